"""How long a rank takes where blocks are copied from memory to memory (direct.py): by copy engines, straight from and to their owners.

What differs from messages: nothing is passed on, only keys that are seen move, no SM sends or receives, gradients are added up at the end,
and half of the own block is worked on while the last of them go home. All transfers of a rank are taken to queue, one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from distflash.cost.memory import Copies
from distflash.cost.time import Cluster, Pass, Rank, compute_seconds
from distflash.cost.traffic import PASSES, Shape, Share, Step, steps
from distflash.parallel.plan import Home, Visit


class Copying(Rank):
    """A `Rank` whose visits are `staging.copies`; its all-to-alls of Ulysses are those of `Rank`."""

    def __init__(self, share: Share, cluster: Cluster, copies: Copies):
        super().__init__(share, cluster)
        self.plans, self.own = copies, share.steps[0].visit
        self.copies: dict[str, Sequence[Visit]] = dict(zip(PASSES, copies, strict=True))

    def one(self, pass_: str) -> Pass:
        return self.schedule(pass_)[0]

    def schedule(self, pass_: str) -> tuple[Pass, list[tuple[str, float, float]]]:
        """A pass, and what is done when: ("compute" or "send", start, end) of each kernel and of each copy."""
        s, device, link, backward = self.shape, self.cluster.device, self.cluster.device.wires[self.cluster.wire], pass_ == "backward"
        worked, pulled, pushed = self.worked(pass_), self.pulled(pass_), 0
        last = max((n for n, step in enumerate(worked) if step.pairs), default=0)
        clock, free, compute, arrival, rounds = 2 * s.message(self.own.tiles.q_len, s.itemsize) / device.hbm, 0.0, 0.0, {}, 1  # published
        events: list[tuple[str, float, float]] = []

        def copied(nbytes: int) -> float:
            start = max(clock, free)
            events.append(("send", start, start + link.seconds(nbytes)))
            return events[-1][2]

        for n, step in enumerate(worked):
            for hop in self.copies[pass_][n].hops:
                free, rounds = copied(pulled[hop.step]), rounds + 1
                arrival[hop.step] = free
            clock = max(clock, arrival.get(step.visit.step, 0.0)) if self.others(step.visit) else clock
            work = compute_seconds(step, s, device, pass_, n == 0, n == last)
            start, clock = clock, clock + work + link.drag * min(max(0.0, free - clock), work)
            compute += work
            events += [("compute", start, clock)] if work else []
            if backward and self.others(step.visit) and step.pairs:
                nbytes = s.message(step.visit.tiles.kv_len, s.wide)
                free, pushed, rounds = copied(nbytes), pushed + nbytes, rounds + 1
        total = max(clock, free)
        if backward:  # our parts and those of the others, about as large as what we sent them, are read, their sum is written
            total += (s.message(self.own.tiles.q_len, s.wide + s.itemsize) + pushed) / device.hbm
        total = max(total, rounds * link.host) + self.swapped_seconds(pass_)
        return Pass(total, compute, total - compute, self.tiers(pass_)), events

    def worked(self, pass_: str) -> list[Step]:
        """The visits and their sizes; what travels beside them is not in it."""
        return steps([replace(visit, hops=(), home=Home(None, None, None)) for visit in self.copies[pass_]], self.shape)

    def pulled(self, pass_: str) -> dict[int, int]:
        """Bytes of K and V, by the step that they are copied for."""
        return {v.step: self.shape.message(v.tiles.kv_len, self.shape.itemsize) for v in self.copies[pass_] if self.others(v)}

    def others(self, visit: Visit) -> bool:
        return visit.owner != self.own.owner

    def moved(self, pass_: str) -> Sequence[Mapping[int, int]]:
        """Of the ring as much in as out, whoever the other rank is: all are of this host."""
        ring, swapped = carried(self.copies[pass_], self.shape, pass_), self.share.swapped(pass_)
        return [{self.share.rank: ring} | {peer: both[way] for peer, both in swapped.items()} for way in (0, 1)]


def carried(visits: Sequence[Visit], shape: Shape, pass_: str) -> int:
    """Bytes that a rank copies in a pass, `staging.copies` of it: others' K and V to itself, and backward their gradients to them."""
    sizes = (shape.itemsize, shape.wide) if pass_ == "backward" else (shape.itemsize,)
    tokens = sum(visit.tiles.kv_len for visit in visits if visit.owner != visits[0].owner and visit.tiles)
    return tokens * sum(sizes) * shape.token // shape.itemsize
