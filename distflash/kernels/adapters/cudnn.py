"""cuDNN's fused attention. Legend: B batch, R x C queries x keys of one piece, H query heads, D head dim."""

from __future__ import annotations

import torch
from torch import Tensor

from distflash.kernels.adapters.adapter import Adapter
from distflash.kernels.adapters.pieces import Window
from distflash.kernels.base import Problem

_ATEN = torch.ops.aten


class CudnnKernel(Adapter):
    """cuDNN's fused attention, as PyTorch ships it. Its causal mask is aligned top-left, so it gets squares only (`pieces`)."""

    name = "cudnn"
    windows = False

    def _dims(self, problem: Problem) -> str | None:
        dims = (problem.head_dim, problem.v_head_dim)
        if any(d % 8 for d in dims) or not (max(dims) <= 128 or dims == (256, 256)):
            return f"cudnn serves head dims up to 128, multiples of 8, and 256, got {dims[0]} and {dims[1]}"
        if max(dims) > 128 and torch.cuda.get_device_capability(problem.device) < (9, 0):
            return f"cudnn serves head dim 256 from compute capability 9.0 on, {problem.device} has less"
        return None

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, keep: Window) -> tuple[Tensor, Tensor]:
        back = keep == (0, None)
        heads_first = (_turned(x, back).transpose(1, 2) for x in (q, k, v))
        causal = back or keep.causal
        out, lse, *_ = _ATEN._scaled_dot_product_cudnn_attention(*heads_first, None, True, 0.0, causal, False, scale=scale)
        lse = lse.view(out.shape[:3])  # [B, H, R, 1] in some releases
        return _turned(out.transpose(1, 2), back), lse.flip(2) if back else lse

    def _gradients(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, keep: Window
    ) -> tuple[Tensor, Tensor, Tensor]:
        back = keep == (0, None)
        heads_first = (_turned(x, back).transpose(1, 2) for x in (dout, q, k, v, out))
        lse = (lse.flip(2) if back else lse).unsqueeze(-1)
        none = torch.zeros((), dtype=torch.int64, device=q.device)  # seed and offset of the dropout that there is not
        grads = _ATEN._scaled_dot_product_cudnn_attention_backward(
            *heads_first, lse, none, none, None, None, None, q.shape[1], k.shape[1], 0.0, back or keep.causal, scale=scale
        )
        dq, dk, dv = (_turned(x.transpose(1, 2), back) for x in grads)
        return dq, dk, dv


def _turned(x: Tensor, back: bool) -> Tensor:
    """[B, T, H, D] from the last token to the first, if so wished."""
    return x.flip(1) if back else x
