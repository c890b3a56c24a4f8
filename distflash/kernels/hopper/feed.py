"""The TMA warp of a forward, and the buffers that it fills: an item's line and Q, then its K and V in the consumers' order."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from distflash.kernels.hopper.common import entry
from distflash.kernels.hopper.compat import tma_load
from distflash.kernels.hopper.items import from_right
from distflash.kernels.hopper.slots import reclaim


@gluon.constexpr_function
def tile_bytes(tiles):
    """Of one tile, all its parts, of 16-bit elements."""
    return sum(part.shape[1] * part.shape[2] * 2 for part in tiles)


@gluon.jit
def fill(tiles, slot, desc, desc2, b, h, row, full):
    """One tile from row `row`, a box a part."""
    tma_load(desc, [b, h, row, 0], full, tiles[0].index(slot))
    if desc2 is not None:
        tma_load(desc2, [b, h, row, desc.block_shape[3]], full, tiles[1].index(slot))


@gluon.jit
def producer(
    desc_q, desc_q2, desc_k, desc_k2, desc_v, desc_v2, desc_order, q, k, v, dealt, qf, qe, kf, ke, vf, ve, segments, order, rounds, heads,
    group, NQ: gl.constexpr, NAMED: gl.constexpr
):  # fmt: skip
    """The TMA warp: an item's line and Q, then its K and V tile by tile, in the consumers' order. Past a tensor's last row or column a box
    is filled with zeros, and counts in full."""
    NC: gl.constexpr = q[0].shape[0] // NQ
    NB: gl.constexpr = k[0].shape[0]
    BN: gl.constexpr = k[0].shape[1]
    it = 0
    q_bytes: gl.constexpr = NC * tile_bytes(q)
    k_bytes: gl.constexpr = tile_bytes(k)
    v_bytes: gl.constexpr = tile_bytes(v)
    items = gl.load(entry(0, order, rounds) + 6)
    for r in range(items):
        at = entry(r, order, rounds)
        bh = gl.load(at + 1)
        start = gl.load(at + 2)
        n_seg = gl.load(at + 5)
        b = bh // heads
        h = bh % heads
        hk = h // group
        mbarrier.wait(qe.index(r % NQ), ((r // NQ) & 1) ^ 1)
        mbarrier.expect(qf.index(r % NQ), q_bytes + 64)
        tma_load(desc_order, [16 * (gl.program_id(0) * rounds + r)], qf.index(r % NQ), dealt.index(2 * (r % 2)))
        for c in gl.static_range(NC):
            fill(q, (r % NQ) * NC + c, desc_q, desc_q2, b, h, start + c * 64, qf.index(r % NQ))
        for n in range(n_seg):
            at = entry(r, order, rounds)
            at = gl.where(n == 0, at + 8, segments + 8 * (gl.load(at + 4) + n))
            first = gl.load(at)
            left = gl.load(at + 4)
            inner = gl.load(at + 5)
            total = gl.load(at + 6)
            for i in range(total):
                n0 = first + from_right(i, left, inner, total - inner) * BN
                slot = it % NB
                reclaim(ke, it, NAMED, 0, NB)
                mbarrier.expect(kf.index(slot), k_bytes)
                fill(k, slot, desc_k, desc_k2, b, hk, n0, kf.index(slot))
                reclaim(ve, it, NAMED, NB, NB)
                mbarrier.expect(vf.index(slot), v_bytes)
                fill(v, slot, desc_v, desc_v2, b, hk, n0, vf.index(slot))
                it += 1
    if NAMED:  # no barrier is left half full
        for n in range(gl.maximum(it, NB), it + NB):
            reclaim(ke, n, NAMED, 0, NB)
            reclaim(ve, n, NAMED, NB, NB)


@gluon.jit
def buffers(n: gl.constexpr, desc, desc2):
    """Shared memory for n tiles of what the descriptors read, a buffer a part."""
    shape: gl.constexpr = desc.block_shape
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([shape[2], shape[3]], desc.dtype)
    one = gl.allocate_shared_memory(desc.dtype, [n, shape[2], shape[3]], layout)
    if desc2 is None:
        return (one,)
    else:
        shape2: gl.constexpr = desc2.block_shape
        layout2: gl.constexpr = gl.NVMMASharedLayout.get_default_for([shape2[2], shape2[3]], desc.dtype)
        return one, gl.allocate_shared_memory(desc.dtype, [n, shape2[2], shape2[3]], layout2)
