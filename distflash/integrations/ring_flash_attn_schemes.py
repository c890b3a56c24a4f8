"""Who holds what under ring-flash-attn's functions, and one call over it. The functions are in `ring_flash_attn`.

Legend: P ranks, T local tokens, H query heads, Hk key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from distflash.api import attention
from distflash.parallel.group import Group
from distflash.parallel.layout import Layout, by_document, contiguous, striped, zigzag
from distflash.parallel.sequence import SequenceParallel, ShardedSequence

Returned = Tensor | tuple[Tensor, Tensor, None]


class Scheme(NamedTuple):
    """Who holds what, in how many chunks of equal length, and when blocks move."""

    layout: Callable[[tuple[int, ...], int], Layout]  # of the documents of all ranks, and P
    chunks: int = 1
    order: str = "auto"


RING, ZIGZAG, STRIPE = Scheme(by_document), Scheme(zigzag, chunks=2), Scheme(striped)
LLAMA3 = Scheme(contiguous, order="all_gather")


def attend(
    q: Tensor, k: Tensor, v: Tensor, seq: ShardedSequence, stride: int | None = None, *, alibi_slopes: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """out (..., T, H, D) and lse (..., H, T), `stride` key/value heads at a time."""
    heads, kv_heads = q.shape[-2], k.shape[-2]
    if stride is None or stride == kv_heads or heads % kv_heads:  # what does not divide is refused in there
        return attention(q, k, v, seq, alibi_slopes=alibi_slopes, return_lse=True, **options)  # type: ignore[return-value]
    if stride < 1 or kv_heads % stride:
        raise ValueError(f"heads_k_stride={stride} must divide the {kv_heads} key/value heads")
    found: Any = []
    for few in (slice(at, at + stride) for at in range(0, kv_heads, stride)):
        many = slice(few.start * heads // kv_heads, few.stop * heads // kv_heads)
        slopes = None if alibi_slopes is None else alibi_slopes[..., many]
        part = q[..., many, :], k[..., few, :], v[..., few, :]
        found.append(attention(*part, seq, alibi_slopes=slopes, return_lse=True, **options))
    out, lse = zip(*found, strict=True)
    return torch.cat(out, dim=-2), torch.cat(lse, dim=-2)


def shared(local: tuple[int, ...], scheme: Scheme, group: Group | None) -> ShardedSequence:
    """The sequence of which every rank holds documents with the borders `local`. Raises ValueError if they cannot be cut into chunks."""
    sp = parallel(group, scheme.order)
    odd = next((b for b in local if b % scheme.chunks), None)
    if odd is not None and sp.size > 1:
        raise ValueError(
            f"a rank holds {scheme.chunks} chunks of equal length of each document, but a border of its parts is {odd}: pad documents to "
            f"multiples of {scheme.chunks * sp.size}, or use SequenceParallel, which shares any length"
        )
    return sequence(sp, tuple(sp.size * b for b in local), scheme)


@lru_cache(maxsize=64)
def sequence(sp: SequenceParallel, documents: tuple[int, ...], scheme: Scheme) -> ShardedSequence:
    """All tokens of these documents, held as the scheme says; made once for all layers."""
    return ShardedSequence(sp, documents, layout=scheme.layout(documents, sp.size))


def parallel(group: Group | None, order: str) -> SequenceParallel:
    """One for each group and order. The first time it is a collective."""
    if group is None and dist.is_available() and dist.is_initialized():
        group = dist.group.WORLD  # another one after destroy_process_group
    return _made(group, order)


@cache  # never forgotten: making one again would be a collective, which other ranks might not come to
def _made(group: Group | None, order: Any) -> SequenceParallel:
    return SequenceParallel(group, ulysses=1, order=order)
