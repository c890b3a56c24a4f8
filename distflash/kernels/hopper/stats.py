"""The small kernels around the backward, in plain Triton: delta = rowsum(out * dout), and lse and delta as the backward reads them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["T", "heads"])
def delta_kernel(out, dout, delta, ob, ot, oh, gb, gt, gh, T, heads, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr):
    """D_i of FlashAttention-2 (arXiv:2307.08691), §3.1: out, dout [B, T, H, D], rows contiguous -> delta [B, H, T] fp32.
    grid: B * H * T / ROWS, one dimension: only the first may pass 65535."""
    blocks = tl.cdiv(T, ROWS)
    line = tl.program_id(0) // blocks
    rows = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    b = (line // heads).to(tl.int64)
    h = (line % heads).to(tl.int64)
    cols = tl.arange(0, DP)
    inside = (rows < T)[:, None] & (cols < D)[None, :]
    t = rows.to(tl.int64)[:, None]
    o = tl.load(out + b * ob + h * oh + t * ot + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    g = tl.load(dout + b * gb + h * gh + t * gt + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(delta + line.to(tl.int64) * T + rows, tl.sum(o * g, 1), mask=rows < T)


@triton.jit(do_not_specialize=["T", "PAD"])
def stats_kernel(lse, delta, nlse, ndelta, fold, T, PAD, BLOCK: tl.constexpr):
    """-lse in base 2, and still -inf where no key was seen (there exp2(s - lse) must be 0); -delta times `fold`. Lines of T elements
    become lines of PAD, the rest like a row that saw no key. grid: lines, PAD / BLOCK.

    Negated here, so that the backward's s - lse and dp - delta are one FMA each.
    """
    line = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(lse + line * T + at, mask=at < T, other=float("-inf"))
    y = tl.load(delta + line * T + at, mask=at < T, other=0.0)
    tl.store(nlse + line * PAD + at, tl.where(x == float("-inf"), x, x * -1.4426950408889634), mask=at < PAD)
    tl.store(ndelta + line * PAD + at, y * -fold, mask=at < PAD)
