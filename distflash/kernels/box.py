"""Tensors as the copy engine (TMA) of sm_90 and newer reads them: [B, H, T, D] views, tile by tile.

Legend: B batch, T tokens, H heads, D head dim.
"""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor


def readable(t: Tensor) -> bool:
    """True if TMA can read `t`: not empty, address and strides are multiples of 16 bytes, the last dimension is contiguous."""
    return t.data_ptr() % 16 == 0 and _lines(t.shape, t.stride(), 16 // t.element_size())


@lru_cache(1024)
def _lines(shape: tuple[int, ...], strides: tuple[int, ...], unit: int) -> bool:
    steps = (s for s, n in zip(strides[:-1], shape[:-1], strict=True) if n > 1)
    return 0 not in shape and strides[-1] == 1 and all(s > 0 and s % unit == 0 for s in steps)


def heads_first(t: Tensor) -> tuple[list[int], list[int]]:
    """Shape and strides of a readable [B, T, H, D] as [B, H, T, D]."""
    (B, T, H, D), (b, s, h, _) = t.shape, t.stride()
    aligned = H * D * 8  # any legal number: the stride of a dimension of size 1 is never used, but is checked
    return [B, H, T, D], [b if B > 1 else aligned, h if H > 1 else aligned, s if T > 1 else aligned, 1]
