"""What a step of a forward is made of (forward.py): two products, the weights between them, and the weights' sums."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from distflash.kernels.hopper.common import as_operand


@gluon.jit
def weights(s, qs, top):
    """Probabilities up to a factor a row: 2^(s * qs - top), the exponent in one FMA."""
    return gl.exp2(gl.fma(s, qs, -top[:, None]))


@gluon.jit
def cast(x, k, acc):
    """as_operand for every part of acc: how P lies in registers does not depend on their widths."""
    o_l: gl.constexpr = acc[0].type.layout
    return as_operand(x, k[0].dtype, o_l)


@gluon.jit
def held(a, zero, COLUMNS: gl.constexpr):
    """The first COLUMNS of a [64, D] as a register operand of `product`: one, or none."""
    if COLUMNS:
        return (a.slice(0, COLUMNS, 1).load(gl.DotOperandLayout(0, zero.type.layout, 2)),)
    else:
        return ()


@gluon.jit
def product(first, a, b, zero):
    """Issue a bᵀ of a [64, D], b [n, D], the `first` columns of a from registers: what wgmma needs not read from shared memory."""
    if len(first) == 0:
        return warpgroup_mma(a, b.permute([1, 0]), zero, use_acc=False, is_async=True)
    else:
        COLUMNS: gl.constexpr = first[0].type.shape[1]
        D: gl.constexpr = a.shape[1]
        s = warpgroup_mma(first[0], b.slice(0, COLUMNS, 1).permute([1, 0]), zero, use_acc=False, is_async=True)
        for at in gl.static_range(COLUMNS, D, COLUMNS):
            s = warpgroup_mma(a.slice(at, COLUMNS, 1), b.slice(at, COLUMNS, 1).permute([1, 0]), s, is_async=True)
        return s


@gluon.jit
def scores(first, q, k, mine, idx, zero):
    """Issue Q Kᵀ of a tile: a sum over the parts of the head dim, of which `first` has columns of the first."""
    s = product(first, q[0].index(mine), k[0].index(idx), zero)
    for c in gl.static_range(1, len(k)):
        s = warpgroup_mma(q[c].index(mine), k[c].index(idx).permute([1, 0]), s, is_async=True)
    return s


@gluon.jit
def values(p, v, idx, acc):
    """Issue P V of a tile, each part of its columns into an accumulator of its own."""
    new = (warpgroup_mma(p, v[0].index(idx), acc[0], is_async=True),)
    for c in gl.static_range(1, len(v)):
        new = new + (warpgroup_mma(p, v[c].index(idx), acc[c], is_async=True),)
    return new


@gluon.jit
def finished(acc, p, behind: gl.constexpr = 0):
    """Wait for P V, of which p is an operand until then, but not for the products issued behind it."""
    if len(acc) == 1:
        a, p = warpgroup_mma_wait(behind, deps=[acc[0], p])
        return (a,)
    else:
        a, b, p = warpgroup_mma_wait(behind, deps=[acc[0], acc[1], p])
        return a, b


@gluon.jit
def zeros(columns):
    """An accumulator for one part of V."""
    D: gl.constexpr = columns.shape[2]
    return gl.zeros([64, D], gl.float32, layout=gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16]))


@gluon.jit
def row_sums(x, OWN: gl.constexpr):
    """Of each row of x; if OWN of what each of the four threads that share it holds: [64, 4], and nothing moves between threads."""
    if OWN:
        columns: gl.constexpr = x.type.shape[1]
        return gl.sum(gl.sum(x.reshape([64, columns // 8, 4, 2]), 3), 1)
    else:
        return gl.sum(x, 1)


@gluon.jit
def rescaled(l, alpha):
    """`row_sums` times a factor a row."""
    if len(l.type.shape) == 2:
        return l * gl.convert_layout(alpha, gl.SliceLayout(1, l.type.layout))[:, None]
    else:
        return l * alpha
