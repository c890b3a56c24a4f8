"""Attention as one PyTorch operator with its gradient: the only autograd and custom-op wiring of the library.

Legend: B batch, T local tokens, H query heads, Hk key/value heads, D head dim, Dv value head dim.

A Scheme is everything about a call that is not a tensor. Operators take integers and tensors, so a scheme travels as a `ticket`:
one int64 on the CPU, its handle, in memory that belongs to a Python object that holds the scheme. Whoever keeps the ticket keeps
the scheme: autograd, a checkpoint, a compiled graph, for which the ticket is data. So one compiled graph serves every sequence.
Being an operator that the dispatcher sees, a selective checkpoint policy can keep its results (`save_attention`): a checkpointed
layer does not run attention, nor its communication, again. What differs from call to call under one scheme travels as tensors
too: the slopes of ALiBi [B, H], and the seed of dropout, one int64 on the CPU, which the backward gets too.

A compiler may change the order of calls that do not depend on each other, and Inductor does, by sizes, which differ from rank to
rank: they would receive each other's messages. So in a graph every forward is followed by a `tick` of the clock that the next one reads,
and a backward is told what another one returned `after` which it comes: the one that was traced before it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, wraps
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy

from distflash.kernels.base import Dropout, Kernel, Partial, Scores, accumulator
from distflash.parallel import handles, ring
from distflash.parallel.agreement import nothing
from distflash.parallel.all_to_all import around
from distflash.parallel.mask import blind
from distflash.parallel.plan import Visit
from distflash.parallel.positions import Positions
from distflash.parallel.ulysses import Ulysses

Operator = TypeVar("Operator", bound=Callable[..., Any])


@torch.inference_mode(False)  # autograd and in-place operators refuse what was made in inference mode, and this outlives it
def number(value: int) -> Tensor:
    """[value], int64, on the CPU: what operators are given of which a compiled graph is to know no value."""
    return torch.tensor([value], device="cpu")


CLOCK = number(0)
TRACE = number(0)  # what stands for it in a trace is one object, made for that trace


class Variants(NamedTuple):
    """What is asked of the scores beyond a scale and a mask, as far as it is the same in every call."""

    softcap: float
    dropout_p: float
    positions: Positions


@dataclass(frozen=True, eq=False)
class Scheme:
    """How one attention call is carried out: the plan, who talks to whom, what computes a visit."""

    visits: tuple[Visit, ...]
    back: tuple[Visit, ...]  # those of a backward
    carrier: ring.Carrier
    ulysses: Ulysses | None
    kernel: Kernel
    scale: float
    variants: Variants | None = None
    unseen: tuple[range, ...] = ()  # local keys that no query of any rank sees
    begin_backward: Callable[[], None] = nothing  # ranks agree that all of them run one
    handle: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "handle", handles.new(self))

    def ticket(self) -> Tensor:
        """What stands for this scheme in a call of the operator; a new one each time, for a graph may use its memory again."""
        memory = _Ticket(self.handle)
        memory.scheme = self
        # as torch.tensor makes it: fake where tensors are fake
        return torch.ops.aten.lift_fresh.default(torch.frombuffer(memory, dtype=torch.int64))

    @property
    def gathered(self) -> list[int] | None:
        """`Ulysses.gathered`, None without one."""
        return None if self.ulysses is None else self.ulysses.gathered

    def seen(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Local keys and values, 0 where nobody sees them: there may be anything, NaN too, and kernels read whole tiles."""
        if not self.unseen:
            return k, v
        return k.index_fill(1, (at := _indices(self.unseen, k.device)), 0), v.index_fill(1, at, 0)

    @cached_property
    def blind(self) -> tuple[range, ...]:
        """The queries of all visits that see no key. In a backward they and their dout are 0: there may be anything, NaN too, and 0 times
        a NaN would reach the keys that share a tile with them."""
        return blind(visit.tiles for visit in self.visits) if self.visits else ()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, seed: Tensor | None, group: int = 0) -> Partial:
        """Attention of this rank's tokens and heads, all that are here; of a group of them, in Ulysses."""
        if q.shape[1] != (tokens := self.visits[0].tiles.q_len):
            raise RuntimeError(
                f"a trace of attention over {tokens} tokens was given {q.shape[1]}: torch.jit.trace and make_fx keep the plan of the call "
                "that they saw, torch.compile and torch.export make one for each"
            )
        return ring.forward(self.visits, self.carrier, self.kernel, q, k, v, self.scale, self.asked(q.device, slopes, seed, group))

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, slopes: Tensor | None, seed: Tensor | None,
        dkv_dtype: torch.dtype, group: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Its dq, dk, dv."""
        if self.blind:
            at = _indices(self.blind, q.device)
            dout, q, delta = dout.index_fill(1, at, 0), q.index_fill(1, at, 0), delta.index_fill(2, at, 0)
        asked = self.asked(q.device, slopes, seed, group)
        return ring.backward(self.back, self.carrier, self.kernel, dout, q, k, v, lse, delta, self.scale, asked, dkv_dtype=dkv_dtype)

    def asked(self, device: torch.device, slopes: Tensor | None, seed: Tensor | None, group: int = 0) -> ring.Asked | None:
        """What a kernel is asked for, by the visit: None if there are no variants. Ulysses: of this rank's heads, those of the group."""
        if (variants := self.variants) is None:
            return None
        mine = None if self.ulysses is None else self.ulysses.mine(group)
        if slopes is not None:
            slopes = slopes.contiguous() if mine is None else slopes[:, mine.start : mine.stop].contiguous()
        dropout = None if seed is None else Dropout(variants.dropout_p, int(seed), 0 if mine is None else mine.start)
        positions = variants.positions
        return lambda visit: Scores(positions.queries(device), positions.keys(visit.parts, device), variants.softcap, slopes, dropout)


@lru_cache(maxsize=64)
def _indices(parts: tuple[range, ...], device: torch.device) -> Tensor:
    return torch.tensor([n for part in parts for n in part], device=device)


class _Ticket(ctypes.c_int64):
    """The memory of a ticket."""

    scheme: Scheme


def scheme_of(ticket: Tensor) -> Scheme:
    """Raises RuntimeError if the scheme is gone: of a copy of a ticket that outlived it."""
    return handles.find(int(ticket), Scheme)


def save_attention(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    """A policy for torch.utils.checkpoint.create_selective_checkpoint_contexts: keep what attention returned, recompute the rest.

        contexts = functools.partial(create_selective_checkpoint_contexts, distflash.save_attention)
        x = checkpoint(layer, x, seq, use_reentrant=False, context_fn=contexts)

    Attention costs the most to run again, and it communicates; out and lse are small. Also under torch.compile.
    """
    ops = torch.ops.distflash
    keep = op in (ops.attention.default, ops.prepare.default, ops.dropout_seed.default)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def in_its_own_dtypes(body: Operator) -> Operator:
    """An operator's body without autocast, which would compute what is kept in fp32, scores and lse, in 16 bit."""

    @wraps(body)
    def run(first: Tensor, *rest: Any) -> Any:
        kind = first.device.type
        with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
            return body(first, *rest)

    return run  # type: ignore[return-value]


@torch.library.custom_op("distflash::attention", mutates_args=())
@in_its_own_dtypes
def _forward(
    q: Tensor, k: Tensor, v: Tensor, ticket: Tensor, gathered: list[int] | None, slopes: Tensor | None, seed: Tensor | None,
    trace: Tensor | None,
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """(out, lse, what the backward needs and the inputs do not hold: q, k, v [B * Tg * h, ...] and lse [B * h, Tg] after the all-to-all of
    Ulysses, a group of heads behind the other).

    `gathered` is `Scheme.gathered`: the sizes of these, for who knows tensors by their shapes only. `trace` is None
    in eager mode.
    """
    scheme = scheme_of(ticket)
    k, v = scheme.seen(k, v)
    if (ulysses := scheme.ulysses) is None:
        out, lse = scheme.forward(q, k, v, slopes, seed)
        return out.contiguous(), lse.contiguous(), []  # as the fake ones below; most kernels' are
    lses = []

    def attend(group: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = scheme.forward(q, k, v, slopes, seed, group)
        lses.append(lse)
        return out, lse.transpose(1, 2)

    rows, (out, lse) = around(ulysses, attend, (q, k, v), ulysses.of_qkv, ulysses.of_out)
    lse_rows = lses[0] if len(lses) == 1 else torch.cat(lses)
    return out, lse.transpose(1, 2).contiguous(), [*rows, lse_rows.flatten(0, 1)]


@torch.library.custom_op("distflash::tick", mutates_args=("clock",))
def tick(clock: Tensor, after: Tensor) -> None:
    """To a compiler: changes the clock, once `after` is there. Nothing is done."""


@tick.register_fake
def _(clock, after):
    return None


@torch.library.custom_op("distflash::attention_backward", mutates_args=())
@in_its_own_dtypes
def _backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, ticket: Tensor, kv_heads: int,
    slopes: Tensor | None, seed: Tensor | None, after: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the local q, k, v, the latter of `kv_heads`; and something for the next one's `after`.

    dout, dlse, out are local; q, k, v, lse are what the ring worked on.
    """
    scheme = scheme_of(ticket)
    scheme.begin_backward()
    delta = scheme.kernel.delta(out, dout)  # [B, H, T]
    if dlse is not None:
        # d lse_i / d s_ij = p_ij: the gradient of lse joins dS = P * (dP - delta) with the opposite sign
        delta = delta - dlse
    if (ulysses := scheme.ulysses) is None:
        k, v = scheme.seen(k, v)
        return *scheme.backward(dout, q, k, v, lse, delta, slopes, seed, k.dtype), _nothing()
    (total, *heads), batch = ulysses.gathered, dout.shape[0]
    h, hk = (n // ulysses.groups for n in heads)
    qs, ks, vs = (ulysses.split(x, batch, total, n, x.shape[-1]) for x, n in ((q, h), (k, hk), (v, hk)))
    lses = ulysses.split(lse, batch, h, total)
    dkv_dtype = accumulator(k.dtype) if ulysses.shared else k.dtype

    def attend(n: int, dout: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        delta = delta.transpose(1, 2).contiguous()
        return scheme.backward(dout, qs[n], ks[n], vs[n], lses[n], delta, slopes, seed, dkv_dtype, n)

    _, (dq, dk, dv) = around(ulysses, attend, (dout, delta.transpose(1, 2)), ulysses.of_out, ulysses.of_qkv)
    return dq, dk.to(k.dtype), dv.to(v.dtype), _nothing()


def _nothing() -> Tensor:
    return torch.empty(0, device="cpu")


@_forward.register_fake
def _(q, k, v, ticket, gathered, slopes, seed, trace):
    batch, tokens, heads, _ = q.shape
    acc = accumulator(q.dtype)
    out, lse = q.new_empty(batch, tokens, heads, v.shape[3]), q.new_empty(batch, heads, tokens, dtype=acc)
    if gathered is None:
        return out, lse, []
    total, mine, kv = gathered
    rows = ((mine, q.shape[3]), (kv, k.shape[3]), (kv, v.shape[3]))
    return out, lse, [*(q.new_empty(batch * total * heads, dim) for heads, dim in rows), q.new_empty(batch * mine, total, dtype=acc)]


@_backward.register_fake
def _(dout, dlse, q, k, v, out, lse, ticket, kv_heads, slopes, seed, after):
    batch, tokens, heads, _ = out.shape
    shapes = ((heads, q.shape[-1]), (kv_heads, k.shape[-1]), (kv_heads, v.shape[-1]))
    return *(q.new_empty(batch, tokens, *s) for s in shapes), _nothing()


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, ticket, _, slopes, seed, trace = inputs
    out, lse, gathered = output
    # no saved tensors: what offloads those would keep copies, and a copy of a ticket does not keep the scheme
    ctx.ticket, ctx.kv_heads, ctx.trace = ticket, k.shape[2], trace
    q, k, v, lse = gathered or (q, k, v, lse)
    ctx.save_for_backward(q, k, v, out, lse, slopes, seed)
    ctx.set_materialize_grads(False)


def _gradient(ctx, dout, dlse, _):
    q, k, v, out, lse, slopes, seed = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    after = getattr(ctx.trace, "distflash_after", None)
    *grads, done = torch.ops.distflash.attention_backward(dout, dlse, q, k, v, out, lse, ctx.ticket, ctx.kv_heads, slopes, seed, after)
    if ctx.trace is not None:
        ctx.trace.distflash_after = done
    return *grads, None, None, None, None, None


torch.library.register_autograd("distflash::attention", _gradient, setup_context=_setup_context)


class _Attention(torch.autograd.Function):
    """The same gradient around the same operator, which modes and checkpoint policies see as ever. What `register_autograd` makes takes
    apart and rebuilds an operator's lists of tensors, at every call and again in its backward: as much host time as all the rest.
    """

    @staticmethod
    def forward(ctx, *call):
        output = torch.ops.distflash.attention.default(*call)
        _setup_context(ctx, call, output)
        return output[0], output[1]

    @staticmethod
    def backward(ctx, dout, dlse):  # type: ignore[override]
        return _gradient(ctx, dout, dlse, None)


def needs_gradients(*tensors: Tensor) -> bool:
    """True if what is computed from these tensors will be differentiated by one of them."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def eager(*call: Any) -> tuple[Tensor, Tensor]:
    """(out, lse) of the operator called with these arguments, differentiable; not for a trace."""
    if needs_gradients(*call[:3]):
        return _Attention.apply(*call)
    return torch.ops.distflash.attention.default(*call)[:2]
