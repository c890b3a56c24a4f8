"""HopperKernel: the Kernel protocol over the Gluon kernels. Host side only: checks, buffers, descriptors, launch.

Legend: B batch, Tq / Tk local queries / keys, H query heads, Hk key/value heads, D head dim.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon.language import bfloat16, float16, float32

from distflash.kernels.base import Partial, Problem
from distflash.kernels.hopper import configs
from distflash.kernels.hopper.backward import backward_kernel
from distflash.kernels.hopper.compat import NVMMASharedLayout, TensorDescriptor
from distflash.kernels.hopper.configs import BackwardConfig, ForwardConfig
from distflash.kernels.hopper.forward import forward_kernel
from distflash.kernels.hopper.schedule import schedule
from distflash.kernels.hopper.stats import delta_kernel, stats_kernel
from distflash.tile import Tiles

_DTYPES = {torch.bfloat16: bfloat16, torch.float16: float16, torch.float32: float32}
_LOG2E = 1.4426950408889634
_L2_BYTES = 28 << 20  # K and V of the heads that are worked on at once; H100's L2 is 50 MB


class HopperKernel:
    """Gluon kernels for sm_90: bf16 and fp16, D = Dv of 64 and 128."""

    name = "hopper"

    def __init__(self, forward: dict[int, ForwardConfig] | None = None, backward: dict[int, BackwardConfig] | None = None):
        self._forward = forward or configs.FORWARD
        self._backward = backward or configs.BACKWARD

    def supports(self, problem: Problem) -> str | None:
        """None, or the reason why this kernel cannot serve the problem. A Triton it does not know fails earlier, on import."""
        if problem.device.type != "cuda" or torch.version.hip:
            return f"hopper kernels run on NVIDIA GPUs, not on {'ROCm' if torch.version.hip else problem.device}"
        if (capability := torch.cuda.get_device_capability(problem.device)) != (9, 0):
            return f"hopper kernels need compute capability 9.0, {problem.device} has {capability[0]}.{capability[1]}"
        if problem.dtype not in (torch.bfloat16, torch.float16):
            return f"hopper kernels compute in bf16 and fp16, not in {problem.dtype}"
        if problem.head_dim != problem.v_head_dim:
            return f"hopper kernels need one head dim for keys and values, got {problem.head_dim} and {problem.v_head_dim}"
        if problem.head_dim not in self._forward or problem.head_dim not in self._backward:
            served = sorted(self._forward.keys() & self._backward.keys())
            return f"hopper kernels serve head dims of {' and '.join(map(str, served))}, got {problem.head_dim}"
        if problem.deterministic:
            return "the hopper backward adds up dq in the order in which programs finish: not bit-equal from run to run"
        return None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, scale: float, *, acc: Partial | None = None, dtype: torch.dtype | None = None
    ) -> Partial:
        """Attend over `tiles` and merge with `acc`; in place where acc is contiguous and `out` stays fp32."""
        B, Tq, H, D = q.shape
        Hk, config = k.shape[2], self._forward[D]
        work = schedule(tiles, config.block_m, config.block_n, q.device)
        out, lse = _outputs(q, acc, dtype or torch.float32, work.idle)
        items = work.busy * B * H
        if items == 0:
            return Partial(out, lse)
        if scale <= 0:  # the kernel takes maxima before it scales
            q, scale = (q.neg(), -scale) if scale < 0 else (torch.zeros_like(q), 1.0)
        q, k, v = (_legal(t) for t in (q, k, v))
        programs = min(items, _sms(q.device)) if config.persistent else items
        order = work.order(B * H, _heads_at_once(B * H, 4 * tiles.kv_len * D * Hk // H), programs)
        _launch(
            forward_kernel, (programs,),
            _descriptor(q, Tq, 64), _descriptor(k, work.reach, config.block_n), _descriptor(v, work.reach, config.block_n),
            out, lse, lse if acc is None else acc.out.contiguous(), lse, work.blocks, work.segments, order, scale * _LOG2E,
            order.shape[1], H, H // Hk, Tq,
            config.consumers, config.block_n, D, config.stages, acc is not None, config.late_cast, config.poly, *config.regs,
            num_warps=4, maxnreg=config.max_regs,
        )  # fmt: skip
        return Partial(out, lse)

    def delta(self, out: Tensor, dout: Tensor) -> Tensor:
        """rowsum(out * dout) as [B, H, Tq] fp32."""
        B, T, H, D = out.shape
        out, dout = (t if t.stride(-1) == 1 else t.contiguous() for t in (out, dout))
        delta = torch.empty((B, H, T), dtype=torch.float32, device=out.device)
        if delta.numel():
            _launch(
                delta_kernel, (-(-T // 64) * B * H,),
                out, dout, delta, *out.stride()[:3], *dout.stride()[:3], T, H, D, 1 << (D - 1).bit_length(), 64, num_warps=8,
            )  # fmt: skip
        return delta

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lse: Tensor,
        delta: Tensor,
        tiles: Tiles,
        scale: float,
        *,
        dq: Tensor | None = None,
        dq_dtype: torch.dtype | None = None,
        dkv_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv; dq in place where it is contiguous and stays fp32. Not bit-equal from run to run."""
        dq_dtype, dkv_dtype = dq_dtype or torch.float32, dkv_dtype or torch.float32
        if scale <= 0:  # as in forward: a negated or zero query with a positive scale, and dq the other way round
            side, positive = (q.neg(), -scale) if scale < 0 else (torch.zeros_like(q), 1.0)
            step, dk, dv = self.backward(dout, side, k, v, lse, delta, tiles, positive, dkv_dtype=dkv_dtype)
            step = step.neg_() if scale < 0 else step.zero_()
            return (step if dq is None else step.add_(dq)).to(dq_dtype), dk, dv
        B, Tq, H, D = q.shape
        Tk, Hk = k.shape[1], k.shape[2]
        config = self._backward[D]
        work = schedule(tiles, 128, config.block_m, q.device, transposed=True)
        items = work.busy * B * Hk
        nothing = items == 0 or H == 0
        dq = torch.zeros((B, Tq, H, D), dtype=torch.float32, device=q.device) if dq is None else _legal(dq.contiguous())
        fresh = torch.zeros if work.idle or nothing else torch.empty
        dk, dv = (fresh((B, Tk, Hk, D), dtype=dkv_dtype, device=q.device) for _ in range(2))
        if nothing:
            return dq.to(dq_dtype), dk, dv
        scale = float(scale)  # an int of 1 would be compiled in
        fold = scale if q.dtype == torch.bfloat16 else 1.0  # fp16 would lose the small dS: scaled at the end there
        q, k, v, dout = (_legal(t) for t in (q, k, v, dout.to(q.dtype)))
        rows, m = work.reach, config.block_m
        nlse, ndelta = _stats(lse, delta, fold)
        _launch(
            backward_kernel, (items,),
            _descriptor(q, rows, m), _descriptor(k, Tk, 128), _descriptor(v, Tk, 128), _descriptor(dout, rows, m),
            _vector(nlse, m), _vector(ndelta, m), _descriptor(dq, rows, 64, D if m == 128 else D // 2), dk, dv,
            work.blocks, work.segments, scale * _LOG2E, scale, fold,
            work.busy, _heads_at_once(B * Hk, 8 * Tq * D * H // Hk), Hk, H // Hk, nlse.shape[1], Tk,
            m, D, config.stages, config.overlap, config.late, q.dtype == torch.bfloat16, *config.regs,
            num_warps=4, maxnreg=config.max_regs,
        )  # fmt: skip
        return dq.to(dq_dtype), dk, dv


def _launch(kernel, grid: tuple[int, ...], first, *args, **options) -> None:
    """On the device of the first argument, which need not be the current one."""
    with torch.cuda.device((first.base if isinstance(first, TensorDescriptor) else first).device):
        kernel[grid](first, *args, **options)


def _stats(lse: Tensor, delta: Tensor, fold: float) -> tuple[Tensor, Tensor]:
    """-lse in base 2 and -delta * fold, [B * H, T] with lines padded to 16 bytes: TMA reads nothing that starts elsewhere."""
    B, H, T = lse.shape
    pad = -(-T // 4) * 4
    assert B * H * pad < 1 << 31, "the kernel reads the lines as one vector, with 32-bit coordinates"
    nlse, ndelta = (torch.empty((B * H, pad), dtype=torch.float32, device=lse.device) for _ in range(2))
    _launch(stats_kernel, (B * H, -(-pad // 1024)), lse.contiguous(), delta.contiguous(), nlse, ndelta, fold, T, pad, 1024)
    return nlse, ndelta


def _outputs(q: Tensor, acc: Partial | None, dtype: torch.dtype, idle: bool) -> tuple[Tensor, Tensor]:
    """Where a forward writes: rows that no block covers already hold what they end with."""
    B, T, H, D = q.shape
    if acc is None:
        out = (torch.zeros if idle else torch.empty)((B, T, H, D), dtype=dtype, device=q.device)
        lse = torch.empty((B, H, T), dtype=torch.float32, device=q.device)
        return out, lse.fill_(float("-inf")) if idle else lse
    out, lse = acc.out.contiguous(), acc.lse.contiguous()
    if out.dtype == dtype:
        return out, lse
    return (out.to(dtype) if idle else torch.empty_like(out, dtype=dtype)), lse


def _legal(t: Tensor) -> Tensor:
    """`t`, copied if TMA cannot read it: 16-byte multiples for the address and every stride, the last dimension contiguous."""
    unit = 16 // t.element_size()
    steps = (s for s, n in zip(t.stride()[:-1], t.shape[:-1], strict=True) if n > 1)
    if t.data_ptr() % 16 == 0 and t.stride(-1) == 1 and all(s > 0 and s % unit == 0 for s in steps):
        return t
    return torch.empty(t.shape, dtype=t.dtype, device=t.device).copy_(t)


def _descriptor(t: Tensor, length: int, rows: int, columns: int | None = None) -> TensorDescriptor:
    """[B, T, H, D] as [B, H, T, D] in boxes of [1, 1, rows, columns]; tokens from `length` on read as zeros."""
    B, _, H, D = t.shape
    b, s, h, _ = t.stride()
    aligned = H * D * 8  # any legal number: the stride of a dimension of size 1 is never used, but is checked
    box = [1, 1, rows, columns or D]
    return TensorDescriptor(t, [B, H, length, D], [b if B > 1 else aligned, h if H > 1 else aligned, s if t.shape[1] > 1 else aligned, 1],
                            box, _layout(tuple(box), t.dtype))  # fmt: skip


def _vector(t: Tensor, width: int) -> TensorDescriptor:
    """A contiguous tensor as one vector, in boxes of `width`."""
    return TensorDescriptor(t, [t.numel()], [1], [width], _layout((width,), t.dtype))


@functools.cache
def _layout(box: tuple[int, ...], dtype: torch.dtype) -> Any:
    return NVMMASharedLayout.get_default_for(list(box), _DTYPES[dtype])


@functools.cache
def _sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.lru_cache(1024)
def _heads_at_once(heads: int, bytes_each: int) -> int:
    """The largest divisor of `heads` whose K and V stay in L2 together."""
    return max(n for n in range(1, heads + 1) if heads % n == 0 and (n == 1 or n * bytes_each <= _L2_BYTES))
