"""Compile every shipped configuration for sm_90a, without a GPU, and look at what came out.

    python -m distflash.kernels.hopper.check [--quick] [--variants] [--only NAME] [--keep DIR]

Fails (exit code 1) on spilled bytes, on wgmma that ptxas serialised (C7510 .. C7520), and on more shared memory than a block may have.
`hot` tells spills in the loops over unmasked tiles (innermost loops with wgmma and no selects: where the time goes) from the rest. Run it
with each Triton that users have first on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from multiprocessing import get_context

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from distflash.kernels.assembled import assembled
from distflash.kernels.hopper import configs
from distflash.kernels.hopper.backward import backward_kernel
from distflash.kernels.hopper.configs import BackwardConfig, ForwardConfig, KeysConfig, RolesConfig, RowsConfig
from distflash.kernels.hopper.dkv import dkv_kernel
from distflash.kernels.hopper.dq import dq_kernel
from distflash.kernels.hopper.forward import forward_kernel
from distflash.kernels.hopper.tma import parts, stageable

_TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
_SHARED = 232448  # bytes a block may have on sm_90
_MOST = " fp16 padded running fp32"  # a backward with every option on
Sides = tuple[int, int]  # of the tiles that hold the query and key, and the value head size
_TYPES = {"bf16": gl.bfloat16, "fp16": gl.float16, "fp32": gl.float32, "i32": gl.int32}


def _descriptor(box: list[int], dtype: str) -> str:
    return f"tensordesc<{dtype}{box},{gl.NVMMASharedLayout.get_default_for(box, _TYPES[dtype])!r}>"


def forward_source(
    sides: Sides, c: ForwardConfig, dtype: str = "bf16", out: str = "bf16", acc: bool = False, columns: Sides | None = None, bounds: int = 1
):
    """(kernel, signature, constants, registers) of one forward; `columns` are the head sizes, where they are smaller than the tiles."""
    widths = [parts(side, n) for side, n in zip(sides, columns or sides, strict=True)]
    tensors = {"q": (64, widths[0]), "k": (c.block_n, widths[0]), "v": (c.block_n, widths[1])}
    signature = {f"desc_{name}": _descriptor([1, 1, rows, width], dtype) for name, (rows, (width, _)) in tensors.items()}
    signature |= {f"desc_{name}2": _descriptor([1, 1, rows, width], dtype) for name, (rows, (_, width)) in tensors.items() if width}
    staged = c.staged and not acc and out == dtype and stageable(sides, columns or sides, c.q_stages == 1)
    signature |= {f"desc_o{n}": _descriptor([1, 1, 64, w], dtype) for n, w in zip(("", 2), widths[1], strict=True) if staged and w}
    signature |= {"desc_order": _descriptor([16], "i32"), "O": "*" + out, "qs": "fp32"} | dict.fromkeys(("M", "A", "AM"), "*fp32")
    signature |= dict.fromkeys(("segments", "order"), "*i32") | dict.fromkeys(("rounds", "heads", "group", "t_q"), "i32")
    constants = {f"desc_{name}2": None for name, (_, (_, width)) in tensors.items() if not width}
    constants |= {f"desc_o{n}": None for n in ("", 2) if f"desc_o{n}" not in signature}
    constants |= {"NC": c.consumers, "NB": c.stages, "NQ": c.q_stages, "DV": (columns or sides)[1], "HAS_ACC": acc, "AHEAD": c.ahead}
    constants |= {"Q_REGS": c.q_regs, "TURNS": c.consumers if c.pingpong else 0, "BOUNDS": bounds if c.one_bound else 2}
    constants |= {"NAMED": c.consumers if c.named else 0, "ANEW": c.anew}
    return forward_kernel, signature, constants | {"REGS": c.regs[0], "REGS_P": c.regs[1]}, c.max_regs


def keys_source(sides: Sides, c: KeysConfig, dtype: str = "bf16", out: str = "bf16", dq: bool = True, columns: Sides | None = None):
    """(kernel, signature, constants, registers) of the one pass, or without `dq` of dK and dV alone; `columns` are the head sizes."""
    (d, _), columns = sides, columns or sides
    constants = {"BM": c.block_m, "D": d, "COLUMNS": columns[0], "COLUMNS_V": columns[1], "NB": c.stages, "OVERLAP": c.overlap}
    constants |= {"LATE": c.late, "FOLD": dtype == "bf16", "DQ": c.dq if dq else configs.NONE, "KV_REGS": c.kv_regs}
    constants |= {"PROMPT": c.prompt, "NAMED": c.named, "HIDE": c.hide}
    constants |= {"REGS": c.regs[0], "REGS_R": c.regs[1], "REGS_P": c.regs[2]}
    signature = _key_signature(sides, c, dtype, out)
    adds = _descriptor([1, 1, 64, 64], "fp32")
    signature |= {"desc_dq": adds if dq else signature["desc_delta"]}
    staged = c.staged and out == dtype and all(n % 8 == 0 for n in columns)
    out_descriptors = ("desc_dk", "desc_dv")
    if staged:
        signature |= dict.fromkeys(out_descriptors, _descriptor([1, 1, 64, d], dtype))
    absent = {} if staged else dict.fromkeys(out_descriptors)
    return backward_kernel, signature, constants | absent, c.max_regs


def roles_source(sides: Sides, c: RolesConfig, dtype: str = "bf16", out: str = "bf16", columns: Sides | None = None):
    """As keys_source, of dK and dV by roles."""
    columns = columns or sides
    constants = {"BM": c.block_m, "D": sides[0], "D_V": sides[1], "COLUMNS": columns[0], "COLUMNS_V": columns[1], "NB": c.stages}
    constants |= {"FOLD": dtype == "bf16", "REGS": c.regs[0], "REGS_P": c.regs[1]}
    return dkv_kernel, _key_signature(sides, c, dtype, out), constants, c.max_regs


def rows_source(sides: Sides, c: RowsConfig, dtype: str = "bf16", out: str = "bf16", acc: bool = False, columns: Sides | None = None):
    """As keys_source, of dQ alone."""
    box = {"q": [1, 1, 64, sides[0]], "k": [1, 1, c.block_n, sides[0]], "v": [1, 1, c.block_n, sides[1]], "do": [1, 1, 64, sides[1]]}
    signature = {f"desc_{name}": _descriptor(b, dtype) for name, b in box.items()} | {"DQ": "*fp32" if acc else "*" + out}
    signature |= dict.fromkeys(("NLSE", "NDELTA"), "*fp32") | dict.fromkeys(("blocks", "segments", "order"), "*i32")
    signature |= dict.fromkeys(("qs", "scale"), "fp32") | dict.fromkeys(("rounds", "heads", "group", "t_q"), "i32")
    constants = {"BN": c.block_n, "D": sides[0], "D_V": sides[1], "COLUMNS": (columns or sides)[0], "NB": c.stages, "NBV": c.v_stages}
    return dq_kernel, signature, constants | {"ADD": acc, "FOLD": dtype == "bf16", "REGS": c.regs[0], "REGS_P": c.regs[1]}, c.max_regs


def _key_signature(sides: Sides, c: KeysConfig | RolesConfig, dtype: str, out: str) -> dict[str, str]:
    """What the kernels with stationary keys share."""
    box = {"q": [c.block_m, sides[0]], "k": [c.keys, sides[0]], "v": [c.keys, sides[1]], "do": [c.block_m, sides[1]]}
    signature = {f"desc_{name}": _descriptor([1, 1, *b], dtype) for name, b in box.items()}
    signature |= dict.fromkeys(("desc_lse", "desc_delta"), _descriptor([c.block_m], "fp32"))
    signature |= {"DK": "*" + out, "DV": "*" + out, "blocks": "*i32", "segments": "*i32"}
    signature |= dict.fromkeys(("qs", "scale", "fold"), "fp32")
    return signature | dict.fromkeys(("busy", "per", "kv_heads", "group", "t_pad", "t_k"), "i32")


def backward_sources(
    sides: Sides, c: BackwardConfig, dtype: str = "bf16", out: str = "bf16", acc: bool = False, columns: Sides | None = None
) -> dict[str, tuple]:
    """name -> source of every kernel that a backward may launch."""
    name = _name(sides)
    found = {"backward" + name: keys_source(sides, c.one_pass, dtype, out, columns=columns)} if c.one_pass else {}
    if isinstance(c.dkv, RolesConfig):
        found["dkv" + name] = roles_source(sides, c.dkv, dtype, out, columns)
    else:
        found["dkv" + name] = keys_source(sides, c.dkv, dtype, out, False, columns)
    return found | {"dq" + name: rows_source(sides, c.dq, dtype, out, acc, columns)}


def _name(sides: Sides) -> str:
    return f" D{sides[0]}" if sides[0] == sides[1] else f" D{sides[0]}/{sides[1]}"


def inspect(kernel, signature: dict, constants: dict, max_regs: int, keep: str | None = None) -> dict:
    """Compile and assemble; what ptxas and the SASS say. `hot` counts spill instructions in the loops over unmasked tiles."""
    names = kernel.arg_names
    source = GluonASTSource(
        fn=kernel,
        signature={n: "constexpr" if n in constants else signature[n] for n in names},
        constexprs={(names.index(n),): v for n, v in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n, t in signature.items() if t.startswith("*")},
    )
    built, log = assembled(source, GPUTarget("cuda", 90, 32), {"num_warps": 4, "maxnreg": max_regs, "enable_fp_fusion": True})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(built.asm["cubin"])
        cubin.flush()
        sass = subprocess.run([f"{_TOOLS}/cuobjdump", "-sass", cubin.name], capture_output=True, text=True, check=True).stdout
    if keep:
        os.makedirs(os.path.dirname(keep), exist_ok=True)
        for ending, text in (("ptx", built.asm["ptx"]), ("sass", sass)):
            with open(f"{keep}.{ending}", "w") as f:
                f.write(text)
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", log))
    lines = [re.sub(r"/\* 0x.*", "", line).strip() for line in sass.splitlines() if re.match(r"\s+/\*[0-9a-f]{4,6}\*/", line)]
    return {
        "registers": int((re.search(r"Used (\d+) registers", log) or [0, 0])[1]),
        "spilled": spilled,
        "hot": _hot_spills(lines),
        "shared": built.metadata.shared,
        "wgmma": sum("HGMMA" in line for line in lines),
        "serialised": sorted(set(re.findall(r"C75[12]\d", log))),
    }


def _hot_spills(lines: list[str]) -> int:
    at = {int(re.match(r"/\*([0-9a-f]+)\*/", line)[1], 16): n for n, line in enumerate(lines)}  # type: ignore[index]
    loops = []
    for n, line in enumerate(lines):
        if (jump := re.search(r"BRA 0x([0-9a-f]+)", line)) and (start := at.get(int(jump[1], 16), n)) < n:
            body = lines[start : n + 1]
            if any("HGMMA" in x for x in body) and not any("EXIT" in x or "USETMAXREG" in x for x in body):
                loops.append((start, n))
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    unmasked = [(a, b) for a, b in inner if sum("FSEL" in x for x in lines[a : b + 1]) < 16]
    return sum(bool(re.search(r"\b(STL|LDL)", x)) for a, b in unmasked for x in lines[a : b + 1])


def _jobs(quick: bool, variants_too: bool) -> dict[str, tuple[tuple, bool]]:
    """name -> (source, shipped) of all that is to be compiled."""
    jobs, forwards, backwards = {}, {"": {}}, {"": {}}
    if not quick:
        forwards |= {
            " window": {"bounds": 2},
            " running fp32": {"out": "fp32", "acc": True},
            " fp16": {"dtype": "fp16", "out": "fp16"},
            " padded": {"columns": (59, 59)},
        }
        backwards |= {" fp16": forwards[" fp16"], _MOST: {"dtype": "fp16", "columns": (59, 59), "out": "fp32", "acc": True}}
    for kind, options in forwards.items():
        for sides, c in configs.FORWARD.items():
            if kind == " window" and not c.one_bound:
                continue  # masks look at both bounds everywhere
            jobs["forward" + _name(sides) + kind] = forward_source(sides, c, **options), True
            if kind == " padded":  # and one column short of the tile, onto a running partial: the most addresses that an epilogue needs
                most = {"columns": (sides[0] - 1, sides[1] - 1), "out": "fp32", "acc": True, "bounds": 2}
                jobs["forward" + _name(sides) + " padded running fp32"] = forward_source(sides, c, **most), True
    for kind, options in backwards.items():
        for sides, c in configs.BACKWARD.items():
            jobs |= {name + kind: (source, True) for name, source in backward_sources(sides, c, **options).items()}
    if variants_too:
        for sides, variants in configs.FORWARD_VARIANTS.items():
            jobs |= {f"forward{_name(sides)} {n}": (forward_source(sides, c), False) for n, c in variants.items()}
        for sides, variants in configs.BACKWARD_VARIANTS.items():
            shipped = backward_sources(sides, configs.BACKWARD[sides])
            for n, c in variants.items():
                tried = backward_sources(sides, c)
                jobs |= {f"{name} {n}": (source, False) for name, source in tried.items() if source != shipped[name]}
    return jobs


def _inspect(name: str) -> dict:
    return inspect(*_TODO[name][0], keep=_TODO[name][2])


_TODO: dict[str, tuple] = {}  # of this process, before it forks: kernels cannot be sent to another


def main() -> int:
    """Compile what was asked for, a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", action="store_true", help="also what the tuner tries; these may fail without failing the check")
    parser.add_argument("--quick", action="store_true", help="a forward and a backward of each head size, bf16")
    parser.add_argument("--only", default="", help="compile those whose name contains this")
    parser.add_argument("--keep", help="folder for PTX and SASS")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    args = parser.parse_args()
    for name, (job, shipped) in _jobs(args.quick, args.variants).items():
        if args.only in name:
            _TODO[name] = job, shipped, os.path.join(args.keep, name.replace(" ", "_").replace("/", "-")) if args.keep else None
    failed = 0
    print(f"triton {triton.__version__}, sm_90a")  # noqa: T201
    with get_context("fork").Pool(args.jobs) as pool:
        for name, seen in zip(_TODO, pool.imap(_inspect, _TODO), strict=True):
            bad = seen["spilled"] or seen["serialised"] or seen["shared"] > _SHARED
            failed += bool(bad and _TODO[name][1])
            line = f"{name:<38} regs {seen['registers']:>3}  spilled {seen['spilled']:>4} B (hot loops: {seen['hot']:>2})"
            print(line, f" shared {seen['shared']:>6}  wgmma {seen['wgmma']:>3} ", *seen["serialised"], "FAIL" if bad else "", flush=True)  # noqa: T201
    print(f"{failed} failed" if failed else "all pass")  # noqa: T201
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
