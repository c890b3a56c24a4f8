"""P ranks as threads of one process: every multi-rank test runs through it, on a CPU or on one GPU.

Messages are copied when they are sent, so a buffer that is overwritten too early shows up as a wrong result here too.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from distflash.parallel.wire.base import Pending, SubWire, Wire
from distflash.parallel.wire.journal import Disagreement, Journal, Made, Now
from distflash.parallel.wire.symmetric import SubWindows, Window

_PATIENCE = 120.0  # seconds a rank waits for another one before it gives up
_SLICE = 0.5  # seconds between two looks at what the others do instead


class LocalGroup:
    """What P threads share: a mailbox for each pair of ranks. Give each thread its `wire(rank)`."""

    def __init__(self, size: int, device: torch.device | str = "cpu", per_node: int | None = None):
        self.size, self.device, self.per_node = size, torch.device(device), per_node or size
        self.mail: dict[tuple[int, int], dict[int, tuple[Tensor, Made]]] = defaultdict(dict)  # by pair, then by number
        self.sent, self.asked = Counter(), Counter()  # messages of each pair so far: the n-th that is asked for is the n-th sent
        self.changed = threading.Condition()
        self.failed = False
        self.notes: dict[int, dict[int, str]] = defaultdict(dict)  # by round, then by rank
        self.journals = {rank: Journal("of threads") for rank in range(size)}
        self.windows: dict[tuple, LocalMemory] = {}  # by ranks, name and size

    def wire(self, rank: int) -> LocalWire:
        return LocalWire(self, rank)

    def wait(self, rank: int, there: Callable[[], bool], what: str) -> None:
        """Let a rank wait until something is there, named for the error if it never is; `changed` is held."""
        end, ours = time.monotonic() + _PATIENCE, self.journals[rank]
        while not self.changed.wait_for(lambda: there() or self.failed, _SLICE) and time.monotonic() < end:
            for other, journal in self.journals.items():
                theirs = journal.made
                if ours.counterpart(theirs) not in (None, theirs):
                    raise Disagreement(f"ranks disagree on calls: rank {other} made {theirs}, rank {rank} made {ours.counterpart(theirs)}")
        if not there():
            raise RankLost(f"rank {rank} waited for {what}")

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
    patience = _PATIENCE
    unequal: str | None = None  # its hosts hold `per_node` ranks each, but for the last

    def __init__(self, group: LocalGroup, rank: int):
        self.group, self.rank, self.size = group, rank, group.size
        self.device, self.per_node = group.device, group.per_node
        self.journal = group.journals[rank]

    def exchange(self, sends: Mapping[int, Tensor], recvs: Mapping[int, Tensor]) -> Pending:
        with self.group.changed:
            for dest, message in sends.items():
                if message.numel():
                    pair = self.rank, dest
                    self.group.mail[pair][self.group.sent[pair]] = message.clone(), self.journal.made
                    self.group.sent[pair] += 1
            self.group.changed.notify_all()
            return _Receipt(self.group, self.rank, {source: message for source, message in recvs.items() if message.numel()})

    def all_reduce(self, x: Tensor) -> Tensor:
        return SubWire(self, range(self.size), self.per_node).all_reduce(x)

    def sub(self, members: Sequence[int]) -> Wire:
        return SubWindows(self, members, max(1, self.per_node * len(members) // self.size))

    def window(self, name: str, nbytes: int) -> Window:
        return self.window_among(range(self.size), name, nbytes)

    def window_among(self, members: Sequence[int], name: str, nbytes: int) -> Window:
        """A window of some ranks of the group."""
        members = tuple(members)
        with self.group.changed:
            if (members, name, nbytes) not in self.group.windows:
                self.group.windows[members, name, nbytes] = LocalMemory(members, nbytes, self.device)
        return LocalWindow(self.group, self.group.windows[members, name, nbytes], members.index(self.rank))

    def beside(self, lane: str) -> AbstractContextManager[None]:
        return nullcontext()  # threads have one order, and each waits for the others by itself

    def mark(self) -> None:
        return None

    def after(self, mark: torch.cuda.Event | None) -> None:
        pass

    def post(self, round: int, note: str) -> None:
        with self.group.changed:
            self.group.notes[round][self.rank] = note
            self.group.notes.pop(round - 2, None)
            self.group.changed.notify_all()

    def read(self, round: int, seconds: float) -> dict[int, str]:
        notes = self.group.notes[round]
        with self.group.changed:
            self.group.changed.wait_for(lambda: len(notes) == self.size or self.group.failed, seconds)
            if self.group.failed and len(notes) < self.size:
                raise RankLost(f"rank {self.rank} waited for notes of other ranks, of which one failed")
            return dict(notes)

    def others(self) -> dict[int, Now]:
        return {rank: journal.now for rank, journal in self.group.journals.items() if rank != self.rank}


class _Receipt:
    def __init__(self, group: LocalGroup, rank: int, recvs: Mapping[int, Tensor]):
        self.group, self.rank, self.recvs = group, rank, dict(recvs)
        self.made, self.numbers = group.journals[rank].made, {source: group.asked[source, rank] for source in recvs}
        group.asked.update((source, rank) for source in recvs)  # this rank alone asks for these

    def wait(self) -> None:
        for source, buffer in self.recvs.items():
            box, number = self.group.mail[source, self.rank], self.numbers[source]
            with self.group.changed:
                awaited = f"a message of rank {source} that did not come"
                self.group.wait(self.rank, lambda box=box, number=number: number in box, awaited)
                message, made = box.pop(number)
            _check(source, made, self.rank, self.made)
            assert message.numel() == buffer.numel(), f"{message.numel()} bytes came, {buffer.numel()} were expected"
            buffer.copy_(message)


def _check(source: int, theirs: Made, rank: int, ours: Made) -> None:
    if theirs != ours:
        raise Disagreement(f"ranks disagree on calls: rank {source} sent something of {theirs}, rank {rank} waits for {ours}")


class LocalMemory:
    """The memory of a window, and its flags."""

    def __init__(self, members: tuple[int, ...], nbytes: int, device: torch.device):
        self.members, ranks = members, range(len(members))
        self.pieces = [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in ranks]
        self.full: dict[tuple[int, int], Made] = {}  # (writer, reader): given in that call, and not taken yet
        self.free = {(writer, reader) for writer in ranks for reader in ranks}


class LocalWindow:
    """One rank's view of it."""

    def __init__(self, group: LocalGroup, memory: LocalMemory, rank: int):
        self.group, self.memory, self.rank = group, memory, rank
        self.journal = group.journals[memory.members[rank]]
        self.asked: set[int] = set()  # for whom we may write

    def of(self, rank: int) -> Tensor:
        return self.memory.pieces[rank]

    def writable(self, *ranks: int) -> None:
        for rank in ranks:
            self._wait(self.memory.free, (self.rank, rank))
            self.asked.add(rank)

    def give(self, *ranks: int) -> None:
        with self.group.changed:
            for pair in [(self.rank, rank) for rank in ranks]:
                assert pair[1] in self.asked, f"{pair} was given, and it had not been asked whether it may be written"
                self.asked.remove(pair[1])
                self.memory.free.remove(pair)
                self.memory.full[pair] = self.journal.made
            self.group.changed.notify_all()

    def take(self, rank: int) -> None:
        self._wait(self.memory.full, (rank, self.rank))
        made, members = self.memory.full.pop((rank, self.rank)), self.memory.members
        _check(members[rank], made, members[self.rank], self.journal.made)

    def release(self, rank: int) -> None:
        with self.group.changed:
            self.memory.free.add((rank, self.rank))
            self.group.changed.notify_all()

    def _wait(self, flags: Container[tuple[int, int]], pair: tuple[int, int]) -> None:
        with self.group.changed:
            self.group.wait(self.memory.members[self.rank], lambda: pair in flags, f"a flag of {pair} that was not set")
