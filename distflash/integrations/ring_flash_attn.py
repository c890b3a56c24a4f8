"""ring-flash-attn's functions under its own names: `from distflash.integrations.ring_flash_attn import zigzag_ring_flash_attn_func`.

Legend: P ranks of `group`, B batch, T local tokens, N documents, H query heads, Hk key/value heads, D head dim.

Argument names, order and defaults are those of ring-flash-attn 0.1.8, and so is who holds what, P * T tokens in all:

    ring_, plain               rank r holds the r-th of P equal pieces
    ring_, varlen              rank r holds the r-th of P equal pieces of each document
    zigzag_ring_, plain        rank r holds chunks r and 2P-1-r of 2P
    zigzag_ring_, varlen       rank r holds chunks r and 2P-1-r of 2P of each document
    stripe_                    rank r holds tokens r, r + P, r + 2P, ...
    llama3_                    rank r holds the r-th of P equal pieces of the packed documents, wherever their borders are

With `return_attn_probs` functions return (out, lse, None), lse (B, H, T) or (H, T), fp32, natural log. What is refused there and served
here: causal=False under every layout, window_size, alibi_slopes (H,), dropout_p (one pattern in every layout and on any number of ranks),
fp32 and fp64, tokens behind the last border (out 0, lse -inf), the gradient of lse. Every function is a collective of `group`, None is
all ranks; the first call on a group makes its `SequenceParallel`. Plans are made once a length or set of documents, not once a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import Parameter, signature
from typing import Any

from torch import Tensor

from distflash.integrations.flash_attn_arguments import Window, check_dims, cu_of, padded, trimmed, unpacked, window_of
from distflash.integrations.ring_flash_attn_llama3 import (
    llama3_flash_attn_prepare_cu_seqlens,
    llama3_varlen,
    substitute_hf_flash_attn,
    update_ring_flash_attn_params,
)
from distflash.integrations.ring_flash_attn_schemes import RING, STRIPE, ZIGZAG, Returned, Scheme, attend, shared
from distflash.parallel.group import Group

__all__ = [
    "llama3_flash_attn_prepare_cu_seqlens",
    "llama3_flash_attn_varlen_func",
    "llama3_flash_attn_varlen_kvpacked_func",
    "llama3_flash_attn_varlen_qkvpacked_func",
    "ring_flash_attn_func",
    "ring_flash_attn_kvpacked_func",
    "ring_flash_attn_qkvpacked_func",
    "ring_flash_attn_varlen_func",
    "ring_flash_attn_varlen_kvpacked_func",
    "ring_flash_attn_varlen_qkvpacked_func",
    "stripe_flash_attn_func",
    "stripe_flash_attn_kvpacked_func",
    "stripe_flash_attn_qkvpacked_func",
    "substitute_hf_flash_attn",
    "update_ring_flash_attn_params",
    "zigzag_ring_flash_attn_func",
    "zigzag_ring_flash_attn_kvpacked_func",
    "zigzag_ring_flash_attn_qkvpacked_func",
    "zigzag_ring_flash_attn_varlen_func",
    "zigzag_ring_flash_attn_varlen_kvpacked_func",
    "zigzag_ring_flash_attn_varlen_qkvpacked_func",
]


def _plain(scheme: Scheme) -> Callable[..., Returned]:
    def func(
        q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
        window_size: Window = (-1, -1), alibi_slopes: Tensor | None = None, deterministic: bool = False,
        return_attn_probs: bool = False, group: Group | None = None,
    ) -> Returned:  # fmt: skip
        """Attention of q (B, T, H, D) over k, v (B, T, Hk, D), this rank's shards: out (B, T, H, D)."""
        check_dims(4, q=q, k=k, v=v)
        out, lse = attend(
            q, k, v, shared((0, q.shape[1]), scheme, group), dropout_p=dropout_p, softmax_scale=softmax_scale, causal=causal,
            window_size=window_of(window_size), alibi_slopes=alibi_slopes, deterministic=deterministic,
        )  # fmt: skip
        return (out, lse, None) if return_attn_probs else out

    return func


def _varlen(scheme: Scheme) -> Callable[..., Returned]:
    def func(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout_p: float = 0.0,
        softmax_scale: float | None = None, causal: bool = False, window_size: Window = (-1, -1),
        alibi_slopes: Tensor | None = None, deterministic: bool = False, return_attn_probs: bool = False, group: Group | None = None,
    ) -> Returned:  # fmt: skip
        """Attention inside packed documents of q (T, H, D) over k, v (T, Hk, D), this rank's shards: out (T, H, D).

        `cu_seqlens` (N + 1,) are the borders of this rank's parts of the documents, the global ones divided by P; none is longer than
        `max_seqlen`.
        """
        check_dims(3, q=q, k=k, v=v)
        rows, cu = len(q), cu_of(cu_seqlens, max_seqlen, len(q))
        q, k, v = (trimmed(x, cu) for x in (q, k, v))
        found = attend(
            q, k, v, shared(cu, scheme, group), dropout_p=dropout_p, softmax_scale=softmax_scale, causal=causal,
            window_size=window_of(window_size), alibi_slopes=alibi_slopes, deterministic=deterministic,
        )  # fmt: skip
        out, lse = padded(*found, rows)
        return (out, lse, None) if return_attn_probs else out

    return func


def _family(name: str, func: Callable[..., Returned], dims: int) -> tuple[Callable[..., Returned], ...]:
    """`func` of q, k, v as name_func; name_kvpacked_func of q and kv; name_qkvpacked_func of qkv. Packed tensors have `dims` dimensions."""

    def kvpacked_func(q: Tensor, kv: Tensor, *args: Any, **options: Any) -> Returned:
        return func(q, *unpacked(dims, kv=kv), *args, **options)

    def qkvpacked_func(qkv: Tensor, *args: Any, **options: Any) -> Returned:
        return func(*unpacked(dims, qkv=qkv), *args, **options)

    whole = signature(func)
    rest = [p for p in whole.parameters.values() if p.name not in ("q", "k", "v")]
    for packed, kind, first in (
        (func, "", ("q", "k", "v")),
        (kvpacked_func, "kvpacked_", ("q", "kv")),
        (qkvpacked_func, "qkvpacked_", ("qkv",)),
    ):
        packed.__name__ = packed.__qualname__ = f"{name}_{kind}func"
        packed.__module__ = __name__
        packed.__doc__ = packed.__doc__ or f"`{name}_func` of {first[-1]}, in which {', '.join(first[-1])} are stacked before the heads."
        tensors = [Parameter(x, Parameter.POSITIONAL_OR_KEYWORD, annotation="Tensor") for x in first]
        packed.__signature__ = whole.replace(parameters=tensors + rest)  # type: ignore[attr-defined]
    return func, kvpacked_func, qkvpacked_func


ring_flash_attn_func, ring_flash_attn_kvpacked_func, ring_flash_attn_qkvpacked_func = _family("ring_flash_attn", _plain(RING), 5)
ring_flash_attn_varlen_func, ring_flash_attn_varlen_kvpacked_func, ring_flash_attn_varlen_qkvpacked_func = _family(
    "ring_flash_attn_varlen", _varlen(RING), 4
)
zigzag_ring_flash_attn_func, zigzag_ring_flash_attn_kvpacked_func, zigzag_ring_flash_attn_qkvpacked_func = _family(
    "zigzag_ring_flash_attn", _plain(ZIGZAG), 5
)
zigzag_ring_flash_attn_varlen_func, zigzag_ring_flash_attn_varlen_kvpacked_func, zigzag_ring_flash_attn_varlen_qkvpacked_func = _family(
    "zigzag_ring_flash_attn_varlen", _varlen(ZIGZAG), 4
)
stripe_flash_attn_func, stripe_flash_attn_kvpacked_func, stripe_flash_attn_qkvpacked_func = _family("stripe_flash_attn", _plain(STRIPE), 5)
llama3_flash_attn_varlen_func, llama3_flash_attn_varlen_kvpacked_func, llama3_flash_attn_varlen_qkvpacked_func = _family(
    "llama3_flash_attn_varlen", llama3_varlen, 4
)
