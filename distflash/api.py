"""The public calls: validate, choose, call. Everything here happens before any communication, and alike on every rank.

Legend: B batch, T local tokens, S global tokens, H query heads, Hk key/value heads, D head dim, Dv value head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distflash.parallel.autograd import CLOCK, TRACE, eager
from distflash.parallel.merge import with_sinks
from distflash.parallel.seeds import fresh
from distflash.parallel.sequence import ShardedSequence
from distflash.parallel.slices import Slices
from distflash.preparation import prepare


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
        ValueError, TypeError: on input that cannot be served, before any communication. Ranks that compare notes on a call which
            another rank refuses raise `Disagreement` with its text: see `SequenceParallel`'s `check`.
        RuntimeError: if a checkpointed layer runs again without the state of its forward, or in that of two, so that dropout could differ.

    With `seq` this is a collective. Sources: FlashAttention-2 (arXiv:2307.08691), Ring Attention (arXiv:2310.01889), DeepSpeed
    Ulysses (arXiv:2309.14509).
    """
    ticket, gathered = prepare(
        q, k, v, seq, mask, causal=causal, window_size=window_size, softmax_scale=softmax_scale, softcap=softcap,
        alibi_slopes=alibi_slopes, dropout_p=dropout_p, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, deterministic=deterministic,
        kernel=kernel, return_lse=return_lse, sinks=sinks,
    )  # fmt: skip
    batched = q.dim() == 4
    if not batched:
        q, k, v = (x.unsqueeze(0) for x in (q, k, v))
    slopes = None if alibi_slopes is None else alibi_slopes.expand(q.shape[0], -1)  # [B, H]
    seed = None if not dropout_p else fresh() if seq is None else seq.sp.seeds.draw(ticket)
    call = (q, k, v, ticket, gathered, slopes, seed)
    if not torch.compiler.is_dynamo_compiling():
        out, lse = eager(*call, None)
    else:
        out, lse, _ = torch.ops.distflash.attention(*call, None if seq is None else TRACE)
        if seq is not None:
            torch.ops.distflash.tick(CLOCK, lse.detach())
    if sinks is not None:
        out, lse = with_sinks(out, lse, sinks)
    if not batched:
        out, lse = out.squeeze(0), lse.squeeze(0)
    return (out, lse) if return_lse else out
