"""Which kernel computes: an ordered list of candidates, each with the reason it was passed over."""

from __future__ import annotations

from functools import cache
from importlib import import_module

from distflash.kernels.base import Kernel, Problem

# the first that supports the problem is what "auto" takes; `reference` serves only by name
KERNELS = {
    "hopper": "distflash.kernels.hopper:HopperKernel",
    "triton": "distflash.kernels.triton:TritonKernel",
    "eager": "distflash.kernels.eager:EagerKernel",
    "reference": "distflash.kernels.reference:ReferenceKernel",
}
BY_NAME_ONLY = {"reference": "dense, S x S in memory: ask for it by name"}


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
    return [(name, BY_NAME_ONLY.get(name) or _reason(name, problem)) for name in KERNELS]


def _reason(name: str, problem: Problem) -> str | None:
    kernel = _load(name)
    return kernel if isinstance(kernel, str) else kernel.supports(problem)


@cache
def select(name: str, problem: Problem) -> Kernel:
    """The kernel asked for, or for "auto" the first candidate that supports the problem.

    Raises ValueError if the name is unknown, or if the kernel asked for cannot serve: nothing else runs in its place.
    """
    if name != "auto" and name not in KERNELS:
        raise ValueError(f"kernel={name!r} is not known: use 'auto' or one of {', '.join(map(repr, KERNELS))}")
    chosen = next(n for n, reason in candidates(problem) if reason is None) if name == "auto" else name
    if reason := _reason(chosen, problem):
        raise ValueError(f"kernel={name!r} cannot serve this problem: {reason}; kernel='auto' would choose another")
    kernel = _load(chosen)
    assert not isinstance(kernel, str)
    return kernel
