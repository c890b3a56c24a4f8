"""What a kernel takes: tensors that TMA can read, their descriptors, and the launch. Host side of sm_90.

Legend: B batch, T tokens, H heads, D head dim.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon.language import bfloat16, float16, float32, int32

from distflash.kernels.box import heads_first, readable
from distflash.kernels.hopper.compat import NVMMASharedLayout, TensorDescriptor
from distflash.kernels.launching import LAUNCHING

_DTYPES = {torch.bfloat16: bfloat16, torch.float16: float16, torch.float32: float32, torch.int32: int32}
_L2_BYTES = 28 << 20  # of the heads that are worked on at once; H100's L2 is 50 MB


def launch(kernel, grid: tuple[int, ...], first, *args, **options) -> None:
    """On the device of the first argument, which need not be the current one; a·b + c is one FMA, whatever Triton's default."""
    with LAUNCHING, torch.cuda.device((first.base if isinstance(first, TensorDescriptor) else first).device):
        kernel[grid](first, *args, enable_fp_fusion=True, **options)


def legal(t: Tensor) -> Tensor:
    """`t`, copied if TMA cannot read it. The copy's lines are as long as that needs: a narrow view of a wider buffer where the last
    dimension is no multiple of 16 bytes."""
    if readable(t):
        return t
    unit = 16 // t.element_size()
    wide = torch.empty((*t.shape[:-1], -(-t.shape[-1] // unit) * unit), dtype=t.dtype, device=t.device)
    return wide[..., : t.shape[-1]].copy_(t)


def descriptor(t: Tensor, length: int, rows: int, columns: int | None = None) -> TensorDescriptor:
    """[B, T, H, D] as [B, H, T, D] in boxes of [1, 1, rows, columns]; tokens from `length` on, and columns from D on, read as zeros."""
    (B, H, _, D), strides = heads_first(t)
    return _described(t, (B, H, length, D), tuple(strides), (1, 1, rows, columns or D))


def parts(side: int, head_dim: int) -> tuple[int, int]:
    """A tile's side in powers of two of up to 128, as tensors and boxes have them: one, or two where head_dim goes past the first."""
    first = min(128, 1 << (side.bit_length() - 1))
    return first, side - first if head_dim > first else 0


def descriptors(t: Tensor, length: int, rows: int, side: int) -> tuple[TensorDescriptor, TensorDescriptor | None]:
    """`descriptor` in boxes of the first and of the second part of `side`, None where there is no second."""
    first, second = parts(side, t.shape[-1])
    return descriptor(t, length, rows, first), descriptor(t, length, rows, second) if second else None


def stageable(sides: tuple[int, int], head_dims: tuple[int, int], own: bool) -> bool:
    """Whether TMA can write out: from q's boxes, of the same columns, or from its own one, part by part; lines a multiple of 16 bytes of
    16-bit elements."""
    q, out = (parts(side, n) for side, n in zip(sides, head_dims, strict=True))
    return (out[1] in (0, out[0]) if own else q == out) and head_dims[1] % 8 == 0


def vector(t: Tensor, width: int) -> TensorDescriptor:
    """A contiguous tensor as one vector, in boxes of `width`."""
    return _described(t, (t.numel(),), (1,), (width,))


def _described(t: Tensor, shape: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]) -> TensorDescriptor:
    """A descriptor of `t`, whose form was checked when it was first seen: Triton's checks take longer than all else about it."""
    assert t.data_ptr() % 16 == 0, "TMA reads lines that start on 16 bytes"
    made = object.__new__(TensorDescriptor)
    vars(made).update(_form(shape, strides, box, t.dtype), base=t)
    return made


@functools.lru_cache(1024)
def _form(shape: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    """The fields of a descriptor but for its tensor. Raises what Triton raises on a form that TMA does not have."""
    layout: Any = NVMMASharedLayout.get_default_for(list(box), _DTYPES[dtype])
    stand_in = torch.empty(8, dtype=dtype, device="cpu")
    return vars(TensorDescriptor(stand_in, list(shape), list(strides), list(box), layout))


@functools.cache
def sms(device: torch.device) -> int:
    """Streaming multiprocessors of a device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.lru_cache(1024)
def heads_at_once(heads: int, bytes_each: int) -> int:
    """The largest divisor of `heads` whose K and V stay in L2 together."""
    return max(n for n in range(1, heads + 1) if heads % n == 0 and (n == 1 or n * bytes_each <= _L2_BYTES))
