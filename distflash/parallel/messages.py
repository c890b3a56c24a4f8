"""How blocks of K and V, and their gradients, move between ranks: as messages, over any wire.

A block travels as one message, packed. While one is worked on, those that the plan sends early are under way: two are alive at
a time in a ring, whatever the number of ranks, and a copy of our own where it is sent past ranks that do not need it. References
are the buffer pool: a block is freed when its computation is enqueued and its messages are waited on, and the allocator hands the
same memory to the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from distflash.kernels.base import accumulator
from distflash.parallel.plan import Home, Hop, Visit
from distflash.parallel.wire.base import Form, Pending, Wire, empty, pack, unpack


class Messages:
    """A `ring.Carrier` over a wire."""

    def __init__(self, wire: Wire):
        self.wire, self.journal = wire, wire.journal

    def travel(self, visits: Sequence[Visit], k: Tensor, v: Tensor) -> Iterator[tuple[Visit, Tensor, Tensor]]:
        """Yield (visit, k, v); every block that the plan sends early is already under way while the caller computes.

        The block of a visit without tiles does not come, but for our own at step 0: its k and v are not to be read.
        """
        own, tokens = (k, v), {visit.step: visit.tiles.kv_len for visit in visits}
        message = pack(own) if any(hop.onward is not None for hop in visits[0].hops) else None
        coming: dict[int, _Exchange] = {}
        for visit in visits:
            self.journal.at(visit.step, visits[-1].step)
            for step in [step for step in coming if step <= visit.step]:
                arrived = coming.pop(step).receive()
                if arrived:  # the block of this visit; an exchange that only sends brings none
                    [(message, (k, v))] = arrived.values()
                del arrived
            for hop in visit.hops:
                forms = {} if hop.source is None else {hop.source: block_forms(tokens[hop.step], k, v, k.dtype)}
                coming[hop.step] = _Exchange(self.wire, _sends(hop, message, own), forms, k.device)
            yield visit, k, v
        for exchange in coming.values():
            exchange.receive()

    def gradients(self, visits: Sequence[Visit], k: Tensor, v: Tensor, dtype: torch.dtype) -> Gradients:
        """dk and dv ride home with their block, each rank adding its part."""
        return Gradients(visits, self.wire, k, v, dtype)


class _Exchange:
    """Messages under way, and how to read those that come."""

    def __init__(self, wire: Wire, sends: dict[int, Tensor], forms: dict[int, list[Form]], device: torch.device):
        self.forms, self.messages = forms, {source: empty(form, device) for source, form in forms.items()}
        self.pending: Pending = wire.exchange(sends, self.messages)

    def receive(self) -> dict[int, tuple[Tensor, list[Tensor]]]:
        """By source: the message, and views of the tensors inside."""
        self.pending.wait()
        return {source: (message, unpack(message, self.forms[source])) for source, message in self.messages.items()}


class Gradients:
    """dk and dv of blocks, under way: those of the block at hand are passed on, those of our own block meet here."""

    def __init__(self, visits: Sequence[Visit], wire: Wire, k: Tensor, v: Tensor, dtype: torch.dtype):
        self.wire, self.like, self.wide, self.dtype = wire, (k, v), accumulator(k.dtype), dtype
        self.tokens = {visit.step: visit.tiles.kv_len for visit in visits}
        self.coming: tuple[Home, _Exchange] | None = None
        self.ours: list[Tensor] = []
        self.shared = any(visit.home.busy for visit in visits)
        self.taken = None if self.shared else dtype  # what step 0 computes is all of our block's gradient

    def move(self, visit: Visit, grads: list[Tensor]) -> None:
        """Join our part with what has arrived, pass it on, expect what comes before the next visit."""
        message, grads = self._arrived(grads)
        if visit.step == 0 and visit.home.dest is None:
            self.ours = grads
        sends = {} if visit.home.dest is None else {visit.home.dest: pack(grads) if message is None else message}
        expected = ((visit.home.source, visit.step + 1), (visit.home.ours, 0))
        forms = {source: block_forms(self.tokens[step], *self.like, self.wide) for source, step in expected if source is not None}
        if visit.home.busy:
            self.coming = visit.home, _Exchange(self.wire, sends, forms, self.like[0].device)

    def home(self) -> list[Tensor]:
        """The sum of all that came home of our own block's gradient; a copy where it lies in a message."""
        self._arrived([])
        return [x.to(self.dtype, copy=self.shared) for x in self.ours]

    def _arrived(self, grads: list[Tensor]) -> tuple[Tensor | None, list[Tensor]]:
        """(message that holds them or None, dk and dv) of the block at hand, our part added; what came home joins the rest."""
        if self.coming is None:
            return None, grads
        home, exchange = self.coming
        self.coming, arrived = None, exchange.receive()
        if home.ours is not None:
            self.ours = _added(arrived[home.ours][1], self.ours)
        if home.source is None:
            return None, grads
        message, theirs = arrived[home.source]
        return message, _added(theirs, grads)


def _added(theirs: list[Tensor], ours: list[Tensor]) -> list[Tensor]:
    """Ours added to theirs in place; nothing of ours leaves theirs as they are."""
    for x, y in zip(theirs, ours, strict=False):
        x.add_(y)
    return theirs


def _sends(hop: Hop, message: Tensor | None, own: tuple[Tensor, Tensor]) -> dict[int, Tensor]:
    sends = {}
    if hop.onward is not None:
        assert message is not None
        sends[hop.onward] = message
    if hop.own is not None:
        sends[hop.own] = pack(own)
    return sends


def block_forms(tokens: int, k: Tensor, v: Tensor, dtype: torch.dtype) -> list[Form]:
    """What moves of a block with that many tokens, keys and values or their gradients: like (k, v)."""
    return [((x.shape[0], tokens, *x.shape[2:]), dtype) for x in (k, v)]
