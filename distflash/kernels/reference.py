"""The oracle: attention as the formula says it, dense, S x S in memory. For tests; any device, any dtype, fp64 too.

Legend: B batch, Tq / Tk local queries / keys, H query heads, Hk key/value heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distflash.kernels.base import Partial, Problem, Scores, accumulator
from distflash.kernels.scores import shaped, weights
from distflash.tile import Tiles


class ReferenceKernel:
    """softmax(scale * q k^T + mask) v by the book, in the accumulator's dtype."""

    name = "reference"

    def supports(self, problem: Problem) -> str | None:
        return None

    def deterministic(self) -> ReferenceKernel:
        return self

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, scale: float, *, acc: Partial | None = None, dtype: torch.dtype | None = None,
        scores: Scores | None = None,
    ) -> Partial:  # fmt: skip
        s, _, _, dropped = _scores(q, k, tiles, scale, scores)
        if acc is not None:
            # the running result is one more key: its score is lse, its value is out
            s = torch.cat([s, acc.lse.to(s).unsqueeze(-1)], dim=-1)
        lse = torch.logsumexp(s, dim=-1)  # [B, H, Tq]
        p = torch.softmax(s, dim=-1).masked_fill(lse.unsqueeze(-1) == float("-inf"), 0.0)
        out = torch.einsum("bhij,bjhd->bihd", p[..., : k.shape[1]] * dropped, _grouped(_clean(v, tiles), q))
        if acc is not None:
            out = out + p[..., -1].transpose(1, 2).unsqueeze(-1) * acc.out
        return Partial(out.to(dtype or out.dtype), lse)

    def delta(self, out: Tensor, dout: Tensor) -> Tensor:
        wide = accumulator(out.dtype)
        return (out.to(wide) * dout.to(wide)).sum(-1).transpose(1, 2).contiguous()

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, tiles: Tiles, scale: float, *,
        dq: Tensor | None = None, dq_dtype: torch.dtype | None = None, dkv_dtype: torch.dtype | None = None,
        scores: Scores | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        wide = accumulator(q.dtype)
        s, keep, derivative, dropped = _scores(q, k, tiles, scale, scores)
        p = torch.exp(s - lse.unsqueeze(-1)).masked_fill(~keep, 0.0)  # [B, H, Tq, Tk]
        do, kw, vw = dout.to(wide), _grouped(_clean(k, tiles), q), _grouped(_clean(v, tiles), q)
        dp = torch.einsum("bihd,bjhd->bhij", do, vw) * dropped
        ds = (p * (dp - delta.unsqueeze(-1)) * derivative).masked_fill(~keep, 0.0) * scale
        grad_q = torch.einsum("bhij,bjhd->bihd", ds, kw)
        grad_k = _folded(torch.einsum("bhij,bihd->bjhd", ds, q.to(wide)), k)
        grad_v = _folded(torch.einsum("bhij,bihd->bjhd", p * dropped, do), v)
        grad_q = grad_q if dq is None else dq + grad_q
        dtypes = (dq_dtype or wide, dkv_dtype or wide, dkv_dtype or wide)
        dq, dk, dv = (x.to(dtype).contiguous() for x, dtype in zip((grad_q, grad_k, grad_v), dtypes, strict=True))
        return dq, dk, dv


def _scores(
    q: Tensor, k: Tensor, tiles: Tiles, scale: float, asked: Scores | None
) -> tuple[Tensor, Tensor, Tensor | float, Tensor | float]:
    """Scores [B, H, Tq, Tk] with -inf where no tile keeps the pair; the pairs kept [Tq, Tk]; derivative and dropout of each score."""
    keep = torch.zeros(tiles.q_len, tiles.kv_len, dtype=torch.bool, device=q.device)
    for t in tiles:
        offset = torch.arange(t.columns, device=q.device) - torch.arange(t.rows, device=q.device).unsqueeze(1)
        keep[t.q, t.kv] |= (offset >= t.band.lo) & (offset <= t.band.hi)
    s = torch.einsum("bihd,bjhd->bhij", q.to(accumulator(q.dtype)), _grouped(k, q)) * scale
    derivative = dropped = None
    if asked is not None:
        s, derivative = shaped(s, asked, slice(None), slice(None))
        dropped = weights(s, asked, slice(None), slice(None))
    return s.masked_fill(~keep, float("-inf")), keep, 1.0 if derivative is None else derivative, 1.0 if dropped is None else dropped


def _grouped(x: Tensor, q: Tensor) -> Tensor:
    """[B, T, Hk, D] repeated to the query heads: head h reads h // (H // Hk)."""
    return x.to(accumulator(x.dtype)).repeat_interleave(q.shape[2] // x.shape[2], dim=2)


def _folded(x: Tensor, like: Tensor) -> Tensor:
    """[B, T, H, D] summed over the query heads of each key/value head."""
    return x.unflatten(2, (like.shape[2], -1)).sum(3)


def _clean(x: Tensor, tiles: Tiles) -> Tensor:
    """Keys that no tile touches hold anything, NaN too; here they meet probability 0 in a product, so they become 0."""
    used = torch.zeros(x.shape[1], dtype=torch.bool, device=x.device)
    for t in tiles:
        used[t.kv] = True
    return torch.where(used[:, None, None], x, 0)
