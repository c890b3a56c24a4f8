"""Backward attention over a tile table: FlashAttention-2 (arXiv:2307.08691), algorithm 2, as two passes without atomics.

Legend: B batch, T local queries, S local keys, H query heads, Hk key/value heads, D / DV head dims, padded to PAD / PAD_V.
    delta_kernel   rowsum(out * dout)
    stats_kernel   (lse * log2(e), delta) side by side: the dK/dV loop loads both with one copy an element, and half the addresses
    dkv_kernel     one program a block of keys and key/value head: dk, dv of all query heads of its group, summed in registers
    dq_kernel      one program a block of queries and head
P is recomputed in both, 7 matmuls instead of 5: the price of gradients that are bit-equal from run to run.
A row with lse = -inf keeps nothing, so it only meets masked steps, where the mask is applied after the exponential.
"""

import triton
import triton.language as tl

from distflash.kernels.triton.scores import dropped, lifted, looked_up, shaped
from distflash.kernels.triton.tiles import column_ranges, kept, load_pairs, load_step, load_tile, store_tile


@triton.jit(do_not_specialize=["n_blocks", "heads", "q_len"])
def delta_kernel(
    out, dout, delta, out_b, out_t, out_h, dout_b, dout_t, dout_h, n_blocks, heads, q_len,
    DV: tl.constexpr, PAD_V: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """delta [B, H, T] = rowsum(out * dout): D_i of §3.1."""
    program = tl.program_id(0)
    first = program % n_blocks * ROWS
    head = tl.cast(program // n_blocks % heads, tl.int64)
    batch = tl.cast(program // n_blocks // heads, tl.int64)
    o = load_tile(out + batch * out_b + head * out_h, out_t, first, q_len, DV, ROWS, PAD_V, WIDE, True)
    do = load_tile(dout + batch * dout_b + head * dout_h, dout_t, first, q_len, DV, ROWS, PAD_V, WIDE, True)
    rows = first + tl.arange(0, ROWS)
    tl.store(delta + (batch * heads + head) * q_len + rows, tl.sum(o.to(tl.float32) * do.to(tl.float32), 1), mask=rows < q_len)


@triton.jit(do_not_specialize=["n"])
def stats_kernel(lse, delta, stats, n, BLOCK: tl.constexpr):
    """stats [n, 2] = (lse in base 2, delta) of n rows; all contiguous fp32."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    log_sum = tl.load(lse + row, mask=row < n, other=0.0) * 1.4426950408889634
    pair = tl.join(log_sum, tl.load(delta + row, mask=row < n, other=0.0))
    tl.store(stats + 2 * row[:, None] + tl.arange(0, 2)[None, :], pair, mask=(row < n)[:, None])


@triton.jit
def _dkv_range(
    dk, dv, keys, values, q, dout, q_box, dout_box, batch, head, stats, q_t, dout_t, begin, stop, end, rows, lo, hi, scale2, here,
    D: tl.constexpr, DV: tl.constexpr, PAD: tl.constexpr, PAD_V: tl.constexpr, COLUMNS: tl.constexpr, HAS_LO: tl.constexpr,
    WIDE: tl.constexpr, BOXES: tl.constexpr, ASKED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One range of queries (the columns here), all tiles transposed: P and dS stay in registers as left operands."""
    for column in tl.range(begin, stop, COLUMNS):
        q_tile = load_step(q_box, q, q_t, batch, head, column, end, D, COLUMNS, PAD, WIDE, MASKED, BOXES)  # [COLUMNS, PAD]
        log_sum, delta = load_pairs(stats, column, end, COLUMNS, MASKED)
        score = tl.dot(keys, q_tile.T, input_precision="ieee")  # [ROWS, COLUMNS]
        if ASKED:
            score, derivative, at = shaped(score, scale2, here, column, end, COLUMNS, ASKED, MASKED)
            p = tl.exp2(score - log_sum[None, :])
        else:
            p = tl.exp2(score * scale2 - log_sum[None, :])
        if MASKED:
            p = tl.where(kept(rows, column + tl.arange(0, COLUMNS), end, lo, hi, HAS_LO), p, 0.0)
        do = load_step(dout_box, dout, dout_t, batch, head, column, end, DV, COLUMNS, PAD_V, WIDE, MASKED, BOXES)  # [COLUMNS, PAD_V]
        if ASKED:
            kept_p = dropped(p, here, at, True, ASKED)
            dv = tl.dot(kept_p.to(do.dtype), do, dv, input_precision="ieee")
            dp = lifted(tl.dot(values, do.T, input_precision="ieee"), here[0], ASKED)
            ds = (kept_p * dp - p * delta[None, :]) * derivative
        else:
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
            dp = tl.dot(values, do.T, input_precision="ieee")  # [ROWS, COLUMNS]
            ds = p * (dp - delta[None, :])
        if MASKED:
            ds = tl.where(p > 0.0, ds, 0.0)  # a key of this block that nobody sees may be NaN: its dk is 0, not 0 * NaN
        dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["n_blocks", "kv_heads", "q_len", "kv_len", "seed", "threshold", "first_head"])
def dkv_kernel(
    q, k, v, dout, q_box, dout_box, stats, dk, dv, blocks, entries, scale, scale2,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, dout_b, dout_t, dout_h, n_blocks, kv_heads, group, q_len, kv_len,
    asked, seed, threshold, first_head,
    D: tl.constexpr, DV: tl.constexpr, PAD: tl.constexpr, PAD_V: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    HAS_LO: tl.constexpr, WIDE: tl.constexpr, BOXES: tl.constexpr, ASKED: tl.constexpr,
):  # fmt: skip
    """dk [B, S, Hk, D], dv [B, S, Hk, DV], contiguous; bands of the table are on query - key; boxes and ASKED as forward_kernel's."""
    program = tl.program_id(0)
    block = blocks + 4 * (program % n_blocks)
    kv_head = program // n_blocks % kv_heads
    batch = tl.cast(program // n_blocks // kv_heads, tl.int64)
    first_row, stop_row = tl.load(block), tl.load(block + 1)
    entry, n_entries = tl.load(block + 2), tl.load(block + 3)
    rows = first_row + tl.arange(0, ROWS)

    keys = load_tile(k + batch * k_b + tl.cast(kv_head, tl.int64) * k_h, k_t, first_row, stop_row, D, ROWS, PAD, WIDE, True)
    values = load_tile(v + batch * v_b + tl.cast(kv_head, tl.int64) * v_h, v_t, first_row, stop_row, DV, ROWS, PAD_V, WIDE, True)
    batch_32 = tl.cast(batch, tl.int32)
    dk_tile = tl.zeros([ROWS, PAD], tl.float32)
    dv_tile = tl.zeros([ROWS, PAD_V], tl.float32)
    for head in range(kv_head * group, kv_head * group + group):
        q_head = q + batch * q_b + tl.cast(head, tl.int64) * q_h
        dout_head = dout + batch * dout_b + tl.cast(head, tl.int64) * dout_h
        here = looked_up(asked, seed, threshold, first_head, kv_heads * group, batch_32, head, first_row, stop_row, ROWS, ASKED)
        pairs = stats + (batch * kv_heads * group + head) * q_len * 2
        for n in range(entry, entry + n_entries):
            start, stop = tl.load(entries + 4 * n), tl.load(entries + 4 * n + 1)
            lo, hi = tl.load(entries + 4 * n + 2), tl.load(entries + 4 * n + 3)
            first, inner, tail, end = column_ranges(first_row, stop_row, start, stop, lo, hi, COLUMNS)
            if HAS_LO:
                dk_tile, dv_tile = _dkv_range(
                    dk_tile, dv_tile, keys, values, q_head, dout_head, q_box, dout_box, batch_32, head, pairs, q_t, dout_t,
                    first, tl.minimum(inner, end), end, rows, lo, hi, scale2, here,
                    D, DV, PAD, PAD_V, COLUMNS, HAS_LO, WIDE, BOXES, ASKED, MASKED=True,
                )  # fmt: skip
            dk_tile, dv_tile = _dkv_range(
                dk_tile, dv_tile, keys, values, q_head, dout_head, q_box, dout_box, batch_32, head, pairs, q_t, dout_t,
                inner, tail, end, rows, lo, hi, scale2, here,
                D, DV, PAD, PAD_V, COLUMNS, HAS_LO, WIDE, BOXES, ASKED, MASKED=False,
            )  # fmt: skip
            dk_tile, dv_tile = _dkv_range(
                dk_tile, dv_tile, keys, values, q_head, dout_head, q_box, dout_box, batch_32, head, pairs, q_t, dout_t,
                tail, end, end, rows, lo, hi, scale2, here,
                D, DV, PAD, PAD_V, COLUMNS, HAS_LO, WIDE, BOXES, ASKED, MASKED=True,
            )  # fmt: skip

    plane = batch * kv_len * kv_heads + kv_head
    store_tile(dk + plane * D, kv_heads * D, first_row, stop_row, dk_tile * scale, D, ROWS, PAD, WIDE)
    store_tile(dv + plane * DV, kv_heads * DV, first_row, stop_row, lifted(dv_tile, asked, ASKED), DV, ROWS, PAD_V, WIDE)


@triton.jit
def _dq_range(
    dq, q, do, log_sum, delta, k, v, k_box, v_box, batch, head, k_t, v_t, begin, stop, end, rows, lo, hi, scale2, here,
    D: tl.constexpr, DV: tl.constexpr, PAD: tl.constexpr, PAD_V: tl.constexpr, COLUMNS: tl.constexpr, HAS_LO: tl.constexpr,
    WIDE: tl.constexpr, BOXES: tl.constexpr, ASKED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One range of keys: dq += dS k."""
    for column in tl.range(begin, stop, COLUMNS):
        keys = load_step(k_box, k, k_t, batch, head, column, end, D, COLUMNS, PAD, WIDE, MASKED, BOXES)  # [COLUMNS, PAD]
        score = tl.dot(q, keys.T, input_precision="ieee")  # [ROWS, COLUMNS]
        if ASKED:
            score, derivative, at = shaped(score, scale2, here, column, end, COLUMNS, ASKED, MASKED)
            p = tl.exp2(score - log_sum[:, None])
        else:
            p = tl.exp2(score * scale2 - log_sum[:, None])
        if MASKED:
            p = tl.where(kept(rows, column + tl.arange(0, COLUMNS), end, lo, hi, HAS_LO), p, 0.0)
        values = load_step(v_box, v, v_t, batch, head, column, end, DV, COLUMNS, PAD_V, WIDE, MASKED, BOXES)  # [COLUMNS, PAD_V]
        dp = tl.dot(do, values.T, input_precision="ieee")
        if ASKED:
            dp = lifted(dropped(dp, here, at, False, ASKED), here[0], ASKED)
            ds = p * (dp - delta[:, None]) * derivative
        else:
            ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(keys.dtype), keys, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=["n_blocks", "heads", "q_len", "seed", "threshold", "first_head"])
def dq_kernel(
    q, k, v, dout, k_box, v_box, stats, dq, acc_dq, blocks, entries, scale, scale2,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, dout_b, dout_t, dout_h, n_blocks, heads, group, q_len,
    asked, seed, threshold, first_head,
    D: tl.constexpr, DV: tl.constexpr, PAD: tl.constexpr, PAD_V: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    HAS_LO: tl.constexpr, MERGE: tl.constexpr, WIDE: tl.constexpr, BOXES: tl.constexpr, ASKED: tl.constexpr,
):  # fmt: skip
    """dq [B, T, H, D], contiguous, plus acc_dq of the same shape if MERGE; boxes and ASKED as forward_kernel's."""
    program = tl.program_id(0)
    block = blocks + 4 * (program % n_blocks)
    head = program // n_blocks % heads
    batch = tl.cast(program // n_blocks // heads, tl.int64)
    first_row, stop_row = tl.load(block), tl.load(block + 1)
    entry, n_entries = tl.load(block + 2), tl.load(block + 3)
    rows = first_row + tl.arange(0, ROWS)

    q_tile = load_tile(q + batch * q_b + tl.cast(head, tl.int64) * q_h, q_t, first_row, stop_row, D, ROWS, PAD, WIDE, True)
    do = load_tile(dout + batch * dout_b + tl.cast(head, tl.int64) * dout_h, dout_t, first_row, stop_row, DV, ROWS, PAD_V, WIDE, True)
    log_sum, delta = load_pairs(stats + (batch * heads + head) * q_len * 2, first_row, stop_row, ROWS, True)
    kv_head = head // group
    k += batch * k_b + tl.cast(kv_head, tl.int64) * k_h
    v += batch * v_b + tl.cast(kv_head, tl.int64) * v_h
    batch_32 = tl.cast(batch, tl.int32)
    here = looked_up(asked, seed, threshold, first_head, heads, batch_32, head, first_row, stop_row, ROWS, ASKED)
    tile = tl.zeros([ROWS, PAD], tl.float32)
    for n in range(entry, entry + n_entries):
        start, stop = tl.load(entries + 4 * n), tl.load(entries + 4 * n + 1)
        lo, hi = tl.load(entries + 4 * n + 2), tl.load(entries + 4 * n + 3)
        first, inner, tail, end = column_ranges(first_row, stop_row, start, stop, lo, hi, COLUMNS)
        if HAS_LO:
            tile = _dq_range(
                tile, q_tile, do, log_sum, delta, k, v, k_box, v_box, batch_32, kv_head, k_t, v_t, first, tl.minimum(inner, end), end,
                rows, lo, hi, scale2, here, D, DV, PAD, PAD_V, COLUMNS, HAS_LO, WIDE, BOXES, ASKED, MASKED=True,
            )  # fmt: skip
        tile = _dq_range(
            tile, q_tile, do, log_sum, delta, k, v, k_box, v_box, batch_32, kv_head, k_t, v_t, inner, tail, end, rows, lo, hi, scale2, here,
            D, DV, PAD, PAD_V, COLUMNS, HAS_LO, WIDE, BOXES, ASKED, MASKED=False,
        )  # fmt: skip
        tile = _dq_range(
            tile, q_tile, do, log_sum, delta, k, v, k_box, v_box, batch_32, kv_head, k_t, v_t, tail, end, end, rows, lo, hi, scale2, here,
            D, DV, PAD, PAD_V, COLUMNS, HAS_LO, WIDE, BOXES, ASKED, MASKED=True,
        )  # fmt: skip

    plane = (batch * q_len * heads + head) * D
    tile *= scale
    if MERGE:
        tile += load_tile(acc_dq + plane, heads * D, first_row, stop_row, D, ROWS, PAD, WIDE, True)
    store_tile(dq + plane, heads * D, first_row, stop_row, tile, D, ROWS, PAD, WIDE)
