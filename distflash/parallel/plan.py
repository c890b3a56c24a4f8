"""When each block of keys and values moves, and what is computed on it. Integers only: no torch.

Order    whose block each rank works on at each step, and the step at which that block sets out
Visit    one block at one step: its tiles, the messages to start before computing, the way its gradient takes home
plan     layout x mask x order -> the visits of one rank; `ring` executes them
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from distflash.parallel.layout import Layout
from distflash.parallel.mask import Mask, tiles
from distflash.tile import Tiles


@dataclass(frozen=True)
class Order:
    """owner[rank][t]: whose block `rank` works on at step t. sent[t] < t: the step at which that block sets out."""

    owner: tuple[tuple[int, ...], ...]
    sent: tuple[int, ...]  # sent[0] is unused: the own block is there


def ring(ranks: int, per_node: int) -> Order:
    """Each step passes the block on to the next rank (Ring Attention, arXiv:2310.01889)."""
    return Order(tuple(tuple((r - t) % ranks for t in range(ranks)) for r in range(ranks)), tuple(t - 1 for t in range(ranks)))


def all_gather(ranks: int, per_node: int) -> Order:
    """Every block sets out at once, straight to every rank: all of K/V is held, latency is paid once."""
    return Order(ring(ranks, per_node).owner, (0,) * ranks)


def double_ring(ranks: int, per_node: int) -> Order:
    """Go round inside the node; the hop between nodes sets out a whole inner ring early (LoongTrain, arXiv:2406.18485)."""
    nodes, steps = ranks // per_node, range(ranks)
    owner = tuple(
        tuple((n - t // per_node) % nodes * per_node + (local - t) % per_node for t in steps)
        for n in range(nodes)
        for local in range(per_node)
    )
    return Order(owner, tuple(t - (per_node if t % per_node == 0 else 1) for t in steps))


ORDERS: dict[str, Callable[[int, int], Order]] = {"ring": ring, "all_gather": all_gather, "double_ring": double_ring}


@dataclass(frozen=True)
class Hop:
    """One exchange: the block we hold goes to `dest`; what `source` holds will be worked on at `step`."""

    step: int
    dest: int
    source: int


@dataclass(frozen=True, eq=False)
class Visit:
    """One block at one step. `hops` start before computing; `home` is where the block's gradient goes afterwards."""

    step: int
    owner: int  # the rank whose block this is
    tiles: Tiles
    hops: tuple[Hop, ...]
    home: Hop  # the table wraps around, so the last hop ends at the owner


def plan(layout: Layout, mask: Mask, order: Order, rank: int) -> tuple[Visit, ...]:
    """The visits of one rank, in order. Every allowed (query, key) pair is in exactly one tile of exactly one rank."""
    at = [[row[t] for row in order.owner] for t in range(len(order.sent))]  # at[t][rank] = owner
    where = [{owner: holder for holder, owner in enumerate(row)} for row in at]

    def hop(now: int, then: int) -> Hop:
        return Hop(then, where[then][at[now][rank]], where[now][at[then][rank]])

    return tuple(
        Visit(
            t,
            at[t][rank],
            tiles(layout[rank], layout[at[t][rank]], mask),
            tuple(hop(t, then) for then in range(1, len(at)) if order.sent[then] == t),
            hop(t, (t + 1) % len(at)),
        )
        for t in range(len(at))
    )


def alone(tiles: Tiles) -> tuple[Visit, ...]:
    """The plan of one device: one visit, nobody to talk to."""
    return (Visit(0, 0, tiles, (), Hop(0, 0, 0)),)
