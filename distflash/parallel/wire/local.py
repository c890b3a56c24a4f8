"""P ranks as threads of one process: every multi-rank test runs through it, on a CPU or on one GPU.

Messages are copied when they are sent, so a buffer that is overwritten too early shows up as a wrong result here too.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from distflash.parallel.wire.base import Pending, SubWire, Wire

_PATIENCE = 120.0  # seconds a rank waits for another one before it gives up


class LocalGroup:
    """What P threads share: a mailbox for each pair of ranks. Give each thread its `wire(rank)`."""

    def __init__(self, size: int, device: torch.device | str = "cpu", per_node: int | None = None):
        self.size, self.device, self.per_node = size, torch.device(device), per_node or size
        self.mail: dict[tuple[int, int], deque[Tensor]] = defaultdict(deque)
        self.changed = threading.Condition()
        self.failed = False

    def wire(self, rank: int) -> LocalWire:
        return LocalWire(self, rank)

    def fail(self) -> None:
        """A rank raised: wake those who wait for it."""
        with self.changed:
            self.failed = True
            self.changed.notify_all()


class RankLost(RuntimeError):
    """Another rank of the group raised or never answered; its own error is the one to read."""


class LocalWire:
    """One rank's end of a LocalGroup."""

    name = "local"

    def __init__(self, group: LocalGroup, rank: int):
        self.group, self.rank, self.size = group, rank, group.size
        self.device, self.per_node = group.device, group.per_node

    def exchange(self, sends: Mapping[int, Tensor], recvs: Mapping[int, Tensor]) -> Pending:
        with self.group.changed:
            for dest, message in sends.items():
                if message.numel():
                    self.group.mail[self.rank, dest].append(message.clone())
            self.group.changed.notify_all()
        return _Receipt(self.group, self.rank, recvs)

    def all_reduce(self, x: Tensor) -> Tensor:
        return SubWire(self, range(self.size), self.per_node).all_reduce(x)

    def sub(self, members: Sequence[int]) -> Wire:
        return SubWire(self, members, max(1, self.per_node * len(members) // self.size))


class _Receipt:
    def __init__(self, group: LocalGroup, rank: int, recvs: Mapping[int, Tensor]):
        self.group, self.rank, self.recvs = group, rank, {s: m for s, m in recvs.items() if m.numel()}

    def wait(self) -> None:
        for source, buffer in self.recvs.items():
            box = self.group.mail[source, self.rank]
            with self.group.changed:
                there = self.group.changed.wait_for(lambda box=box: box or self.group.failed, _PATIENCE)
                if not there or not box:
                    raise RankLost(f"rank {self.rank} waited for a message of rank {source} that did not come")
                message = box.popleft()
            assert message.numel() == buffer.numel(), f"{message.numel()} bytes came, {buffer.numel()} were expected"
            buffer.copy_(message)
