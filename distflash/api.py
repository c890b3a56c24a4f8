"""The public calls: validate, choose, call. Everything here happens before any communication, and alike on every rank.

Legend: B batch, T local tokens, S global tokens, H query heads, Hk key/value heads, D head dim, Dv value head dim.
"""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor

from distflash.kernels.base import Kernel, Problem
from distflash.kernels.select import select
from distflash.parallel.agreement import mask_words
from distflash.parallel.autograd import Scheme, Variants, attend
from distflash.parallel.mask import AnyMask, packed
from distflash.parallel.merge import with_sinks
from distflash.parallel.plan import alone
from distflash.parallel.positions import aligned
from distflash.parallel.seeds import fresh
from distflash.parallel.sequence import ShardedSequence, needs_gradients
from distflash.parallel.slices import Slices
from distflash.parallel.wire.local import LocalGroup
from distflash.validate import check_shards, check_sinks, check_tensors, check_variants, documents, scale_of, sees


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seq: ShardedSequence | None = None,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | Tensor | None = None,
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
        softmax_scale: None is D ** -0.5. A 0-d tensor is read, which waits for its device; it gets no gradient.
        softcap: scores become softcap * tanh(scores / softcap); 0 is off.
        alibi_slopes: (H,) or (B, H) fp32, without gradient: -slope * |i + Sk - Sq - j| is added to scores, after softcap; i and j
            count inside each document.
        dropout_p: each probability becomes 0 with this chance, else it grows by 1 / (1 - dropout_p). Which ones follows from a seed,
            batch, head, query and key: the same on any number of ranks, in every layout, by every kernel. Without `seq` the
            seed is drawn from torch's default CPU generator; with it, see `SequenceParallel.seed_dropout`.
        cu_seqlens_q, cu_seqlens_k: borders of packed documents, int32, without `seq` only; k defaults to q. With `seq` the
            documents are the sequence's.
        deterministic: bit-equal outputs and gradients from run to run.
        return_lse: also return the log-sum-exp of each row.
        kernel: "auto", or a name: a kernel asked for by name runs or raises.
        sinks: (H,) logits, any floating dtype, that join each row's denominator and nothing else; differentiable. On each rank
            their gradient is that of its own tokens: reduce it over ranks like any parameter's. lse includes them.
        mask: `Slices`: which keys each query sees, in global positions, instead of causal and window_size. Where there are
            documents, each slice lies inside one of them.

    Returns:
        out (B, T, H, Dv) in q.dtype; with `return_lse` also lse (B, H, T), fp32 (fp64 for fp64), natural log. Without a batch
        dimension (T, H, Dv) and (H, T). Both are differentiable. A row that may see no key gives out = 0, lse = -inf (the
        sink, where there are sinks), and contributes 0 to the gradients of q, k and v.

    Raises:
        ValueError, TypeError: on input that cannot be served, on every rank, before any communication.
        RuntimeError: if a checkpointed layer runs again without the state of the forward, so that dropout would differ.

    With `seq` this is a collective. Sources: FlashAttention-2 (arXiv:2307.08691), Ring Attention (arXiv:2310.01889), DeepSpeed
    Ulysses (arXiv:2309.14509).
    """
    batched = check_tensors(q, k, v)
    check_sinks(sinks, q)
    asked = check_variants(softcap, alibi_slopes, dropout_p, q)
    variants = (float(softcap), float(dropout_p)) if asked else None
    scale = scale_of(softmax_scale, q.shape[-1])
    chosen = select(kernel, Problem(q.device, q.dtype, q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1], deterministic, asked))
    if seq is None:
        lengths = (q.shape[-3], k.shape[-3])
        cu = documents(cu_seqlens_q, cu_seqlens_k, *lengths)
        scheme = _one_device(*cu, sees(mask, causal, window_size, *cu), chosen, scale, variants)
    else:
        check_shards(q, k, seq, cu_seqlens_q, cu_seqlens_k)
        visible = sees(mask, causal, window_size, seq.cu_seqlens, seq.cu_seqlens)
        scheme = seq.scheme(visible, chosen, scale, q.shape[-2], k.shape[-2], variants)
        seq.agree(  # all that must be alike on every rank
            "attention", batch=tuple(q.shape[:-3]), heads=(q.shape[-2], k.shape[-2]), head_dims=(q.shape[-1], v.shape[-1]),
            dtype=q.dtype, causal=causal, window_size=tuple(window_size), mask=mask_words(mask), softmax_scale=scale,
            softcap=float(softcap), dropout_p=float(dropout_p), alibi_slopes=alibi_slopes is not None, sinks=sinks is not None,
            deterministic=deterministic, return_lse=return_lse, kernel=chosen.name, gradients=needs_gradients(q, k, v),
        )  # fmt: skip
    if not batched:
        q, k, v = (x.unsqueeze(0) for x in (q, k, v))
    slopes = None if alibi_slopes is None else alibi_slopes.expand(q.shape[0], -1)  # [B, H]
    seed = None if not dropout_p else fresh() if seq is None else seq.sp.seeds.draw()
    out, lse = attend(q, k, v, scheme, slopes, seed)
    if sinks is not None:
        out, lse = with_sinks(out, lse, sinks)
    if not batched:
        out, lse = out.squeeze(0), lse.squeeze(0)
    return (out, lse) if return_lse else out


_ALONE = LocalGroup(1).wire(0)  # nobody to talk to


@lru_cache(maxsize=256)
def _one_device(
    cu_q: tuple[int, ...], cu_k: tuple[int, ...], mask: AnyMask, kernel: Kernel, scale: float, variants: tuple[float, float] | None
) -> Scheme:
    asked = None if variants is None else Variants(*variants, aligned(cu_q, cu_k))
    return Scheme(alone(packed(cu_q, cu_k, mask)), _ALONE, None, kernel, scale, asked)
