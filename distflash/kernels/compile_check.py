"""Compile every shipped configuration of the portable Triton kernels for every target, without a GPU, and check what came out.

    python -m distflash.kernels.compile_check [--target sm_90 ...] [--head-dim 64 128] [--dtype bf16] [--pass forward ...] [--variants all]

Prints registers, spilled bytes, shared memory and serialised wgmma of each kernel. Exits with 1 if something does not compile, needs
more shared or tensor memory than the target has, comes out as a kernel that stores nothing (Triton turns what does not fit into tensor
memory into a bare trap and reports success), or spills more than KNOWN_SPILLS or serialises in a 16-bit configuration of sm_90 at a head
size of 64 or 128. To check another Triton release, unpack it and put it first on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing import Pool

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from distflash.kernels.assembled import assembled
from distflash.kernels.triton.backward import delta_kernel, dkv_kernel, dq_kernel, stats_kernel
from distflash.kernels.triton.configs import Config, config
from distflash.kernels.triton.forward import forward_kernel
from distflash.kernels.triton.scores import Asked


@dataclass(frozen=True)
class Target:
    """What is compiled for, and the configurations that it takes."""

    gpu: GPUTarget
    family: str
    shared: int  # bytes of shared memory that one program may use


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), "sm80", 99 * 1024),  # the limit of sm_86 and sm_89, which share the configurations
    "sm_90": Target(GPUTarget("cuda", 90, 32), "sm90", 227 * 1024),
    "sm_100": Target(GPUTarget("cuda", 100, 32), "sm100", 227 * 1024),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), "gfx9", 64 * 1024),
}
KERNELS = {"forward": forward_kernel, "dkv": dkv_kernel, "dq": dq_kernel, "delta": delta_kernel, "stats": stats_kernel}
DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
# bytes a thread, the most of Triton 3.6, 3.7 and 3.9; around the loops, not in those over whole steps: measured faster with them than
# narrower tiles without. All else: 0
KNOWN_SPILLS = {("forward", 64): 188, ("forward", 128): 224, ("dkv", 64): 24, ("dkv", 128): 1312}
VARIANTS = {"none": 0, "softcap": 1, "alibi": 2, "dropout": 4, "all": 7}  # ASKED of triton.scores
_FP32_POINTERS = {"lse", "delta", "stats", "acc_out", "acc_lse", "acc_dq", "dk", "dv", "dq"}
_INT_POINTERS = {"blocks", "entries"}
_INPUTS = {"q", "k", "v", "out", "dout"}


@dataclass(frozen=True)
class Case:
    """One kernel in one configuration for one target."""

    pass_: str
    target: str
    head_dim: int
    dtype: str
    tile: Config
    has_lo: bool
    merge: bool
    asked: int = 0  # ASKED of triton.scores

    @property
    def strict(self) -> bool:
        """A configuration that the performance target rests on: it may neither spill nor serialise."""
        return self.target == "sm_90" and self.head_dim in (64, 128) and self.dtype != "fp32" and not self.asked


@dataclass(frozen=True)
class Compiled:
    """What a kernel takes: registers a thread, bytes spilled a thread, bytes of shared memory."""

    registers: int
    spilled: int
    shared: int
    serialised: bool
    tensor_memory: int  # columns, of which Blackwell has 512
    stores: int  # to global memory


def cases(
    passes: Sequence[str],
    targets: Sequence[str],
    head_dims: Sequence[int],
    dtypes: Sequence[str],
    variants: Sequence[str] | None = None,
) -> Iterator[Case]:
    """Every shipped configuration with every option on, and with softcap, ALiBi and dropout as asked: if nothing is said, without them
    and with all of them, these for sm_90 and for a head size of 128.

    The strict ones also as a single causal visit uses them, with no option on: less of the same code, but what their speed is that of.
    """
    for target in targets:
        for head_dim in head_dims:
            for dtype in dtypes:
                for pass_ in passes:
                    if pass_ in ("delta", "stats"):
                        yield Case(pass_, target, head_dim, dtype, Config(32, 1, 4, 1), has_lo=False, merge=False)
                        continue
                    usual = ("none", "all") if target == "sm_90" or head_dim == 128 else ("none",)
                    for asked in (VARIANTS[name] for name in variants or usual):
                        tile = config(pass_, TARGETS[target].family, DTYPES[dtype], head_dim, not asked)
                        case = Case(pass_, target, head_dim, dtype, tile, True, pass_ != "dkv", asked)
                        yield from (replace(case, has_lo=False, merge=False), case) if case.strict else (case,)


def build(case: Case) -> Compiled:
    """Compile one case; raises what Triton raises."""
    kernel = KERNELS[case.pass_]
    constants = {
        "D": case.head_dim, "DV": case.head_dim, "PAD": case.head_dim, "PAD_V": case.head_dim, "ROWS": case.tile.rows,
        "COLUMNS": case.tile.columns, "HAS_LO": case.has_lo, "MERGE": case.merge, "WIDE": False, "BOXES": case.tile.boxes,
        "OVERLAP": case.tile.overlap and not case.asked, "ASKED": case.asked, "BLOCK": 1024,
    }  # fmt: skip
    signature = {name: _type_of(name, case) for name in kernel.arg_names}
    values, attrs = {}, {}
    for n, (name, kind) in enumerate(signature.items()):
        for path, part in [((n,), kind)] if isinstance(kind, str) else [((n, field), part) for field, part in enumerate(kind)]:
            if part == "constexpr":
                values[path] = constants.get(name)  # None: an argument that is not there
            elif part.startswith("*") or re.fullmatch(r"\w+_[bth]", name):
                attrs[path] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, values, attrs)
    options = {"num_warps": case.tile.warps, "num_stages": case.tile.stages, "enable_fp_fusion": True}
    compiled, said = assembled(source, TARGETS[case.target].gpu, options)
    return _amd(compiled) if case.target.startswith("gfx") else _nvidia(compiled, said)


def _type_of(name: str, case: Case) -> str | Asked:
    if name.isupper() or (name.endswith("_box") and not case.tile.boxes):
        return "constexpr"
    if not case.asked and name in ("asked", "seed", "threshold", "first_head"):
        return "constexpr"
    if name == "asked":
        return Asked("*i32", "*i32", "*fp32", "fp32", "fp32", "fp32")
    if name.endswith("_box"):
        return f"tensordesc<{case.dtype}[1, 1, {case.tile.columns}, {case.head_dim}]>"
    if name in _INT_POINTERS:
        return "*i32"
    if name in _FP32_POINTERS:
        return "*fp32"
    if name in _INPUTS:
        return f"*{case.dtype}"
    if name in ("seed", "threshold"):
        return "i64"
    return "fp32" if name.startswith("scale") else "i32"


def _nvidia(compiled, said: str) -> Compiled:
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", said))
    return Compiled(
        _figure(r"Used (\d+) registers", said),
        spilled,
        compiled.metadata.shared,
        "serialized" in said,
        compiled.metadata.tmem_size,
        compiled.asm["ptx"].count("st.global"),
    )


def _figure(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, f"the compiler did not print {pattern}"
    return int(found.group(1))


def _amd(compiled) -> Compiled:
    text = compiled.asm["amdgcn"]
    return Compiled(
        _figure(r"\.vgpr_count:\s+(\d+)", text),
        4 * _figure(r"\.vgpr_spill_count:\s+(\d+)", text),
        compiled.metadata.shared,
        False,
        0,
        len(re.findall(r"(?:global|buffer)_store", text)),
    )


def check(case: Case) -> tuple[Case, Compiled | None, str]:
    """(case, what came out, what is wrong with it or an empty string)."""
    try:
        result = build(case)
    except Exception as error:  # a compiler can fail in any way; all of them belong in the report
        return case, None, f"does not compile: {str(error).strip()[-300:] or type(error).__name__}"
    limit = TARGETS[case.target].shared
    if result.shared > limit:
        return case, result, f"needs {result.shared} B of shared memory, {case.target} has {limit}"
    if result.tensor_memory > 512:
        return case, result, f"needs {result.tensor_memory} columns of tensor memory, {case.target} has 512"
    if result.stores == 0:
        return case, result, "stores nothing"
    if case.strict and result.spilled > KNOWN_SPILLS.get((case.pass_, case.head_dim), 0):
        return case, result, f"spills {result.spilled} B"
    if case.strict and result.serialised:
        return case, result, "wgmma serialised"
    return case, result, ""


def main(argv: list[str] | None = None) -> int:
    """Compile, print a line a kernel, and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pass", dest="passes", nargs="+", choices=list(KERNELS), default=list(KERNELS))
    parser.add_argument("--target", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--head-dim", nargs="+", type=int, default=[64, 128, 256])
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["bf16", "fp32"])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS))
    parser.add_argument("--tile", nargs=4, type=int, metavar=("ROWS", "COLUMNS", "WARPS", "STAGES"), help="instead of the shipped one")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args(argv)
    todo = list(cases(args.passes, args.target, args.head_dim, args.dtype, args.variants))
    if args.tile:
        todo = [replace(case, tile=Config(*args.tile)) for case in todo]
    print(f"triton {triton.__version__}: {len(todo)} kernels")
    print(f"{'kernel':8} {'target':7} {'D':>4} {'dtype':5} lo mrg {'rows×cols/warps/stages':>22}  regs  spill    smem")
    failures = 0
    with Pool(args.jobs) as pool:
        for case, result, wrong in pool.imap(check, todo):
            tile = f"{case.tile.rows}×{case.tile.columns}/{case.tile.warps}/{case.tile.stages}"
            found = f"{result.registers:5} {result.spilled:6} {result.shared:7}" if result else " " * 20
            note = "  serialised" if result and result.serialised else ""
            flags = f"{case.has_lo:2} {case.merge:3}"
            note = f"  {next(name for name, asked in VARIANTS.items() if asked == case.asked)}{note}" if case.asked else note
            print(f"{case.pass_:8} {case.target:7} {case.head_dim:4} {case.dtype:5} {flags} {tile:>22} {found}{note}  {wrong}", flush=True)
            failures += bool(wrong)
    print(f"{failures} of {len(todo)} failed" if failures else "all pass")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
