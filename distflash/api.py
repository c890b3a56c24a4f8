"""The public calls: validate, choose, call. Everything here happens before any communication, and alike on every rank.

Legend: B batch, T local tokens, S global tokens, H query heads, Hk key/value heads, D head dim, Dv value head dim.
"""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor

from distflash.kernels.base import Kernel, Problem
from distflash.kernels.select import select
from distflash.parallel.autograd import Scheme, attend
from distflash.parallel.mask import AnyMask, packed
from distflash.parallel.merge import with_sinks
from distflash.parallel.plan import alone
from distflash.parallel.sequence import ShardedSequence
from distflash.parallel.slices import Slices
from distflash.parallel.wire.local import LocalGroup
from distflash.validate import check_shards, check_sinks, check_tensors, documents, refuse, scale_of, sees


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seq: ShardedSequence | None = None,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    mask: Slices | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    kernel: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention: softmax(softmax_scale * q k^T + mask) v, over one device or over the ranks that share `seq`.

    Args:
        q, k, v: (B, T, H, D), (B, T, Hk, D), (B, T, Hk, Dv): this rank's shards with `seq`, the whole sequence without. Query
            head h reads key/value head h // (H // Hk). Without a batch dimension, (T, H, D), B is 1. fp16, bf16, fp32 or fp64.
        seq: how the tokens are shared, from `SequenceParallel.sequence`. None: all of them are here.
        causal: key j is seen by query i iff j <= i + Sk - Sq (bottom-right aligned; inside each document).
        window_size: (left, right), inclusive: key j is seen iff -left <= j - (i + Sk - Sq) <= right; -1 is unlimited.
        softmax_scale: None is D ** -0.5.
        cu_seqlens_q, cu_seqlens_k: borders of packed documents, int32, without `seq` only; k defaults to q. With `seq` the
            documents are the sequence's.
        deterministic: bit-equal outputs and gradients from run to run.
        return_lse: also return the log-sum-exp of each row.
        kernel: "auto", or a name: a kernel asked for by name runs or raises.
        sinks: (H,) logits, any floating dtype, that join each row's denominator and nothing else; differentiable. On each rank
            their gradient is that of its own tokens: reduce it over ranks like any parameter's. lse includes them.
        mask: `Slices`: which keys each query sees, in global positions, instead of causal and window_size. Where there are
            documents, each slice lies inside one of them.
        softcap, alibi_slopes, dropout_p: not supported yet; anything but the default raises.

    Returns:
        out (B, T, H, Dv) in q.dtype; with `return_lse` also lse (B, H, T), fp32 (fp64 for fp64), natural log. Without a batch
        dimension (T, H, Dv) and (H, T). Both are differentiable. A row that may see no key gives out = 0, lse = -inf (the
        sink, where there are sinks), and contributes 0 to the gradients of q, k and v.

    Raises:
        ValueError, TypeError: on input that cannot be served, on every rank, before any communication.
        NotImplementedError: on variants that are not supported yet.

    With `seq` this is a collective. Sources: FlashAttention-2 (arXiv:2307.08691), Ring Attention (arXiv:2310.01889), DeepSpeed
    Ulysses (arXiv:2309.14509).
    """
    refuse(softcap=(softcap, 0.0), alibi_slopes=(alibi_slopes, None), dropout_p=(dropout_p, 0.0))
    batched = check_tensors(q, k, v)
    check_sinks(sinks, q)
    scale = scale_of(softmax_scale, q.shape[-1])
    chosen = select(kernel, Problem(q.device, q.dtype, q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1], deterministic))
    if seq is None:
        lengths = (q.shape[-3], k.shape[-3])
        cu = documents(cu_seqlens_q, cu_seqlens_k, *lengths)
        scheme = _one_device(*cu, sees(mask, causal, window_size, *cu), chosen, scale)
    else:
        check_shards(q, k, seq, cu_seqlens_q, cu_seqlens_k)
        scheme = seq.scheme(sees(mask, causal, window_size, seq.cu_seqlens, seq.cu_seqlens), chosen, scale, q.shape[-2], k.shape[-2])
    if not batched:
        q, k, v = (x.unsqueeze(0) for x in (q, k, v))
    out, lse = attend(q, k, v, scheme)
    if sinks is not None:
        out, lse = with_sinks(out, lse, sinks)
    if not batched:
        out, lse = out.squeeze(0), lse.squeeze(0)
    return (out, lse) if return_lse else out


_ALONE = LocalGroup(1).wire(0)  # nobody to talk to


@lru_cache(maxsize=256)
def _one_device(cu_q: tuple[int, ...], cu_k: tuple[int, ...], mask: AnyMask, kernel: Kernel, scale: float) -> Scheme:
    return Scheme(alone(packed(cu_q, cu_k, mask)), _ALONE, None, kernel, scale)
