"""Which layout, order, Ulysses degree and wire are fastest for a sequence on a cluster: the same answer on every rank.

Nothing but the arguments is looked at, and nothing but +, -, *, / and comparisons of Python floats done with them, so that ranks that
call `choose` alike get equal rankings. Schemes of equal seconds are ranked by memory, then in the order of `LAYOUTS`, `ORDERS`, the
Ulysses degree and `WIRES`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from distflash.cost.copied import Copying
from distflash.cost.even import NoClosedForm, even
from distflash.cost.memory import Copies, head_windows, peak, windows
from distflash.cost.time import Cluster, Pass, Rank
from distflash.cost.traffic import PASSES, Scheme, Shape, Share
from distflash.parallel.layout import LAYOUTS, Layout, lengths
from distflash.parallel.mask import AnyMask, cut, kept, needs
from distflash.parallel.plan import ORDERS, Visit
from distflash.parallel.staging import copies, room

WIRES = ("p2p", "symmetric")
_ALL = 16  # ranks of the largest ring all of which are looked at
_HOSTS = 8  # of a larger one, whose first, middle and last ranks are
_PLANNED = 64  # ranks of the largest ring whose plans are made as `SequenceParallel` makes them
_WORTH = 0.02  # how much shorter a step must be for the reason to name what was saved


@dataclass(frozen=True)
class Candidate:
    """A scheme over a wire, and what it costs a layer; or why it is refused."""

    scheme: Scheme
    wire: str
    passes: dict[str, Pass]
    memory: int  # bytes of attention above its inputs, at the peak
    refused: str | None = None

    @property
    def seconds(self) -> float:
        return sum(one.seconds for one in self.passes.values())

    @property
    def exposed(self) -> float:
        return sum(one.exposed for one in self.passes.values())

    @property
    def reason(self) -> str:
        """What bounds it, in words."""
        if self.refused:
            return self.refused
        if self.exposed <= _WORTH * self.seconds:
            return "communication is hidden behind the kernels"
        tiers = {name: sum(one.tiers[name] for one in self.passes.values()) for name in self.passes["forward"].tiers}
        share = f"{self.exposed / self.seconds:.0%} exposed"
        slowest = max(("links", "network"), key=lambda name: tiers[name])
        if tiers[slowest] > tiers["matmul"]:
            return f"bound by the {slowest}: {share}"
        parts = ["all-to-all"] * (self.scheme.ulysses > 1) + ["hops, and their drag on kernels"] * (self.scheme.ring > 1)
        return f"{share}: {', '.join(parts)}"


def candidates(cluster: Cluster, wires: Sequence[str] = ("p2p",)) -> Iterator[tuple[Scheme, str]]:
    """Every scheme over every wire, in the order that breaks ties."""
    degrees = [u for u in range(1, cluster.ranks + 1) if cluster.ranks % u == 0]
    for layout in LAYOUTS:
        for order in ORDERS:
            for ulysses in degrees:
                for wire in wires:
                    yield Scheme(layout, order, ulysses, cluster.ranks, cluster.per_node), wire


def judge(
    scheme: Scheme, wire: str, cu: tuple[int, ...], mask: AnyMask, shape: Shape, cluster: Cluster, asked: Collection[str] = ()
) -> Candidate:
    """One scheme's cost: of each pass, the slowest of `worst_ranks`, of their heads the most. `asked`: what of it was asked for by name."""
    if refused := scheme.refusal(shape) or replace(cluster, wire=wire).refusal() or _idle(scheme, asked):
        return Candidate(scheme, wire, {}, 0, refused)
    spans, head = scheme.spans(cu, mask), scheme.fullest_head_rank(shape)
    ranks = [rank * scheme.ulysses + head for rank in worst_ranks(scheme, spans, mask)]
    try:
        found = [looked_at(scheme, wire, spans, mask, shape, cluster, rank) for rank in ranks]
    except NoClosedForm as error:
        return Candidate(scheme, wire, {}, 0, f"rings of more than {_PLANNED} ranks are ranked in closed form only: {error}")
    slowest = {name: max((passes[name] for passes, _ in found), key=lambda one: one.seconds) for name in PASSES}
    return Candidate(scheme, wire, slowest, max(memory for _, memory in found))


def worst_ranks(scheme: Scheme, spans: Layout, mask: AnyMask) -> list[int]:
    """The ranks of a ring of which one is the slowest: all of a small one; else three of a host, and who keeps the most pairs.

    Where a mask keeps neighbours only, what crosses the network does so between the last rank of a host and the first of the next, and
    those between them hold the most; but "balanced" puts chunks anywhere, and any rank may need the most. Of many hosts some are looked
    at, spread evenly. Where every rank needs every block, as in the rings that have a closed form, all hosts exchange alike: two do.
    """
    ring, node = scheme.ring, min(scheme.ring, scheme.ring_per_node)
    alike = ring > _PLANNED or (ring > _ALL and all(held == (1 << ring) - 1 for held in needs(spans, mask)))
    if ring <= _ALL or (scheme.layout == "balanced" and not alike):
        return list(range(ring))
    hosts, most = -(-ring // node), 2 if alike else _HOSTS
    some = {n * (hosts - 1) // (min(hosts, most) - 1) for n in range(min(hosts, most))} if hosts > 1 else {0}
    work = [sum(kept(run) for run in cut(held, mask.pieces) if run.span.step == 1) for held in spans]  # stripes all keep as many
    borders = {min(rank, ring - 1) for host in some for rank in (host * node, host * node + node // 2, host * node + node - 1)}
    return sorted(borders | {max(range(ring), key=work.__getitem__)})


def looked_at(
    scheme: Scheme, wire: str, spans: Layout, mask: AnyMask, shape: Shape, cluster: Cluster, rank: int
) -> tuple[dict[str, Pass], int]:
    """(time by pass, bytes above the inputs at the peak) of one rank. Raises NoClosedForm."""
    one, reach = rank_of(scheme, spans, mask, shape, replace(cluster, wire=wire), rank), wire == "symmetric"
    return one.passes(), _memory(one.share, lengths(spans), one.plans if isinstance(one, Copying) else None, reach)


def rank_of(scheme: Scheme, spans: Layout, mask: AnyMask, shape: Shape, cluster: Cluster, rank: int) -> Rank:
    """One of all ranks with its plan, as it is carried out over the wire of the cluster. Raises NoClosedForm."""
    ring_rank = rank // scheme.ulysses
    visits = even(scheme, spans, mask, ring_rank) if scheme.ring > _PLANNED else scheme.visits(spans, mask, ring_rank)
    share = Share(scheme, spans, shape, rank, visits)
    plans = _copies(share, lengths(spans), visits) if cluster.wire == "symmetric" else None
    return Rank(share, cluster) if plans is None else Copying(share, cluster, plans)


def _copies(share: Share, tokens: Sequence[int], visits: tuple[Visit, ...]) -> Copies | None:
    """The visits where blocks are copied, as they are without a limit; None in a ring of one."""
    if len(tokens) == 1:
        return None
    return copies(visits, room(None, max(tokens), share.shape.token, len(tokens)), share.shape.kv_heads, share.shape.heads, False)


def _memory(share: Share, tokens: Sequence[int], plans: Copies | None, reach: bool) -> int:
    """Bytes above the inputs at the peak, and those of windows."""
    kept = windows(share.shape, max(tokens), len(tokens)) + head_windows(share) if reach else 0
    return max(peak(share, plans, reach).values()) + kept


def choose(
    cu: tuple[int, ...], mask: AnyMask, shape: Shape, cluster: Cluster, wires: Sequence[str] = ("p2p",), **fixed: str | int
) -> list[Candidate]:
    """All candidates, the fastest first, refused ones last. `fixed` holds what is not "auto": layout, order, ulysses.

    Raises ValueError if the library refuses all that are left.
    """
    left = [(s, w) for s, w in candidates(cluster, wires) if all(getattr(s, name) == value for name, value in fixed.items())]
    judged = [judge(scheme, wire, cu, mask, shape, cluster, fixed) for scheme, wire in left]
    served = sorted((c for c in judged if c.refused is None), key=lambda c: (c.seconds, c.memory))  # stable: ties stay as they came
    if not served:
        raise ValueError(f"no scheme of {fixed or 'any kind'} serves this: {judged[0].refused if judged else 'there is none'}")
    return served + [c for c in judged if c.refused]


def _idle(scheme: Scheme, asked: Collection[str]) -> str | None:
    """Why it is another scheme under a second name, unless that was asked for."""
    if scheme.order == "double_ring" and scheme.ring_per_node in (1, scheme.ring) and "order" not in asked:
        return "double_ring is a ring here: it has one rank on each host, or one host"
    if scheme.ring == 1 and scheme.layout != "contiguous" and "layout" not in asked:
        return "with one rank of a ring every layout is contiguous"
    if scheme.ring == 1 and scheme.order != "ring" and "order" not in asked:
        return "with one rank of a ring there is no order"
    return None
