"""Backward, host side: one pass of five matmuls that adds up dQ as programs finish.

Legend: B batch, Tq / Tk local queries / keys, H query heads, Hk key/value heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distflash.kernels.hopper.backward import backward_kernel
from distflash.kernels.hopper.configs import BackwardConfig
from distflash.kernels.hopper.schedule import schedule
from distflash.kernels.hopper.stats import stats_kernel
from distflash.kernels.hopper.tma import descriptor, heads_at_once, launch, legal, vector
from distflash.tile import Tiles

_LOG2E = 1.4426950408889634


def backward(
    config: BackwardConfig,
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
    """dq, dk, dv as Kernel.backward; dq in place where it is contiguous and stays fp32."""
    dq_dtype, dkv_dtype = dq_dtype or torch.float32, dkv_dtype or torch.float32
    if scale <= 0:  # as in forward: a negated or zero query with a positive scale, and dq the other way round
        side, positive = (q.neg(), -scale) if scale < 0 else (torch.zeros_like(q), 1.0)
        step, dk, dv = backward(config, dout, side, k, v, lse, delta, tiles, positive, dkv_dtype=dkv_dtype)
        step = step.neg_() if scale < 0 else step.zero_()
        return (step if dq is None else step.add_(dq)).to(dq_dtype), dk, dv
    B, Tq, H, D = q.shape
    Tk, Hk = k.shape[1], k.shape[2]
    work = schedule(tiles, 128, config.block_m, q.device, transposed=True)
    items = work.busy * B * Hk
    nothing = items == 0 or H == 0
    dq = torch.zeros((B, Tq, H, D), dtype=torch.float32, device=q.device) if dq is None else legal(dq.contiguous())
    fresh = torch.zeros if work.idle or nothing else torch.empty
    dk, dv = (fresh((B, Tk, Hk, D), dtype=dkv_dtype, device=q.device) for _ in range(2))
    if nothing:
        return dq.to(dq_dtype), dk, dv
    scale = float(scale)  # an int of 1 would be compiled in
    fold = scale if q.dtype == torch.bfloat16 else 1.0  # fp16 would lose the small dS: scaled at the end there
    q, k, v, dout = (legal(t) for t in (q, k, v, dout.to(q.dtype)))
    rows, m = work.reach, config.block_m
    nlse, ndelta = _stats(lse, delta, fold)
    launch(
        backward_kernel, (items,),
        descriptor(q, rows, m), descriptor(k, Tk, 128), descriptor(v, Tk, 128), descriptor(dout, rows, m),
        vector(nlse, m), vector(ndelta, m), descriptor(dq, rows, 64, D if m == 128 else D // 2), dk, dv,
        work.blocks, work.segments, scale * _LOG2E, scale, fold,
        work.busy, heads_at_once(B * Hk, 8 * Tq * D * H // Hk), Hk, H // Hk, nlse.shape[1], Tk,
        m, D, config.stages, config.overlap, config.late, q.dtype == torch.bfloat16, *config.regs,
        num_warps=4, maxnreg=config.max_regs,
    )  # fmt: skip
    return dq.to(dq_dtype), dk, dv


def _stats(lse: Tensor, delta: Tensor, fold: float) -> tuple[Tensor, Tensor]:
    """-lse in base 2 and -delta * fold, [B * H, T] with lines padded to 16 bytes: TMA reads nothing that starts elsewhere."""
    B, H, T = lse.shape
    pad = -(-T // 4) * 4
    assert B * H * pad < 1 << 31, "the kernel reads the lines as one vector, with 32-bit coordinates"
    nlse, ndelta = (torch.empty((B * H, pad), dtype=torch.float32, device=lse.device) for _ in range(2))
    launch(stats_kernel, (B * H, -(-pad // 1024)), lse.contiguous(), delta.contiguous(), nlse, ndelta, fold, T, pad, 1024)
    return nlse, ndelta
