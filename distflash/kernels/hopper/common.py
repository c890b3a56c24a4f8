"""What the Hopper kernels share: values hidden from the optimiser, the order of work, layouts of registers."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def again(x):
    """x, hidden from the optimiser: what follows from it is computed anew, not kept in registers (spilled) over the main loop,
    nor computed before the kernel parts into its partitions (and spilled there)."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def entry(r, order, rounds):
    """Where round r of this program stands in Schedule.order. The host has dealt the items out so that every program gets the same work."""
    return order + 16 * (gl.program_id(0) * again(rounds) + r)


@gluon.jit
def tile_of(i, left, inner, masked):
    """Column tile of step i of a backward: the masked ones on the left, those on the right, then the inner ones."""
    return gl.where(i < left, i, gl.where(i < masked, i + inner, i - masked + left))


@gluon.jit
def lines(layout: gl.constexpr):
    """0 .. 63. Of these a thread holds two, 8 apart: one register over the main loop, not two, of which three consumers would spill one."""
    i = gl.arange(0, 64, layout=layout)
    return again(i & 0x37) + (i & 8)


@gluon.jit
def kept(s, n0, low, high, BOUNDS: gl.constexpr = 2):
    """s of columns low <= j < high, or with one of the BOUNDS j < high, -inf elsewhere; the tile begins at column n0. What of a column's
    number differs from thread to thread is moved to the bounds, so that a register's own part is a constant of its comparisons."""
    i = gl.arange(0, s.type.shape[1], layout=gl.SliceLayout(0, s.type.layout))
    mine = n0 + (i & 6)[None, :]
    i = (i & ~6)[None, :]
    if BOUNDS == 1:
        return gl.where(i < high[:, None] - mine, s, float("-inf"))
    else:
        return gl.where((i >= low[:, None] - mine) & (i < high[:, None] - mine), s, float("-inf"))


@gluon.jit
def as_operand(x, dtype: gl.constexpr, o_l: gl.constexpr):
    """Probabilities as the register operand of PV: a cast, no data moves between threads."""
    return gl.convert_layout(x.to(dtype), gl.DotOperandLayout(0, o_l, 2))
