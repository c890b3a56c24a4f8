"""The plans of one rank's ring for a sequence, and what carries them out: each is made when first asked for, and kept.

plan.py says what blocks do in any ring; here is what they do in this one, within the memory that may be used and over its wire.
Legend: R ranks of a ring, U ranks of a Ulysses group.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple, cast

from distflash.cost.traffic import Shape
from distflash.parallel.direct import Direct
from distflash.parallel.layout import Layout, gathered, lengths
from distflash.parallel.mask import AnyMask, tiles, unseen
from distflash.parallel.messages import Messages
from distflash.parallel.plan import Order, Visit, plan, readers
from distflash.parallel.positions import Positions
from distflash.parallel.slices import Slices
from distflash.parallel.staging import copies, room, within
from distflash.parallel.ulysses import head_shards
from distflash.parallel.wire.base import Wire
from distflash.parallel.wire.symmetric import Windows


class Plans(NamedTuple):
    """What one rank's ring does."""

    sent: tuple[Visit, ...]  # as blocks go from rank to rank
    forward: tuple[Visit, ...]  # what is carried out: the same, or `copies` of blocks
    backward: tuple[Visit, ...]
    limit: int | None  # bytes that others' K and V may take meanwhile; None is any number

    @property
    def copies(self) -> tuple[tuple[Visit, ...], tuple[Visit, ...]] | None:
        """(forward, backward) if blocks are copied."""
        return None if self.forward is self.sent else (self.forward, self.backward)


@dataclass(eq=False)
class Planner:
    """What this rank's ring does with one sequence."""

    wire: Wire  # of the R ranks
    layout: Layout  # of all R * U ranks
    ulysses: int
    order: Order
    staging: int | None  # bytes, as SequenceParallel has it
    direct: bool  # blocks are copied; else sent
    _visits: dict[tuple[AnyMask, Order], tuple[Visit, ...]] = field(init=False, default_factory=dict)
    _copies: dict[tuple, tuple[tuple[Visit, ...], tuple[Visit, ...]]] = field(init=False, default_factory=dict)
    _carriers: dict[AnyMask, Direct] = field(init=False, default_factory=dict)

    @cached_property
    def spans(self) -> Layout:
        """What each of the R ranks works on, once its Ulysses group has exchanged tokens for heads."""
        return gathered(self.layout, self.ulysses)

    @cached_property
    def positions(self) -> Positions:
        """Of what the ring works on."""
        return Positions(self.spans[self.wire.rank], self.spans)

    def visits(self, mask: AnyMask, order: Order | None = None) -> tuple[Visit, ...]:
        """The plan for a mask, as blocks would go from rank to rank."""
        key = mask, order or self.order
        if key not in self._visits:
            self._visits[key] = plan(self.spans, *key, self.wire.rank)
        return self._visits[key]

    def plans(self, mask: AnyMask, shape: Shape, deterministic: bool) -> Plans:
        """What is carried out for a call with tensors of this shape, within `staging`. Raises ValueError if it is too little."""
        ranks = self.wire.size
        if ranks == 1:
            visits = self.visits(mask)
            return Plans(visits, visits, visits, None)
        tokens = max(lengths(self.spans))
        shards = head_shards(shape.heads, shape.kv_heads, self.ulysses)[1]
        most = replace(shape, kv_heads=max(map(len, shards)))  # of any rank, so that all ranks raise or none does
        if not self.direct:
            visits = self.visits(mask, within(self.order, self.staging, most.message(tokens, shape.itemsize)))
            return Plans(visits, visits, visits, self.staging)
        space = room(self.staging, tokens, most.token, ranks)
        key = space, shape.kv_heads, shape.heads, deterministic
        if (mask, *key) not in self._copies:
            self._copies[mask, *key] = copies(self.visits(mask), *key)
        return Plans(self.visits(mask), *self._copies[mask, *key], space * most.token)

    def unseen(self, mask: AnyMask, rank: int) -> tuple[range, ...]:
        """The keys of a rank, of all R * U, that no query of any rank sees. But for `Slices`, each is seen from its own position."""
        return unseen(tiles(spans, self.layout[rank], mask) for spans in self.layout) if isinstance(mask, Slices) else ()

    def carrier(self, mask: AnyMask) -> Messages | Direct:
        """What moves blocks and gradients."""
        if not self.direct or self.wire.size == 1:
            return Messages(self.wire)
        if mask not in self._carriers:
            wire = cast(Windows, self.wire)
            self._carriers[mask] = Direct(wire, lengths(self.spans), readers(self.spans, mask, wire.rank))
        return self._carriers[mask]
