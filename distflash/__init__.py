"""DistFlash: exact attention over one GPU or many."""

from distflash.api import attention
from distflash.explain import explain
from distflash.launch.world import World, init
from distflash.parallel.loss import token_mean
from distflash.parallel.sequence import SequenceParallel, ShardedSequence

__version__ = "0.1.0.dev0"
__all__ = ["SequenceParallel", "ShardedSequence", "World", "attention", "explain", "init", "token_mean"]
