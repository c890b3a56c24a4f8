"""Ulysses: an all-to-all turns shards of tokens into shards of heads, around any inner attention (arXiv:2309.14509).

Legend: B batch, T local tokens, Tg tokens of the whole group, H heads, h heads of this rank, U ranks of the group.

Heads need not divide evenly, and there may be fewer key/value heads than ranks: those are then held by several ranks, and the
gradients that come back for them are summed in the accumulator's dtype, in rank order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from distflash.parallel.wire.base import Wire, empty, pack, unpack

Heads = tuple[range, ...]  # Heads[rank]: the heads that a rank of the group computes


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
        me = self.wire.rank

        def forms(rank: int) -> list:
            return [((x.shape[0], self.lengths[rank], len(h[me]), *x.shape[3:]), x.dtype) for x, h in zip(tensors, shards, strict=True)]

        def parts(rank: int) -> list[Tensor]:
            return [x[:, :, h[rank].start : h[rank].stop] for x, h in zip(tensors, shards, strict=True)]

        return [torch.cat(list(column), dim=1) for column in zip(*self._exchange(parts, forms, tensors[0].device), strict=True)]

    def to_tokens(self, tensors: Sequence[Tensor], shards: Sequence[Heads]) -> list[Tensor]:
        """Each [B, Tg, h, ...] becomes [B, T, H, ...] again; what several ranks hold of one head is summed."""
        me, edges = self.wire.rank, [0, *accumulate(self.lengths)]

        def forms(rank: int) -> list:
            return [((x.shape[0], self.lengths[me], len(h[rank]), *x.shape[3:]), x.dtype) for x, h in zip(tensors, shards, strict=True)]

        def parts(rank: int) -> list[Tensor]:
            return [x[:, edges[rank] : edges[rank + 1]] for x in tensors]

        columns = zip(*self._exchange(parts, forms, tensors[0].device), strict=True)
        return [_assembled(column, h) for column, h in zip(columns, shards, strict=True)]

    def _exchange(self, parts, forms, device: torch.device) -> list[list[Tensor]]:
        """Send `parts(rank)` to each rank; return what each rank sent us, in rank order, of shapes `forms(rank)`."""
        others = [r for r in range(self.wire.size) if r != self.wire.rank]
        arriving = {r: empty(forms(r), device) for r in others}
        with self.wire.journal.during("all-to-all"):
            self.wire.exchange({r: pack(parts(r)) for r in others}, arriving).wait()
        return [unpack(arriving[r], forms(r)) if r in arriving else parts(r) for r in range(self.wire.size)]


def _assembled(column: Sequence[Tensor], shards: Heads) -> Tensor:
    if not any(a.stop > b.start for a, b in pairwise(shards)):
        return torch.cat(list(column), dim=2)
    first = column[0]
    whole = first.new_zeros(*first.shape[:2], shards[-1].stop, *first.shape[3:])
    for part, heads in zip(column, shards, strict=True):
        whole[:, :, heads.start : heads.stop] += part
    return whole
