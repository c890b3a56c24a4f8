"""How 64 rows of out leave a forward: scaled, merged with earlier visits, by direct stores or by TMA."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from distflash.kernels.hopper.common import again, lines
from distflash.kernels.hopper.compat import LATER, tma_store


@gluon.jit
def times(x, factor):
    """The rows of one part times `factor`."""
    return x * gl.convert_layout(factor, gl.SliceLayout(1, x.type.layout))[:, None]


@gluon.jit
def scaled(acc, factor):
    """`times` of every part."""
    new = (times(acc[0], factor),)
    for c in gl.static_range(1, len(acc)):
        new = new + (times(acc[c], factor),)
    return new


@gluon.jit
def places(b, h, start, stop, heads, t, FIRST: gl.constexpr, DV: gl.constexpr, layout: gl.constexpr, W: gl.constexpr, HIDE: gl.constexpr):
    """Where 64 rows of a part stand in contiguous [B, T, H, DV], and which of it is there."""
    rows = start + lines(gl.SliceLayout(1, layout))
    cols = gl.arange(0, W, layout=gl.SliceLayout(0, layout))
    cols = FIRST + (again(cols) if HIDE else cols)
    line = (b.to(gl.int64) * t * heads + h) * DV + rows.to(gl.int64) * (heads * DV)  # B * T * H * DV may pass 2^31
    inside = rows[:, None] < stop
    if FIRST + W > DV:
        inside = inside & (cols[None, :] < DV)
    return line[:, None] + cols[None, :], inside


@gluon.jit
def write(O, A, b, h, start, stop, heads, t, acc, new, old, FIRST: gl.constexpr, DV: gl.constexpr, HAS_ACC: gl.constexpr,
    HIDE: gl.constexpr
):  # fmt: skip
    """One part, columns from FIRST on, of 64 rows of contiguous [B, T, H, DV]: O = acc * new, plus A * old if there is one."""
    layout: gl.constexpr = acc.type.layout
    W: gl.constexpr = acc.type.shape[1]
    r_l: gl.constexpr = gl.SliceLayout(1, layout)
    gl.static_assert(FIRST < DV)  # the compiler removes a product that nobody stores, and step's wait would count one that is not there
    acc = acc * gl.convert_layout(new, r_l)[:, None]
    if HAS_ACC:
        at, inside = places(b, h, start, stop, heads, t, FIRST, DV, layout, W, HIDE)
        acc += gl.load(A + at, mask=inside, other=0.0) * gl.convert_layout(old, r_l)[:, None]
    at, inside = places(b, h, again(start), again(stop), heads, t, FIRST, DV, layout, W, HIDE)  # anew: or these are registers meanwhile
    gl.store(O + at, acc.to(O.dtype.element_ty), mask=inside)


@gluon.constexpr_function
def padded(v, DV):
    """Whether a tile of V, all its parts, has more columns than the head."""
    return sum(part.shape[2] for part in v) > DV


@gluon.constexpr_function
def hidden(v, DV):
    """Whether columns, too, are hidden from what is computed early: where rows are padded they cannot be stored in wider words, and each
    takes a register over the loop. Later releases spill less if they are not."""
    return padded(v, DV) and not LATER


@gluon.jit
def leave(O, A, b, h, start, stop, heads, t, acc, new, old, v, DV: gl.constexpr, HAS_ACC: gl.constexpr):
    """`write` of every part."""
    W: gl.constexpr = v[0].shape[2]
    HIDE: gl.constexpr = HAS_ACC and hidden(v, DV)
    write(O, A, b, h, start, stop, heads, t, acc[0], new, old, 0, DV, HAS_ACC, HIDE)
    if len(acc) == 2:  # after the first part's store, from addresses of its own: the registers of one part at a time
        write(O, A, b, h, again(start), stop, heads, t, acc[1], new, old, W, DV, HAS_ACC, HIDE)


@gluon.jit
def stage(out, desc_o, desc_o2, way, mine, OWN: gl.constexpr, b, h, start):
    """Out of 64 rows by way of shared memory, from where a copy is still leaving on return: of Q, which nobody reads any more, or of a
    buffer of their OWN for one part, from where the copy before has to have left."""
    for c in gl.static_range(len(out)):
        place = way[0 if OWN else c].index(mine)
        if OWN:
            tma.store_wait(0)
        place.store(out[c].to(place.dtype))
        fence_async_shared()
        if c == 0:
            tma_store(desc_o, [b, h, start, 0], place)
        else:
            tma_store(desc_o2, [b, h, start, desc_o.block_shape[3]], place)
