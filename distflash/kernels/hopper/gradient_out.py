"""How gradients leave a backward: row by row, or by TMA from the buffers of what it has read."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from distflash.kernels.hopper.common import again, lines
from distflash.kernels.hopper.compat import group_sync, named_barrier, tma_store
from distflash.kernels.hopper.program import place


@gluon.jit
def store_rows(out, x, b, h, start, stop, heads, t, COLUMNS: gl.constexpr, ADD: gl.constexpr):
    """Rows `start` .. of contiguous [B, T, heads, COLUMNS]: out = x, or out += x. None past the `stop`."""
    layout: gl.constexpr = x.type.layout
    rows = start + lines(gl.SliceLayout(1, layout))
    cols = gl.arange(0, x.type.shape[1], layout=gl.SliceLayout(0, layout))
    line = (b.to(gl.int64) * t * heads + h) * COLUMNS + rows.to(gl.int64) * (heads * COLUMNS)  # B * T * H * D may pass 2^31
    at = line[:, None] + cols[None, :]
    inside = rows[:, None] < stop
    if x.type.shape[1] > COLUMNS:
        inside = inside & (cols[None, :] < COLUMNS)
    if ADD:
        x += gl.load(out + at, mask=inside, other=0.0)
    gl.store(out + at, x.to(out.dtype.element_ty), mask=inside)


@gluon.jit
def store_keys(out, x, blocks, busy, per, kv_heads, t_k, first: gl.constexpr, COLUMNS: gl.constexpr):
    """x, of keys `first` .. of this program's block, to out [B, Tk, Hk, COLUMNS]."""
    block, b, kv = place(again(busy), again(per), again(kv_heads))
    start = gl.load(blocks + 4 * block) + first
    store_rows(out, x, b, kv, start, gl.load(blocks + 4 * block + 1), again(kv_heads), again(t_k), COLUMNS, False)


@gluon.jit
def whole(blocks, busy, per, kv_heads, t_k, first: gl.constexpr):
    """Whether TMA can write the 64 keys from `first` of this program's block: what lies past the last key of all, it leaves out."""
    block, b, kv = place(again(busy), again(per), again(kv_heads))
    row = gl.load(blocks + 4 * block) + first
    stop = gl.load(blocks + 4 * block + 1)
    return b, kv, row, (row + 64 <= stop) | (stop == again(t_k))


@gluon.jit
def leave(cid: gl.constexpr, qb, dob, DK, DV, dk, dv, blocks, busy, per, kv_heads, t_k, COLUMNS: gl.constexpr, COLUMNS_V: gl.constexpr):
    """dK and dV of 64 keys into buffers of Q and dO, from which the producer sends them: nobody reads or fills these any more."""
    group_sync(10, 256)
    _, _, _, all_there = whole(blocks, busy, per, kv_heads, t_k, cid * 64)
    if all_there:
        qb.index(cid).store(dk.to(qb.dtype))
        dob.index(cid).store(dv.to(qb.dtype))
        fence_async_shared()
    else:
        store_keys(DK, dk, blocks, busy, per, kv_heads, t_k, cid * 64, COLUMNS)
        store_keys(DV, dv, blocks, busy, per, kv_heads, t_k, cid * 64, COLUMNS_V)
    named_barrier("arrive", 11, 288)


@gluon.jit
def send_keys(desc_dk, desc_dv, qb, dob, blocks, busy, per, kv_heads, t_k):
    """The producer's part of `leave`."""
    named_barrier("sync", 11, 288, 1)
    for c in gl.static_range(2):
        b, kv, row, all_there = whole(blocks, busy, per, kv_heads, t_k, c * 64)
        if all_there:
            tma_store(desc_dk, [b, kv, row, 0], qb.index(c))
            tma_store(desc_dv, [b, kv, row, 0], dob.index(c))
    tma.store_wait(0)
