"""Plans of rings so large that looking at every pair of ranks, as `plan` does to see who needs whom, would be slow."""

from __future__ import annotations

from distflash.cost.traffic import Scheme
from distflash.parallel.layout import Layout
from distflash.parallel.mask import AnyMask
from distflash.parallel.plan import ORDERS, Visit, plan


class NoClosedForm(ValueError):
    """Who needs whom has to be looked at."""


def even(scheme: Scheme, spans: Layout, mask: AnyMask, rank: int) -> tuple[Visit, ...]:
    """`plan` where every rank is taken to need every block: a rank of thousands in milliseconds.

    Raises NoClosedForm where this rank does not need a block.
    """
    everyone = (1 << scheme.ring) - 1
    order = ORDERS[scheme.order](scheme.ring, scheme.ring_per_node)
    visits = plan(spans, mask, order, rank, need=[everyone] * scheme.ring)
    if not all(visit.tiles for visit in visits):
        raise NoClosedForm("there is none where a rank needs nothing of another's block")
    return visits
