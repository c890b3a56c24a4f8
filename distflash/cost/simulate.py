"""A discrete-event simulation of a plan: ranks that compute, links that carry one message at a time, messages that are waited for.

Every rank walks its visits as `ring.py` does: wait for the block, post what sets out, compute, wait for gradients, add, send them on.
What a rank sends and receives for one step is an exchange, and its exchanges are carried out one after the other, as NCCL does on its
stream: a message sets out when it is both its sender's and its receiver's turn, and holds the way out of the one and into the other for
as long as its link takes. What finds them taken waits, first come, first served; so two messages over one link take twice as long.
`ranks` may be those of some hosts only, if all hosts do alike: messages to a host that is left out go to the next one that is not.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count

from distflash.cost.copied import Copying
from distflash.cost.devices import Link
from distflash.cost.time import Rank, added_seconds, compute_seconds
from distflash.cost.traffic import Message, Scheme

Turn = tuple[str, int]  # "kv" or "gradient", and the step for which it comes: the same on both sides

KINDS = ("compute", "send", "all-to-all")


@dataclass
class Timeline:
    """What happened: seconds of the pass, and (rank of the ring, one of KINDS, start, end) of everything."""

    seconds: float = 0.0
    busy: dict[int, float] = field(default_factory=dict)  # computing, by rank: all of them
    events: list[tuple[int, str, float, float]] = field(default_factory=list)

    @property
    def efficiency(self) -> float:
        """The mean share of the time in which ranks compute."""
        return sum(self.busy.values()) / len(self.busy) / self.seconds if self.seconds else 1.0


def simulate(ranks: Sequence[Rank], pass_: str, per_nic: int = 1) -> Timeline:
    """One pass over the ranks of a ring (all of them, or those of hosts as many as divide all), `per_nic` neighbours sharing a NIC.

    Raises ValueError if messages that ranks wait for are never sent.
    """
    if ranks and all(isinstance(rank, Copying) for rank in ranks):
        return _copied([rank for rank in ranks if isinstance(rank, Copying)], pass_)
    return _Simulation(ranks, pass_, per_nic).run()


def _copied(ranks: Sequence[Copying], pass_: str) -> Timeline:
    """Where blocks are copied no rank waits for another: each by itself, its all-to-alls before and after."""
    found = Timeline()
    for n, rank in enumerate(ranks):
        (whole, events), swap = rank.schedule(pass_), rank.swapped_seconds(pass_) / 2
        found.seconds, found.busy[n] = max(found.seconds, whole.seconds), whole.compute
        found.events += [(n, kind, start + swap, end + swap) for kind, start, end in events]
        found.events += [(n, "all-to-all", at, at + swap) for at in (0.0, whole.seconds - swap) if swap]
    return found


def standing(scheme: Scheme) -> list[int]:
    """The ranks of a ring that stand for all where hosts do alike: those of the first two hosts and of the last two.

    Early ranks work longest backward and late ones forward, for it is they that see few keys with many queries and many with few.
    """
    ring, some = scheme.ring, 2 * min(scheme.ring, scheme.ring_per_node)
    return list(range(ring)) if ring <= 2 * some else [*range(some), *range(ring - some, ring)]


@dataclass(eq=False)
class _Flight:
    """A message that waits for its ways, or is on them."""

    sender: int
    receiver: int
    ways: list[tuple[str, int]]
    seconds: float
    number: int = 0  # in the order in which messages found their way taken


@dataclass(eq=False)
class _Exchange:
    """What a rank sends and receives at once."""

    turn: Turn
    sends: list[_Flight]  # that the other side is not ready for
    sources: list[int]
    left: int  # messages, either way, that have not arrived


class _Simulation:
    def __init__(self, ranks: Sequence[Rank], pass_: str, per_nic: int):
        self.ranks, self.pass_, self.per_nic = ranks, pass_, per_nic
        self.found = Timeline(busy=dict.fromkeys(range(len(ranks)), 0.0))
        self.now, self.number = 0.0, count()
        self.heap: list[tuple[float, int, int | _Flight]] = []  # who goes on when: a rank, or a message that has come
        self.queues: list[deque[_Exchange]] = [deque() for _ in ranks]  # of each rank: the one that is carried out, those after it
        self.taken: set[tuple[str, int]] = set()
        self.blocked: dict[tuple[str, int], list[_Flight]] = defaultdict(list)  # messages that wait for a way
        self.sent_by = [0.0] * len(ranks)  # when all that a rank has posted would be done if nobody else sent anything
        self.done: list[set[Turn]] = [set() for _ in ranks]
        self.waiting: dict[int, set[Turn]] = {}

    def run(self) -> Timeline:
        walks = [self.walk(n) for n in range(len(self.ranks))]
        for n in range(len(walks)):
            self.later(0.0, n)
        while self.heap:
            self.now, _, item = heappop(self.heap)
            if isinstance(item, _Flight):
                self.land(item)
            elif (wish := next(walks[item], None)) is None:
                self.found.seconds = max(self.found.seconds, self.now)
            elif isinstance(wish, set):
                self.waiting[item] = wish
                self.look(item)
            else:
                self.later(wish, item)
        if self.waiting:
            missing = [(n, *turn) for n, turns in sorted(self.waiting.items()) for turn in sorted(turns - self.done[n])]
            raise ValueError(f"ranks {sorted(self.waiting)} wait for messages that nobody sends: {missing[:4]}")
        return self.found

    def later(self, seconds: float, item: int | _Flight) -> None:
        heappush(self.heap, (self.now + seconds, next(self.number), item))

    def look(self, n: int) -> None:
        """Let a rank go on once all that it waits for has come."""
        if n in self.waiting and self.waiting[n] <= self.done[n]:
            self.done[n] -= self.waiting.pop(n)
            self.later(0.0, n)

    def begin(self, n: int) -> None:
        """A rank's turn has come: what it sends, and what is sent to it, sets out where the other side is as far."""
        mine = self.queues[n][0]
        for rank in (n, *mine.sources):
            theirs = self.queues[rank][0] if self.queues[rank] else None
            for flight in [f for f in theirs.sends if n in (f.sender, f.receiver)] if theirs else ():
                there = self.queues[flight.receiver][0] if self.queues[flight.receiver] else None
                if theirs and there and theirs.turn == there.turn == mine.turn:
                    theirs.sends.remove(flight)
                    flight.number = next(self.number)
                    self.leave(flight)

    def leave(self, flight: _Flight) -> None:
        """Send a message if its ways are free; else it is looked at again when one becomes free."""
        if taken := [way for way in flight.ways if way in self.taken]:
            self.blocked[taken[0]].append(flight)
            return
        self.taken.update(flight.ways)
        self.found.events.append((flight.sender, "send", self.now, self.now + flight.seconds))
        self.later(flight.seconds, flight)

    def land(self, flight: _Flight) -> None:
        """A message has come: who waits for its ways goes first, then what its sender and its receiver do next."""
        self.taken.difference_update(flight.ways)
        for other in sorted((f for way in flight.ways for f in self.blocked.pop(way, ())), key=lambda f: f.number):
            self.leave(other)
        for n in (flight.sender, flight.receiver):
            exchange = self.queues[n][0]
            exchange.left -= 1
            if not exchange.left:
                self.queues[n].popleft()
                self.done[n].add(exchange.turn)
                self.look(n)
                if self.queues[n]:
                    self.begin(n)

    def walk(self, n: int) -> Generator[float | set[Turn], None, None]:
        """One rank: what it waits for, as sets of exchanges, and how long it computes."""
        rank, device, last = self.ranks[n], self.ranks[n].cluster.device, self.ranks[n].last
        coming, returning, adding, drag = set[Turn](), set[Turn](), 0.0, 0.0
        swapped = rank.swapped_seconds(self.pass_) / 2  # there, and back again
        yield self.swap(n, swapped)
        for step in rank.steps:
            now = step.visit.step
            if due := {turn for turn in coming if turn[1] <= now}:
                coming -= due
                yield due
            for then in sorted({m.step for m in step.hops_out + step.hops_in}):
                ways = [[m for m in way if m.step == then] for way in (step.hops_out, step.hops_in)]
                drag = max(drag, self.post(n, ("kv", then), *ways))
                coming.add(("kv", then))
            work = compute_seconds(step, rank.shape, device, self.pass_, now == 0, now == last)
            beside = min(max(0.0, self.sent_by[n] - self.now), work)
            if work:
                self.found.events.append((n, "compute", self.now, self.now + work + drag * beside))
                self.found.busy[n] += work
                yield work + drag * beside
            if self.pass_ == "backward":
                if returning:
                    yield returning
                if adding:
                    yield adding
                returning, adding = set(), added_seconds(step, device)
                if step.visit.home.busy:
                    returning = {("gradient", now + 1)}
                    drag = max(drag, self.post(n, ("gradient", now + 1), step.home_out, step.home_in))
        if coming | returning:
            yield coming | returning
        yield adding
        yield self.swap(n, swapped)

    def swap(self, n: int, seconds: float) -> float:
        if seconds:
            self.found.events.append((n, "all-to-all", self.now, self.now + seconds))
        return seconds

    def post(self, n: int, turn: Turn, out: Sequence[Message], coming: Sequence[Message]) -> float:
        """Queue an exchange; the drag of the links that it takes."""
        links = [[self.ranks[n].link_to(m.peer) for m in way] for way in (out, coming)]
        taken = [sum(link.seconds(m.nbytes) for link, m in zip(of, way, strict=True)) for of, way in zip(links, (out, coming), strict=True)]
        self.sent_by[n] = max(self.sent_by[n], self.now) + max(taken)
        flights = [self.flight(n, m, link) for m, link in zip(out, links[0], strict=True)]
        sources = [m.peer % len(self.ranks) for m in coming]
        self.queues[n].append(_Exchange(turn, flights, sources, len(out) + len(coming)))
        if len(self.queues[n]) == 1:
            self.begin(n)
        return max((link.drag for of in links for link in of), default=0.0)

    def flight(self, n: int, m: Message, link: Link) -> _Flight:
        rank, dest = self.ranks[n], m.peer % len(self.ranks)
        ways = [("out", n), ("in", dest)]
        if not rank.cluster.local(rank.share.rank, rank.share.ring_peer(m.peer)):
            ways += [("nic out", n // self.per_nic), ("nic in", dest // self.per_nic)]
        return _Flight(n, dest, ways, link.seconds(m.nbytes))
