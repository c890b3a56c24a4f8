"""ring-flash-attn's llama3 functions, and its adapter for Transformers; `ring_flash_attn` has them under their names.

Legend: P ranks of `group`, T local tokens, H query heads, Hk key/value heads, D head dim.
"""

from __future__ import annotations

from bisect import bisect_left
from functools import lru_cache, partial
from itertools import pairwise
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from distflash.integrations.flash_attn_arguments import Window, check_dims, cu_of, window_of
from distflash.integrations.ring_flash_attn_schemes import LLAMA3, Returned, attend, parallel, sequence
from distflash.integrations.transformers_arguments import check_known
from distflash.parallel.documents import borders
from distflash.parallel.group import Group
from distflash.parallel.sequence import SequenceParallel, ShardedSequence


def llama3_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    heads_k_stride: int, local_k_slice: slice, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: Window = (-1, -1), alibi_slopes: Tensor | None = None, deterministic: bool = False,
    return_attn_probs: bool = False, group: Group | None = None,
) -> Returned:  # fmt: skip
    """Attention inside packed documents of q (T, H, D) over k, v (T, Hk, D), this rank's shards: out (T, H, D).

    `cu_seqlens_q`, `cu_seqlens_k`, `max_seqlen_q`, `max_seqlen_k` and `local_k_slice` are what `llama3_flash_attn_prepare_cu_seqlens`
    gave. The slice carries the documents of all ranks: one made by hand is refused. Keys and values of `heads_k_stride` heads travel
    at a time: fewer take less memory, and more messages.
    """
    check_dims(3, q=q, k=k, v=v)
    seq = _prepared(len(q), cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, local_k_slice, causal, group)
    out, lse = attend(
        q, k, v, seq, heads_k_stride, dropout_p=dropout_p, softmax_scale=softmax_scale, causal=causal,
        window_size=window_of(window_size), alibi_slopes=alibi_slopes, deterministic=deterministic,
    )  # fmt: skip
    return (out, lse, None) if return_attn_probs else out


class _Start(int):
    """Where a rank's slice of the keys starts, and what it was cut from: the documents of all ranks have to reach every layer."""

    cut_from: tuple[tuple[int, ...], bool, int, int]  # arguments of _slice_of


def llama3_flash_attn_prepare_cu_seqlens(
    cu_seqlens: Tensor, causal: bool, rank: int, world_size: int
) -> tuple[Tensor, Tensor, int, int, slice]:
    """What `llama3_flash_attn_varlen_func` needs on a rank: (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, local_k_slice).

    `cu_seqlens` are the documents of all ranks. `local_k_slice` are the keys that the rank's queries may see: from the start of its first
    document to its last token, or to the end of its last document if not causal. Raises ValueError if the ranks do not share the
    tokens evenly.
    """
    documents = borders(cu_seqlens)
    if documents[-1] % world_size:
        raise ValueError(f"{documents[-1]} tokens must be divisible by the {world_size} ranks: pad the last document")
    cut_from = documents, causal, rank, world_size
    cu_q, cu_k, first = _slice_of(*cut_from)
    start = _Start(first)
    start.cut_from = cut_from
    longest_q, longest_k = (max(b - a for a, b in pairwise(cu)) for cu in (cu_q, cu_k))
    q, k = (torch.tensor(cu, dtype=cu_seqlens.dtype, device=cu_seqlens.device) for cu in (cu_q, cu_k))
    return q, k, longest_q, longest_k, slice(start, first + cu_k[-1])


@lru_cache(maxsize=256)
def _slice_of(documents: tuple[int, ...], causal: bool, rank: int, world_size: int) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Borders of a rank's queries, of the keys that they may see, and the first of these keys."""
    length = documents[-1] // world_size
    start, stop = rank * length, (rank + 1) * length
    left, right = bisect_left(documents, start), bisect_left(documents, stop)
    left -= documents[left] != start
    first, inside = documents[left], documents[left + 1 : right]
    last = stop if causal else documents[right]
    return (0, *(b - start for b in inside), length), (0, *(b - first for b in inside), last - first), first


def _prepared(
    tokens: int, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, keys: slice, causal: bool, group: Group | None
) -> ShardedSequence:
    """The sequence that a slice of keys was cut from. Raises ValueError unless all that came with it still fits."""
    start = keys.start
    if not isinstance(start, _Start):
        raise ValueError(f"local_k_slice={keys} must be the one that llama3_flash_attn_prepare_cu_seqlens gave: it carries the documents")
    sp = parallel(group, LLAMA3.order)
    documents, was_causal, rank, ranks = start.cut_from
    if (sp.rank, sp.size) != (rank, ranks) or documents[-1] != ranks * tokens or causal != was_causal:
        raise ValueError(
            f"rank {sp.rank} of {sp.size} with {tokens} tokens, causal={causal}, got what was prepared for rank {rank} of {ranks} "
            f"with {documents[-1] // ranks} tokens, causal={was_causal}: prepare anew"
        )
    given = cu_of(cu_q, max_q, tokens, "_q"), cu_of(cu_k, max_k, keys.stop - start, "_k")
    expected = _slice_of(*start.cut_from)[:2]
    if given != expected:
        raise ValueError(f"cu_seqlens_q and cu_seqlens_k must be those prepared with local_k_slice, {expected}, got {given}")
    return sequence(sp, documents, LLAMA3)


_DOCUMENTS: WeakKeyDictionary[SequenceParallel, tuple[int, ...]] = WeakKeyDictionary()  # of the batch at hand


def update_ring_flash_attn_params(cu_seqlens: Tensor, process_group: Group | None) -> None:
    """Say before a forward what the documents of its batch are: borders of all ranks' tokens, of which a rank holds the r-th of P equal
    pieces. Raises ValueError if the ranks do not share the tokens evenly.
    """
    sp = parallel(process_group, LLAMA3.order)
    documents = borders(cu_seqlens)
    if documents[-1] % sp.size:
        raise ValueError(f"{documents[-1]} tokens must be divisible by the {sp.size} ranks: pad the last document")
    _DOCUMENTS[sp] = documents


def substitute_hf_flash_attn(process_group: Group | None, heads_k_stride: int) -> None:
    """Let every Transformers model whose attention is "flash_attention_2" compute it across the ranks of `process_group`.

    Models keep their positions and losses: feed them shards, with `position_ids`. What they ask of attention is computed (window, softcap,
    sinks, dropout) or raises. `distflash.integrations.transformers` does it a model, with positions and losses.
    """
    from transformers import AttentionInterface  # pyright: ignore[reportAttributeAccessIssue]  # it looks for it in this folder

    AttentionInterface.register("flash_attention_2", partial(_of_a_layer, group=process_group, stride=heads_k_stride))


def _of_a_layer(
    module: nn.Module,
    query: Tensor,  # [1, H, T, D]
    key: Tensor,  # [1, Hk, T, D]
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    group: Group | None,
    stride: int,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    deterministic: bool | None = None,
    position_ids: Tensor | None = None,  # the model has turned q and k by them: documents are those that were given
    **others: object,
) -> tuple[Tensor, None]:
    """What the layers of a model call; see Transformers' AttentionInterface. Returns (1, T, H, D)."""
    sp = parallel(group, LLAMA3.order)
    if sp not in _DOCUMENTS:
        raise RuntimeError("the documents of this batch are unknown: call update_ring_flash_attn_params(cu_seqlens, process_group) first")
    if len(query) != 1 or attention_mask is not None:
        raise ValueError(
            f"a batch must be one row of packed documents without padding, got {len(query)} rows, attention_mask={attention_mask}"
        )
    check_known(others, "documents come from update_ring_flash_attn_params; for the rest use attn_implementation='eager'")
    if s_aux is not None and stride != key.shape[1]:
        raise ValueError(f"attention sinks need heads_k_stride={key.shape[1]}, all key/value heads, got {stride}")
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if sliding_window is not None and not causal:
        raise ValueError(f"sliding_window={sliding_window} without causal attention is ambiguous: it is not computed")
    q, k, v = (x.transpose(1, 2).to(value.dtype) for x in (query, key, value))  # norms in fp32 widen q and k
    window = (-1, -1) if sliding_window is None else (sliding_window - 1, -1)
    out, _ = attend(
        q, k, v, sequence(sp, _DOCUMENTS[sp], LLAMA3), stride, causal=causal, window_size=window, dropout_p=dropout, softmax_scale=scaling,
        softcap=softcap or 0.0, sinks=s_aux, alibi_slopes=None, deterministic=bool(deterministic),
    )  # fmt: skip
    return out.to(query.dtype), None
