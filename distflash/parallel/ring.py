"""Ring attention, once: one loop forward, one backward, for every layout, order, kernel and wire.

Legend: B batch, T local tokens, H query heads, Hk key/value heads, D head dim, Dv value head dim.

How blocks come and how their gradients go home is a carrier's: as messages over any wire (messages.py), or by copies between the
memories of GPUs that reach each other's (direct.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd import profiler as autograd_profiler

from distflash.kernels.base import Kernel, Partial, Scores
from distflash.parallel.plan import Visit
from distflash.parallel.wire.journal import Journal, noted

Asked = Callable[[Visit], Scores]  # what is asked of the scores of a visit


class Gradients(Protocol):
    """dk and dv of the blocks of one backward, on their way to their owners."""

    taken: torch.dtype | None  # in which dtype kernels are to store them; None is the accumulator's

    def move(self, visit: Visit, grads: list[Tensor]) -> None:
        """Take our part of the gradient of the keys of a visit; nothing where the visit computed nothing."""
        ...

    def home(self) -> list[Tensor]:
        """dk, dv of our own block, every rank's part added and cast at last; two tensors, not views of a message."""
        ...


class Carrier(Protocol):
    """What brings blocks of K and V, and takes their gradients home."""

    journal: Journal

    def travel(self, visits: Sequence[Visit], k: Tensor, v: Tensor) -> Iterator[tuple[Visit, Tensor, Tensor]]:
        """Yield (visit, k, v) in order; every block that the plan sends early is already under way while the caller computes.

        The visit's tiles are of the k and v that come with it. Those of a visit without tiles do not come, but for our own at step 0:
        they are not to be read.
        """
        ...

    def gradients(self, visits: Sequence[Visit], k: Tensor, v: Tensor, dtype: torch.dtype) -> Gradients:
        """Of a backward over these visits; `k` and `v` are our own block, `dtype` is that of the sum."""
        ...


@noted("forward")
def forward(
    visits: Sequence[Visit], carrier: Carrier, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, scale: float, asked: Asked | None = None
) -> Partial:
    """Local queries against every block of the plan: out [B, T, H, Dv] in q.dtype, lse [B, H, T]."""
    last = _last(visits)
    acc = None  # (out, lse) over the keys seen so far, in the accumulator's dtype until the last visit
    for visit, k_t, v_t in carrier.travel(visits, k, v):
        if visit.tiles or visit.step == last:
            scores = {} if asked is None else {"scores": asked(visit)}
            with _range("forward", visit):
                acc = kernel.forward(q, k_t, v_t, visit.tiles, scale, acc=acc, dtype=q.dtype if visit.step == last else None, **scores)
        del k_t, v_t  # the next buffer is allocated before these names are bound again
    assert acc is not None
    return acc


@noted("backward")
def backward(
    visits: Sequence[Visit],
    carrier: Carrier,
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
    gradients = carrier.gradients(visits, k, v, dkv_dtype)
    dq: Tensor | None = None
    for visit, k_t, v_t in carrier.travel(visits, k, v):
        grads: list[Tensor] = []  # dk, dv of a visit; none where nothing is kept of its block
        if visit.tiles or visit.owner == visits[0].owner or visit.step == last:
            scores = {} if asked is None else {"scores": asked(visit)}
            with _range("backward", visit):
                dq, *grads = kernel.backward(
                    dout, q, k_t, v_t, lse, delta, visit.tiles, scale,
                    dq=dq, dq_dtype=q.dtype if visit.step == last else None, dkv_dtype=gradients.taken, **scores,
                )  # fmt: skip
        gradients.move(visit, grads)
        del k_t, v_t, grads  # the next buffers are allocated before these names are bound again
    assert dq is not None
    dk, dv = gradients.home()
    return dq, dk, dv


def _range(name: str, visit: Visit) -> AbstractContextManager:
    """A range in a trace, if one is made."""
    if not autograd_profiler._is_profiler_enabled:
        return nullcontext()
    return autograd_profiler.record_function(
        f"{name}, step {visit.step}: block of rank {', '.join(str(part.owner) for part in visit.parts)}, {len(visit.tiles)} tiles"
    )


def _last(visits: Sequence[Visit]) -> int:
    """The last step at which something is kept: what is finished there is cast."""
    return max((visit.step for visit in visits if visit.tiles), default=0)
