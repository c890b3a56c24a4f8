"""What a wire is: it moves bytes between ranks. Wires know no attention.

A message is a 1-D uint8 tensor: whatever travels together is packed into one, so that every exchange is one message a peer
and nothing can be matched with the wrong half (hazard: two messages between two ranks swapped in silence).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from distflash.parallel.wire.journal import Journal

ALIGN = 128  # bytes: what follows in a message starts where TMA and vector loads may


class Pending(Protocol):
    """An exchange under way. It owns its buffers until it is waited on."""

    def wait(self) -> None:
        """Return once what was received may be read, and what was sent overwritten, by work enqueued from now on."""
        ...


class Wire(Protocol):
    """Point-to-point exchange among `size` ranks; `rank` is ours, counted inside the group."""

    name: str
    rank: int
    size: int
    per_node: int  # how many consecutive ranks share a host
    device: torch.device  # where tensors live unless the caller says otherwise
    journal: Journal  # what this rank is about on it

    def exchange(self, sends: Mapping[int, Tensor], recvs: Mapping[int, Tensor]) -> Pending:
        """Start sending `sends[rank]` and receiving into `recvs[rank]`, all at once. Empty messages are not sent.

        Both sides must know all sizes beforehand: the plan says them.
        """
        ...

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over all ranks, for small tensors (losses, counts); bit-equal on every rank."""
        ...

    def sub(self, members: Sequence[int]) -> Wire:
        """The same wire among `members` alone, who are renumbered in that order; we must be one of them."""
        ...


class SubWire:
    """A wire among some ranks of another one. No new communicator: nothing to create in the same order on every rank."""

    def __init__(self, parent: Wire, members: Sequence[int], per_node: int):
        self.parent, self.members, self.per_node = parent, tuple(members), per_node
        self.name, self.device, self.journal = parent.name, parent.device, parent.journal
        self.rank, self.size = self.members.index(parent.rank), len(self.members)

    def exchange(self, sends: Mapping[int, Tensor], recvs: Mapping[int, Tensor]) -> Pending:
        name = self.members.__getitem__
        return self.parent.exchange({name(r): x for r, x in sends.items()}, {name(r): x for r, x in recvs.items()})

    def all_reduce(self, x: Tensor) -> Tensor:
        first, *others = swapped(self, [x] * self.size, lambda _: torch.empty_like(x))
        return sum(others, start=first)

    def sub(self, members: Sequence[int]) -> Wire:
        return SubWire(self, members, len(members))


def swapped(wire: Wire, outgoing: Sequence[Tensor], room: Callable[[int], Tensor]) -> list[Tensor]:
    """Give `outgoing[rank]` to each rank; what each gave us, in rank order, written into `room(rank)`: ours is what we hold."""
    arriving = {rank: room(rank) for rank in range(wire.size) if rank != wire.rank}
    sends = {rank: _bytes(outgoing[rank].contiguous()) for rank in arriving}
    wire.exchange(sends, {rank: _bytes(x) for rank, x in arriving.items()}).wait()
    return [arriving.get(rank, outgoing[rank]) for rank in range(wire.size)]


def _bytes(x: Tensor) -> Tensor:
    return x.view(-1).view(torch.uint8)


def pack(tensors: Sequence[Tensor]) -> Tensor:
    """One message that holds all tensors, each from a 128-byte border on."""
    message = empty([(t.shape, t.dtype) for t in tensors], tensors[0].device)
    for part, tensor in zip(unpack(message, [(t.shape, t.dtype) for t in tensors]), tensors, strict=True):
        part.copy_(tensor)
    return message


Form = tuple[Sequence[int], torch.dtype]  # shape and dtype of a tensor inside a message


def empty(forms: Sequence[Form], device: torch.device) -> Tensor:
    """An unwritten message with room for tensors of these forms."""
    return torch.empty(room(forms), dtype=torch.uint8, device=device)


def room(forms: Sequence[Form]) -> int:
    """Bytes of a message with tensors of these forms."""
    return sum(_room(form) for form in forms)


def unpack(message: Tensor, forms: Sequence[Form]) -> list[Tensor]:
    """Views of the tensors inside a message."""
    views, at = [], 0
    for shape, dtype in forms:
        numel = torch.Size(shape).numel()
        views.append(message[at : at + numel * dtype.itemsize].view(dtype).view(tuple(shape)))
        at += _room((shape, dtype))
    return views


def _room(form: Form) -> int:
    shape, dtype = form
    return -(-torch.Size(shape).numel() * dtype.itemsize // ALIGN) * ALIGN
