"""What a plan sends, computes and keeps, exactly, from its integers: bytes to and from every rank, FLOPs, memory.

Legend: B batch, T local tokens, H query heads, Hk key/value heads, D head dim, Dv value head dim, P ranks, U ranks of a Ulysses
group, R = P / U ranks of a ring. A pass is "forward" or "backward".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import NamedTuple

from distflash.parallel.layout import LAYOUTS, Layout, lengths, split
from distflash.parallel.mask import AnyMask
from distflash.parallel.plan import ORDERS, Visit, plan, unequal
from distflash.parallel.slices import Slices
from distflash.parallel.ulysses import Heads, head_groups, head_shards
from distflash.parallel.wire.base import ALIGN

PASSES = ("forward", "backward")
BLOCK = 128  # rows, and keys, of a tile of scores


@dataclass(frozen=True)
class Shape:
    """Everything about the tensors of an attention call but their tokens."""

    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    batch: int = 1
    itemsize: int = 2  # bytes of an element of q, k and v

    @property
    def wide(self) -> int:
        """Bytes of an element of what is accumulated: out, lse, dq, dk, dv."""
        return max(4, self.itemsize)

    @property
    def token(self) -> int:
        """Bytes of K and V of a token."""
        return self.batch * self.kv_heads * (self.head_dim + self.v_head_dim) * self.itemsize

    @property
    def row(self) -> int:
        """Bytes of q, k, v and out of a token."""
        return self.token + self.batch * self.heads * (self.head_dim + self.v_head_dim) * self.itemsize

    def message(self, tokens: int, itemsize: int) -> int:
        """Bytes of K and V, or of dK and dV, of so many tokens."""
        return sum(_room(self.batch * tokens * self.kv_heads * dim * itemsize) for dim in (self.head_dim, self.v_head_dim))

    def flops(self, pass_: str) -> int:
        """Of one kept (query, key) pair, all heads: Q Kᵀ and P V forward; these two again, dP, dV, dQ and dK less P V backward."""
        qk, pv = 2 * self.head_dim, 2 * self.v_head_dim
        return self.batch * self.heads * (qk + pv if pass_ == "forward" else 3 * qk + 2 * pv)


class Message(NamedTuple):
    """Some bytes to or from a rank of the ring."""

    peer: int
    nbytes: int
    step: int  # at which the receiver waits for them


class Step(NamedTuple):
    """A visit, its size, and what travels beside it: K and V (hops) from its start on, dK and dV (home) from its end on."""

    visit: Visit
    pairs: int  # (query, key) pairs that are kept
    row_blocks: int  # of 128 queries that a kernel works on
    column_blocks: int  # of 128 keys
    hops_out: tuple[Message, ...]
    hops_in: tuple[Message, ...]
    home_out: tuple[Message, ...]
    home_in: tuple[Message, ...]


def steps(visits: Sequence[Visit], shape: Shape) -> list[Step]:
    """The messages of one rank's ring, with the padding inside. K and V travel as the inputs are, gradients as they accumulate."""
    tokens = {visit.step: visit.tiles.kv_len for visit in visits}  # step 0 holds our own block

    def message(peer: int | None, block: int, itemsize: int, step: int) -> list[Message]:
        return [] if peer is None else [Message(peer, shape.message(tokens[block], itemsize), step)]

    found = []
    for visit in visits:
        now, home, out, coming = visit.step, visit.home, [], []
        for hop in visit.hops:
            out += message(hop.onward, now, shape.itemsize, hop.step) + message(hop.own, 0, shape.itemsize, hop.step)
            coming += message(hop.source, hop.step, shape.itemsize, hop.step)
        back = message(home.dest, now, shape.wide, now + 1)
        returned = message(home.source, now + 1, shape.wide, now + 1) + message(home.ours, 0, shape.wide, now + 1)
        size = visit.tiles.area, covered((t.q for t in visit.tiles), BLOCK), covered((t.kv for t in visit.tiles), BLOCK)
        found.append(Step(visit, *size, tuple(out), tuple(coming), tuple(back), tuple(returned)))
    return found


def covered(spans: Iterable[slice], size: int = 1) -> int:
    """In how many blocks of `size` lie the rows (or columns) of the slices, cut wherever one of these begins or ends. 1: how many rows."""
    spans = sorted(spans, key=lambda s: s.start)
    cuts, total, end, n = sorted({cut for s in spans for cut in (s.start, s.stop)}), 0, 0, 0
    for start, stop in pairwise(cuts):
        while n < len(spans) and spans[n].start <= start:
            end = max(end, spans[n].stop)
            n += 1
        total += -(-(stop - start) // size) if end > start else 0
    return total


Rows = list[tuple[Heads, int]]  # of tensors: whose heads are which, and bytes of one of a token


@dataclass(frozen=True)
class Swap:
    """The two all-to-alls of a pass in a Ulysses group, by integers: tokens -> heads, attention, heads -> tokens."""

    shape: Shape
    tokens: tuple[int, ...]  # of each rank of the group
    heads: Heads
    kv_heads: Heads

    @property
    def shared(self) -> bool:
        """True if some key/value head is several ranks': its gradients travel unrounded."""
        return any(a.stop > b.start for a, b in pairwise(self.kv_heads))

    def rows(self, pass_: str) -> tuple[Rows, Rows]:
        """(there, back): q, k, v there, out, lse back; backward dout, delta there, dq, dk, dv back."""
        s, e, backward = self.shape, self.shape.itemsize, pass_ == "backward"
        kv = s.wide if backward and self.shared else e
        narrow = [(self.heads, s.v_head_dim * e), (self.heads, s.wide)]
        full = [(self.heads, s.head_dim * e), (self.kv_heads, s.head_dim * kv), (self.kv_heads, s.v_head_dim * kv)]
        return (narrow, full) if backward else (full, narrow)

    def nbytes(self, pass_: str, source: int, dest: int) -> int:
        """What one rank of the group sends another, in both."""
        there, back = self.rows(pass_)
        total = sum(_room(self.shape.batch * self.tokens[source] * len(shards[dest]) * row) for shards, row in there)
        return total + sum(_room(self.shape.batch * self.tokens[dest] * len(shards[source]) * row) for shards, row in back)

    def places(self, groups: int) -> tuple[int, int]:
        """Where heads are copied: bytes of a group that two ranks at most have in common, on the way there and on the way back."""
        there, back = zip(*(self.rows(pass_) for pass_ in PASSES), strict=True)
        return max(map(partial(self._place, groups), there)), max(map(partial(self._place, groups), back))

    def _place(self, groups: int, rows: Rows) -> int:
        tokens = self.shape.batch * max(self.tokens)
        return sum(_room(tokens * (max(map(len, shards)) // groups) * row) for shards, row in rows)


class Traffic(NamedTuple):
    """Bytes that one rank sends to, and gets from, each other rank (numbered inside the whole group)."""

    sent: Counter[int]
    received: Counter[int]


@dataclass(frozen=True)
class Scheme:
    """A way to share a sequence, as `SequenceParallel` makes one of the same arguments: names and numbers, no wire."""

    layout: str
    order: str
    ulysses: int
    ranks: int
    per_node: int

    @property
    def ring(self) -> int:
        return self.ranks // self.ulysses

    @property
    def ring_per_node(self) -> int:
        """Consecutive ranks of a ring that share a host."""
        return max(1, self.per_node // self.ulysses)

    def refusal(self, shape: Shape) -> str | None:
        """None, or why the library refuses it."""
        if self.ranks % self.ulysses:
            return f"ulysses={self.ulysses} does not divide the {self.ranks} ranks"
        if self.order == "double_ring" and (found := unequal(self.ranks, self.per_node, self.ulysses)):
            return f"double_ring needs as many consecutive ranks on each host, got {found}"
        try:
            head_shards(shape.heads, shape.kv_heads, self.ulysses)
        except ValueError as error:
            return str(error)
        return None

    def fullest_head_rank(self, shape: Shape) -> int:
        """The rank of a Ulysses group that gets the most query heads, and of these the most key/value heads."""
        heads, kv_heads = head_shards(shape.heads, shape.kv_heads, self.ulysses)
        return max(range(self.ulysses), key=lambda n: (len(heads[n]), len(kv_heads[n])))

    def spans(self, cu: tuple[int, ...], mask: AnyMask) -> Layout:
        """What each rank of the ring works on; the layout "balanced" looks at slices."""
        extra = (mask,) if self.layout == "balanced" and isinstance(mask, Slices) else ()
        return LAYOUTS[self.layout](cu, self.ring, *extra)  # type: ignore[call-arg]

    def visits(self, spans: Layout, mask: AnyMask, ring_rank: int) -> tuple[Visit, ...]:
        return plan(spans, mask, ORDERS[self.order](self.ring, self.ring_per_node), ring_rank)

    def swap(self, spans: Layout, shape: Shape, ring_rank: int) -> Swap | None:
        """The all-to-alls of the group that is this rank of the ring; None if each rank is one."""
        if self.ulysses == 1:
            return None
        tokens = lengths(split(spans, self.ulysses))[ring_rank * self.ulysses :][: self.ulysses]
        return Swap(shape, tokens, *head_shards(shape.heads, shape.kv_heads, self.ulysses))

    def share(self, spans: Layout, mask: AnyMask, shape: Shape, rank: int) -> Share:
        """What one of all ranks has to do."""
        return Share(self, spans, shape, rank, self.visits(spans, mask, rank // self.ulysses))


class Share:
    """One rank's part of a scheme: its visits and their messages, the all-to-alls around them, the shape that it computes on."""

    def __init__(self, scheme: Scheme, spans: Layout, shape: Shape, rank: int, visits: Sequence[Visit]):
        self.scheme, self.rank, self.shape = scheme, rank, shape
        self.ring_rank, self.head_rank = divmod(rank, scheme.ulysses)
        self.swap = scheme.swap(spans, shape, self.ring_rank)
        if self.swap is not None:
            heads, kv_heads = (len(shards[self.head_rank]) for shards in (self.swap.heads, self.swap.kv_heads))
            self.shape = replace(shape, heads=heads, kv_heads=kv_heads)
        self.steps = steps(visits, self.shape)

    @property
    def last(self) -> int:
        """The last step at which something is computed: there, results are cast."""
        return max((step.visit.step for step in self.steps if step.visit.tiles), default=0)

    @property
    def groups(self) -> int:
        """In how many groups heads come where they are copied."""
        if self.swap is None or self.scheme.ring > 1:
            return 1
        return head_groups(self.swap.kv_heads, self.swap.tokens, self.swap.shape.row)

    def ring_peer(self, ring_rank: int) -> int:
        """A rank of the ring, counted among all ranks."""
        return ring_rank * self.scheme.ulysses + self.head_rank

    def swapped(self, pass_: str) -> dict[int, tuple[int, int]]:
        """Bytes (sent, received) of the all-to-alls of a pass, by the other rank."""
        if (swap := self.swap) is None:
            return {}
        first, me = self.ring_rank * self.scheme.ulysses, self.head_rank
        others = (peer for peer in range(self.scheme.ulysses) if peer != me)
        return {first + peer: (swap.nbytes(pass_, me, peer), swap.nbytes(pass_, peer, me)) for peer in others}

    def traffic(self) -> dict[str, Traffic]:
        """By pass: every byte that this rank's wire moves."""
        total = {}
        for pass_ in PASSES:
            sent, received, back = Counter[int](), Counter[int](), pass_ == "backward"
            for step in self.steps:
                for m in step.hops_out + step.home_out * back:
                    sent[self.ring_peer(m.peer)] += m.nbytes
                for m in step.hops_in + step.home_in * back:
                    received[self.ring_peer(m.peer)] += m.nbytes
            for peer, (out, coming) in self.swapped(pass_).items():
                sent[peer] += out
                received[peer] += coming
            total[pass_] = Traffic(+sent, +received)
        return total


def _room(nbytes: int) -> int:
    """Of a tensor inside a message."""
    return -(-nbytes // ALIGN) * ALIGN
