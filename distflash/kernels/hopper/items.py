"""Reading a work item in a forward: its line of Schedule.order, from shared memory, and the segment that stands in it."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from distflash.kernels.hopper.common import again


@gluon.jit
def line_of(dealt, r):
    """Item r's line of Schedule.order, from shared memory, all of it in every thread; to be read once the item's Q is there."""
    return dealt.index(2 * (again(r) % 2)).load(gl.BlockedLayout([16], [32], [4], [0]))


@gluon.jit
def number(line, n: gl.constexpr):
    """Number n of a line: no instruction, for the thread has each in a register."""
    return gl.sum(gl.where(gl.arange(0, 16, layout=line.type.layout) == n, line, 0), 0)


@gluon.jit
def from_right(i, left, inner, masked):
    """Column tile of step i of a forward: the masked ones on the right, the last first; those on the left; then the inner ones."""
    right = masked - left
    return gl.where(i < right, masked + inner - 1 - i, gl.where(i < masked, i - right, i - masked + left))


@gluon.jit
def segment(line, segments, n):
    """A line of an item with its segment n in place of its first."""
    i = gl.arange(0, 16, layout=line.type.layout)
    return gl.load(segments + (8 * (number(line, 4) + n - 1) + i), mask=(n > 0) & (i >= 8), other=line)


@gluon.jit
def bounds(line, rows):
    """The segment of a line: first column, the columns low <= j < high that each of these rows keeps, tiles."""
    low = rows + number(line, 10)
    high = gl.minimum(rows + number(line, 11) + 1, number(line, 9))
    return number(line, 8), low, high, number(line, 12), number(line, 13), number(line, 14)


@gluon.jit
def spared(line, cid: gl.constexpr):
    """What an item spares this consumer's rows: (1 if they reach nothing of its first tile, 1 if they need no mask in the last of the
    masked ones)."""
    bits = number(line, 7) >> cid
    return bits & 1, (bits >> 8) & 1
