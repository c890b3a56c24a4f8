"""When each block of keys and values moves, and what is computed on it. Integers only: no torch.

Order    whose block each rank works on at each step, and the step at which that block sets out
Visit    one block at one step: its tiles, the messages to start before computing, how gradients move afterwards
plan     layout x mask x order -> the visits of one rank; `ring` executes them
staged   when others' blocks are copied into limited memory, and which of them are one visit
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from distflash.parallel.layout import Layout, lengths
from distflash.parallel.mask import AnyMask, cut, meet, needs
from distflash.tile import Tiles


@dataclass(frozen=True)
class Order:
    """Blocks go round inside nodes of `node` consecutive ranks, and after each time round on to the next node; one node is a ring.

    sent[t] < t: the step at which the block that is worked on at step t sets out.
    """

    ranks: int
    node: int
    sent: tuple[int, ...]  # sent[0] is unused: the own block is there

    def __post_init__(self) -> None:
        assert self.ranks % self.node == 0 and len(self.sent) == self.ranks, self

    def owner(self, rank: int, step: int) -> int:
        """Whose block a rank works on at a step."""
        return (rank // self.node - step // self.node) * self.node % self.ranks + (rank - step) % self.node

    def holder(self, block: int, step: int) -> int:
        """Which rank works on a block, named by its owner, at a step."""
        return (block // self.node + step // self.node) * self.node % self.ranks + (block + step) % self.node

    @property
    def held(self) -> int:
        """The most blocks of others that a rank holds at a time: the one worked on, those that arrive, those still being passed on."""
        steps = range(len(self.sent))
        under_way = ({block for then in steps[now + 1 :] if self.sent[then] <= now for block in (then, self.sent[then])} for now in steps)
        return max(len(({now} | blocks) - {0}) for now, blocks in enumerate(under_way))

    def ahead(self, most: int) -> Order:
        """The same, but no block sets out more than so many steps before it is needed."""
        return replace(self, sent=tuple(max(sent, then - most) for then, sent in enumerate(self.sent)))

    def within(self, blocks: int) -> Order:
        """The same, each block setting out as early as it may where no rank holds more than so many; one step early at least."""
        return self if self.held <= blocks else self.ahead(
            max(1, bisect_right(range(1, len(self.sent)), blocks, key=lambda most: self.ahead(most).held))
        )  # fmt: skip


def ring(ranks: int, per_node: int) -> Order:
    """Each step passes the block on to the next rank (Ring Attention, arXiv:2310.01889)."""
    return Order(ranks, ranks, tuple(t - 1 for t in range(ranks)))


def all_gather(ranks: int, per_node: int) -> Order:
    """Every block sets out at once, straight to every rank: all of K/V is held, latency is paid once."""
    return Order(ranks, ranks, (0,) * ranks)


def double_ring(ranks: int, per_node: int) -> Order:
    """Go round inside the node; the hop between nodes sets out a whole inner ring early (LoongTrain, arXiv:2406.18485)."""
    return Order(ranks, per_node, tuple(t - (per_node if t % per_node == 0 else 1) for t in range(ranks)))


def unequal(ranks: int, per_node: int, ulysses: int) -> str | None:
    """What hosts hold that cannot make a double ring; None if each holds as many consecutive ranks of a ring, be it one, or all."""
    equal = per_node <= ulysses or (per_node % ulysses == 0 and ranks % per_node == 0)
    return None if equal else f"{ranks} on hosts of {per_node}, ulysses={ulysses}"


ORDERS: dict[str, Callable[[int, int], Order]] = {"ring": ring, "all_gather": all_gather, "double_ring": double_ring}


@dataclass(frozen=True)
class Hop:
    """One exchange of K and V, for what will be worked on at `step`: who gets what from us, who sends. None is no message."""

    step: int
    onward: int | None  # gets the block of this visit
    own: int | None  # gets our own block, because the rank that would have passed it on does not need it
    source: int | None  # sends the block of that step

    @property
    def busy(self) -> bool:
        return any(peer is not None for peer in (self.onward, self.own, self.source))


@dataclass(frozen=True)
class Home:
    """One exchange of gradients, after a visit: who gets what from us, who sends. None is no message."""

    dest: int | None  # gets the gradient of this visit's block
    source: int | None  # sends what it has of the gradient of the next step's block
    ours: int | None  # sends what it has of our own block's gradient

    @property
    def busy(self) -> bool:
        return any(peer is not None for peer in (self.dest, self.source, self.ours))


class Part(NamedTuple):
    """Keys of a rank's block."""

    owner: int
    keys: range  # which tokens of the block


@dataclass(frozen=True, eq=False)
class Visit:
    """One block at one step, or several side by side. `hops` start before computing; `home` is how gradients move afterwards."""

    step: int
    parts: tuple[Part, ...]  # what is worked on; the tiles are of these keys, one part after the other
    tiles: Tiles  # empty where nothing is kept of the block: then it does not come
    hops: tuple[Hop, ...]
    home: Home

    @property
    def owner(self) -> int:
        """The rank whose block this is; of several, the first."""
        return self.parts[0].owner

    @property
    def placed(self) -> Iterator[tuple[Part, slice]]:
        """Each part, and where its keys lie among those of the visit."""
        at = 0
        for part in self.parts:
            yield part, slice(at, at := at + len(part.keys))


class _Ways:
    """The ways of blocks and of their gradients: an order, without the ranks that need nothing of a block."""

    def __init__(self, order: Order, need: Sequence[int], rank: int):
        self.order, self.need, self.rank = order, need, rank

    def needed(self, holder: int, block: int) -> bool:
        return bool(self.need[holder] >> block & 1)

    def hop(self, now: int, then: int) -> Hop:
        """What we send and receive at step `now` for step `then`."""

        def giver(block: int) -> int:
            holder = self.order.holder(block, now)
            return holder if self.needed(holder, block) else block

        def dest(block: int) -> int | None:
            after = self.order.holder(block, then)
            return after if giver(block) == self.rank and self.needed(after, block) else None

        here, coming = (self.order.owner(self.rank, step) for step in (now, then))
        own = dest(self.rank) if here != self.rank else None
        return Hop(then, dest(here), own, giver(coming) if self.needed(self.rank, coming) else None)

    def home(self, now: int) -> Home:
        """The gradients that we send and receive after step `now`."""
        last = now + 1 == self.order.ranks

        def heir(block: int) -> int:
            after = block if last else self.order.holder(block, now + 1)
            return after if self.needed(after, block) else block

        def holds(holder: int, block: int) -> bool:
            return holder == block or self.needed(holder, block)

        def source(block: int) -> int | None:
            holder = self.order.holder(block, now)
            return holder if holder != self.rank and holds(holder, block) and heir(block) == self.rank else None

        here = self.order.owner(self.rank, now)
        dest = heir(here) if holds(self.rank, here) else self.rank
        return Home(
            None if dest == self.rank else dest,
            None if last else source(self.order.owner(self.rank, now + 1)),
            source(self.rank),
        )


def plan(layout: Layout, mask: AnyMask, order: Order, rank: int, need: Sequence[int] | None = None) -> tuple[Visit, ...]:
    """The visits of one rank, in order. Every allowed (query, key) pair is in exactly one tile of exactly one rank.

    The order says who would work on a block at which step; ranks that keep nothing of it are left out. A block comes from the
    rank that works on it when it sets out, or straight from its owner if that rank does not need it; a gradient is passed on
    to the rank that adds to it at the next step, or straight to its owner. So nobody holds a block longer than the order does,
    and messages are posted by step on both sides, so that no two ranks wait for each other. A step at which a rank neither
    computes nor exchanges anything is no visit of its plan; step 0, on the own block, always is. `need` is `needs(layout, mask)`
    where that is known without looking.
    """
    ways, tokens = _Ways(order, needs(layout, mask) if need is None else need, rank), lengths(layout)
    rows = cut(layout[rank], mask.pieces)
    leaving: dict[int, list[int]] = defaultdict(list)  # by the step at which they set out: steps that blocks are for
    for then in range(1, order.ranks):
        leaving[order.sent[then]].append(then)
    visits = []
    for now in range(order.ranks):
        owner = order.owner(rank, now)
        found = meet(rows, layout[owner], tokens[rank]) if ways.needed(rank, owner) else Tiles((), tokens[rank], tokens[owner])
        hops = (ways.hop(now, then) for then in leaving[now])
        visit = Visit(now, (Part(owner, range(tokens[owner])),), found, tuple(hop for hop in hops if hop.busy), ways.home(now))
        if now == 0 or visit.tiles or visit.hops or visit.home.busy:
            visits.append(visit)
    return tuple(visits)


def narrowed(visits: tuple[Visit, ...]) -> tuple[Visit, ...]:
    """Of others' blocks only the keys from the first to the last that is seen here."""

    def cut_to(keys: range, visit: Visit) -> Visit:
        return replace(visit, tiles=visit.tiles.within(keys), parts=(Part(visit.owner, keys),))

    return (visits[0], *(cut_to(visit.tiles.keys, visit) if visit.tiles else visit for visit in visits[1:]))


def halved(visits: tuple[Visit, ...]) -> tuple[Visit, ...]:
    """The own block cut in two, the half with less work first and the other after all blocks of others.

    So that what arrives first and what leaves last do so while something is computed. Nothing changes for who is alone.
    """
    own = visits[0]
    if not own.tiles or not any(visit.hops or visit.home.busy for visit in visits):
        return visits
    middle = own.tiles.kv_len // 2
    halves = [(keys, own.tiles.within(keys)) for keys in (range(middle), range(middle, own.tiles.kv_len))]
    (first, less), (last, more) = sorted(halves, key=lambda half: half[1].area)
    after = Visit(visits[-1].step + 1, (Part(own.owner, last),), more, (), Home(None, None, None))
    return (replace(own, tiles=less, parts=(Part(own.owner, first),)), *visits[1:], after)


def staged(visits: tuple[Visit, ...], room: int, pace: float | None) -> tuple[Visit, ...]:
    """The visits of a rank that copies others' blocks from their owners, into memory for `room` tokens; several at once if that is no wait.

    Blocks are one visit, in one launch, if all of them should have come when the visit before them ends, by a `pace` of pairs that are
    worked through while a key is copied. They take half of the room at most, unless all blocks fit: the other half fills meanwhile. None:
    each is a visit of its own, so that sums are rounded alike whatever the room. Visits are `narrowed`, and may be `halved`; half of
    `room` holds any of them, or all of it all. A hop here says only when the copies for a step set out: as early as there is room.
    """
    own, others = visits[0], [visit for visit in visits[1:] if visit.tiles and visit.owner != visits[0].owner]
    size = [visit.tiles.kv_len for visit in others]
    most = room if sum(size) <= room else room // 2
    found, start, copied, done = [], 0, 0, own.tiles.area
    while start < len(others):
        stop = start + 1
        while pace is not None and stop < len(others):
            held = sum(size[start : stop + 1])
            if held > most or pace * (copied + held) > done:
                break
            stop += 1
        found.append(_joined(others[start:stop]))
        start, copied, done = stop, copied + found[-1].tiles.kv_len, done + found[-1].tiles.area
    return *_posted(own, found, room), *(visit for visit in visits[1:] if visit.owner == own.owner)


def _joined(visits: Sequence[Visit]) -> Visit:
    """Several visits as one, at the step of the first."""
    tiles, at = [], 0
    for visit in visits:
        tiles += [replace(t, kv=slice(t.kv.start + at, t.kv.stop + at)) for t in visit.tiles]
        at += visit.tiles.kv_len
    parts = tuple(part for visit in visits for part in visit.parts)
    return replace(visits[0], parts=parts, tiles=visits[0].tiles if len(visits) == 1 else Tiles(tuple(tiles), visits[0].tiles.q_len, at))


def _posted(own: Visit, others: Sequence[Visit], room: int) -> tuple[Visit, ...]:
    """With the hops of copies: each sets out at the first visit during which it fits beside what is there, in order."""
    found, waiting, here = [], list(others), 0
    for n, visit in enumerate((own, *others)):
        here -= others[n - 2].tiles.kv_len if n > 1 else 0  # what was worked on before this visit
        hops = []
        while waiting and here + waiting[0].tiles.kv_len <= room:
            coming = waiting.pop(0)
            here += coming.tiles.kv_len
            hops.append(Hop(coming.step, None, None, coming.owner))
        found.append(replace(visit, hops=tuple(hops)))
    assert not waiting, f"{room} tokens are too few"
    return tuple(found)


def readers(layout: Layout, mask: AnyMask, rank: int) -> dict[int, range]:
    """The other ranks that keep something of our block, and from which to which of its tokens."""
    need, found = needs(layout, mask), {}
    for reader, held in enumerate(need):
        if reader != rank and held >> rank & 1:
            found[reader] = meet(cut(layout[reader], mask.pieces), layout[rank], lengths(layout)[reader]).keys
    return found


def alone(tiles: Tiles) -> tuple[Visit, ...]:
    """The plan of one device: one visit, nobody to talk to."""
    return (Visit(0, (Part(0, range(tiles.kv_len)),), tiles, (), Home(None, None, None)),)
