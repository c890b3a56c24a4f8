"""Ulysses: an all-to-all turns shards of tokens into shards of heads, around any inner attention (arXiv:2309.14509).

Legend: B batch, T local tokens, Tg tokens of the whole group, H heads, h heads of this rank, U ranks of the group, G groups of heads.

Heads need not divide evenly, and there may be fewer key/value heads than ranks: those are then held by several ranks, and the
gradients that come back for them are summed in the accumulator's dtype, in rank order.

Here is who has what; all_to_all.py moves it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from math import gcd, isqrt

from torch import Tensor

from distflash.parallel.wire.base import Form, Wire

Heads = tuple[range, ...]  # Heads[rank]: the heads that a rank of the group computes
PIECE = 64 << 20  # bytes from a rank to another that pay for a group: on 2 H200, one group is faster at 16k tokens, four are at 128k


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
        kv = dealt(range(kv_heads), ranks)
        return tuple(range(r.start * group, r.stop * group) for r in kv), kv
    q, kv = [], []
    for n, sharers in enumerate(dealt(range(ranks), kv_heads)):
        q += dealt(range(n * group, (n + 1) * group), len(sharers))
        kv += [range(n, n + 1)] * len(sharers)
    return tuple(q), tuple(kv)


def head_groups(kv_heads: Heads, lengths: Sequence[int], row: int) -> int:
    """G: how many equal groups every rank's heads make, each with the query heads of its key/value heads. The same on every rank.

    `row`: bytes of q, k, v and out of a token. Of t seconds on the way t / G are not hidden, and each group costs o: the sum is least
    at G = sqrt(t / o). Heads that ranks share, or that are not as many on each, may leave one group only.
    """
    whole, worth = gcd(*map(len, kv_heads)), isqrt(max(lengths) * row // len(kv_heads) // PIECE)
    return max(n for n in range(1, whole + 1) if whole % n == 0 and n <= max(1, worth))


def dealt(items: range, parts: int) -> Heads:
    """Consecutive items for each of `parts`, as even as can be."""
    edges = [len(items) * n // parts for n in range(parts + 1)]
    return tuple(items[a:b] for a, b in pairwise(edges))


@dataclass(frozen=True, eq=False)
class Ulysses:
    """One group: `lengths[rank]` tokens before the all-to-all, `heads` and `kv_heads` after it."""

    wire: Wire
    lengths: tuple[int, ...]
    heads: Heads
    kv_heads: Heads
    reach: bool = False  # ranks copy from and to each other's memory: the wire has windows
    row: int = 0  # bytes of q, k, v and out of a token; 0: heads are not to come in groups

    @cached_property
    def groups(self) -> int:
        """G."""
        return head_groups(self.kv_heads, self.lengths, self.row) if self.reach else 1

    @cached_property
    def _edges(self) -> list[int]:
        return [0, *accumulate(self.lengths)]

    @property
    def shared(self) -> bool:
        """True if some key/value head is held by several ranks, whose gradients must be summed."""
        return any(a.stop > b.start for a, b in pairwise(self.kv_heads))

    @property
    def gathered(self) -> list[int]:
        """(tokens, query heads, key/value heads) of this rank after the all-to-all."""
        return [sum(self.lengths), len(self.heads[self.wire.rank]), len(self.kv_heads[self.wire.rank])]

    @property
    def of_qkv(self) -> tuple[Heads, Heads, Heads]:
        """Whose heads are which, of q, k and v and their gradients."""
        return self.heads, self.kv_heads, self.kv_heads

    @property
    def of_out(self) -> tuple[Heads, Heads]:
        """Of out and lse, and of dout and delta."""
        return self.heads, self.heads

    def mine(self, group: int) -> range:
        """The query heads of a group that this rank computes."""
        return dealt(self.heads[self.wire.rank], self.groups)[group]

    def split(self, rows: Tensor, *shape: int) -> tuple[Tensor, ...]:
        """What holds all groups behind one another, by group: each of this shape, in which a -1 is what is left."""
        return rows.view(self.groups, *shape).unbind()

    def others(self) -> list[int]:
        """All ranks but this one, each from the next on: no two begin with the same one."""
        return [(self.wire.rank + n) % self.wire.size for n in range(1, self.wire.size)]

    def of_heads(self, tensors: Sequence[Tensor], shards: Sequence[Heads], rank: int, group: int) -> list[Tensor]:
        """The heads of [B, T, H, ...] that a rank computes in a group."""
        found = (dealt(h[rank], self.groups)[group] for h in shards)
        return [x[:, :, heads.start : heads.stop] for x, heads in zip(tensors, found, strict=True)]

    def of_tokens(self, tensors: Sequence[Tensor], rank: int) -> list[Tensor]:
        """The tokens of [B, Tg, h, ...] that a rank holds."""
        return [x[:, self._edges[rank] : self._edges[rank + 1]] for x in tensors]

    def forms(self, like: Sequence[Tensor], shards: Sequence[Heads], tokens: int, heads: int) -> list[Form]:
        """Of what the tokens of one rank and the heads of another, those of one group, have in common."""
        return self._forms(like, self.lengths[tokens], [len(h[heads]) for h in shards])

    def largest(self, like: Sequence[Tensor], shards: Sequence[Heads]) -> list[Form]:
        """Of the longest shard and the most heads: no two ranks have more in common."""
        return self._forms(like, max(self.lengths), [max(map(len, h)) for h in shards])

    def _forms(self, like: Sequence[Tensor], tokens: int, heads: Sequence[int]) -> list[Form]:
        return [((x.shape[0], tokens, n // self.groups, *x.shape[3:]), x.dtype) for x, n in zip(like, heads, strict=True)]
