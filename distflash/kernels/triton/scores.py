"""Softcap, ALiBi and dropout inside the kernels: what `kernels.scores` says, the softmax in base 2.

    ASKED    SOFTCAP, ALIBI, DROPOUT or sums of them, a constant; 0 is none: what is not asked for is not in the compiled kernel
    asked    an Asked; None if ASKED is 0
    here     what a program makes of it for its rows and its head, a tuple
Seed, threshold and first head of dropout are arguments of their own: integers inside a tuple would be compiled in, a kernel for each.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

SOFTCAP, ALIBI, DROPOUT = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)


class Asked(NamedTuple):
    """Scores become softcap * tanh(scale * q·k / softcap) - slope * distance; kept probabilities grow by `lift`, in fp32:
    of a P that is multiplied before it is rounded to 16 bits, a row's largest, 1, would be up to 0.4 % off, always the same way."""

    rows: Any  # positions, int32, of what the kernel calls rows and columns
    columns: Any
    slopes: Any  # [B, H] fp32; any pointer without ALIBI
    inner: Any  # scale / softcap
    softcap: Any
    lift: Any  # 1 / (1 - p)


@triton.jit
def looked_up(asked, seed, threshold, first_head, heads, batch, head, first, end, ROWS: tl.constexpr, ASKED: tl.constexpr):
    """`here` of rows first..end of one head."""
    here = None
    if ASKED:
        at = _positions(asked.rows, first, end, ROWS, True)
        slope = 0.0
        if ALIBI & ASKED:
            slope = tl.load(asked.slopes + batch * heads + head) * 1.4426950408889634
        key, limit = 0, 0
        if DROPOUT & ASKED:
            key, _, _, _ = tl.philox(seed, first_head + head, batch, 0, 0)  # of the head: its 10 rounds are of scalars
            limit = threshold.to(tl.uint32)
        here = (asked, at, slope, key, limit)
    return here


@triton.jit
def _positions(positions, first, end, N: tl.constexpr, CHECK: tl.constexpr):
    at = tl.arange(0, N)
    if CHECK:
        found = tl.load(positions + first + at, mask=first + at < end, other=0)
    else:
        found = tl.load(positions + first + at)
    return found


@triton.jit
def shaped(score, scale2, here, column, end, COLUMNS: tl.constexpr, ASKED: tl.constexpr, CHECK: tl.constexpr):
    """Of q·k: (what the softmax is taken of, in base 2; its derivative by scale2 * q·k; positions of columns column..end)."""
    asked, rows_at, slope, _, _ = here
    at = _positions(asked.columns, column, end, COLUMNS, CHECK)
    derivative = 1.0
    if SOFTCAP & ASKED:
        ratio = score * asked.inner
        small = tl.exp2(tl.abs(ratio) * -2.8853900817779268)  # exp(-2|x|): never overflows
        share = 1.0 / (1.0 + small)
        far = (1.0 - small) * share
        square = ratio * ratio  # Taylor's series where 1 - exp(-2|x|) would cancel: below 0.3 it errs 1e-7
        near = ratio * (1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
        tanh = tl.where(tl.abs(ratio) < 0.3, near, tl.where(ratio < 0.0, -far, far))
        score = tanh * (asked.softcap * 1.4426950408889634)
        derivative = 4.0 * small * share * share
    else:
        score = score * scale2
    if ALIBI & ASKED:
        score -= slope * tl.abs(rows_at[:, None] - at[None, :]).to(tl.float32)
    return score, derivative, at


@triton.jit
def dropped(p, here, at, KEYS_FIRST: tl.constexpr, ASKED: tl.constexpr):
    """p, 0 where Philox 2x32-7 says so; the caller owes what is left `lifted`. KEYS_FIRST: rows are keys."""
    _, rows_at, _, key, limit = here
    if DROPOUT & ASKED:
        if KEYS_FIRST:
            word = philox_2x32(at[None, :], rows_at[:, None], key, 7)
        else:
            word = philox_2x32(rows_at[:, None], at[None, :], key, 7)
        p = tl.where(word >= limit, p, 0.0)
    return p


@triton.jit
def lifted(x, asked, ASKED: tl.constexpr):
    """fp32 of kept probabilities, or of their gradient, times `lift`."""
    if DROPOUT & ASKED:
        x = x * asked.lift
    return x


@triton.jit
def philox_2x32(first, second, key, ROUNDS: tl.constexpr):
    """Word 0, uint32, of the counters (first, second), broadcast, under a scalar key; `kernels.scores.philox` says of what.

    Round 1 multiplies `first` before it meets `second`: its product is of a row or a column. All others take a multiplication to 64 bits
    and an exclusive or of three words a score; a key as wide as the tile would take an addition more.
    """
    first, second = first.to(tl.uint32, bitcast=True), second.to(tl.uint32, bitcast=True)
    for _ in tl.static_range(ROUNDS):
        product = first.to(tl.uint64) * 0xD256D193
        first, second = (product >> 32).to(tl.uint32) ^ key ^ second, product.to(tl.uint32)
        key = tl.add(key, 0x9E3779B9, sanitize_overflow=False)
    return first
