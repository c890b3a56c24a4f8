"""Which kernel computes: an ordered list of candidates, each with the reason it was passed over."""

from __future__ import annotations

from functools import cache
from importlib import import_module

from distflash.kernels.base import Kernel, Problem

# the first that supports the problem is what "auto" takes; those in BY_NAME_ONLY serve only by name
KERNELS = {
    "hopper": "distflash.kernels.hopper:HopperKernel",
    "triton": "distflash.kernels.triton:TritonKernel",
    "eager": "distflash.kernels.eager:EagerKernel",
    "reference": "distflash.kernels.reference:ReferenceKernel",
    "cudnn": "distflash.kernels.adapters:CudnnKernel",
    "fa2": "distflash.kernels.adapters:Fa2Kernel",
    "fa3": "distflash.kernels.adapters:Fa3Kernel",
    "fa4": "distflash.kernels.adapters:Fa4Kernel",
}
ADAPTED = ("cudnn", "fa2", "fa3", "fa4")
BY_NAME_ONLY = {
    "reference": "dense, S x S in memory: ask for it by name",
    **dict.fromkeys(ADAPTED, "another project's kernel, a launch a tile: ask for it by name"),
}


@cache
def _load(name: str) -> Kernel | str:
    """The kernel, or why it cannot be imported."""
    module, _, attribute = KERNELS[name].partition(":")
    try:
        return getattr(import_module(module), attribute)()
    except ImportError as error:
        return f"not available: {error}"


def candidates(problem: Problem) -> list[tuple[str, str | None]]:
    """Every kernel in the order in which "auto" tries them, with None or the reason it would be passed over."""
    return [(name, _reason(name, problem) or BY_NAME_ONLY.get(name)) for name in KERNELS]


def _reason(name: str, problem: Problem) -> str | None:
    kernel = _load(name)
    return kernel if isinstance(kernel, str) else kernel.supports(problem)


@cache
def select(name: str, problem: Problem) -> Kernel:
    """The kernel asked for, or for "auto" the first candidate that supports the problem; in its deterministic form if the problem says so.

    Raises ValueError if the name is unknown, or if the kernel asked for cannot serve: nothing else runs in its place.
    """
    if name != "auto" and name not in KERNELS:
        raise ValueError(f"kernel={name!r} is not known: use 'auto' or one of {', '.join(map(repr, KERNELS))}")
    chosen = next(n for n in KERNELS if n not in BY_NAME_ONLY and _reason(n, problem) is None) if name == "auto" else name
    if reason := _reason(chosen, problem):
        raise ValueError(f"kernel={name!r} cannot serve this problem: {reason}; kernel='auto' would choose another")
    kernel = _load(chosen)
    assert not isinstance(kernel, str)
    return kernel.deterministic() if problem.deterministic else kernel
