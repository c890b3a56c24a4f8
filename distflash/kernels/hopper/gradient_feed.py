"""The TMA warp of the backwards with stationary keys: what it loads, in the order in which the consumers read it."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from distflash.kernels.hopper.common import tile_of
from distflash.kernels.hopper.compat import named_barrier, tma_load
from distflash.kernels.hopper.gradient_out import send_keys
from distflash.kernels.hopper.program import extent, place


@gluon.jit
def load_rows(desc, desc_stat, tiles, stats, full, empty, FIRST: gl.constexpr, it, b, h, n0, line, BYTES: gl.constexpr, NB: gl.constexpr,
    NAMED: gl.constexpr
):  # fmt: skip
    """Tile `it` of Q and lse (FIRST 0), or of dO and delta (FIRST NB, where delta begins in `stats`), into its slot."""
    slot = it % NB
    if not NAMED:
        mbarrier.wait(empty.index(slot), 1 - (it // NB) % 2)
    mbarrier.expect(full.index(slot), BYTES)
    tma_load(desc, [b, h, n0, 0], full.index(slot), tiles.index(slot))
    tma_load(desc_stat, [line + n0], full.index(slot), stats.index(FIRST + slot))


@gluon.jit
def producer(
    desc_q, desc_k, desc_v, desc_do, desc_lse, desc_delta, desc_dk, desc_dv, kb, vb, qb, dob, st_b, kvf, qf, dof, qe, doe, blocks,
    segments, busy, per, kv_heads, group, t_pad, t_k, KEYS: gl.constexpr, BM: gl.constexpr, D: gl.constexpr, D_V: gl.constexpr,
    NB: gl.constexpr, OVERLAP: gl.constexpr, NAMED: gl.constexpr
):  # fmt: skip
    """The TMA warp: K and V once, then Q and dO tile by tile."""
    BYTES: gl.constexpr = BM * D * 2 + BM * 4
    BYTES_V: gl.constexpr = BM * D_V * 2 + BM * 4
    block, b, kv = place(busy, per, kv_heads)
    start = gl.load(blocks + 4 * block)
    seg = gl.load(blocks + 4 * block + 2)
    n_seg = gl.load(blocks + 4 * block + 3)
    mbarrier.expect(kvf.index(0), KEYS * (D + D_V) * 2)
    tma_load(desc_k, [b, kv, start, 0], kvf.index(0), kb.index(0))
    tma_load(desc_v, [b, kv, start, 0], kvf.index(0), vb.index(0))
    it = 0
    for h in range(kv * group, kv * group + group):
        line = (b * (kv_heads * group) + h) * t_pad
        for sg in range(seg, seg + n_seg):
            first, left, inner, total = extent(segments, sg)
            for i in range(total):
                n0 = first + tile_of(i, left, inner, total - inner) * BM
                if NAMED:  # noqa: SIM102 - decided at compile time, the other is not
                    if it >= NB:
                        named_barrier("sync", 11 + it % NB, 288, 1)
                load_rows(desc_q, desc_lse, qb, st_b, qf, qe, 0, it, b, h, n0, line, BYTES, NB, NAMED)
                load_rows(desc_do, desc_delta, dob, st_b, dof, doe, NB, it, b, h, n0, line, BYTES_V, NB, NAMED)
                it += 1
    last = gl.maximum(it - NB, 0)
    if OVERLAP:  # the last step computes one Sᵀ too many, of any queries
        if NAMED:  # noqa: SIM102
            if it >= NB:
                named_barrier("sync", 11 + it % NB, 288, 1)
                last += 1
        load_rows(desc_q, desc_lse, qb, st_b, qf, qe, 0, it, b, kv * group, 0, 0, BYTES, NB, NAMED)
    if NAMED:  # no barrier is left half full
        for i in range(last, it):
            named_barrier("sync", 11 + i % NB, 288, 1)
    if desc_dk is not None:
        send_keys(desc_dk, desc_dv, qb, dob, blocks, busy, per, kv_heads, t_k)
