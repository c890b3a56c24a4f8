"""HopperKernel: the Kernel protocol over the Gluon kernels; its backward is in gradients.py. Host side only: checks, buffers, launch.

Legend: B batch, Tq / Tk local queries / keys, H query heads, Hk key/value heads, D, Dv head dims.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from distflash.kernels.base import Partial, Problem
from distflash.kernels.hopper import configs, gradients
from distflash.kernels.hopper.configs import BackwardConfig, ForwardConfig, fit
from distflash.kernels.hopper.forward import forward_kernel
from distflash.kernels.hopper.schedule import schedule
from distflash.kernels.hopper.stats import delta_kernel
from distflash.kernels.hopper.tma import descriptors, heads_at_once, launch, legal, sms, stageable, vector
from distflash.tile import Tiles

_LOG2E = 1.4426950408889634
Config = TypeVar("Config")
Served = Mapping[tuple[int, int], Config]  # by tiles of (query and key, value) head size, as configs.FORWARD


class HopperKernel:
    """Gluon kernels for sm_90: bf16 and fp16, head dims up to those of the largest tiles; what lies between is padded by TMA."""

    name = "hopper"

    def __init__(self, forward: Served[ForwardConfig] | None = None, backward: Served[BackwardConfig] | None = None):
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
        if problem.variants:
            return f"hopper kernels do not compute {', '.join(problem.variants)}"
        sides = problem.head_dim, problem.v_head_dim
        if not fit(self._forward, *sides) or not fit(self._backward, *sides):
            most = [max(pair[n] for pair in tiles) for n in (0, 1) for tiles in (self._forward, self._backward)]
            return (
                f"hopper kernels serve head dims of up to {min(most[:2])}, values of up to {min(most[2:])}, got {sides[0]} and {sides[1]}"
            )
        return None

    def deterministic(self) -> HopperKernel:
        """This kernel without the one pass that adds up dq in the order in which programs finish."""
        return HopperKernel(self._forward, {sides: replace(config, one_pass=None) for sides, config in self._backward.items()})

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, scale: float, *, acc: Partial | None = None, dtype: torch.dtype | None = None
    ) -> Partial:
        """Attend over `tiles` and merge with `acc`; in place where acc is contiguous and `out` stays fp32."""
        (B, Tq, H, D), (Hk, Dv) = q.shape, v.shape[2:]
        sides = fit(self._forward, D, Dv)
        assert sides, "supports() refuses head dims that no configuration holds"
        config = self._forward[sides]
        work = schedule(tiles, config.block_m, config.block_n, q.device)
        out, lse = _outputs((B, Tq, H, Dv), q.device, acc, dtype or torch.float32, work.idle)
        items = work.busy * B * H
        if items == 0:
            return Partial(out, lse)
        if scale <= 0:  # the kernel takes maxima before it scales
            q, scale = (q.neg(), -scale) if scale < 0 else (torch.zeros_like(q), 1.0)
        q, k, v = (legal(t) for t in (q, k, v))
        programs = min(items, sms(q.device)) if config.persistent else items
        order = work.order(B * H, heads_at_once(B * H, 2 * tiles.kv_len * (D + Dv) * Hk // H), programs)
        staged = config.staged and acc is None and out.dtype == q.dtype and stageable(sides, (D, Dv), config.q_stages == 1)
        launch(
            forward_kernel, (programs,),
            *descriptors(q, Tq, 64, sides[0]), *descriptors(k, work.reach, config.block_n, sides[0]),
            *descriptors(v, work.reach, config.block_n, sides[1]), *(descriptors(out, Tq, 64, sides[1]) if staged else (None, None)),
            vector(order, 16),
            out, lse, lse if acc is None else acc.out.contiguous(), lse, work.segments, order, scale * _LOG2E,
            order.shape[1], H, H // Hk, Tq,
            config.consumers, config.stages, config.q_stages, config.q_regs, Dv, acc is not None, config.ahead,
            config.consumers if config.pingpong else 0, 1 if config.one_bound and not work.left else 2,
            config.consumers if config.named else 0, config.anew,
            *config.regs, num_warps=4, maxnreg=config.max_regs,
        )  # fmt: skip
        return Partial(out, lse)

    def delta(self, out: Tensor, dout: Tensor) -> Tensor:
        """rowsum(out * dout) as [B, H, Tq] fp32."""
        B, T, H, D = out.shape
        out, dout = (t if t.stride(-1) == 1 else t.contiguous() for t in (out, dout))
        delta = torch.empty((B, H, T), dtype=torch.float32, device=out.device)
        if delta.numel():
            launch(
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
        """dq, dk, dv; dq in place where it is contiguous and stays fp32. Bit-equal from run to run only if `deterministic()`."""
        sides = fit(self._backward, q.shape[-1], v.shape[-1])
        assert sides, "supports() refuses head dims that no configuration holds"
        return gradients.backward(
            self._backward[sides], sides, dout, q, k, v, lse, delta, tiles, scale, dq=dq, dq_dtype=dq_dtype, dkv_dtype=dkv_dtype
        )  # fmt: skip

    def scratch(self, problem: Problem, lines: int, tokens: int, alone: bool) -> int:
        """As `Counted.scratch`."""
        sides = fit(self._backward, problem.head_dim, problem.v_head_dim)
        assert sides, "supports() refuses head dims that no configuration holds"
        return gradients.scratch(self._backward[sides], lines, tokens, problem.head_dim, alone)


def _outputs(
    shape: tuple[int, int, int, int], device: torch.device, acc: Partial | None, dtype: torch.dtype, idle: bool
) -> tuple[Tensor, Tensor]:
    """Where a forward writes out of `shape` [B, Tq, H, Dv], and lse: rows that no block covers already hold what they end with."""
    B, T, H, _ = shape
    if acc is None:
        out = (torch.zeros if idle else torch.empty)(shape, dtype=dtype, device=device)
        lse = torch.empty((B, H, T), dtype=torch.float32, device=device)
        return out, lse.fill_(float("-inf")) if idle else lse
    out, lse = acc.out.contiguous(), acc.lse.contiguous()
    if out.dtype == dtype:
        return out, lse
    return (out.to(dtype) if idle else torch.empty_like(out, dtype=dtype)), lse
