"""The portable Triton kernel behind the Kernel protocol: NVIDIA sm_80 and newer, AMD gfx942, and Triton's interpreter on a CPU.

Legend: B batch, Tq / Tk local queries / keys, H query heads, Hk key/value heads, D / Dv head dims.
Each pass is one launch over a tile table; nothing here waits for the device.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from triton.runtime import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from distflash.kernels.base import Partial, Problem, Scores
from distflash.kernels.box import heads_first, readable
from distflash.kernels.launching import LAUNCHING
from distflash.kernels.scores import threshold
from distflash.kernels.table import column_table, row_table
from distflash.kernels.triton.backward import delta_kernel, dkv_kernel, dq_kernel, stats_kernel
from distflash.kernels.triton.configs import Config, config, family, pad
from distflash.kernels.triton.forward import forward_kernel
from distflash.kernels.triton.scores import ALIBI, DROPOUT, SOFTCAP, Asked
from distflash.tile import Tiles

INTERPRETED = not isinstance(forward_kernel, JITFunction)  # Triton chose when the kernels were decorated
_LOG2E = math.log2(math.e)
_DELTA_ROWS = 32


class TritonKernel:
    """Tiled attention in Triton; `configs` replaces the shipped tile sizes of a pass, for tuning."""

    name = "triton"

    def __init__(self, configs: dict[str, Config] | None = None) -> None:
        self._configs = configs or {}

    def supports(self, problem: Problem) -> str | None:
        """None, or the reason why this kernel cannot serve the problem."""
        if problem.device.type != "cuda" and not (INTERPRETED and problem.device.type == "cpu"):
            return f"triton kernels run on CUDA and ROCm devices (elsewhere only under Triton's interpreter), not on {problem.device}"
        if problem.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"triton kernels compute in fp16, bf16 and fp32, not in {problem.dtype}"
        for side, dim in (("query/key", problem.head_dim), ("value", problem.v_head_dim)):
            if not 1 <= dim <= 256:
                return f"triton kernels serve head dims of 1 to 256, the {side} head dim is {dim}"
        if problem.device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(problem.device) < (8, 0):
            return "triton kernels need compute capability 8.0 or newer"
        return None

    def deterministic(self) -> TritonKernel:
        """Itself: two passes without atomics, whatever is asked for."""
        return self

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, scale: float, *, acc: Partial | None = None, dtype: torch.dtype | None = None,
        scores: Scores | None = None,
    ) -> Partial:  # fmt: skip
        """Attend over `tiles` and merge with `acc`; in place where acc is contiguous and `out` stays fp32."""
        q, k, v = _rowwise(-q if scale < 0 else q), _rowwise(k), _rowwise(v)  # the kernel's row maximum needs a scale >= 0
        (B, Tq, H, D), Dv, dtype = q.shape, v.shape[3], dtype or torch.float32
        acc = Partial(acc.out.contiguous(), acc.lse.contiguous()) if acc is not None else None
        stays = acc is not None and dtype == torch.float32
        out = acc.out if acc is not None and stays else torch.empty(B, Tq, H, Dv, dtype=dtype, device=q.device)
        lse = acc.lse if acc is not None else torch.empty(B, H, Tq, dtype=torch.float32, device=q.device)
        tile = self._config("forward", q, v, scores)
        table = row_table(tiles, tile.rows, q.device)
        blocks = table.busy if stays else len(table.blocks)
        boxes = _boxes(tile, k, v)
        self._launch(
            forward_kernel, q, blocks * B * H, tile,
            q, k, v, *boxes, out, lse, acc.out if acc else out, lse, table.blocks, table.entries, abs(scale) * _LOG2E,
            *_strides(q, k, v), blocks, H, H // max(k.shape[2], 1), Tq, *_asked(scores, abs(scale)),
            D=D, DV=Dv, PAD=pad(D), PAD_V=pad(Dv), ROWS=tile.rows, COLUMNS=tile.columns,
            HAS_LO=table.has_lo, MERGE=acc is not None, WIDE=_wide(q, k, v, out), BOXES=tile.boxes if boxes[0] else 0, OVERLAP=tile.overlap,
            ASKED=_flags(scores),
        )  # fmt: skip
        return Partial(out, lse)

    def delta(self, out: Tensor, dout: Tensor) -> Tensor:
        """rowsum(out * dout) as [B, H, Tq] fp32."""
        out, dout = _rowwise(out), _rowwise(dout)
        B, Tq, H, Dv = out.shape
        delta = torch.empty(B, H, Tq, dtype=torch.float32, device=out.device)
        blocks = -(-Tq // _DELTA_ROWS)
        self._launch(
            delta_kernel, out, blocks * B * H, Config(_DELTA_ROWS, 1, 4, 1),
            out, dout, delta, *_strides(out, dout), blocks, H, Tq,
            DV=Dv, PAD_V=pad(Dv), ROWS=_DELTA_ROWS, WIDE=_wide(out, dout),
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
        scores: Scores | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv, bit-equal from run to run; dq in place where it is contiguous and stays fp32."""
        q, k, v, dout = _rowwise(q), _rowwise(k), _rowwise(v), _rowwise(dout.to(q.dtype))
        stats = self._stats(lse.contiguous(), delta.contiguous())
        dkv_dtype, dq_dtype = dkv_dtype or torch.float32, dq_dtype or torch.float32
        dk, dv = (torch.empty(t.shape, dtype=dkv_dtype, device=t.device) for t in (k, v))
        carried = dq.contiguous() if dq is not None else None
        stays = carried is not None and dq_dtype == carried.dtype
        dq = carried if carried is not None and stays else torch.empty(q.shape, dtype=dq_dtype, device=q.device)
        with _fork(q.device) as beside:
            self._dkv(dout, q, k, v, stats, tiles, scale, scores, dk, dv)
            with beside:
                self._dq(dout, q, k, v, stats, tiles, scale, scores, dq, carried, stays)
        return dq, dk, dv

    def scratch(self, problem: Problem, lines: int, tokens: int, alone: bool) -> int:
        """As `Counted.scratch`: the statistics."""
        return 8 * lines * tokens

    def _stats(self, lse: Tensor, delta: Tensor) -> Tensor:
        """(lse in base 2, delta) as [B, H, Tq, 2]."""
        stats = torch.empty(*lse.shape, 2, dtype=torch.float32, device=lse.device)
        self._launch(stats_kernel, lse, -(-lse.numel() // 1024), Config(1, 1, 4, 1), lse, delta, stats, lse.numel(), BLOCK=1024)
        return stats

    def _dkv(self, dout, q, k, v, stats, tiles: Tiles, scale: float, scores: Scores | None, dk: Tensor, dv: Tensor) -> None:
        (B, Tq, H, D), (_, Tk, Hk, Dv) = q.shape, v.shape
        tile = self._config("dkv", q, v, scores)
        table = column_table(tiles, tile.rows, q.device)
        blocks = len(table.blocks)
        boxes = _boxes(tile, q, dout)
        self._launch(
            dkv_kernel, q, blocks * B * Hk, tile,
            q, k, v, dout, *boxes, stats, dk, dv, table.blocks, table.entries, scale, scale * _LOG2E,
            *_strides(q, k, v, dout), blocks, Hk, H // max(Hk, 1), Tq, Tk, *_asked(scores, scale, transposed=True),
            D=D, DV=Dv, PAD=pad(D), PAD_V=pad(Dv), ROWS=tile.rows, COLUMNS=tile.columns,
            HAS_LO=table.has_lo, WIDE=_wide(q, k, v, dout), BOXES=tile.boxes if boxes[0] else 0, ASKED=_flags(scores),
        )  # fmt: skip

    def _dq(
        self, dout, q, k, v, stats, tiles: Tiles, scale: float, scores: Scores | None, dq: Tensor, carried: Tensor | None, stays: bool
    ) -> None:
        (B, Tq, H, D), (_, _, Hk, Dv) = q.shape, v.shape
        tile = self._config("dq", q, v, scores)
        table = row_table(tiles, tile.rows, q.device)
        blocks = table.busy if stays else len(table.blocks)
        boxes = _boxes(tile, k, v)
        self._launch(
            dq_kernel, q, blocks * B * H, tile,
            q, k, v, dout, *boxes, stats, dq, dq if carried is None else carried, table.blocks, table.entries, scale, scale * _LOG2E,
            *_strides(q, k, v, dout), blocks, H, H // max(Hk, 1), Tq, *_asked(scores, scale),
            D=D, DV=Dv, PAD=pad(D), PAD_V=pad(Dv), ROWS=tile.rows, COLUMNS=tile.columns,
            HAS_LO=table.has_lo, MERGE=carried is not None, WIDE=_wide(q, k, v, dout), BOXES=tile.boxes if boxes[0] else 0,
            ASKED=_flags(scores),
        )  # fmt: skip

    def _config(self, pass_: str, q: Tensor, v: Tensor, scores: Scores | None) -> Config:
        width = pad(max(q.shape[3], v.shape[3]))
        chosen = self._configs.get(pass_) or config(pass_, family(q.device), q.element_size(), width, scores is None)
        return chosen if scores is None else replace(chosen, overlap=False)

    @staticmethod
    def _launch(kernel, on: Tensor, programs: int, tile: Config, *args, **constants) -> None:
        """Launch on the tensor's own device, which need not be the current one."""
        if programs == 0:
            return
        with LAUNCHING, torch.cuda.device(on.device) if on.is_cuda else contextlib.nullcontext():
            kernel[(programs,)](*args, **constants, num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True)


def _boxes(tile: Config, *tensors: Tensor) -> list[TensorDescriptor | None]:
    """Descriptors of [B, T, H, D] tensors in boxes of tile.columns rows, as wide as the padded head; None where pointers must do."""
    if not tile.boxes or not all(readable(t) for t in tensors):
        return [None] * len(tensors)
    return [TensorDescriptor(t, *heads_first(t), [1, 1, tile.columns, pad(t.shape[3])]) for t in tensors]


@contextlib.contextmanager
def _fork(device: torch.device) -> Iterator[contextlib.AbstractContextManager]:
    """Yields a context whose launches run beside those after this point: the end of one pass is filled by the start of the other."""
    if device.type != "cuda":
        yield contextlib.nullcontext()
        return
    current, side = torch.cuda.current_stream(device), _side(device)
    side.wait_stream(current)
    try:
        yield torch.cuda.stream(side)
    finally:
        current.wait_stream(side)


@functools.cache
def _side(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _asked(scores: Scores | None, scale: float, transposed: bool = False) -> tuple[Asked | None, int | None, int | None, int | None]:
    """(asked, seed, threshold, first_head) of a kernel; `transposed` if its rows are keys."""
    if scores is None:
        return None, None, None, None
    rows, columns = (scores.k_positions, scores.q_positions) if transposed else (scores.q_positions, scores.k_positions)
    inner = scale / scores.softcap if scores.softcap else 0.0
    slopes = rows if scores.slopes is None else scores.slopes
    if (dropout := scores.dropout) is None:
        return Asked(rows, columns, slopes, inner, scores.softcap, 1.0), 0, 0, 0
    return Asked(rows, columns, slopes, inner, scores.softcap, 1 / (1 - dropout.p)), dropout.seed, threshold(dropout), dropout.head


def _flags(scores: Scores | None) -> int:
    """ASKED of a kernel."""
    if scores is None:
        return 0
    found = ((SOFTCAP, bool(scores.softcap)), (ALIBI, scores.slopes is not None), (DROPOUT, scores.dropout is not None))
    return sum(flag.value for flag, on in found if on)


def _rowwise(t: Tensor) -> Tensor:
    """A tensor whose head dim is contiguous: itself, or a copy. Every other stride is the kernels' business."""
    return t if t.stride(3) == 1 or t.shape[3] == 1 else t.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    """(batch, token, head) strides of each tensor."""
    return [t.stride(n) for t in tensors for n in (0, 1, 2)]


def _wide(*tensors: Tensor) -> bool:
    """True if an offset inside one tile, of at most 256 rows, may pass 2^31."""
    return max(t.stride(1) for t in tensors) >= (1 << 31) // 256
