"""How blocks of K and V, and their gradients, move where ranks reach each other's memory: copied, straight from and to their owners.

Beside messages.py because nothing of that is needed here: a block is published once, in a window, and whoever needs it copies from there
what it needs of it, when its plan says that the block sets out; nobody passes it on. Gradients are written into the owner's window, a
place for each rank that has some, and added by the owner in the order of ranks: the same bits every run, whoever comes first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from distflash.kernels.base import accumulator
from distflash.parallel.messages import block_forms
from distflash.parallel.plan import Visit
from distflash.parallel.wire.base import room, unpack
from distflash.parallel.wire.symmetric import Window, Windows, between, copy


class Direct:
    """A `ring.Carrier` over windows.

    `lengths` are the tokens of each rank's block; `readers` are the ranks that need some of ours, and which of its tokens. Visits are
    `plan.staged`: blocks of one visit are copied side by side into one tensor.
    """

    def __init__(self, wire: Windows, lengths: Sequence[int], readers: Mapping[int, range]):
        self.wire, self.journal, self.lengths, self.readers = wire, wire.journal, lengths, readers

    def travel(self, visits: Sequence[Visit], k: Tensor, v: Tensor) -> Iterator[tuple[Visit, Tensor, Tensor]]:
        """Yield (visit, k, v); every block that the plan sends early is already under way while the caller computes."""
        window = self.wire.window("blocks", room(block_forms(max(self.lengths), k, v, k.dtype)))
        self._publish(window, k, v)
        of, coming = {visit.step: visit for visit in visits}, {}
        for visit in visits:
            self.journal.at(visit.step, visits[-1].step)
            for hop in visit.hops:
                coming[hop.step] = self._pull(window, of[hop.step], k, v)
            if visit.step in coming:
                (k_t, v_t), arrived = coming.pop(visit.step)
                self.wire.after(arrived)
            else:
                k_t, v_t = (tokens(x, visit.parts[0].keys) for x in (k, v))
            yield visit, k_t, v_t
            del k_t, v_t

    def gradients(self, visits: Sequence[Visit], k: Tensor, v: Tensor, dtype: torch.dtype) -> Gradients:
        """Each rank's part goes straight to the owner of the block."""
        return Gradients(self, k, v, dtype, alone=not self.readers and len(visits) == 1)

    def others(self) -> list[int]:
        return [rank for rank in range(self.wire.size) if rank != self.wire.rank]

    def _publish(self, window: Window, k: Tensor, v: Tensor) -> None:
        if self.readers:
            window.writable(*self.others())  # who read it last need not be who reads it now
            for place, x in zip(unpack(window.of(self.wire.rank), block_forms(k.shape[1], k, v, k.dtype)), (k, v), strict=True):
                place.copy_(x)
            window.give(*self.readers)

    def _pull(self, window: Window, visit: Visit, k: Tensor, v: Tensor) -> tuple[list[Tensor], torch.cuda.Event | None]:
        """(k, v) of a visit, and the point at which all of them are there."""
        block = [torch.empty(shape, dtype=dtype, device=k.device) for shape, dtype in block_forms(visit.tiles.kv_len, k, v, k.dtype)]
        before = self.wire.mark()  # this memory is ours from here on
        with self.wire.beside("pull"):
            self.wire.after(before)
            for part, where in visit.placed:
                window.take(part.owner)
                theirs = unpack(window.of(part.owner), block_forms(self.lengths[part.owner], k, v, k.dtype))
                for x, whole in zip(block, theirs, strict=True):
                    copy(tokens(whole, part.keys), x[:, where])
                window.release(part.owner)
            return block, self.wire.mark()


class Gradients:
    """dk and dv of one backward: those of others' blocks are written into their windows, those of ours are in ours."""

    def __init__(self, carrier: Direct, k: Tensor, v: Tensor, dtype: torch.dtype, alone: bool):
        self.wire, self.readers, self.like, self.wide, self.dtype = carrier.wire, carrier.readers, (k, v), accumulator(k.dtype), dtype
        self.lengths, self.place = carrier.lengths, room(block_forms(max(carrier.lengths), k, v, self.wide))
        self.window = self.wire.window("gradients", self.place * (self.wire.size - 1))
        self.taken = dtype if alone else None
        self.parts: list[tuple[range, list[Tensor]]] = []  # of our own block, from which to which token
        self.under_way: deque[tuple[list[Tensor], torch.cuda.Event | None]] = deque()  # what is sent may not be freed before it is there

    def move(self, visit: Visit, grads: list[Tensor]) -> None:
        """Keep ours, send others'."""
        if visit.owner == self.wire.rank:
            self.parts.append((visit.parts[0].keys, grads))
        elif visit.tiles:
            there = self.wire.mark()
            with self.wire.beside("home"):
                self.wire.after(there)
                for part, where in visit.placed:
                    self.window.writable(part.owner)
                    for whole, mine in zip(self._of(part.owner, self.wire.rank), grads, strict=True):
                        copy(mine[:, where], tokens(whole, part.keys))
                    self.window.give(part.owner)
                self.under_way.append((grads, self.wire.mark()))
            self._wait(1)

    def home(self) -> list[Tensor]:
        """The sum of all parts of our own block's gradient, added up in the order of ranks."""
        parts, length = list(self.parts), self.like[0].shape[1]
        for reader, rows in sorted(self.readers.items()):
            self.window.take(reader)
            parts.append((rows, [tokens(x, rows) for x in self._of(self.wire.rank, reader)]))
        cuts = sorted({0, length, *(edge for rows, _ in parts for edge in (rows.start, rows.stop))})
        total = [torch.empty(x.shape, dtype=self.dtype, device=x.device) for x in self.like]
        for start, stop in pairwise(cuts):
            here = [(x, slice(start - rows.start, stop - rows.start)) for rows, x in parts if rows.start <= start and stop <= rows.stop]
            for n, sum_ in enumerate(total):
                add([x[n][:, where] for x, where in here], sum_[:, start:stop])
        for reader in self.readers:
            self.window.release(reader)
        self._wait(0)
        return total

    def _of(self, owner: int, source: int) -> list[Tensor]:
        """Where the owner of a block gets what `source` has of its gradient."""
        return unpack(between(self.window, owner, source, self.place), block_forms(self.lengths[owner], *self.like, self.wide))

    def _wait(self, left: int) -> None:
        while len(self.under_way) > left:
            self.wire.after(self.under_way.popleft()[1])


def add(parts: Sequence[Tensor], out: Tensor) -> None:
    """Their sum, in their dtype and cast at last; the first may be overwritten."""
    first, *others = parts
    for part in others[:-1]:
        first.add_(part)
    if others:
        torch.add(first, others[-1], out=out)
    else:
        out.copy_(first)


def tokens(x: Tensor, which: range) -> Tensor:
    """Some tokens of [B, T, ...]."""
    return x[:, which.start : which.stop]
