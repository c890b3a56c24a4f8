"""How long a plan takes: by tier, which nothing beats, and with what overlaps as `ring.py` lets it overlap.

A tier is what the bytes or FLOPs of a pass need at the full rate of one resource: T >= max over tiers. The prediction goes through one
rank's visits in order, and takes the others to be where it is: exact if all ranks do alike, else `simulate.py` says more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from distflash.cost import hbm
from distflash.cost.devices import Device, Link
from distflash.cost.hbm import Blocks
from distflash.cost.traffic import BLOCK, PASSES, Message, Shape, Share, Step


@dataclass(frozen=True)
class Cluster:
    """Ranks on hosts: `per_node` consecutive ones share one and its links, others meet over the network."""

    device: Device
    ranks: int
    per_node: int
    network: Link
    wire: str = "p2p"  # inside a host; between hosts there is one

    def local(self, a: int, b: int) -> bool:
        return a // self.per_node == b // self.per_node

    def link(self, a: int, b: int) -> Link:
        return self.device.wires[self.wire] if self.local(a, b) else self.network

    def refusal(self) -> str | None:
        """None, or why this wire cannot serve."""
        if self.wire not in self.device.wires:
            return f"{self.device.name} has no wire {self.wire!r}"
        if self.wire == "symmetric" and self.ranks > self.per_node:
            return f"symmetric memory reaches {self.per_node} ranks of a host, not {self.ranks} of several"
        return None


class Pass(NamedTuple):
    """Seconds of one pass over one layer's attention, of one rank."""

    seconds: float
    compute: float  # of these, those in which kernels run
    exposed: float  # and those in which nothing does but communication, the drag on kernels included
    tiers: dict[str, float]


def compute_seconds(step: Step, shape: Shape, device: Device, pass_: str, first: bool, last: bool) -> float:
    """Of one visit's kernel: the slower of FLOPs and HBM, and a launch. 0 where nothing is kept."""
    if not step.pairs:
        return 0.0
    rate, padding = device.rate(pass_, shape.head_dim)
    blocks = step.row_blocks if pass_ == "forward" else step.column_blocks
    flops = padding * shape.flops(pass_) * (step.pairs + rate.start * BLOCK**2 * blocks)
    return max(flops / rate.flops, hbm_bytes(step, shape, device, pass_, first, last) / device.hbm) + device.launch


def hbm_bytes(step: Step, shape: Shape, device: Device, pass_: str, first: bool, last: bool) -> int:
    """Of one visit, its programs walking abreast: what one of them loads, the others find in L2. So the block is that of all of them."""
    wave = device.processors * BLOCK
    if pass_ == "forward":
        return hbm.forward(step.visit.tiles, shape, Blocks(wave, BLOCK), first, last)
    return hbm.backward(step.visit.tiles, shape, Blocks(BLOCK, wave))


def added_seconds(step: Step, device: Device) -> float:
    """Adding our part to the gradients that come in: two reads and a write."""
    return 3 * sum(m.nbytes for m in step.home_in) / device.hbm


class Rank:
    """One rank of a scheme on a cluster, and how long it takes."""

    def __init__(self, share: Share, cluster: Cluster):
        self.share, self.cluster = share, cluster
        self.steps, self.shape, self.last = share.steps, share.shape, share.last

    def link_to(self, ring_peer: int) -> Link:
        return self.cluster.link(self.share.rank, self.share.ring_peer(ring_peer))

    def passes(self) -> dict[str, Pass]:
        return {pass_: self.one(pass_) for pass_ in PASSES}

    def one(self, pass_: str) -> Pass:
        """A pass: the all-to-alls, and between them the ring, each visit beside the messages that its plan sends with it."""
        device, last = self.cluster.device, self.last
        clock = compute = wire_free = home = adding = drag = 0.0
        arrival: dict[int, float] = {}
        for step in self.steps:
            now = step.visit.step
            clock = max([clock, *(arrival.pop(then) for then in [then for then in arrival if then <= now])])
            for then in sorted({m.step for m in step.hops_out + step.hops_in}):
                ways = [[m for m in way if m.step == then] for way in (step.hops_out, step.hops_in)]
                wire_free, slow = self._sent(ways, clock, wire_free)
                arrival[then], drag = wire_free, max(drag, slow)
            work = compute_seconds(step, self.shape, device, pass_, now == 0, now == last)
            beside = min(max(0.0, wire_free - clock), work)
            compute, clock = compute + work, clock + work + drag * beside
            if pass_ == "backward":
                clock, adding = max(clock, home) + adding, added_seconds(step, device)
                if step.visit.home.busy:
                    wire_free, slow = self._sent((step.home_out, step.home_in), clock, wire_free)
                    home, drag = wire_free, max(drag, slow)
        total = max([clock, home, *arrival.values()]) + adding + self.swapped_seconds(pass_)
        return Pass(total, compute, total - compute, self.tiers(pass_))

    def _sent(self, ways: Sequence[Sequence[Message]], clock: float, free: float) -> tuple[float, float]:
        """(when an exchange is done, its drag): it waits for the one before it; both ways at once, the messages of one in turn."""
        seconds = max(sum(self.link_to(m.peer).seconds(m.nbytes) for m in way) for way in ways)
        return max(clock, free) + seconds, max((self.link_to(m.peer).drag for way in ways for m in way), default=0.0)

    def swapped_seconds(self, pass_: str) -> float:
        """The two all-to-alls of Ulysses, which nothing runs beside, and packing and putting together what they carry."""
        moved, seconds = self.share.swapped(pass_), 0.0
        for local in (True, False):
            peers = [peer for peer in moved if self.cluster.local(self.share.rank, peer) == local]
            if nbytes := max((sum(moved[peer][way] for peer in peers) for way in (0, 1)), default=0):
                seconds = max(seconds, 2 * self.cluster.link(self.share.rank, peers[0]).seconds(nbytes / 2))  # there and back
        return seconds + 4 * sum(out for out, _ in moved.values()) / self.cluster.device.hbm

    def worked(self, pass_: str) -> Sequence[Step]:
        """The visits of a pass."""
        return self.steps

    def moved(self, pass_: str) -> Sequence[Mapping[int, int]]:
        """Bytes by the other rank: sent, received."""
        return self.share.traffic()[pass_]

    def tiers(self, pass_: str) -> dict[str, float]:
        """Seconds that each resource needs at its full rate."""
        device, last = self.cluster.device, self.last
        rate, _ = device.rate(pass_, self.shape.head_dim)
        worked = self.worked(pass_)
        pairs = sum(step.pairs for step in worked)
        nbytes = sum(hbm_bytes(s, self.shape, device, pass_, s.visit.step == 0, s.visit.step == last) for s in worked if s.visit.tiles)
        found = {"matmul": self.shape.flops(pass_) * pairs / rate.flops, "hbm": nbytes / device.hbm, "links": 0.0, "network": 0.0}
        for way in self.moved(pass_):
            total: Counter[str] = Counter()
            for peer, n in way.items():
                total["links" if self.cluster.local(self.share.rank, peer) else "network"] += n
            for tier, link in (("links", device.wires[self.cluster.wire]), ("network", self.cluster.network)):
                found[tier] = max(found[tier], total[tier] / link.bandwidth)
        return found
