"""Ring attention, once: one loop forward, one backward, for every layout, order, kernel and wire.

Legend: B batch, T local tokens, H query heads, Hk key/value heads, D head dim, Dv value head dim.

Blocks of K and V travel as one message. While one is worked on, those that the plan sends early are under way: two are alive at
a time in a ring, whatever the number of ranks, and a copy of our own where it is sent past ranks that do not need it. References
are the buffer pool: a block is freed when its computation is enqueued and its messages are waited on, and the allocator hands the
same memory to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from distflash.kernels.base import Kernel, Partial, Scores, accumulator
from distflash.parallel.plan import Home, Hop, Visit
from distflash.parallel.wire.base import Form, Pending, Wire, empty, pack, unpack
from distflash.parallel.wire.journal import noted

Asked = Callable[[int], Scores]  # what is asked of the scores with the keys of a rank of the ring


@noted("forward")
def forward(
    visits: Sequence[Visit], wire: Wire, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, scale: float, asked: Asked | None = None
) -> Partial:
    """Local queries against every block of the plan: out [B, T, H, Dv] in q.dtype, lse [B, H, T]."""
    last = _last(visits)
    acc = None  # (out, lse) over the keys seen so far, in the accumulator's dtype until the last visit
    for visit, k_t, v_t in travel(visits, wire, k, v):
        if visit.tiles or visit.step == last:
            scores = {} if asked is None else {"scores": asked(visit.owner)}
            acc = kernel.forward(q, k_t, v_t, visit.tiles, scale, acc=acc, dtype=q.dtype if visit.step == last else None, **scores)
        del k_t, v_t  # the next buffer is allocated before these names are bound again
    assert acc is not None
    return acc


@noted("backward")
def backward(
    visits: Sequence[Visit],
    wire: Wire,
    kernel: Kernel,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    scale: float,
    asked: Asked | None = None,
    *,
    dkv_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq in q.dtype; dk, dv in `dkv_dtype`, cast once after every rank has added its part.

    With the *global* lse and delta each block's gradient is independent (Ring Attention with FlashAttention-2, arXiv:2307.08691,
    Algorithm 2): dq adds up here, dk and dv ride home with their block, each rank adding its part.
    """
    last = _last(visits)
    gradients = _Gradients(visits, wire, k, v)
    alone = not any(visit.home.busy for visit in visits)  # what step 0 computes is all of our block's gradient
    dq: Tensor | None = None
    for visit, k_t, v_t in travel(visits, wire, k, v):
        grads: list[Tensor] = []  # dk, dv of a visit; none where nothing is kept of its block
        if visit.tiles or visit.step in (0, last):
            scores = {} if asked is None else {"scores": asked(visit.owner)}
            dq, *grads = kernel.backward(
                dout, q, k_t, v_t, lse, delta, visit.tiles, scale,
                dq=dq, dq_dtype=q.dtype if visit.step == last else None, dkv_dtype=dkv_dtype if alone else None, **scores,
            )  # fmt: skip
        gradients.move(visit, grads)
        del k_t, v_t, grads  # the next buffers are allocated before these names are bound again
    assert dq is not None
    dk, dv = (x.to(dkv_dtype, copy=not alone) for x in gradients.home())  # two tensors, not views of a message
    return dq, dk, dv


def travel(visits: Sequence[Visit], wire: Wire, k: Tensor, v: Tensor) -> Iterator[tuple[Visit, Tensor, Tensor]]:
    """Yield (visit, k, v); every block that the plan sends early is already under way while the caller computes.

    The block of a visit without tiles does not come, but for our own at step 0: its k and v are not to be read.
    """
    own, tokens = (k, v), {visit.step: visit.tiles.kv_len for visit in visits}
    message = pack(own) if any(hop.onward is not None for hop in visits[0].hops) else None
    coming: dict[int, _Exchange] = {}
    for visit in visits:
        wire.journal.at(visit.step, visits[-1].step)
        for step in [step for step in coming if step <= visit.step]:
            arrived = coming.pop(step).receive()
            if arrived:  # the block of this visit; an exchange that only sends brings none
                [(message, (k, v))] = arrived.values()
            del arrived
        for hop in visit.hops:
            forms = {} if hop.source is None else {hop.source: _forms(tokens[hop.step], k, v, k.dtype)}
            coming[hop.step] = _Exchange(wire, _sends(hop, message, own), forms, k.device)
        yield visit, k, v
    for exchange in coming.values():
        exchange.receive()


class _Exchange:
    """Messages under way, and how to read those that come."""

    def __init__(self, wire: Wire, sends: dict[int, Tensor], forms: dict[int, list[Form]], device: torch.device):
        self.forms, self.messages = forms, {source: empty(form, device) for source, form in forms.items()}
        self.pending: Pending = wire.exchange(sends, self.messages)

    def receive(self) -> dict[int, tuple[Tensor, list[Tensor]]]:
        """By source: the message, and views of the tensors inside."""
        self.pending.wait()
        return {source: (message, unpack(message, self.forms[source])) for source, message in self.messages.items()}


class _Gradients:
    """dk and dv of blocks, under way: those of the block at hand are passed on, those of our own block meet here."""

    def __init__(self, visits: Sequence[Visit], wire: Wire, k: Tensor, v: Tensor):
        self.wire, self.like, self.wide = wire, (k, v), accumulator(k.dtype)
        self.tokens = {visit.step: visit.tiles.kv_len for visit in visits}
        self.coming: tuple[Home, _Exchange] | None = None
        self.ours: list[Tensor] = []

    def move(self, visit: Visit, grads: list[Tensor]) -> None:
        """Join our part with what has arrived, pass it on, expect what comes before the next visit."""
        message, grads = self._arrived(grads)
        if visit.step == 0 and visit.home.dest is None:
            self.ours = grads
        sends = {} if visit.home.dest is None else {visit.home.dest: pack(grads) if message is None else message}
        expected = ((visit.home.source, visit.step + 1), (visit.home.ours, 0))
        forms = {source: _forms(self.tokens[step], *self.like, self.wide) for source, step in expected if source is not None}
        if visit.home.busy:
            self.coming = visit.home, _Exchange(self.wire, sends, forms, self.like[0].device)

    def home(self) -> list[Tensor]:
        """The sum of all that came home of our own block's gradient."""
        self._arrived([])
        return self.ours

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


def _forms(tokens: int, k: Tensor, v: Tensor, dtype: torch.dtype) -> list[Form]:
    """What travels of a block with that many tokens: like (k, v)."""
    return [((x.shape[0], tokens, *x.shape[2:]), dtype) for x in (k, v)]


def _last(visits: Sequence[Visit]) -> int:
    """The last step at which something is kept: what is finished there is cast."""
    return max((visit.step for visit in visits if visit.tiles), default=0)
