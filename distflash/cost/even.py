"""Plans of large rings in closed form: `plan` looks at every pair of ranks, which thousands of them make slow."""

from __future__ import annotations

from collections import defaultdict

from distflash.cost.traffic import Scheme
from distflash.parallel.layout import Layout
from distflash.parallel.mask import AnyMask, tiles
from distflash.parallel.plan import Home, Hop, Part, Visit


class NoClosedForm(ValueError):
    """The plan has to be made by `plan`."""


def even(scheme: Scheme, spans: Layout, mask: AnyMask, rank: int) -> tuple[Visit, ...]:
    """`plan` of a ring or a double ring in which every rank needs every block, in closed form: a rank of thousands in milliseconds.

    Raises NoClosedForm for another order, and where a block is not needed.
    """
    ring, node = scheme.ring, scheme.ring_per_node if scheme.order == "double_ring" else scheme.ring
    if scheme.order not in ("ring", "double_ring"):
        raise NoClosedForm(f"{scheme.order} has none, ring and double_ring have")

    def owner(t: int) -> int:
        return (rank // node - t // node) * node % ring + (rank - t) % node

    def holder(block: int, t: int) -> int:
        return (block // node + t // node) * node % ring + (block + t) % node

    hops: dict[int, list[Hop]] = defaultdict(list)
    for then in range(1, ring):
        now = then - (node if then % node == 0 and node < ring else 1)
        hops[now].append(Hop(then, holder(owner(now), then), None, holder(owner(then), now)))
    visits = []
    for now in range(ring):
        found, last = tiles(spans[rank], spans[owner(now)], mask), now + 1 == ring
        if not found:
            raise NoClosedForm("there is none where a rank needs nothing of another's block")
        dest = owner(now) if last else holder(owner(now), now + 1)
        source, ours = (None, holder(rank, now)) if last else (holder(owner(now + 1), now), None)
        home = Home(dest, source, ours) if ring > 1 else Home(None, None, None)
        visits.append(Visit(now, (Part(owner(now), range(found.kv_len)),), found, tuple(hops[now]), home))
    return tuple(visits)
