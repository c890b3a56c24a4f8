"""Copies between the memories of GPUs that reach each other's: no message, no SM, no wait of the host.

A `Window` is memory that every rank of a wire has a piece of, and that all may read and write: torch's symmetric memory. Its data is
moved by copy engines, on streams of their own. Who may touch a piece is told by flags in the window itself, one that a piece is full and
one that it is free for each pair of ranks; streams wait for and set them without a kernel (cuStreamWaitValue32, cuStreamWriteValue32).
Flags are 0 or 1, not counters, so that a CUDA graph can be replayed. NVLink multicast is not used.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from distflash.parallel.wire.base import SubWire, Wire
from distflash.parallel.wire.p2p import P2PWire

GRAIN = 1 << 21  # bytes; what memory is mapped in
_EQUAL = 1  # CU_STREAM_WAIT_VALUE_EQ
_FLUSH = 1 << 30  # CU_STREAM_WAIT_VALUE_FLUSH: what peers wrote before the flag is there, too
_CAN_FLUSH = 98  # CU_DEVICE_ATTRIBUTE_CAN_FLUSH_REMOTE_WRITES


class Window(Protocol):
    """A piece of memory on each of `size` ranks. What these methods wait for and tell is in the order of the current stream.

    The one who writes a piece waits until it is `writable`, writes, and gives it; a reader takes it, reads, and releases it.
    Where the piece lies, with the writer or with the reader, is the same to the flags: they belong to the pair.
    """

    def of(self, rank: int) -> Tensor:
        """The bytes of a rank's piece, [nbytes] uint8, in place."""
        ...

    def writable(self, *ranks: int) -> None:
        """Wait until each of them has released what we gave it last."""
        ...

    def give(self, *ranks: int) -> None:
        """Tell each of them that what was written until here is theirs to read."""
        ...

    def take(self, rank: int) -> None:
        """Wait until a rank has given us something."""
        ...

    def release(self, rank: int) -> None:
        """Tell it that we are done with what it gave."""
        ...


class Windows(Wire, Protocol):
    """A wire whose ranks reach each other's memory."""

    def window(self, name: str, nbytes: int) -> Window:
        """The window of that name, at least as large; every rank asks for the same ones in the same order. A collective if it grows."""
        ...

    def beside(self, lane: str) -> AbstractContextManager[None]:
        """Issue work in the order of a lane of its own, while ours computes."""
        ...

    def mark(self) -> torch.cuda.Event | None:
        """A point in the order of the current lane."""
        ...

    def after(self, mark: torch.cuda.Event | None) -> None:
        """What follows in the current lane waits for a point in another."""
        ...


def between(window: Window, owner: int, other: int, nbytes: int) -> Tensor:
    """What of the owner's piece is for, or of, another rank: [nbytes] uint8, of as much for each of the others in their order."""
    at = nbytes * (other - (other > owner))
    return window.of(owner)[at : at + nbytes]


def copy(source: Tensor, to: Tensor) -> None:
    """Copy tokens of [B, T, ...], a sequence at a time: contiguous, as copy engines do it."""
    for here, there in zip(source, to, strict=True):
        there.copy_(here)


class SymmetricWire(P2PWire):
    """The wire of GPUs of one host, over a ProcessGroup: small messages as NCCL sends them, blocks through windows."""

    def __init__(self, group: dist.ProcessGroup):
        super().__init__(group)
        self.name = "symmetric"
        self._lanes: dict[str, torch.cuda.Stream] = {}
        self._windows: dict[tuple[tuple[int, ...], str], CudaWindow] = {}
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {tuple(range(self.size)): group}

    def window(self, name: str, nbytes: int) -> Window:
        return self.window_among(range(self.size), name, nbytes)

    def window_among(self, members: Sequence[int], name: str, nbytes: int) -> Window:
        """A window of some ranks of the group."""
        key = tuple(members), name
        held = self._windows.get(key)
        if held is None or held.nbytes < nbytes:
            torch.cuda.synchronize(self.device)  # all that we have begun on the old one is done, on every rank once they have met below
            self._windows[key] = CudaWindow(self._group(key[0]), -(-nbytes // GRAIN) * GRAIN, self.device)
        return self._windows[key]

    def _group(self, members: tuple[int, ...]) -> dist.ProcessGroup:
        if members not in self._groups:
            ranks = [dist.get_global_rank(self.group, member) for member in members]
            group = dist.new_group(ranks, use_local_synchronization=True)
            assert isinstance(group, dist.ProcessGroup)  # we are one of its members
            self._groups[members] = group
        return self._groups[members]

    @contextmanager
    def beside(self, lane: str) -> Iterator[None]:
        if lane not in self._lanes:
            self._lanes[lane] = torch.cuda.Stream(self.device)
        with torch.cuda.stream(self._lanes[lane]):
            yield

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record()
        return event

    def after(self, mark: torch.cuda.Event | None) -> None:
        assert mark is not None
        torch.cuda.current_stream().wait_event(mark)

    def sub(self, members: Sequence[int]) -> Wire:
        return self if tuple(members) == tuple(range(self.size)) else SubWindows(self, members, len(members))


class SubWindows(SubWire):
    """Some ranks of a wire with windows."""

    def window(self, name: str, nbytes: int) -> Window:
        return self.parent.window_among(self.members, name, nbytes)  # type: ignore[attr-defined]

    def beside(self, lane: str) -> AbstractContextManager[None]:
        return self.parent.beside(lane)  # type: ignore[attr-defined]

    def mark(self) -> torch.cuda.Event | None:
        return self.parent.mark()  # type: ignore[attr-defined]

    def after(self, mark: torch.cuda.Event | None) -> None:
        self.parent.after(mark)  # type: ignore[attr-defined]


class CudaWindow:
    """A window in torch's symmetric memory. Creating one is a collective; when it returns, no rank uses an older one any more."""

    def __init__(self, group: dist.ProcessGroup, nbytes: int, device: torch.device):
        from torch.distributed import _symmetric_memory as symmetric

        self.nbytes, self.rank, self.size = nbytes, group.rank(), group.size()
        self._device = device.index or 0
        self._flags_at = nbytes  # behind the data: full[rank], then free[rank], int32
        self._memory = symmetric.empty(nbytes + GRAIN, dtype=torch.uint8, device=device)
        flags = self._memory[nbytes:].view(torch.int32)
        flags[: self.size].zero_()
        flags[self.size : 2 * self.size].fill_(1)
        torch.cuda.synchronize(device)  # no rank passes the rendezvous before all flags are set
        self._handle = symmetric.rendezvous(self._memory, group)
        self._pieces = [self._handle.get_buffer(rank, (nbytes,), torch.uint8) for rank in range(self.size)]
        self._base = [int(pointer) for pointer in self._handle.buffer_ptrs]
        self._flush = _FLUSH if _can_flush(self._device) else 0

    def of(self, rank: int) -> Tensor:
        return self._pieces[rank]

    def writable(self, *ranks: int) -> None:
        for rank in ranks:
            self._wait(self._free(self.rank, rank))

    def give(self, *ranks: int) -> None:
        for rank in ranks:
            self._set(self._free(self.rank, rank), 0)
            self._set(self._full(rank, self.rank), 1)

    def take(self, rank: int) -> None:
        self._wait(self._full(self.rank, rank))
        self._set(self._full(self.rank, rank), 0)

    def release(self, rank: int) -> None:
        self._set(self._free(rank, self.rank), 1)

    def _full(self, rank: int, peer: int) -> int:
        return self._base[rank] + self._flags_at + 4 * peer

    def _free(self, rank: int, peer: int) -> int:
        return self._full(rank, self.size + peer)

    def _wait(self, address: int) -> None:
        _driver("cuStreamWaitValue32_v2", self._device, address, 1, _EQUAL | self._flush)

    def _set(self, address: int, value: int) -> None:
        _driver("cuStreamWriteValue32_v2", self._device, address, value, 0)


def _driver(call: str, device: int, address: int, value: int, flags: int) -> None:
    if error := getattr(_cuda(), call)(torch.cuda.current_stream(device).cuda_stream, address, value, flags):
        raise RuntimeError(f"{call} failed with CUDA error {error}: use wire='p2p'")


@cache
def _cuda() -> ctypes.CDLL:
    cuda = ctypes.CDLL("libcuda.so.1")
    for call in (cuda.cuStreamWaitValue32_v2, cuda.cuStreamWriteValue32_v2):
        call.argtypes = (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint)
    return cuda


@cache
def _can_flush(device: int) -> bool:
    found = ctypes.c_int()
    return _cuda().cuDeviceGetAttribute(ctypes.byref(found), _CAN_FLUSH, device) == 0 and bool(found.value)


def obstacle(wire: P2PWire) -> str | None:
    """Why the ranks of a wire cannot reach each other's memory, None if they can: on all ranks alike. A collective."""
    if wire.device.type != "cuda" or torch.version.hip:
        return "it copies between the memories of NVIDIA GPUs"
    if wire.per_node != wire.size:
        return "its ranks must share a host"
    mine, visible = wire.device.index or 0, torch.cuda.device_count()
    reached = visible >= wire.size and all(torch.cuda.can_device_access_peer(mine, n) for n in range(visible) if n != mine)
    if refused := _count(wire, not reached):
        return f"{refused} of {wire.size} ranks cannot reach the memory of all GPUs of the host"
    failure = None
    try:
        CudaWindow(wire.group, GRAIN, wire.device)
    except RuntimeError as error:  # a container may forbid to hand memory over
        failure = str(error).strip().partition("\n")[0]
    if failed := _count(wire, failure is not None):
        return f"{failed} of {wire.size} ranks could not share memory{f': {failure}' if failure else ''}"
    return None


def _count(wire: P2PWire, here: bool) -> int:
    """On how many ranks it is so. A collective."""
    return int(wire.all_reduce(torch.tensor([here], dtype=torch.int32, device=wire.device)))
