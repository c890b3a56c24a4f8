"""What a sequence is made of, checked: its length or the borders of its documents, the heads that will attend, and its mask."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from operator import index
from typing import Any, cast

import torch
from torch import Tensor

from distflash.parallel.slices import Slices, checked_borders


def one_document(length: object) -> tuple[int, int]:
    """The borders of one document of `length` tokens. Raises ValueError unless that is a positive integer."""
    tokens = 0
    with suppress(TypeError):
        tokens = 0 if isinstance(length, bool) else index(cast(Any, length))  # numpy's integers, too
    if tokens < 1:
        raise ValueError(f"length={length!r} must be a positive integer")
    return 0, tokens


def borders(cu_seqlens: Tensor | Sequence[int]) -> tuple[int, ...]:
    """Document borders as integers, checked. Reading them off a GPU tensor waits for the GPU: keep them on the CPU."""
    if isinstance(cu_seqlens, Tensor):
        if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"cu_seqlens must be a 1-D int32 or int64 tensor, got {cu_seqlens.dim()}-D {cu_seqlens.dtype}")
        cu_seqlens = cu_seqlens.tolist()
    cu = checked_borders(cu_seqlens)
    if cu[-1] == 0:
        raise ValueError("cu_seqlens ends at 0: there are no tokens to attend to")
    return cu


def check_heads(heads: object) -> None:
    """Raise ValueError unless `heads` are (query heads, key/value heads, head dim)."""
    whole = isinstance(heads, tuple) and len(heads) == 3 and all(type(n) is int and n > 0 for n in heads)
    if not whole or heads[0] % heads[1]:  # type: ignore[index]
        raise ValueError(f"heads={heads!r} must be (query heads, key/value heads, head dim): integers, the first a multiple of the second")


def check_balanced_for(mask: object, layout: str, cu: tuple[int, ...]) -> None:
    """Raise TypeError or ValueError unless `mask` is one of these documents and the layout looks at it."""
    if not isinstance(mask, Slices):
        raise TypeError(f"mask must be distflash.Slices, got {type(mask).__name__}")
    if layout != "balanced":
        raise ValueError(f"the layout {layout!r} does not look at a mask: use layout='balanced', or give it to attention() only")
    mask.check(cu, cu)
