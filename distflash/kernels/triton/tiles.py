"""What every kernel of this package does with a tile table: find its column ranges, load, mask and store.

A program owns a run of *rows* (its block of the table) and walks the *columns* of the block's entries. In the forward and dQ kernels
rows are queries and columns are keys; in the dK/dV kernel it is the other way round. Offsets into tensors are int64 from the base to
the first row of a tile; inside a tile they are int32 unless WIDE says that a tile spans 2^31 elements. Lengths are not specialised on:
a compilation for each kind of length would cost seconds.
"""

import triton
import triton.language as tl


@triton.jit
def column_ranges(first_row, stop_row, start, stop, lo, hi, COLUMNS: tl.constexpr):
    """Cut an entry's columns for rows first_row..stop_row: masked `first..inner`, clear `inner..tail`, masked `tail..end`.

    Row i keeps the columns i+lo..i+hi. Some row keeps a column of first..end; every row keeps all of inner..tail, which is a whole
    number of steps of COLUMNS. An entry that the rows do not reach gives three empty ranges.
    """
    first = tl.maximum(start, first_row + lo)
    end = tl.minimum(stop, stop_row + hi)
    all_from = tl.maximum(start, stop_row - 1 + lo)
    all_to = tl.minimum(stop, first_row + hi + 1)
    inner = first + tl.cdiv(tl.maximum(all_from - first, 0), COLUMNS) * COLUMNS
    tail = inner + tl.maximum(all_to - inner, 0) // COLUMNS * COLUMNS
    return first, inner, tail, end


@triton.jit
def kept(rows, columns, end, lo, hi, HAS_LO: tl.constexpr):
    """[rows, columns] mask of a step that the band or the end of the range cuts."""
    ahead = columns[None, :] - rows[:, None]
    keep = (ahead <= hi) & (columns[None, :] < end)
    if HAS_LO:
        keep &= ahead >= lo
    return keep


@triton.jit
def _offsets(stride, ROWS: tl.constexpr, PAD: tl.constexpr, WIDE: tl.constexpr):
    row = tl.arange(0, ROWS)[:, None]
    if WIDE:
        row = row.to(tl.int64)
    return row * stride + tl.arange(0, PAD)[None, :]


@triton.jit
def load_tile(base, stride, first, end, D: tl.constexpr, ROWS: tl.constexpr, PAD: tl.constexpr, WIDE: tl.constexpr, CHECK: tl.constexpr):
    """Rows first..first+ROWS of a matrix [*, D] as [ROWS, PAD]: 0 beyond D and, if CHECK, from row `end` on."""
    at = base + tl.cast(first, tl.int64) * stride + _offsets(stride, ROWS, PAD, WIDE)
    inside_rows = (first + tl.arange(0, ROWS) < end)[:, None]
    inside_dims = (tl.arange(0, PAD) < D)[None, :]
    if CHECK:
        if PAD != D:
            tile = tl.load(at, mask=inside_rows & inside_dims, other=0.0)
        else:
            tile = tl.load(at, mask=inside_rows, other=0.0)
    elif PAD != D:
        tile = tl.load(at, mask=inside_dims, other=0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def load_step(
    box, base, stride, batch, head, first, end,
    D: tl.constexpr, ROWS: tl.constexpr, PAD: tl.constexpr, WIDE: tl.constexpr, CHECK: tl.constexpr, BOXES: tl.constexpr,
):  # fmt: skip
    """load_tile of one (batch element, head), through the tensor's descriptor `box` in steps that check nothing (BOXES 1) or in all (2).

    The copy engine makes the addresses, which as pointers take registers that the 64-column steps don't have. It reads past `end`: what
    is there is cleared in registers, as 0 * NaN would be NaN.
    """
    if BOXES == 2 or (BOXES == 1 and not CHECK):
        tile = tl.reshape(box.load([batch, head, first, 0]), [ROWS, PAD])
        if CHECK:
            tile = tl.where((first + tl.arange(0, ROWS) < end)[:, None], tile, 0.0)
    else:
        tile = load_tile(base, stride, first, end, D, ROWS, PAD, WIDE, CHECK)
    return tile


@triton.jit
def store_tile(base, stride, first, end, tile, D: tl.constexpr, ROWS: tl.constexpr, PAD: tl.constexpr, WIDE: tl.constexpr):
    """Write [ROWS, PAD] to rows first..end of a matrix [*, D], in the matrix' dtype."""
    at = base + tl.cast(first, tl.int64) * stride + _offsets(stride, ROWS, PAD, WIDE)
    inside = (first + tl.arange(0, ROWS) < end)[:, None]
    if PAD != D:
        inside &= (tl.arange(0, PAD) < D)[None, :]
    tl.store(at, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def load_pairs(base, first, end, ROWS: tl.constexpr, CHECK: tl.constexpr):
    """Pairs first..first+ROWS of a contiguous fp32 [*, 2], as two vectors: 0 from `end` on if CHECK."""
    at = base + 2 * first + 2 * tl.arange(0, ROWS)[:, None] + tl.arange(0, 2)[None, :]
    if CHECK:
        pairs = tl.load(at, mask=(first + tl.arange(0, ROWS) < end)[:, None], other=0.0)
    else:
        pairs = tl.load(at)
    return tl.split(pairs)
