"""Ring attention, once: one loop forward, one backward, for every layout, order, kernel and wire.

Legend: B batch, T local tokens, H query heads, Hk key/value heads, D head dim, Dv value head dim.

Blocks of K and V travel as one message. While one is worked on, those that the plan sends early are under way: two are alive at
a time in a ring, whatever the number of ranks. References are the buffer pool: a block is freed when its computation is enqueued
and its messages are waited on, and the allocator hands the same memory to the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from distflash.kernels.base import Kernel, Partial
from distflash.parallel.plan import Visit
from distflash.parallel.wire.base import Form, Pending, Wire, empty, pack, unpack


def forward(visits: Sequence[Visit], wire: Wire, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Partial:
    """Local queries against every block of the plan: out [B, T, H, Dv] in q.dtype, lse [B, H, T]."""
    last = len(visits) - 1
    acc = None  # (out, lse) over the keys seen so far, in the accumulator's dtype until the last visit
    for visit, k_t, v_t in travel(visits, wire, k, v):
        if visit.tiles or visit.step == last:
            acc = kernel.forward(q, k_t, v_t, visit.tiles, scale, acc=acc, dtype=q.dtype if visit.step == last else None)
        del k_t, v_t  # the next buffer is allocated before these names are bound again
    assert acc is not None
    return acc


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
    *,
    dkv_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq in q.dtype; dk, dv in `dkv_dtype`, cast once after every rank has added its part.

    With the *global* lse and delta each block's gradient is independent (Ring Attention with FlashAttention-2, arXiv:2307.08691,
    Algorithm 2): dq adds up here, dk and dv ride home with their block, each rank adding its part.
    """
    last = len(visits) - 1
    dq: Tensor | None = None
    homeward: _Coming | None = None
    grads: list[Tensor] = []  # dk, dv of a visit; none where nothing is kept of its block
    for visit, k_t, v_t in travel(visits, wire, k, v):
        if visit.tiles or visit.step in (0, last):
            dq, *grads = kernel.backward(
                dout, q, k_t, v_t, lse, delta, visit.tiles, scale,
                dq=dq, dq_dtype=q.dtype if visit.step == last else None, dkv_dtype=None if last else dkv_dtype,
            )  # fmt: skip
        if not last:  # one device: nobody adds to them
            break
        homeward = _send_home(visits, visit, wire, grads, homeward)
        grads = []
        del k_t, v_t  # the next buffers are allocated before these names are bound again
    assert dq is not None
    if homeward is not None:
        grads = [x.to(dkv_dtype, copy=True) for x in homeward.receive()]  # two tensors, not views of a message
    dk, dv = grads
    return dq, dk, dv


class _Coming:
    """A message under way, and how to read it."""

    def __init__(self, pending: Pending, message: Tensor, forms: Sequence[Form]):
        self.pending, self.message, self.forms = pending, message, forms

    def receive(self) -> list[Tensor]:
        self.pending.wait()
        return unpack(self.message, self.forms)


def travel(visits: Sequence[Visit], wire: Wire, k: Tensor, v: Tensor) -> Iterator[tuple[Visit, Tensor, Tensor]]:
    """Yield (visit, k, v); every block that the plan sends early is already under way while the caller computes."""
    message = pack((k, v)) if any(visit.hops for visit in visits) else None
    coming: dict[int, _Coming] = {}
    for visit in visits:
        for hop in visit.hops:
            assert message is not None
            forms = _forms(visits[hop.step], k, v)
            arriving = empty(forms, k.device)
            coming[hop.step] = _Coming(wire.exchange({hop.dest: message}, {hop.source: arriving}), arriving, forms)
        yield visit, k, v
        if following := coming.pop(visit.step + 1, None):
            k, v = following.receive()
            message = following.message


def _send_home(visits: Sequence[Visit], visit: Visit, wire: Wire, grads: Sequence[Tensor], homeward: _Coming | None) -> _Coming:
    """Add our part to the gradient of the block we hold, pass it on, and expect that of the block we hold next."""
    if homeward is None:
        message, held = pack(grads), grads
    else:
        message, held = homeward.message, homeward.receive()
        for theirs, ours in zip(held, grads, strict=False):  # no gradient of ours: theirs goes on as it is
            theirs.add_(ours)
    forms = _forms(visits[visit.home.step], *held)
    arriving = empty(forms, message.device)
    return _Coming(wire.exchange({visit.home.dest: message}, {visit.home.source: arriving}), arriving, forms)


def _forms(visit: Visit, k: Tensor, v: Tensor) -> list[Form]:
    """Shapes and dtypes of the block of a visit: like (k, v), with its owner's number of tokens."""
    return [((x.shape[0], visit.tiles.kv_len, *x.shape[2:]), x.dtype) for x in (k, v)]
