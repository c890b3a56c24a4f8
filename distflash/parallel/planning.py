"""The plans of one rank's ring for a sequence, and what carries them out: each is made when first asked for, the last ones are kept.

plan.py says what blocks do in any ring; here is what they do in this one, within the memory that may be used and over its wire.
Legend: R ranks of a ring, U ranks of a Ulysses group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
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

KEPT = 256  # of each kind of plan: masks may be new at every step


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

    @cached_property
    def spans(self) -> Layout:
        """What each of the R ranks works on, once its Ulysses group has exchanged tokens for heads."""
        return gathered(self.layout, self.ulysses)

    @cached_property
    def positions(self) -> Positions:
        """Of what the ring works on."""
        return Positions(self.spans[self.wire.rank], self.spans)

    @cached_property
    def _planned(self) -> Callable[[AnyMask, Order, int], tuple[Visit, ...]]:
        return lru_cache(KEPT)(partial(plan, self.spans))

    @cached_property
    def _copied(self) -> Callable[..., tuple[tuple[Visit, ...], tuple[Visit, ...]]]:
        return lru_cache(KEPT)(copies)

    @cached_property
    def _carried(self) -> Callable[[AnyMask], Direct]:
        return lru_cache(KEPT)(partial(_direct, cast(Windows, self.wire), self.spans))

    def visits(self, mask: AnyMask, order: Order | None = None) -> tuple[Visit, ...]:
        """The plan for a mask, as blocks would go from rank to rank."""
        return self._planned(mask, order or self.order, self.wire.rank)

    def plans(self, mask: AnyMask, shape: Shape, deterministic: bool) -> Plans:
        """What is carried out for a call with tensors of this shape, within `staging`. Raises ValueError if it is too little."""
        ranks = self.wire.size
        if ranks == 1:
            visits = self.visits(mask)
            return Plans(visits, visits, visits, None)
        tokens = max(lengths(self.spans))
        shards = zip(*head_shards(shape.heads, shape.kv_heads, self.ulysses), strict=True)
        heads, kv_heads = max((len(q), len(kv)) for q, kv in shards)  # of any rank, so that all ranks raise or none does
        most = replace(shape, heads=heads, kv_heads=kv_heads)
        if not self.direct:
            visits = self.visits(mask, within(self.order, self.staging, most.message(tokens, shape.itemsize)))
            return Plans(visits, visits, visits, self.staging)
        space = room(self.staging, tokens, most.token, ranks)
        visits = self.visits(mask)
        return Plans(visits, *self._copied(visits, space, kv_heads, heads, deterministic), space * most.token)

    def unseen(self, mask: AnyMask, rank: int) -> tuple[range, ...]:
        """The keys of a rank, of all R * U, that no query of any rank sees. But for `Slices`, each is seen from its own position."""
        return unseen(tiles(spans, self.layout[rank], mask) for spans in self.layout) if isinstance(mask, Slices) else ()

    def carrier(self, mask: AnyMask) -> Messages | Direct:
        """What moves blocks and gradients."""
        if not self.direct or self.wire.size == 1:
            return Messages(self.wire)
        return self._carried(mask)


def _direct(wire: Windows, spans: Layout, mask: AnyMask) -> Direct:
    return Direct(wire, lengths(spans), readers(spans, mask, wire.rank))
