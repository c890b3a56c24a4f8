"""From what a call asks for to its Scheme: what it sees, the kernel, the plan, and that all ranks are about to do the same.

In eager mode that is the Python it looks like. In a graph that is being compiled it is an operator, `distflash::prepare`: it looks at
the call when the graph runs. So sequences, documents, masks and scales are data there, one graph serves all that have the same
shapes, and ranks compare notes at every call, compiled or not. What can be known from shapes and options alone is refused when
the graph is compiled.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from distflash.cost.traffic import Shape
from distflash.kernels.base import Kernel, Problem
from distflash.kernels.select import select
from distflash.parallel import handles
from distflash.parallel.agreement import mask_words
from distflash.parallel.autograd import CLOCK, Scheme, Variants, needs_gradients
from distflash.parallel.documents import borders
from distflash.parallel.mask import AnyMask, packed, unseen
from distflash.parallel.messages import Messages
from distflash.parallel.plan import alone
from distflash.parallel.positions import aligned
from distflash.parallel.sequence import ShardedSequence, refusing
from distflash.parallel.slices import Slices
from distflash.parallel.wire.local import LocalGroup
from distflash.validate import check_flags, check_mask, check_shards, check_sinks, check_tensors, check_variants, documents, scale_of, sees


def prepare(
    q: Tensor, k: Tensor, v: Tensor, seq: ShardedSequence | None, mask: Slices | None, **options: Any
) -> tuple[Tensor, list[int] | None]:
    """(ticket, gathered) for the operator, as `Scheme` has them. Raises what `distflash.attention` raises."""
    # not is_compiling(): that is true in every thread while one compiles
    later = torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting()
    if later:
        return _prepare_later(q, k, v, seq, mask, gradients=needs_gradients(q, k, v), **options)
    scheme = _scheme(q, k, v, seq, mask, **options)
    return scheme.ticket(), scheme.gathered


def _chosen(
    q: Tensor, k: Tensor, v: Tensor, softcap: float, slopes: Tensor | None, sinks: Tensor | None, dropout_p: float, deterministic: bool,
    kernel: str,
) -> tuple[Kernel, tuple[float, float] | None]:  # fmt: skip
    """The kernel that serves, and (softcap, dropout_p) unless no variant is asked for: what needs no more than shapes and options."""
    check_sinks(sinks, q)
    asked = check_variants(softcap, slopes, dropout_p, q)
    heads, kv_heads, head_dim, v_head_dim = (int(n) for n in (q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1]))
    problem = Problem(q.device, q.dtype, heads, kv_heads, head_dim, v_head_dim, deterministic, asked)
    return select(kernel, problem), (float(softcap), float(dropout_p)) if asked else None


def _scheme(q: Tensor, k: Tensor, v: Tensor, seq: ShardedSequence | None, mask: Slices | None, **options: Any) -> Scheme:
    """How the call is carried out, on which the ranks have agreed."""
    with refusing(seq, "attention"):
        scheme, alike = _planned(q, k, v, seq, mask, **options)
    if seq is not None:
        seq.agree("attention", **alike)
    return scheme


def _planned(
    q: Tensor, k: Tensor, v: Tensor, seq: ShardedSequence | None, mask: Slices | None, *, causal: bool, window_size: tuple[int, int],
    softmax_scale: float | Tensor | None, softcap: float, alibi_slopes: Tensor | None, dropout_p: float, cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None, deterministic: bool, kernel: str, return_lse: bool, sinks: Tensor | None, gradients: bool | None = None,
) -> tuple[Scheme, dict[str, Any]]:  # fmt: skip
    """How the call would be carried out, and what of it must be alike on every rank. `gradients`: None is as the tensors say."""
    check_tensors(q, k, v)
    check_flags(causal=causal, deterministic=deterministic, return_lse=return_lse)
    chosen, variants = _chosen(q, k, v, softcap, alibi_slopes, sinks, dropout_p, deterministic, kernel)
    scale = scale_of(softmax_scale, q.shape[-1])
    if seq is None:
        lengths = (q.shape[-3], k.shape[-3])
        cu = documents(cu_seqlens_q, cu_seqlens_k, *lengths)
        return _one_device(*cu, sees(mask, causal, window_size, *cu), chosen, scale, variants), {}
    check_shards(q, k, seq, cu_seqlens_q, cu_seqlens_k)
    visible = sees(mask, causal, window_size, seq.cu_seqlens, seq.cu_seqlens)
    batch = q.shape[0] if q.dim() == 4 else 1
    shape = Shape(q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1], batch, q.element_size())
    return seq.scheme(visible, chosen, scale, shape, variants, deterministic), dict(
        batch=tuple(q.shape[:-3]), heads=(q.shape[-2], k.shape[-2]), head_dims=(q.shape[-1], v.shape[-1]), dtype=q.dtype, causal=causal,
        window_size=tuple(map(int, window_size)), mask=mask_words(mask), softmax_scale=scale, softcap=float(softcap),
        dropout_p=float(dropout_p), seed_dropout=seq.sp.seeds.begun if dropout_p else None, alibi_slopes=alibi_slopes is not None,
        sinks=sinks is not None, deterministic=deterministic, return_lse=return_lse, kernel=chosen.name,
        gradients=needs_gradients(q, k, v) if gradients is None else gradients,
    )  # fmt: skip


def _prepare_later(
    q: Tensor, k: Tensor, v: Tensor, seq: ShardedSequence | None, mask: Slices | None, *, causal: bool, window_size: tuple[int, int],
    softmax_scale: float | Tensor | None, alibi_slopes: Tensor | None, sinks: Tensor | None, kernel: str,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, **rest: Any,
) -> tuple[Tensor, list[int] | None]:  # fmt: skip
    """`prepare` as it goes into a graph. Dynamo traces this; what it could not guard well is left to the operator."""
    check_mask(mask, causal, window_size)
    if seq is not None:
        check_shards(q, k, seq, cu_seqlens_q, cu_seqlens_k)
    # of many numbers a graph has one symbol, of which the operator sees the value: that is where it is checked
    given = isinstance(softmax_scale, (int, float, Tensor)) and not isinstance(softmax_scale, bool)
    number = softmax_scale if given else scale_of(softmax_scale, q.shape[-1])
    scale = (None, number) if isinstance(number, Tensor) else (number, None)
    cu = (x if x is None or isinstance(x, Tensor) else torch.tensor(borders(x), device="cpu") for x in (cu_seqlens_q, cu_seqlens_k))
    ticket = torch.ops.distflash.prepare(
        *((None, None) if seq is None else (CLOCK, seq.ticket)), None if mask is None else mask.handle, q.detach(), k.detach(), v.detach(),
        *scale, alibi_slopes, None if sinks is None else sinks.detach(), *cu,
        causal=causal, window_size=window_size, kernel_name=kernel, **rest,
    )  # fmt: skip
    ulysses = None if seq is None else seq.head_exchange(q.shape[-2], k.shape[-2])
    return ticket, None if ulysses is None else ulysses.gathered


# tagged: as it counts calls and may talk to other ranks, it runs exactly once a call
@torch.library.custom_op("distflash::prepare", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _prepare_now(
    clock: Tensor | None, seq: Tensor | None, mask: int | None, q: Tensor, k: Tensor, v: Tensor, scale: float | None,
    scale_tensor: Tensor | None, slopes: Tensor | None, sinks: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None, *, causal: bool,
    window_size: list[int], softcap: float, dropout_p: float, deterministic: bool, kernel_name: str, return_lse: bool, gradients: bool,
) -> Tensor:  # fmt: skip
    """The ticket of a call's scheme. `seq` is the ticket of a sequence, `mask` the handle of Slices."""
    left, right = window_size
    scheme = _scheme(
        q, k, v, None if seq is None else handles.find(int(seq), ShardedSequence), None if mask is None else handles.find(mask, Slices),
        causal=causal, window_size=(left, right), softmax_scale=scale if scale_tensor is None else scale_tensor, softcap=softcap,
        alibi_slopes=slopes, dropout_p=dropout_p, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, deterministic=deterministic, kernel=kernel_name,
        return_lse=return_lse, sinks=sinks, gradients=gradients,
    )  # fmt: skip
    return scheme.ticket()


@_prepare_now.register_fake
def _(clock, seq, mask, q, k, v, scale, scale_tensor, slopes, sinks, cu_q, cu_k, *, softcap, dropout_p, deterministic, kernel_name, **_):
    check_tensors(q, k, v)
    _chosen(q, k, v, softcap, slopes, sinks, dropout_p, deterministic, kernel_name)
    return torch.empty(1, dtype=torch.int64, device="cpu")


_ALONE = Messages(LocalGroup(1).wire(0))  # nobody to talk to


@lru_cache(maxsize=256)
def _one_device(
    cu_q: tuple[int, ...], cu_k: tuple[int, ...], mask: AnyMask, kernel: Kernel, scale: float, variants: tuple[float, float] | None
) -> Scheme:
    asked = None if variants is None else Variants(*variants, aligned(cu_q, cu_k))
    tiles = packed(cu_q, cu_k, mask)
    visits = alone(tiles)
    return Scheme(visits, visits, _ALONE, None, kernel, scale, asked, unseen([tiles]))
