"""DistFlash: exact attention over one GPU or many. Names are imported when they are first used: `distflash --help` needs no torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distflash import nn
    from distflash.api import attention
    from distflash.explanation import explain
    from distflash.launch.world import World, init
    from distflash.numerics import check_numerics
    from distflash.parallel.autograd import save_attention
    from distflash.parallel.loss import token_mean
    from distflash.parallel.sequence import SequenceParallel, ShardedSequence
    from distflash.parallel.slices import Slice, Slices
    from distflash.ragged import Ragged

__version__ = "0.1.0.dev0"
__all__ = [
    "Ragged",
    "SequenceParallel",
    "ShardedSequence",
    "Slice",
    "Slices",
    "World",
    "attention",
    "check_numerics",
    "explain",
    "init",
    "nn",
    "save_attention",
    "token_mean",
]

_HOMES = {
    "Ragged": "distflash.ragged",
    "SequenceParallel": "distflash.launch.started",
    "ShardedSequence": "distflash.parallel.sequence",
    "Slice": "distflash.parallel.slices",
    "Slices": "distflash.parallel.slices",
    "World": "distflash.launch.world",
    "attention": "distflash.api",
    "check_numerics": "distflash.numerics",
    "explain": "distflash.explanation",
    "init": "distflash.launch.world",
    "save_attention": "distflash.parallel.autograd",
    "token_mean": "distflash.parallel.loss",
}


def __getattr__(name: str) -> Any:
    if name == "nn":
        return import_module("distflash.nn")
    if name not in _HOMES:
        raise AttributeError(f"module 'distflash' has no attribute {name!r}: it has {', '.join(__all__)}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
