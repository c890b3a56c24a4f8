"""The Kernel protocol over a function that attends over one rectangle, and one for its gradients: one call a piece, merged and summed.

Legend: B batch, Tq / Tk local queries / keys, R x C one piece of the tile table, H query heads, Hk key/value heads, D head dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from distflash.kernels.adapters.pieces import Window, pieces, window
from distflash.kernels.base import Partial, Problem
from distflash.kernels.eager import EagerKernel, merge_rows
from distflash.tile import Tile, Tiles

_EAGER = EagerKernel()
_NOTHING = 1e30  # the lse of a row that sees nothing: exp(s - lse) is 0, and no kernel computes inf - inf


class Adapter(ABC):
    """The Kernel protocol over a function that attends over one piece, and one for its gradients.

    A subclass gives `_attend` and `_gradients`: q, dout, out [B, R, H, D], k, v [B, C, Hk, D], scale > 0, addresses and strides
    multiples of 16 bytes; lse [B, H, R] fp32, natural log.
    """

    name: str
    windows = True  # serves any window, not only full and causal squares
    capability = (8, 0)

    def _missing(self) -> str | None:
        """Why the kernel's package cannot be used, if so."""
        return None

    @abstractmethod
    def _attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, keep: Window) -> tuple[Tensor, Tensor]:
        """(out, lse)."""

    @abstractmethod
    def _gradients(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, keep: Window
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv) of the probabilities exp(scale q·k - lse), with rowsum(out * dout) for delta."""

    def _dims(self, problem: Problem) -> str | None:
        """Why the head dims cannot be served, if so."""
        if problem.head_dim != problem.v_head_dim or problem.head_dim % 8 or problem.head_dim > 256:
            return f"one head dim up to 256, a multiple of 8, is needed, got {problem.head_dim} and {problem.v_head_dim}"
        return None

    def supports(self, problem: Problem) -> str | None:
        """None, or the reason why this kernel cannot serve the problem."""
        if problem.device.type != "cuda" or torch.version.hip:
            return f"{self.name} runs on NVIDIA GPUs, not on {'ROCm' if torch.version.hip else problem.device}"
        if (found := torch.cuda.get_device_capability(problem.device)) < self.capability:
            return f"{self.name} needs compute capability {'.'.join(map(str, self.capability))}, {problem.device} has {found[0]}.{found[1]}"
        if problem.dtype not in (torch.bfloat16, torch.float16):
            return f"{self.name} computes in bf16 and fp16, not in {problem.dtype}"
        if problem.variants:
            return f"the adapter of {self.name} hands over a scale and a mask, not {', '.join(problem.variants)}"
        if problem.deterministic:
            return f"{self.name} adds up gradients in the order in which programs finish: not bit-equal from run to run"
        return self._dims(problem) or self._missing()

    def deterministic(self) -> Adapter:
        raise ValueError(f"{self.name} has no gradients that are bit-equal from run to run")

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, scale: float, *, acc: Partial | None = None, dtype: torch.dtype | None = None
    ) -> Partial:
        """Attend over `tiles`, one call a piece, and merge with `acc`."""
        q, scale, _ = _positive(q, scale)
        dtype = dtype or torch.float32
        cut, single = self._cut(tiles)
        if acc is None and len(cut) == 1 and not len(single) and cut[0].rows == q.shape[1]:  # nothing to merge
            out, lse = self._attend(*_legal(q, k[:, cut[0].kv], v[:, cut[0].kv]), scale=scale, keep=window(cut[0]))
            return Partial(out.to(dtype), lse)
        if acc is None:
            B, T, H, _ = q.shape
            acc = Partial(q.new_zeros(B, T, H, v.shape[3], dtype=torch.float32), q.new_full((B, H, T), float("-inf"), dtype=torch.float32))
        if len(single):
            acc = _EAGER.forward(q, k, v, single, scale, acc=acc)
        for piece in cut:
            part = self._attend(*_legal(q[:, piece.q], k[:, piece.kv], v[:, piece.kv]), scale=scale, keep=window(piece))
            merge_rows(acc, piece.q, Partial(*part))
        return Partial(acc.out.to(dtype), acc.lse)

    def _cut(self, tiles: Tiles) -> tuple[list[Tile], Tiles]:
        """Pieces for the kernel, and those of a single key, a product a row, which cuDNN refuses: PyTorch computes them."""
        cut = [piece for tile in tiles for piece in pieces(tile, self.windows)]
        single = tuple(piece for piece in cut if piece.columns == 1)
        return [piece for piece in cut if piece.columns > 1], Tiles(single, tiles.q_len, tiles.kv_len)

    def delta(self, out: Tensor, dout: Tensor) -> Tensor:
        """rowsum(out * dout) as [B, H, Tq] fp32."""
        return _EAGER.delta(out, dout.contiguous())

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, tiles: Tiles, scale: float, *,
        dq: Tensor | None = None, dq_dtype: torch.dtype | None = None, dkv_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients through `tiles`, one call a piece, summed in fp32."""
        cut, single = self._cut(tiles)
        lse = torch.where(lse == float("-inf"), _NOTHING, lse)
        if len(single):
            dq, dk, dv = _EAGER.backward(dout, q, k, v, lse, delta, single, scale, dq=dq)
        else:
            dq = torch.zeros(q.shape, dtype=torch.float32, device=q.device) if dq is None else dq
            dk, dv = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (k, v))
        q, scale, sign = _positive(q, scale)
        dout, out = _stand_ins(dout.contiguous(), delta)  # PyTorch adds up strided rows in another order, as it does in delta
        for piece in cut:
            rows, columns = piece.q, piece.kv
            local = _legal(dout[:, rows], q[:, rows], k[:, columns], v[:, columns], out[:, rows])
            grads = self._gradients(*local, lse=lse[:, :, rows].contiguous(), scale=scale, keep=window(piece))
            dq[:, rows].add_(grads[0], alpha=sign)
            dk[:, columns] += grads[1]
            dv[:, columns] += grads[2]
        dtypes = (dq_dtype or torch.float32, dkv_dtype or torch.float32, dkv_dtype or torch.float32)
        dq, dk, dv = (x.to(dtype).contiguous() for x, dtype in zip((dq, dk, dv), dtypes, strict=True))
        return dq, dk, dv


def _positive(q: Tensor, scale: float) -> tuple[Tensor, float, int]:
    """(q, scale, sign) with the same scores and scale > 0, which these kernels need: they take maxima before they scale.

    dq comes out for the q that is returned: times sign it is that of the q that came in.
    """
    if scale > 0:
        return q, scale, 1
    return (q.neg(), -scale, -1) if scale < 0 else (torch.zeros_like(q), 1.0, 0)


def _stand_ins(dout: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """(dout', out') with rowsum(out' * dout') = delta, for kernels that take `out` and compute delta themselves.

    Their delta would be that of their own tile; ours is global, less the gradient of lse. out' = dout * delta / |dout|², whose norm
    |delta| / |dout| never exceeds that of the true out (Cauchy-Schwarz) unless lse has a gradient. Rounding out' to the
    inputs' dtype costs delta what rounding out does: one part in 2^9 (bf16) of each product, which average out over D. It shows where dS
    cancels: a row that sees one key gets that rounding of delta instead of 0. |dout| is taken after division by its largest element,
    so that squares neither overflow nor vanish.

    A row whose dout is 0, or so faint beside the gradient of lse that out' would pass 1 / share, gets one element delta * share in dout',
    against 1 / share in out'. In dS that is less than rounding; dV errs by that share of what lse's gradient is. The element is at least
    `least`, fp16's smallest number: where it outweighs delta * share, dS is as coarse. A delta below `least` is none.
    """
    share, least = (2.0**-15, 2.0**-24) if dout.dtype == torch.float16 else (2.0**-40, 2.0**-100)
    column = delta.transpose(1, 2).unsqueeze(-1)  # [B, R, H, 1] fp32
    top = dout.abs().amax(-1, keepdim=True).float()
    wide = dout / torch.where(top == 0, 1.0, top)  # [B, R, H, D] fp32
    size = top * wide.square().sum(-1, keepdim=True)  # |dout|² / its largest element: delta / size is that of out'
    raised = (column.abs() * share).clamp(min=least).to(dout.dtype)
    faint = (size < raised) & (column.abs() >= least)
    first = torch.arange(dout.shape[-1], device=dout.device) == 0
    out = torch.where(faint, first * (column / raised), wide * (column / torch.where(size == 0, 1.0, size)))
    return torch.where(faint & first, raised, dout), out.to(dout.dtype)


def _legal(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors, copied where their address or a stride is no multiple of 16 bytes or the last dimension is not contiguous."""
    return tuple(x if _is_legal(x) else x.clone(memory_format=torch.contiguous_format) for x in tensors)


def _is_legal(x: Tensor) -> bool:
    unit = 16 // x.element_size()
    return x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(s > 0 and s % unit == 0 for s in x.stride()[:-1])
