"""Tiled online softmax and recomputation in plain PyTorch: any device, any dtype, never S x S in memory. The default on CPU.

Legend: B batch, Tq / Tk local queries / keys, H query heads, Hk key/value heads, G = H / Hk, D head dim; R x C one block of scores.

Heads of one group are stacked along the rows, [B, Hk, G*R, D], so that grouped heads need no copy of K or V.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from distflash.kernels.base import Partial, Problem, Scores, accumulator
from distflash.kernels.scores import shaped, weights
from distflash.tile import Tile, Tiles

_ROWS, _COLUMNS = 256, 1024  # block of scores: fits a core's L2 at a few heads, large enough for BLAS


class EagerKernel:
    """FlashAttention-2's two loops (arXiv:2307.08691, Algorithms 1 and 2) over PyTorch matmuls."""

    name = "eager"

    def supports(self, problem: Problem) -> str | None:
        return None

    def deterministic(self) -> EagerKernel:
        return self

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, scale: float, *, acc: Partial | None = None, dtype: torch.dtype | None = None,
        scores: Scores | None = None,
    ) -> Partial:  # fmt: skip
        wide = accumulator(q.dtype)
        q, k, v = (x.to(wide) for x in (q, k, v))
        if acc is None:
            batch, rows, heads, _ = q.shape
            acc = Partial(q.new_zeros(batch, rows, heads, v.shape[3]), q.new_full((batch, heads, rows), float("-inf")))
        for tile in tiles:
            for rows, part in _flash(q, k, v, tile, scale, scores) or _online(q, k, v, tile, scale, scores):
                merge_rows(acc, rows, part)
        return Partial(acc.out.to(dtype or wide), acc.lse)

    def delta(self, out: Tensor, dout: Tensor) -> Tensor:
        wide = accumulator(out.dtype)
        return torch.einsum("bihd,bihd->bhi", out.to(wide), dout.to(wide))

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, tiles: Tiles, scale: float, *,
        dq: Tensor | None = None, dq_dtype: torch.dtype | None = None, dkv_dtype: torch.dtype | None = None,
        scores: Scores | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        wide = accumulator(q.dtype)
        q, k, v, dout = (x.to(wide) for x in (q, k, v, dout))
        dq = torch.zeros_like(q, memory_format=torch.contiguous_format) if dq is None else dq
        dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (k, v))
        kv_heads = k.shape[2]
        for tile in tiles:
            for rows, columns, keep in _blocks(tile):
                q_b, do_b = _stacked(q[:, rows], kv_heads), _stacked(dout[:, rows], kv_heads)  # [B, Hk, G*R, D]
                k_b, v_b = k[:, columns].transpose(1, 2), v[:, columns].transpose(1, 2)  # [B, Hk, C, D]
                lse_b, delta_b = (x[:, :, rows].reshape(x.shape[0], kv_heads, -1, 1) for x in (lse, delta))  # [B, Hk, G*R, 1]
                s, derivative, dropped = _asked(torch.matmul(q_b, k_b.mT).mul_(scale), q.shape[2], scores, rows, columns)
                p = torch.exp_(s.sub_(lse_b))
                if keep is not None:
                    p.unflatten(2, (-1, keep.shape[0])).masked_fill_(~keep.to(p.device), 0.0)
                dv[:, columns] += torch.matmul((p if dropped is None else p * dropped).mT, do_b).transpose(1, 2)
                dp = torch.matmul(do_b, v_b.mT) if dropped is None else torch.matmul(do_b, v_b.mT).mul_(dropped)
                ds = dp.sub_(delta_b).mul_(p).mul_(scale)
                if derivative is not None:
                    ds.mul_(derivative)
                if keep is not None:
                    # p is 0 there, but dP may be NaN where the key is meant to be unseen
                    ds.unflatten(2, (-1, keep.shape[0])).masked_fill_(~keep.to(p.device), 0.0)
                dk[:, columns] += torch.matmul(ds.mT, q_b).transpose(1, 2)
                dq[:, rows] += _unstacked(torch.matmul(ds, k_b), q.shape[2])
        return dq.to(dq_dtype or wide), dk.to(dkv_dtype or wide), dv.to(dkv_dtype or wide)


def _asked(s: Tensor, heads: int, scores: Scores | None, rows: slice, columns: slice) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Scores [B, Hk, G*R, C] as the softmax takes them, their derivative by s, what dropout multiplies probabilities with."""
    if scores is None:
        return s, None, None
    shape = s.shape
    s = s.view(shape[0], heads, rows.stop - rows.start, shape[3])
    dropped = weights(s, scores, rows, columns)
    s, derivative = shaped(s, scores, rows, columns)
    return s.view(shape), derivative if derivative is None else derivative.view(shape), dropped if dropped is None else dropped.view(shape)


def _online(q: Tensor, k: Tensor, v: Tensor, tile: Tile, scale: float, scores: Scores | None) -> Iterator[tuple[slice, Partial]]:
    """Attention over one tile, block by block: each part covers some rows and some keys."""
    for rows, columns, keep in _blocks(tile):
        s = torch.matmul(_stacked(q[:, rows], k.shape[2]), k[:, columns].permute(0, 2, 3, 1)).mul_(scale)  # [B, Hk, G*R, C]
        s, _, dropped = _asked(s, q.shape[2], scores, rows, columns)
        if keep is not None:
            s.unflatten(2, (-1, keep.shape[0])).masked_fill_(~keep.to(s.device), float("-inf"))
        top = s.amax(-1, keepdim=True)
        top = torch.where(top == float("-inf"), 0.0, top)  # a row that sees nothing here
        p = torch.exp_(s.sub_(top))
        total = p.sum(-1, keepdim=True)
        if dropped is not None:
            p.mul_(dropped)  # after their sum: lse is of what was there before
        out = torch.matmul(p, v[:, columns].transpose(1, 2)) / torch.where(total == 0, 1.0, total)
        lse = (top + torch.log(total)).squeeze(-1)
        yield rows, Partial(_unstacked(out, q.shape[2]), lse.reshape(q.shape[0], q.shape[2], -1))


def _flash(q: Tensor, k: Tensor, v: Tensor, tile: Tile, scale: float, scores: Scores | None) -> Iterator[tuple[slice, Partial]] | None:
    """PyTorch's own CPU flash operator where it serves: a rectangle without a mask, or a causal square, scale > 0, no variants.

    It multiplies its mask of -inf by the scale too, so that a causal square with scale <= 0 would come out as NaN.
    """
    causal = tile.rows == tile.columns and tile.band.hi == 0 and tile.band.lo <= 1 - tile.rows
    if q.device.type != "cpu" or not (tile.full or causal) or q.shape[3] != v.shape[3] or scale <= 0 or scores is not None:
        return None
    group = q.shape[2] // k.shape[2]
    k_t, v_t = (x[:, tile.kv].repeat_interleave(group, dim=2) if group > 1 else x[:, tile.kv] for x in (k, v))
    heads_first = (_rows(x).transpose(1, 2) for x in (q[:, tile.q], k_t, v_t))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads_first, 0.0, not tile.full, scale=scale)
    return iter([(tile.q, Partial(out.transpose(1, 2), lse))])


def _rows(x: Tensor) -> Tensor:
    """x, copied if its last dimension has gaps: the operator reads rows as if they had none."""
    return x if x.stride(-1) == 1 else x.contiguous()


def merge_rows(acc: Partial, rows: slice, part: Partial) -> None:
    """Merge a part that covers only `rows` into the running result, in place: parallel.merge, which kernels do not import."""
    mine = acc.lse[:, :, rows]
    top = torch.maximum(mine, part.lse)
    top = torch.where(top > float("-inf"), top, 0.0)
    old, new = torch.exp(mine - top), torch.exp(part.lse - top)
    total = old + new  # 0 where neither saw a key; weights are normalised by it, not by the rounded lse
    share_old, share_new = ((x / torch.where(total > 0, total, 1.0)).transpose(1, 2).unsqueeze(-1) for x in (old, new))
    acc.out[:, rows] = share_old * acc.out[:, rows] + share_new * part.out
    acc.lse[:, :, rows] = top + torch.log(total)


def _blocks(tile: Tile) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """(rows, columns, pairs kept or None for all) of the blocks of a tile that keep something."""
    lo, hi = tile.band.lo, tile.band.hi
    for i in range(0, tile.rows, _ROWS):
        i1 = min(i + _ROWS, tile.rows)
        for j in range(max(0, i + lo), min(tile.columns, i1 + hi), _COLUMNS):
            j1 = min(j + _COLUMNS, tile.columns, i1 + hi)
            keep = None
            if j1 - 1 - i > hi or j - (i1 - 1) < lo:
                offset = torch.arange(j, j1) - torch.arange(i, i1).unsqueeze(1)
                keep = (offset >= lo) & (offset <= hi)
            yield slice(tile.q.start + i, tile.q.start + i1), slice(tile.kv.start + j, tile.kv.start + j1), keep


def _stacked(x: Tensor, kv_heads: int) -> Tensor:
    """[B, R, H, D] -> [B, Hk, G*R, D]."""
    return x.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)


def _unstacked(x: Tensor, heads: int) -> Tensor:
    """[B, Hk, G*R, D] -> [B, R, H, D]."""
    batch, kv_heads, _, dim = x.shape
    return x.view(batch, heads, -1, dim).transpose(1, 2) if kv_heads else x
