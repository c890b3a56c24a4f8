"""Other people's kernels behind the Kernel protocol: cuDNN, FlashAttention-2, -3 and -4. Chosen by name only.

So that a user can bring a kernel, and rings can be compared with equal kernels inside. One launch a tile of the tile table, or a few
where a kernel cannot express the tile's band (`pieces`). What they cost against this library's own kernels: results leave them in
the inputs' dtype, so each tile adds a rounding, and merging is a pass over memory of its own. cuDNN builds a plan and FlashAttention-4
compiles for each new shape or mask: the first calls take seconds. All of them group heads themselves: K and V are never repeated.

Legend: B batch, Tq / Tk local queries / keys, R x C one piece of the tile table, H query heads, Hk key/value heads, D head dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distflash.kernels.base import Partial, Problem
from distflash.kernels.eager import EagerKernel, merge_rows
from distflash.tile import Band, Tile, Tiles

_ATEN = torch.ops.aten
_EAGER = EagerKernel()
_NOTHING = 1e30  # the lse of a row that sees nothing: exp(s - lse) is 0, and no kernel computes inf - inf


class Window(NamedTuple):
    """What a piece keeps, in FlashAttention's words: bottom-right aligned, None is unlimited. (None, 0) is causal."""

    left: int | None
    right: int | None

    @property
    def causal(self) -> bool:
        return self == (None, 0)


def window(piece: Tile) -> Window:
    """The band of a piece, counted from the bottom right corner."""
    corner = piece.columns - piece.rows
    left = corner - piece.band.lo if piece.band.lo > 1 - piece.rows else None
    right = piece.band.hi - corner if piece.band.hi < piece.columns - 1 else None
    return Window(left, right)


def pieces(tile: Tile, windows: bool) -> Iterator[Tile]:
    """Cut a tile into rectangles that a kernel can express; every row of a piece sees a key, every key is seen.

    With `windows` a piece is full, causal from the bottom right corner, or a window. Without, it is full, or a square that keeps
    j <= i (causal, whatever the alignment), or a square that keeps j >= i (causal with both axes reversed).
    """
    cropped = tile.cropped()
    if cropped is None:
        return
    tile, lo, hi = cropped, cropped.band.lo, cropped.band.hi
    rows, columns = tile.rows, tile.columns
    below, above = lo > 1 - rows, hi < columns - 1  # which bound cuts something
    if not (below or above) or (below and windows):
        yield tile
    elif below and above:  # of hi - lo rows, either bound cuts on its own side of one column
        height = max(1, hi - lo)
        for at in range(0, rows, height):
            stop, middle = min(at + height, rows), min(max(0, at + hi), columns)
            yield from pieces(_part(tile, at, stop, 0, middle), windows)
            yield from pieces(_part(tile, at, stop, middle, columns), windows)
    elif below:
        yield from (_reversed(piece, tile) for piece in pieces(_reversed(tile, tile), windows))
    else:  # rows from `end` on see every key, `edge` keys are seen by every row
        end, edge = columns - hi, 0 if windows else hi
        yield _part(tile, 0, end, edge, columns)
        yield from pieces(_part(tile, 0, end, 0, edge), windows)
        yield from pieces(_part(tile, end, rows, 0, columns), windows)


def _part(tile: Tile, top: int, bottom: int, left: int, right: int) -> Tile:
    """Rows top..bottom and columns left..right of a tile."""
    q, kv, shift = tile.q.start, tile.kv.start, top - left
    return Tile(slice(q + top, q + bottom), slice(kv + left, kv + right), Band(tile.band.lo + shift, tile.band.hi + shift))


def _reversed(piece: Tile, tile: Tile) -> Tile:
    """A piece of `tile` with the rows and columns of `tile` counted from the other end."""
    q, kv = (slice(s.start + s.stop - x.stop, s.start + s.stop - x.start) for s, x in ((tile.q, piece.q), (tile.kv, piece.kv)))
    corner = piece.columns - piece.rows
    return Tile(q, kv, Band(corner - piece.band.hi, corner - piece.band.lo))


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
        return _EAGER.delta(out, dout)

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
        dout, out = _stand_ins(dout, delta)
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


class Fa2Kernel(Adapter):
    """FlashAttention-2: the flash_attn package (2.7 or newer) where it is installed, else the one inside PyTorch."""

    name = "fa2"

    def _missing(self) -> str | None:
        try:
            found = version("flash_attn") if _package() else "2.7"
        except PackageNotFoundError:
            return "there is a module flash_attn that is no installed package: which version it stands for is not known"
        if tuple(map(int, found.split(".")[:2])) < (2, 7):
            return f"flash_attn {found} is installed, 2.7 or newer is needed: upgrade it, or remove it to use PyTorch's own"
        return None

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, keep: Window) -> tuple[Tensor, Tensor]:
        if package := _package():
            out, lse, *_ = package._flash_attn_forward(q, k, v, 0.0, scale, keep.causal, *_minus(keep), 0.0, None, False)
            return out, lse
        left, right = _minus(keep)
        out, lse, *_ = _ATEN._flash_attention_forward(
            q, k, v, None, None, q.shape[1], k.shape[1], 0.0, keep.causal, False,
            scale=scale, window_size_left=left, window_size_right=right,
        )  # fmt: skip
        return out, lse

    def _gradients(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, keep: Window
    ) -> tuple[Tensor, Tensor, Tensor]:
        if package := _package():
            dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
            package._flash_attn_backward(dout, q, k, v, out, lse, dq, dk, dv, 0.0, scale, keep.causal, *_minus(keep), 0.0, None, False)
            return dq, dk, dv
        left, right = _minus(keep)
        rng, unused = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)  # of dropout
        return _ATEN._flash_attention_backward(
            dout, q, k, v, out, lse, None, None, q.shape[1], k.shape[1], 0.0, keep.causal, rng, unused,
            scale=scale, window_size_left=left, window_size_right=right,
        )  # fmt: skip


def _package() -> Any:
    return import_module("flash_attn.flash_attn_interface") if _installed("flash_attn.flash_attn_interface") else None


class Fa3Kernel(Adapter):
    """FlashAttention-3, from its module flash_attn_interface (built from source, or a wheel that holds the same names)."""

    name = "fa3"
    capability = (9, 0)

    def _missing(self) -> str | None:
        if not _installed("flash_attn_interface"):
            return "FlashAttention-3 is not installed: there is no module flash_attn_interface"
        flags = import_module("flash_attn_config").CONFIG["build_flags"] if _installed("flash_attn_config") else {}
        if flags.get("FLASHATTENTION_DISABLE_BACKWARD"):
            return "this build of FlashAttention-3 has no backward: build it with one"
        return None

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, keep: Window) -> tuple[Tensor, Tensor]:
        left, right = _minus(keep)
        attend = import_module("flash_attn_interface")._flash_attn_forward
        out, lse, *_ = attend(q, k, v, softmax_scale=scale, causal=keep.causal, window_size_left=left, window_size_right=right)
        return out, lse

    def _gradients(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, keep: Window
    ) -> tuple[Tensor, Tensor, Tensor]:
        left, right = _minus(keep)
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        import_module("flash_attn_interface")._flash_attn_backward(
            dout, q, k, v, out, lse, dq=dq, dk=dk, dv=dv, softmax_scale=scale, is_causal=keep.causal,
            window_size_left=left, window_size_right=right,
        )  # fmt: skip
        return dq, dk, dv


class Fa4Kernel(Adapter):
    """FlashAttention-4 (flash_attn.cute, CuTe DSL): compiled at the first call of each kind."""

    name = "fa4"
    capability = (9, 0)

    def _missing(self) -> str | None:
        return None if _installed("flash_attn.cute.interface") else "FlashAttention-4 is not installed: there is no module flash_attn.cute"

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, keep: Window) -> tuple[Tensor, Tensor]:
        attend = import_module("flash_attn.cute.interface")._flash_attn_fwd
        out, lse, *_ = attend(q, k, v, softmax_scale=scale, causal=keep.causal, return_lse=True, **_named(keep))
        return out, lse

    def _gradients(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, keep: Window
    ) -> tuple[Tensor, Tensor, Tensor]:
        gradients = import_module("flash_attn.cute.interface")._flash_attn_bwd
        dq, dk, dv, *_ = gradients(q, k, v, out, dout, lse, softmax_scale=scale, causal=keep.causal, **_named(keep))
        return dq, dk, dv


def _minus(keep: Window) -> tuple[int, int]:
    """(left, right) with -1 for unlimited; a causal piece says so by its flag."""
    left, right = (-1 if w is None or keep.causal else w for w in keep)
    return left, right


def _named(keep: Window) -> dict[str, int | None]:
    return {} if keep.causal else {"window_size_left": keep.left, "window_size_right": keep.right}


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package
        return False
