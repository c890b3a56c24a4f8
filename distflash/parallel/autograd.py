"""Attention as one PyTorch operator with its gradient: the only autograd and custom-op wiring of the library.

Legend: B batch, T local tokens, H query heads, Hk key/value heads, D head dim, Dv value head dim.

A Scheme is everything about a call that is not a tensor. Operators take integers, so a scheme travels as its `handle`. Being an
operator that the dispatcher sees, a selective checkpoint policy can keep its results: a checkpointed layer does not run
attention, nor its communication, again. What differs from call to call under one scheme travels as tensors: the slopes of
ALiBi [B, H], and the seed of dropout, one int64 on the CPU, which the backward gets too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from distflash.kernels.base import Dropout, Kernel, Scores, accumulator
from distflash.parallel import ring
from distflash.parallel.plan import Visit
from distflash.parallel.positions import Positions
from distflash.parallel.ulysses import Ulysses
from distflash.parallel.wire.base import Wire

_COUNTER = count()
_SCHEMES: WeakValueDictionary[int, Scheme] = WeakValueDictionary()


class Variants(NamedTuple):
    """What is asked of the scores beyond a scale and a mask, as far as it is the same in every call."""

    softcap: float
    dropout_p: float
    positions: Positions


@dataclass(frozen=True, eq=False)
class Scheme:
    """How one attention call is carried out: the plan, who talks to whom, what computes a visit."""

    visits: tuple[Visit, ...]
    wire: Wire  # of the ring
    ulysses: Ulysses | None
    kernel: Kernel
    scale: float
    variants: Variants | None = None
    handle: int = field(default_factory=_COUNTER.__next__, init=False)

    def __post_init__(self) -> None:
        _SCHEMES[self.handle] = self

    def asked(self, device: torch.device, slopes: Tensor | None, seed: Tensor | None) -> ring.Asked | None:
        """What a kernel is asked for, by the owner of the keys: None if there are no variants. Ulysses: of this rank's heads."""
        if (variants := self.variants) is None:
            return None
        mine = None if self.ulysses is None else self.ulysses.heads[self.ulysses.wire.rank]
        if slopes is not None:
            slopes = slopes.contiguous() if mine is None else slopes[:, mine.start : mine.stop].contiguous()
        dropout = None if seed is None else Dropout(variants.dropout_p, int(seed), 0 if mine is None else mine.start)
        positions = variants.positions
        return lambda owner: Scores(positions.queries(device), positions.keys(owner, device), variants.softcap, slopes, dropout)


def attend(
    q: Tensor, k: Tensor, v: Tensor, scheme: Scheme, slopes: Tensor | None = None, seed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """out [B, T, H, Dv] in q.dtype and lse [B, H, T] (natural log, fp32; fp64 for fp64), both differentiable by q, k and v."""
    out, lse, _ = torch.ops.distflash.attention(q, k, v, scheme.handle, slopes, seed)
    return out, lse


@torch.library.custom_op("distflash::attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, handle: int, slopes: Tensor | None, seed: Tensor | None
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(out, lse, what the backward needs and the inputs do not hold: q, k, v and lse after the all-to-all of Ulysses)."""
    scheme = _SCHEMES[handle]
    asked = scheme.asked(q.device, slopes, seed)
    if (ulysses := scheme.ulysses) is None:
        out, lse = ring.forward(scheme.visits, scheme.wire, scheme.kernel, q, k, v, scheme.scale, asked)
        return out, lse, []
    q, k, v = ulysses.to_heads((q, k, v), (ulysses.heads, ulysses.kv_heads, ulysses.kv_heads))
    out, lse = ring.forward(scheme.visits, scheme.wire, scheme.kernel, q, k, v, scheme.scale, asked)
    mine = ulysses.to_tokens((out, lse.transpose(1, 2)), (ulysses.heads, ulysses.heads))
    return mine[0], mine[1].transpose(1, 2).contiguous(), [q, k, v, lse]


@torch.library.custom_op("distflash::attention_backward", mutates_args=())
def _backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, handle: int,
    slopes: Tensor | None, seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the local q, k, v. dout, dlse, out are local; q, k, v, lse are what the ring worked on."""
    scheme = _SCHEMES[handle]
    delta = scheme.kernel.delta(out, dout)  # [B, H, T]
    if dlse is not None:
        # d lse_i / d s_ij = p_ij: the gradient of lse joins dS = P * (dP - delta) with the opposite sign
        delta = delta - dlse
    asked = scheme.asked(q.device, slopes, seed)
    if (ulysses := scheme.ulysses) is None:
        return ring.backward(scheme.visits, scheme.wire, scheme.kernel, dout, q, k, v, lse, delta, scheme.scale, asked, dkv_dtype=k.dtype)
    dout, delta = ulysses.to_heads((dout, delta.transpose(1, 2)), (ulysses.heads, ulysses.heads))
    grads = ring.backward(
        scheme.visits, scheme.wire, scheme.kernel, dout, q, k, v, lse, delta.transpose(1, 2).contiguous(), scheme.scale, asked,
        dkv_dtype=accumulator(k.dtype) if ulysses.shared else k.dtype,
    )  # fmt: skip
    dq, dk, dv = ulysses.to_tokens(grads, (ulysses.heads, ulysses.kv_heads, ulysses.kv_heads))
    return dq, dk.to(k.dtype), dv.to(v.dtype)


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, handle: int, slopes, seed) -> tuple[Tensor, Tensor, list[Tensor]]:
    batch, tokens, heads, _ = q.shape
    acc = accumulator(q.dtype)
    out, lse = q.new_empty(batch, tokens, heads, v.shape[3]), q.new_empty(batch, heads, tokens, dtype=acc)
    if (ulysses := _SCHEMES[handle].ulysses) is None:
        return out, lse, []
    total, me = sum(ulysses.lengths), ulysses.wire.rank
    mine, kv = len(ulysses.heads[me]), len(ulysses.kv_heads[me])
    shapes = ((mine, q.shape[3]), (kv, k.shape[3]), (kv, v.shape[3]))
    return out, lse, [*(q.new_empty(batch, total, *s) for s in shapes), q.new_empty(batch, mine, total, dtype=acc)]


@_backward.register_fake
def _(dout, dlse, q, k, v, out, lse, handle, slopes, seed):
    batch, tokens, heads, _ = out.shape
    ulysses = _SCHEMES[handle].ulysses
    kv_heads = k.shape[2] if ulysses is None else ulysses.kv_heads[-1].stop
    shapes = ((heads, q.shape[3]), (kv_heads, k.shape[3]), (kv_heads, v.shape[3]))
    return tuple(q.new_empty(batch, tokens, *s) for s in shapes)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, handle, slopes, seed = inputs
    out, lse, gathered = output
    ctx.scheme = _SCHEMES[handle]  # keeps it alive until the backward
    q, k, v, lse = gathered or (q, k, v, lse)
    ctx.save_for_backward(q, k, v, out, lse, slopes, seed)
    ctx.set_materialize_grads(False)


def _gradient(ctx, dout, dlse, _):
    q, k, v, out, lse, slopes, seed = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    grads = torch.ops.distflash.attention_backward(dout, dlse, q, k, v, out, lse, ctx.scheme.handle, slopes, seed)
    return *grads, None, None, None


torch.library.register_autograd("distflash::attention", _gradient, setup_context=_setup_context)
