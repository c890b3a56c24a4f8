"""Seeds of dropout: one a call, the same on every rank of a group, and the same again where checkpointing runs a layer twice.

Ranks draw from a generator of their own, which all of a group start alike, so that no call has to ask the others. Checkpointing does
not know that generator, but brings back the state of torch's default one (preserve_rng_state). So each call also draws a token
from the default generator, and a call inside a backward pass gets the seed that went with the same token in the forward. A token
that two calls drew, because somebody brought the default generator back to the same state between them, tells neither: it is refused
there, unless the first of them was run again before the second was made, or seeds began anew in between.
An operator does it, so that selective checkpointing sees the same operators both times.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from operator import index

import torch
from torch import Tensor

from distflash.parallel import handles
from distflash.parallel.wire.base import Wire

_REMEMBERED = 1 << 16  # calls that a checkpoint may still run again
_BITS = 63


def fresh() -> Tensor:
    """A new seed of torch's default generator, an int64 in 0..2^63 on the CPU."""
    return torch.randint((1 << _BITS) - 1, (), device="cpu")


class Seeds:
    """The seeds of one group of ranks."""

    def __init__(self, wire: Wire):
        self._wire, self._handle = wire, handles.new(self)
        self.begun: int | str = "not called"  # with which seed, as ranks compare it
        self._generator: random.Random | None = None
        self._drawn: OrderedDict[int, int | None] = OrderedDict()  # seed by token; None is of two calls
        self._over: set[int] = set()  # tokens of calls after which another one may draw the same

    def begin(self, seed: int) -> None:
        """Begin anew from `seed`, which must be the same on every rank. Raises TypeError unless it is an integer."""
        if isinstance(seed, bool) or not hasattr(seed, "__index__"):
            raise TypeError(f"seed={seed!r} must be an integer, the same on every rank")
        self.begun = index(seed)
        self._start(self.begun)

    def _start(self, seed: int) -> None:
        self._generator = random.Random(seed)
        self._over.update(self._drawn)

    def draw(self, after: Tensor | None = None) -> Tensor:
        """The seed of this call, as `fresh` gives one. The first time it is a collective: rank 0 of the group says where to begin.

        `after` is what a compiled graph must have computed before: ranks draw in one order. Raises RuntimeError inside a backward
        pass if the call is not one of the forward run again in the same state, or more than one could be.
        """
        return torch.ops.distflash.dropout_seed(fresh(), self._handle, after)

    def of(self, token: int) -> int:
        """The seed that goes with a token."""
        if torch._C._current_graph_task_id() != -1:  # as torch.utils.checkpoint asks whether a backward runs
            return self._again(token)
        if self._generator is None:
            offer = torch.tensor(token if self._wire.rank == 0 else 0, device=self._wire.device)
            self._start(int(self._wire.all_reduce(offer)))
        assert self._generator is not None
        seed = self._generator.getrandbits(_BITS)
        self._drawn[token] = None if token in self._drawn and token not in self._over else seed
        self._drawn.move_to_end(token)
        self._over.discard(token)
        if len(self._drawn) > _REMEMBERED:
            self._over.discard(self._drawn.popitem(last=False)[0])
        return seed

    def _again(self, token: int) -> int:
        """The seed of the call of the forward that drew this token."""
        if token not in self._drawn:
            raise RuntimeError(
                "attention with dropout runs inside a backward pass, but not in the state of a call of the forward: "
                "checkpoint with preserve_rng_state=True, so that the same probabilities are dropped again"
            )
        if (seed := self._drawn[token]) is None:
            raise RuntimeError(
                "attention with dropout runs inside a backward pass in the state of two calls of the forward, which dropped different "
                "probabilities: do not call torch.manual_seed between calls that one backward runs again"
            )
        self._over.add(token)
        return seed


@torch.library.custom_op("distflash::dropout_seed", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _seed(token: Tensor, handle: int, after: Tensor | None) -> Tensor:
    return torch.tensor(handles.find(handle, Seeds).of(int(token)), device="cpu")


@_seed.register_fake
def _(token: Tensor, handle: int, after: Tensor | None) -> Tensor:
    return torch.empty_like(token)
