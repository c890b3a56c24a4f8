"""A discrete-event simulation of a plan: ranks that compute, links that carry one message at a time, messages that are waited for.

Every rank walks its visits as `ring.py` does: wait for the block, post what sets out, compute, wait for gradients, add, send them on.
A message holds the sender's way out and the receiver's way in for as long as its link takes; what finds them taken queues, a rank's
messages in the order in which it sends them. So two messages over one link take twice as long. `ranks` may be the first hosts only,
if all hosts do alike: their messages to the next host then arrive at the first one again, and thousands of ranks cost as much as one
host's.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count

from distflash.cost.time import Rank, added_seconds, compute_seconds
from distflash.cost.traffic import Message

Key = tuple[str, int, int, int]  # "kv" or "gradient", sender, receiver, step: what a rank waits for

KINDS = ("compute", "send", "all-to-all")


@dataclass
class Timeline:
    """What happened: seconds of the pass, and (rank of the ring, one of KINDS, start, end) of everything."""

    seconds: float = 0.0
    busy: dict[int, float] = field(default_factory=lambda: defaultdict(float))  # computing, by rank
    events: list[tuple[int, str, float, float]] = field(default_factory=list)

    @property
    def efficiency(self) -> float:
        """The mean share of the time in which ranks compute."""
        return sum(self.busy.values()) / len(self.busy) / self.seconds if self.seconds else 1.0


def simulate(ranks: Sequence[Rank], pass_: str, per_nic: int = 1) -> Timeline:
    """One pass over ranks 0.. of a ring (all of them, or those of the first hosts), `per_nic` neighbours sharing a NIC.

    Raises ValueError if messages that ranks wait for are never sent.
    """
    return _Simulation(ranks, pass_, per_nic).run()


@dataclass(eq=False)
class _Flight:
    """A message that waits for its ways, or is on them."""

    sender: int
    key: Key
    ways: list[tuple[str, int]]
    seconds: float


class _Simulation:
    def __init__(self, ranks: Sequence[Rank], pass_: str, per_nic: int):
        self.ranks, self.pass_, self.per_nic, self.found = ranks, pass_, per_nic, Timeline()
        self.now, self.number = 0.0, count()
        self.heap: list[tuple[float, int, int | _Flight]] = []  # who goes on when: a rank, or a message that has come
        self.queues: list[deque[_Flight]] = [deque() for _ in ranks]  # of each sender: messages that have not left, in order
        self.taken: set[tuple[str, int]] = set()
        self.blocked: dict[tuple[str, int], list[int]] = defaultdict(list)  # senders whose first message waits for a way
        self.sent_by = [0.0] * len(ranks)  # when all that a rank has posted would be sent if nobody else sent anything
        self.arrived: set[Key] = set()
        self.waiting: dict[int, set[Key]] = {}

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
            missing = sorted(set().union(*self.waiting.values()) - self.arrived)
            raise ValueError(f"ranks {sorted(self.waiting)} wait for messages that nobody sends: {missing[:4]}")
        return self.found

    def later(self, seconds: float, item: int | _Flight) -> None:
        heappush(self.heap, (self.now + seconds, next(self.number), item))

    def look(self, n: int) -> None:
        """Let a rank go on once all that it waits for has come."""
        if self.waiting[n] <= self.arrived:
            self.arrived -= self.waiting.pop(n)
            self.later(0.0, n)

    def leave(self, sender: int) -> None:
        """Send a rank's first message if its ways are free; else it is looked at again when one becomes free."""
        if not self.queues[sender]:
            return
        flight = self.queues[sender][0]
        if taken := [way for way in flight.ways if way in self.taken]:
            self.blocked[taken[0]].append(sender)
            return
        self.queues[sender].popleft()
        self.taken.update(flight.ways)
        self.found.events.append((sender, "send", self.now, self.now + flight.seconds))
        self.later(flight.seconds, flight)

    def land(self, flight: _Flight) -> None:
        """A message has come: its ways are free, its receiver may go on."""
        self.taken.difference_update(flight.ways)
        self.arrived.add(flight.key)
        if (receiver := flight.key[2]) in self.waiting:
            self.look(receiver)
        for sender in [flight.sender, *(n for way in flight.ways for n in self.blocked.pop(way, ()))]:
            self.leave(sender)

    def walk(self, n: int) -> Generator[float | set[Key], None, None]:
        """One rank: what it waits for, as sets of messages, and how long it computes."""
        rank, device, last = self.ranks[n], self.ranks[n].cluster.device, self.ranks[n].last
        coming: dict[int, set[Key]] = defaultdict(set)
        returning, adding = set[Key](), 0.0
        swapped = rank.swapped_seconds(self.pass_) / 2  # there, and back again
        yield self.swap(n, swapped)
        for step in rank.steps:
            now = step.visit.step
            due = set[Key]().union(*(coming.pop(then) for then in [then for then in coming if then <= now]))
            if due:
                yield due
            for m in step.hops_in:
                coming[m.step].add(self.key("kv", m.peer, n, m.step))
            drag = self.send(n, "kv", step.hops_out)
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
                self.send(n, "gradient", step.home_out)
                returning, adding = {self.key("gradient", m.peer, n, m.step) for m in step.home_in}, added_seconds(step, device)
        for keys in (*coming.values(), returning):
            if keys:
                yield keys
        yield adding
        yield self.swap(n, swapped)

    def swap(self, n: int, seconds: float) -> float:
        if seconds:
            self.found.events.append((n, "all-to-all", self.now, self.now + seconds))
        return seconds

    def key(self, kind: str, source: int, dest: int, step: int) -> Key:
        return kind, source % len(self.ranks), dest % len(self.ranks), step

    def send(self, n: int, kind: str, messages: Sequence[Message]) -> float:
        """Put messages on their ways; the drag of the links they take."""
        rank, drag = self.ranks[n], 0.0
        for m in sorted(messages, key=lambda m: m.step):
            link, dest = rank.link_to(m.peer), m.peer % len(self.ranks)
            ways = [("out", n), ("in", dest)]
            if not rank.cluster.local(rank.share.rank, rank.share.ring_peer(m.peer)):
                ways += [("nic out", n // self.per_nic), ("nic in", dest // self.per_nic)]
            self.queues[n].append(_Flight(n, self.key(kind, n, m.peer, m.step), ways, link.seconds(m.nbytes)))
            self.sent_by[n] = max(self.sent_by[n], self.now) + link.seconds(m.nbytes)
            drag = max(drag, link.drag)
            if len(self.queues[n]) == 1:
                self.leave(n)
        return drag
