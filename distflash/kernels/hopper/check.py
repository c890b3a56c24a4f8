"""Compile every shipped configuration for sm_90a, without a GPU, and look at what came out.

    python -m distflash.kernels.hopper.check [--quick] [--variants] [--only NAME] [--keep DIR]

Fails (exit code 1) on spilled bytes, but for the gaps listed in KNOWN_GAPS, on wgmma that ptxas serialised (C7510 .. C7520), and on more
shared memory than a block may have. `hot` tells spills in the loops over unmasked tiles (innermost loops with wgmma and no selects: where
the time goes) from the rest. Run it with each Triton that users have first on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from distflash.kernels.hopper import configs
from distflash.kernels.hopper.backward import backward_kernel
from distflash.kernels.hopper.configs import BackwardConfig, ForwardConfig
from distflash.kernels.hopper.forward import forward_kernel

_TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
_SHARED = 232448  # bytes a block may have on sm_90
# bytes that a shipped configuration is known to spill, by Triton release: slow there, not wrong. Nothing else may spill, nor these more.
# The configurations are tuned for 3.6, with which torch 2.11 comes; later releases keep more addresses in registers over the loops.
KNOWN_GAPS = {
    "3.7": {"backward D128": 48, "backward D128 fp16": 48},  # not in the hot loops
    "3.9": {"backward D128": 960, "backward D128 fp16": 960},  # 37 loads and stores in the hot loops
}
_TYPES = {"bf16": gl.bfloat16, "fp16": gl.float16, "fp32": gl.float32}


def _descriptor(box: list[int], dtype: str) -> str:
    return f"tensordesc<{dtype}{box},{gl.NVMMASharedLayout.get_default_for(box, _TYPES[dtype])!r}>"


def forward_source(d: int, c: ForwardConfig, dtype: str = "bf16", out: str = "bf16", acc: bool = False):
    """(kernel, signature, constants, options) of one forward."""
    kv = _descriptor([1, 1, c.block_n, d], dtype)
    signature = {"desc_q": _descriptor([1, 1, 64, d], dtype), "desc_k": kv, "desc_v": kv, "O": "*" + out}
    signature |= dict.fromkeys(("M", "A", "AM"), "*fp32")
    signature |= {"blocks": "*i32", "segments": "*i32", "order": "*i32", "qs": "fp32"}
    signature |= dict.fromkeys(("rounds", "heads", "group", "t_q"), "i32")
    constants = {"NC": c.consumers, "BN": c.block_n, "D": d, "NB": c.stages, "HAS_ACC": acc, "LATE": c.late_cast, "POLY": c.poly}
    return forward_kernel, signature, constants | {"REGS": c.regs[0], "REGS_P": c.regs[1]}, c.max_regs


def backward_source(d: int, c: BackwardConfig, dtype: str = "bf16", out: str = "bf16"):
    """(kernel, signature, constants, options) of one backward."""
    q, kv, stat = _descriptor([1, 1, c.block_m, d], dtype), _descriptor([1, 1, 128, d], dtype), _descriptor([c.block_m], "fp32")
    dq = _descriptor([1, 1, 64, d if c.block_m == 128 else d // 2], "fp32")
    signature = {"desc_q": q, "desc_k": kv, "desc_v": kv, "desc_do": q, "desc_lse": stat, "desc_delta": stat, "desc_dq": dq}
    signature |= {"DK": "*" + out, "DV": "*" + out, "blocks": "*i32", "segments": "*i32"}
    signature |= dict.fromkeys(("qs", "scale", "fold"), "fp32")
    signature |= dict.fromkeys(("busy", "per", "kv_heads", "group", "t_pad", "t_k"), "i32")
    constants = {"BM": c.block_m, "D": d, "NB": c.stages, "OVERLAP": c.overlap, "LATE": c.late, "FOLD": dtype == "bf16"}
    return backward_kernel, signature, constants | {"REGS": c.regs[0], "REGS_P": c.regs[1]}, c.max_regs


def inspect(kernel, signature: dict, constants: dict, max_regs: int, keep: str | None = None) -> dict:
    """Compile and assemble; what ptxas and the SASS say. `hot` counts spill instructions in the loops over unmasked tiles."""
    names = kernel.arg_names
    source = GluonASTSource(
        fn=kernel,
        signature={n: "constexpr" if n in constants else signature[n] for n in names},
        constexprs={(names.index(n),): v for n, v in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n, t in signature.items() if t.startswith("*")},
    )
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "maxnreg": max_regs})
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = os.path.join(folder, "k.ptx"), os.path.join(folder, "k.cubin")
        with open(ptx, "w") as f:
            f.write(built.asm["ptx"])
        assemble = [get_ptxas(90).path, "-v", *_allocation(), "--gpu-name=sm_90a", ptx, "-o", cubin]
        log = subprocess.run(assemble, capture_output=True, text=True, check=True).stderr
        sass = subprocess.run([f"{_TOOLS}/cuobjdump", "-sass", cubin], capture_output=True, text=True, check=True).stdout
    if keep:
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


def _allocation() -> list[str]:
    """What Triton passes on to ptxas 13 and later."""
    return ["--regAllocOptLevel=2"] if int(get_ptxas(90).version.split(".")[0]) >= 13 else []


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


def main() -> int:
    """Compile what was asked for, a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", action="store_true", help="also what the tuner tries; these may fail without failing the check")
    parser.add_argument("--quick", action="store_true", help="a forward and a backward of each head size, bf16")
    parser.add_argument("--only", default="", help="compile those whose name contains this")
    parser.add_argument("--keep", help="folder for PTX and SASS")
    args = parser.parse_args()
    jobs = [(f"forward D{d}", forward_source(d, c), True) for d, c in configs.FORWARD.items()]
    jobs += [(f"backward D{d}", backward_source(d, c), True) for d, c in configs.BACKWARD.items()]
    if not args.quick:
        jobs += [(f"forward D{d} running fp32", forward_source(d, c, out="fp32", acc=True), True) for d, c in configs.FORWARD.items()]
        jobs += [(f"forward D{d} fp16", forward_source(d, c, "fp16", "fp16"), True) for d, c in configs.FORWARD.items()]
        jobs += [(f"backward D{d} fp16", backward_source(d, c, "fp16", "fp16"), True) for d, c in configs.BACKWARD.items()]
    if args.variants:
        jobs += [(f"forward D{d} {n}", forward_source(d, c), False) for d, v in configs.FORWARD_VARIANTS.items() for n, c in v.items()]
        jobs += [(f"backward D{d} {n}", backward_source(d, c), False) for d, v in configs.BACKWARD_VARIANTS.items() for n, c in v.items()]
    failed, gaps = 0, KNOWN_GAPS.get(".".join(triton.__version__.split(".")[:2]), {})
    print(f"triton {triton.__version__}, sm_90a")  # noqa: T201
    for name, job, shipped in jobs:
        if args.only not in name:
            continue
        seen = inspect(*job, keep=os.path.join(args.keep, name.replace(" ", "_")) if args.keep else None)
        bad = seen["spilled"] > gaps.get(name, 0) or seen["serialised"] or seen["shared"] > _SHARED
        failed += bool(bad and shipped)
        note = "FAIL" if bad else f"known gap, up to {gaps[name]} B" if seen["spilled"] else ""
        line = f"{name:<28} regs {seen['registers']:>3}  spilled {seen['spilled']:>4} B (hot loops: {seen['hot']:>2})"
        print(line, f" shared {seen['shared']:>6}  wgmma {seen['wgmma']:>3} ", *seen["serialised"], note, flush=True)  # noqa: T201
    print(f"{failed} failed" if failed else "all pass")  # noqa: T201
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
