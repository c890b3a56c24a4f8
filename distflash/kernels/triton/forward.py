"""Forward attention over a tile table: FlashAttention-2 (arXiv:2307.08691), algorithm 1, with the softmax in base 2.

Legend: B batch, T local queries, H query heads, D / DV head dims of q·k and of v, padded to PAD / PAD_V.
One program is one block of queries (ROWS) of one head; it keeps its q, walks the keys in steps of COLUMNS, and merges the running
(out, lse) of earlier visits in registers before its one store: a merge as a kernel of its own costs 6 to 25 % of a ring step.
The body exceeds the usual length because a kernel's whole state is its local variables.
"""

import triton
import triton.language as tl

from distflash.kernels.triton.scores import dropped, lifted, looked_up, shaped
from distflash.kernels.triton.tiles import column_ranges, kept, load_step, load_tile, store_tile

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _softmax(score, peak, total, keep, scale2, MASKED: tl.constexpr):
    """One step of the online softmax: probabilities, the factor that rescales what was summed before, new row maxima and sums."""
    if MASKED:
        score = tl.where(keep, score * scale2, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)  # a row that sees nothing yet: exp2(-inf - 0) = 0, no NaN
        p = tl.exp2(score - shift[:, None])
    else:
        higher = tl.maximum(peak, tl.max(score, 1) * scale2)  # scale2 >= 0
        shift = higher
        p = tl.exp2(score * scale2 - shift[:, None])
    shrink = tl.exp2(peak - shift)
    return p, shrink, higher, total * shrink + tl.sum(p, 1)


@triton.jit
def _attend(
    out, peak, total, q, k, v, k_box, v_box, batch, head, k_t, v_t, begin, stop, end, rows, lo, hi, scale2, here,
    D: tl.constexpr, DV: tl.constexpr, PAD: tl.constexpr, PAD_V: tl.constexpr, COLUMNS: tl.constexpr, HAS_LO: tl.constexpr,
    WIDE: tl.constexpr, BOXES: tl.constexpr, ASKED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One range of columns: out, row maxima and row sums, updated by the online softmax."""
    for column in tl.range(begin, stop, COLUMNS):
        keys = load_step(k_box, k, k_t, batch, head, column, end, D, COLUMNS, PAD, WIDE, MASKED, BOXES)  # [COLUMNS, PAD]
        score = tl.dot(q, keys.T, input_precision="ieee")  # [ROWS, COLUMNS] fp32
        keep = kept(rows, column + tl.arange(0, COLUMNS), end, lo, hi, HAS_LO) if MASKED else 0
        if ASKED:
            score, _, at = shaped(score, scale2, here, column, end, COLUMNS, ASKED, MASKED)
            p, shrink, peak, total = _softmax(score, peak, total, keep, 1.0, MASKED)
            p = dropped(p, here, at, False, ASKED)  # after the sum: lse is of what was there before
        else:
            p, shrink, peak, total = _softmax(score, peak, total, keep, scale2, MASKED)
        out = out * shrink[:, None]
        values = load_step(v_box, v, v_t, batch, head, column, end, DV, COLUMNS, PAD_V, WIDE, MASKED, BOXES)  # [COLUMNS, PAD_V]
        out = tl.dot(p.to(values.dtype), values, out, input_precision="ieee")
    return out, peak, total


@triton.jit
def _attend_overlapped(
    out, peak, total, q, k, v, k_box, v_box, batch, head, k_t, v_t, begin, stop, scale2,
    D: tl.constexpr, DV: tl.constexpr, PAD: tl.constexpr, PAD_V: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
    BOXES: tl.constexpr,
):  # fmt: skip
    """_attend without a mask, the product with the values one step late: it runs beside the next step's exponentials.

    Triton leaves a dot in flight only if nothing of its own step reads the result. `p` is carried in fp32: what a loop carries in
    16 bits would go to the dot through shared memory, and be waited for.
    """
    if begin < stop:
        keys = load_step(k_box, k, k_t, batch, head, begin, stop, D, COLUMNS, PAD, WIDE, False, BOXES)
        p, shrink, peak, total = _softmax(tl.dot(q, keys.T, input_precision="ieee"), peak, total, 0, scale2, False)
        for column in tl.range(begin + COLUMNS, stop, COLUMNS):
            keys = load_step(k_box, k, k_t, batch, head, column, stop, D, COLUMNS, PAD, WIDE, False, BOXES)
            score = tl.dot(q, keys.T, input_precision="ieee")
            out = out * shrink[:, None]
            values = load_step(v_box, v, v_t, batch, head, column - COLUMNS, stop, DV, COLUMNS, PAD_V, WIDE, False, BOXES)
            out = tl.dot(p.to(values.dtype), values, out, input_precision="ieee")
            p, shrink, peak, total = _softmax(score, peak, total, 0, scale2, False)
        values = load_step(v_box, v, v_t, batch, head, stop - COLUMNS, stop, DV, COLUMNS, PAD_V, WIDE, False, BOXES)
        out = tl.dot(p.to(values.dtype), values, out * shrink[:, None], input_precision="ieee")
    return out, peak, total


@triton.jit(do_not_specialize=["n_blocks", "heads", "q_len", "seed", "threshold", "first_head"])
def forward_kernel(
    q, k, v, k_box, v_box, out, lse, acc_out, acc_lse, blocks, entries, scale2,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, n_blocks, heads, group, q_len,
    asked, seed, threshold, first_head,
    D: tl.constexpr, DV: tl.constexpr, PAD: tl.constexpr, PAD_V: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    HAS_LO: tl.constexpr, MERGE: tl.constexpr, WIDE: tl.constexpr, BOXES: tl.constexpr, OVERLAP: tl.constexpr,
    ASKED: tl.constexpr,
):  # fmt: skip
    """out [B, T, H, DV] and lse [B, H, T], both contiguous; acc_out and acc_lse likewise, read if MERGE. Needs scale2 >= 0.

    k_box, v_box: descriptors of k and v as [B, Hk, S, D] in boxes of COLUMNS rows, or None if BOXES is 0.
    ASKED, asked, seed, threshold, first_head: see triton.scores. OVERLAP goes with ASKED = 0.
    """
    program = tl.program_id(0)
    block = blocks + 4 * (program % n_blocks)  # a head's blocks run side by side and share its k and v in L2
    head = program // n_blocks % heads
    batch = tl.cast(program // n_blocks // heads, tl.int64)
    first_row, stop_row = tl.load(block), tl.load(block + 1)
    entry, n_entries = tl.load(block + 2), tl.load(block + 3)
    rows = first_row + tl.arange(0, ROWS)

    q_tile = load_tile(q + batch * q_b + tl.cast(head, tl.int64) * q_h, q_t, first_row, stop_row, D, ROWS, PAD, WIDE, True)
    kv_head = head // group
    k += batch * k_b + tl.cast(kv_head, tl.int64) * k_h
    v += batch * v_b + tl.cast(kv_head, tl.int64) * v_h
    batch_32 = tl.cast(batch, tl.int32)
    here = looked_up(asked, seed, threshold, first_head, heads, batch_32, head, first_row, stop_row, ROWS, ASKED)
    o = tl.zeros([ROWS, PAD_V], tl.float32)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for n in range(entry, entry + n_entries):
        start, stop = tl.load(entries + 4 * n), tl.load(entries + 4 * n + 1)
        lo, hi = tl.load(entries + 4 * n + 2), tl.load(entries + 4 * n + 3)
        first, inner, tail, end = column_ranges(first_row, stop_row, start, stop, lo, hi, COLUMNS)
        if HAS_LO:
            o, peak, total = _attend(
                o, peak, total, q_tile, k, v, k_box, v_box, batch_32, kv_head, k_t, v_t, first, tl.minimum(inner, end), end, rows, lo, hi,
                scale2, here, D, DV, PAD, PAD_V, COLUMNS, HAS_LO, WIDE, BOXES, ASKED, MASKED=True,
            )  # fmt: skip
        if OVERLAP:
            o, peak, total = _attend_overlapped(
                o, peak, total, q_tile, k, v, k_box, v_box, batch_32, kv_head, k_t, v_t, inner, tail, scale2,
                D, DV, PAD, PAD_V, COLUMNS, WIDE, BOXES,
            )  # fmt: skip
        else:
            o, peak, total = _attend(
                o, peak, total, q_tile, k, v, k_box, v_box, batch_32, kv_head, k_t, v_t, inner, tail, end, rows, lo, hi,
                scale2, here, D, DV, PAD, PAD_V, COLUMNS, HAS_LO, WIDE, BOXES, ASKED, MASKED=False,
            )  # fmt: skip
        o, peak, total = _attend(
            o, peak, total, q_tile, k, v, k_box, v_box, batch_32, kv_head, k_t, v_t, tail, end, end, rows, lo, hi,
            scale2, here, D, DV, PAD, PAD_V, COLUMNS, HAS_LO, WIDE, BOXES, ASKED, MASKED=True,
        )  # fmt: skip

    o = lifted(o, asked, ASKED)
    line = (batch * heads + head) * q_len + rows  # of lse
    plane = (batch * q_len * heads + head) * DV  # of out
    if MERGE:  # the running partial is one more column, of weight exp(acc_lse)
        before = tl.load(acc_lse + line, mask=rows < stop_row, other=float("-inf")) * LOG2E
        higher = tl.maximum(peak, before)
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        old, new = tl.exp2(before - shift), tl.exp2(peak - shift)
        total = total * new + old
        carried = load_tile(acc_out + plane, heads * DV, first_row, stop_row, DV, ROWS, PAD_V, WIDE, True)
        o = o * new[:, None] + carried * old[:, None]
        peak = higher
    total = tl.where(total == 0.0, 1.0, total)  # a row that saw no key: peak is -inf. The total of one that met a NaN is NaN
    o = o * (1.0 / total)[:, None]
    tl.store(lse + line, (peak + tl.log2(total)) * LN2, mask=rows < stop_row)
    store_tile(out + plane, heads * DV, first_row, stop_row, o, DV, ROWS, PAD_V, WIDE)
