"""What a program of a backward works on: its block of keys, and the segments of queries that these meet (schedule.py, transposed)."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from distflash.kernels.hopper.common import again, lines


@gluon.jit
def place(busy, per, kv_heads):
    """This program's (row of the block table, batch element, kv head): blocks longest first, heads in groups of `per` that fit L2."""
    pid = gl.program_id(0)
    group = pid // (busy * per)
    rest = pid % (busy * per)
    bh = group * per + rest % per
    return rest // per, bh // kv_heads, bh % kv_heads


@gluon.jit
def extent(segments, sg):
    """A segment's tiles: (first column, left, inner, total)."""
    at = segments + 8 * sg
    return gl.load(at), gl.load(at + 4), gl.load(at + 5), gl.load(at + 6)


@gluon.jit
def band(segments, sg, start, stop, r_l: gl.constexpr, HIDE: gl.constexpr = False):
    """The queries low <= i < high that each of 64 keys from `start` meets in a segment: none past the block's `stop`."""
    at = segments + 8 * sg
    rows = start + (lines(r_l) if HIDE else gl.arange(0, 64, layout=r_l))
    low = gl.maximum(rows + gl.load(at + 2), gl.load(at + 7))
    high = gl.minimum(rows + gl.load(at + 3) + 1, gl.load(at + 1))
    return low, gl.where(rows < stop, high, -(1 << 30))


@gluon.jit
def n_segments(blocks, busy, per, kv_heads):
    """Segments of this program's block; looked up anew at each use, as everything that would otherwise spill over the matmuls."""
    return gl.load(blocks + 4 * place(again(busy), again(per), again(kv_heads))[0] + 3)


@gluon.jit
def segment_of(u, blocks, busy, per, kv_heads, group):
    """(block start, block stop, batch element, query head, segment) of this program's u-th segment, counted over the heads of its group."""
    block, b, kv = place(again(busy), again(per), again(kv_heads))
    n_seg = gl.load(blocks + 4 * block + 3)
    sg = gl.load(blocks + 4 * block + 2) + u % n_seg
    return gl.load(blocks + 4 * block), gl.load(blocks + 4 * block + 1), b, kv * group + u // n_seg, sg
