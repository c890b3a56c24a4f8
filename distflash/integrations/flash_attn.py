"""flash-attn's functions under its own names: `from distflash.integrations.flash_attn import flash_attn_func` is all that changes.

Legend: B batch, Sq / Sk queries / keys, Tq / Tk packed ones of all documents, N documents, H query heads, Hk key/value heads, D head dim.

Argument names, order and defaults are those of flash-attn 2.8; what they mean is in `distflash.attention`, and these differ on purpose:

    served here, refused there     any head size, fp32 and fp64, values of another head size, dropout with softcap, the gradient of lse
    refused here, served there     block_table: a paged cache
    a row that sees no key         out is 0 as there; lse is -inf, there +inf
    rows past cu_seqlens[-1]       out is 0 and lse -inf, and they get no gradient; there they are whatever memory held
    max_seqlen_q, max_seqlen_k     shape nothing here, but must not be smaller than a document
    dropout_p                      the pattern follows from torch's default CPU generator, not from that of the GPU
    S_dmask                        empty without dropout, as there. With dropout each row is divided by its largest probability, so that
                                   it is that of the softmax up to a factor a row, in natural order and exact shape; there it is scaled by
                                   a kernel's running maximum and padded to multiples of 128. Signs mean the same: negative is dropped
"""

from __future__ import annotations

from itertools import pairwise, zip_longest
from operator import index
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from distflash.api import attention
from distflash.integrations.flash_attn_arguments import PADDING, Window, check_dims, unpacked, window_of, with_padding
from distflash.kernels.base import accumulator

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
]

Returned = Tensor | tuple[Tensor, Tensor, Tensor]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Returned:
    """Attention of q (B, Sq, H, D) over k, v (B, Sk, Hk, D): out (B, Sq, H, D).

    With `return_attn_probs` also lse (B, H, Sq), fp32, natural log, and S_dmask (B, H, Sq, Sk), which is dense: for tests only.
    Raises ValueError or TypeError on what cannot be served, before anything runs.
    """
    check_dims(4, q=q, k=k, v=v)
    asked = _asked(softmax_scale, causal, window_size, softcap, deterministic, alibi_slopes=alibi_slopes)
    found = _attend(q, k, v, dropout_p, asked, return_attn_probs)
    return (found.out, found.lse, found.s_dmask) if return_attn_probs else found.out


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Returned:
    """`flash_attn_func` of kv (B, Sk, 2, Hk, D)."""
    k, v = unpacked(5, kv=kv)
    return flash_attn_func(q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Returned:
    """`flash_attn_func` of qkv (B, S, 3, H, D)."""
    q, k, v = unpacked(5, qkv=qkv)
    return flash_attn_func(q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Returned:
    """Attention inside each of N packed documents, of q (Tq, H, D) over k, v (Tk, Hk, D): out (Tq, H, D).

    `cu_seqlens_q`, `cu_seqlens_k` (N + 1,) are the documents' borders; tokens past the last one are padding. `alibi_slopes` are (H,), or
    (N, H): then each document is a call of its own. With `return_attn_probs` also lse (H, Tq) and S_dmask (N, H, max_seqlen_q,
    max_seqlen_k). Raises ValueError or TypeError on what cannot be served, before anything runs.
    """
    if block_table is not None:
        raise ValueError("block_table is not served: gather the pages of a cache into contiguous k and v, and leave it None")
    check_dims(3, q=q, k=k, v=v)
    if not (isinstance(cu_seqlens_q, Tensor) and isinstance(cu_seqlens_k, Tensor)):
        kinds = f"{type(cu_seqlens_q).__name__} and {type(cu_seqlens_k).__name__}"
        raise TypeError(f"cu_seqlens_q and cu_seqlens_k must be int32 tensors of (documents + 1,) borders, got {kinds}")
    cu_q, cu_k = with_padding(cu_seqlens_q, cu_seqlens_k, index(max_seqlen_q), index(max_seqlen_k), q.shape[0], k.shape[0])
    asked = _asked(softmax_scale, causal, window_size, softcap, deterministic)
    number = cu_seqlens_q.shape[0] - 1
    if alibi_slopes is not None and alibi_slopes.dim() == 2 and number > 1:
        out, lse, found = _by_document(q, k, v, cu_q, cu_k, dropout_p, asked, alibi_slopes, return_attn_probs)
    else:
        out, lse, found = _together(q, k, v, cu_q, cu_k, dropout_p, asked, alibi_slopes, return_attn_probs)
    if not return_attn_probs:
        return out
    places = (index(max_seqlen_q), index(max_seqlen_k))
    return out, lse, torch.stack([_placed(s, *places) for s in found[:number]]) if found else q.new_empty(0)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Returned:
    """`flash_attn_varlen_func` of kv (Tk, 2, Hk, D)."""
    k, v = unpacked(4, kv=kv)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Returned:
    """`flash_attn_varlen_func` of qkv (T, 3, H, D)."""
    q, k, v = unpacked(4, qkv=qkv)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


class Found(NamedTuple):
    """What a call gives."""

    out: Tensor
    lse: Tensor
    s_dmask: Tensor


def _asked(softmax_scale, causal, window_size, softcap, deterministic, **more: Any) -> dict[str, Any]:
    """flash-attn's options as `distflash.attention` calls them: a softcap of 0 or less is off, and so is a negative window."""
    options = {"softmax_scale": softmax_scale, "causal": causal, "window_size": window_of(window_size), "deterministic": deterministic}
    return options | {"softcap": 0.0 if softcap <= 0 else softcap} | more


def _attend(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, asked: dict[str, Any], probabilities: bool, columns: Tensor | None = None
) -> Found:
    """One call. `columns` (Sk,) is each key's column of S_dmask (..., Sq, columns), None for all in their order."""
    s_dmask = q.new_empty(0)
    if probabilities and dropout_p:
        with torch.random.fork_rng(devices=[]), torch.no_grad():  # the seed drawn in here is drawn once more below
            s_dmask = _signed(q, k, dropout_p, asked, torch.arange(k.shape[-3], device=k.device) if columns is None else columns)
    found: Any = attention(q, k, v, dropout_p=dropout_p, return_lse=True, **asked)
    return Found(found[0], found[1], s_dmask)


def _signed(q: Tensor, k: Tensor, dropout_p: float, asked: dict[str, Any], columns: Tensor) -> Tensor:
    """Probabilities over the largest of their row, negative where dropped: attention gives them for values that are unit vectors."""
    units = one_hot(columns).to(accumulator(k.dtype))[:, None].expand(*k.shape[:-1], -1)
    call: dict[str, Any] = asked | {"kernel": "reference"}
    dropped: Any = attention(q.to(units), k.to(units), units, dropout_p=dropout_p, **call)
    p: Any = attention(q.to(units), k.to(units), units, **call)
    p = p / p.amax(-1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)
    return torch.where(dropped == 0, -p, p).transpose(-3, -2).to(q.dtype)  # [..., H, Sq, columns]


def _together(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, dropout_p: float, asked: dict[str, Any], slopes: Tensor | None,
    probabilities: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """out, lse and S_dmask (H, Sq, Sk or more) of each document: all in one call."""
    asked = asked | {"alibi_slopes": slopes, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    if not (probabilities and dropout_p):
        found = _attend(q, k, v, dropout_p, asked, False)
        return found.out, found.lse, []
    columns = torch.cat([torch.arange(end - start, device=k.device) for start, end in pairwise(cu_k.tolist())])
    found = _attend(q, k, v, dropout_p, asked, True, columns)
    return found.out, found.lse, [found.s_dmask[:, start:end] for start, end in pairwise(cu_q.tolist())]


def _by_document(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, dropout_p: float, asked: dict[str, Any], slopes: Tensor,
    probabilities: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """The same, each document in a call of its own with its own slopes (documents, H)."""
    documents = list(zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True))
    if len(slopes) != len(documents) - PADDING:
        raise ValueError(
            f"alibi_slopes must be (H,), or (documents, H) with {len(documents) - PADDING} documents, got {tuple(slopes.shape)}"
        )
    found = []
    for mine, ((q0, q1), (k0, k1)) in zip_longest(slopes, documents):
        if q0 < q1 and k0 < k1:
            found.append(_attend(q[q0:q1], k[k0:k1], v[k0:k1], dropout_p, asked | {"alibi_slopes": mine}, probabilities))
        else:  # no rows, or rows that see no key, as padding
            rows = q[q0:q1]
            lse = rows.new_full((q.shape[1], q1 - q0), float("-inf"), dtype=accumulator(q.dtype))
            found.append(Found(rows.new_zeros(*rows.shape[:-1], v.shape[-1]), lse, rows.new_zeros(q.shape[1], q1 - q0, k1 - k0)))
    out, lse, s_dmask = zip(*found, strict=True)
    return torch.cat(out), torch.cat(lse, dim=1), [*s_dmask] if probabilities and dropout_p else []


def _placed(s: Tensor, rows: int, columns: int) -> Tensor:
    """(H, Sq, Sk) with as many rows and columns, 0 where there is no pair."""
    return pad(s, (0, columns - s.shape[2], 0, rows - s.shape[1]))
