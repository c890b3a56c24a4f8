"""Ulysses: an all-to-all turns shards of tokens into shards of heads, around any inner attention (arXiv:2309.14509).

Legend: B batch, T local tokens, Tg tokens of the whole group, H heads, h heads of this rank, U ranks of the group.

Heads need not divide evenly, and there may be fewer key/value heads than ranks: those are then held by several ranks, and the
gradients that come back for them are summed in the accumulator's dtype, in rank order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import cast

import torch
from torch import Tensor

from distflash.parallel.wire.base import Form, Wire, empty, pack, room, unpack
from distflash.parallel.wire.symmetric import Windows

Heads = tuple[range, ...]  # Heads[rank]: the heads that a rank of the group computes
Parts = Callable[[int], list[Tensor]]  # by rank: what it gets from us
Forms = Callable[[int, int], list[Form]]  # by (source, dest): of what the one gives to the other


def head_shards(heads: int, kv_heads: int, ranks: int) -> tuple[Heads, Heads]:
    """(query heads, key/value heads) of each rank, such that every rank's own heads are again evenly grouped.

    Whole groups are dealt out while there are enough of them; with fewer groups than ranks, a group's query heads are dealt out
    among the ranks that share its key/value head. Raises ValueError if some rank would get no head.
    """
    if heads < ranks:
        raise ValueError(
            f"ulysses={ranks} needs at least as many query heads, got {heads}: use ulysses<={heads} and let the ring take the rest"
        )
    group = heads // kv_heads
    if kv_heads >= ranks:
        kv = _dealt(range(kv_heads), ranks)
        return tuple(range(r.start * group, r.stop * group) for r in kv), kv
    q, kv = [], []
    for n, sharers in enumerate(_dealt(range(ranks), kv_heads)):
        q += _dealt(range(n * group, (n + 1) * group), len(sharers))
        kv += [range(n, n + 1)] * len(sharers)
    return tuple(q), tuple(kv)


def _dealt(items: range, parts: int) -> Heads:
    edges = [len(items) * n // parts for n in range(parts + 1)]
    return tuple(items[a:b] for a, b in pairwise(edges))


@dataclass(frozen=True, eq=False)
class Ulysses:
    """One group: `lengths[rank]` tokens before the all-to-all, `heads` and `kv_heads` after it."""

    wire: Wire
    lengths: tuple[int, ...]
    heads: Heads
    kv_heads: Heads
    reach: bool = False  # ranks read from each other's memory: the wire has windows

    @property
    def shared(self) -> bool:
        """True if some key/value head is held by several ranks, whose gradients must be summed."""
        return any(a.stop > b.start for a, b in pairwise(self.kv_heads))

    @property
    def gathered(self) -> list[int]:
        """(tokens, query heads, key/value heads) of this rank after the all-to-all."""
        return [sum(self.lengths), len(self.heads[self.wire.rank]), len(self.kv_heads[self.wire.rank])]

    def to_heads(self, tensors: Sequence[Tensor], shards: Sequence[Heads]) -> list[Tensor]:
        """Each [B, T, H, ...] becomes [B, Tg, h, ...]; all of them travel in one message a peer."""

        def forms(source: int, dest: int) -> list[Form]:
            return [((x.shape[0], self.lengths[source], len(h[dest]), *x.shape[3:]), x.dtype) for x, h in zip(tensors, shards, strict=True)]

        def parts(rank: int) -> list[Tensor]:
            return [x[:, :, h[rank].start : h[rank].stop] for x, h in zip(tensors, shards, strict=True)]

        with self._exchanged(parts, forms, tensors[0].device) as found:
            return [torch.cat(list(column), dim=1) for column in zip(*found, strict=True)]

    def to_tokens(self, tensors: Sequence[Tensor], shards: Sequence[Heads]) -> list[Tensor]:
        """Each [B, Tg, h, ...] becomes [B, T, H, ...] again; what several ranks hold of one head is summed."""
        edges = [0, *accumulate(self.lengths)]

        def forms(source: int, dest: int) -> list[Form]:
            return [((x.shape[0], self.lengths[dest], len(h[source]), *x.shape[3:]), x.dtype) for x, h in zip(tensors, shards, strict=True)]

        def parts(rank: int) -> list[Tensor]:
            return [x[:, edges[rank] : edges[rank + 1]] for x in tensors]

        with self._exchanged(parts, forms, tensors[0].device) as found:
            return [_assembled(column, h) for column, h in zip(zip(*found, strict=True), shards, strict=True)]

    @contextmanager
    def _exchanged(self, parts: Parts, forms: Forms, device: torch.device) -> Iterator[list[list[Tensor]]]:
        """Give `parts(rank)` to each rank; yield what each rank gave us, in rank order, of shapes `forms(rank, we)`."""
        with self.wire.journal.during("all-to-all"), (self._read if self.reach else self._sent)(parts, forms, device) as theirs:
            yield [theirs[rank] if rank in theirs else parts(rank) for rank in range(self.wire.size)]

    @contextmanager
    def _sent(self, parts: Parts, forms: Forms, device: torch.device) -> Iterator[dict[int, list[Tensor]]]:
        """As messages."""
        arriving = {r: empty(forms(r, self.wire.rank), device) for r in self._others}
        self.wire.exchange({r: pack(parts(r)) for r in self._others}, arriving).wait()
        yield {r: unpack(message, forms(r, self.wire.rank)) for r, message in arriving.items()}

    @contextmanager
    def _read(self, parts: Parts, forms: Forms, device: torch.device) -> Iterator[dict[int, list[Tensor]]]:
        """Straight from the others' memory, where each has laid what is for us."""
        me, ranks = self.wire.rank, range(self.wire.size)
        place = max(room(forms(source, dest)) for source in ranks for dest in ranks if source != dest)
        window = cast(Windows, self.wire).window("heads", place * len(ranks))

        def laid(source: int, dest: int) -> list[Tensor]:
            return unpack(window.of(source)[dest * place : (dest + 1) * place], forms(source, dest))

        window.writable(*self._others)
        for dest in self._others:
            for to, part in zip(laid(me, dest), parts(dest), strict=True):
                to.copy_(part)
        window.give(*self._others)
        for source in self._others:
            window.take(source)
        yield {source: laid(source, me) for source in self._others}
        for source in self._others:
            window.release(source)

    @property
    def _others(self) -> list[int]:
        return [rank for rank in range(self.wire.size) if rank != self.wire.rank]


def _assembled(column: Sequence[Tensor], shards: Heads) -> Tensor:
    if not any(a.stop > b.start for a, b in pairwise(shards)):
        return torch.cat(list(column), dim=2)
    first = column[0]
    whole = first.new_zeros(*first.shape[:2], shards[-1].stop, *first.shape[3:])
    for part, heads in zip(column, shards, strict=True):
        whole[:, :, heads.start : heads.stop] += part
    return whole
