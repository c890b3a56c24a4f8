"""dQ for sm_90 without atomics: queries stationary, keys and values streamed, each row of dQ written once by the program that summed it.

    item      one block of rows of one head of one batch element; items, segments and tiles as in forward.py
    consumer  64 of the rows. S = Q Kᵀ and dP = dO Vᵀ live in registers, dS is the register operand of dQ += dS K. S of the next tile is
              issued behind dQ of this one, so that exponentials run beside dP, and only dS is left to run beside the other consumer

Barriers (count): qdo_full (1, TMA: Q and dO), qdo_empty (2), NB each of k_full (1, TMA), k_empty (2), NBV each of v_full, v_empty.
Tile i, counted over all items, has its K in slot i % NB and its V in i % NBV. NB >= 2: S of tile i + 1 is read while K of tile i is.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait

from distflash.kernels.hopper.common import again, as_operand, entry, kept, tile_of
from distflash.kernels.hopper.compat import tma_load
from distflash.kernels.hopper.gradient_out import store_rows


@gluon.jit
def pick(r, order, rounds, heads):
    """Work item of round r: (is there one, row of the block table, batch element, head)."""
    at = entry(r, order, rounds)
    block = gl.load(at)
    bh = gl.load(at + 1)
    return block >= 0, gl.maximum(block, 0), bh // heads, bh % heads


@gluon.jit
def limits(segments, sg, start, r_l: gl.constexpr):
    """A segment, and the columns low <= j < high that each of 64 rows from `start` keeps in it."""
    at = segments + 8 * sg
    rows = start + gl.arange(0, 64, layout=r_l)
    low = rows + gl.load(at + 2)
    high = gl.minimum(rows + gl.load(at + 3) + 1, gl.load(at + 1))
    return gl.load(at), low, high, gl.load(at + 4), gl.load(at + 5), gl.load(at + 6)


@gluon.jit
def step(
    MASK: gl.constexpr, LAST: gl.constexpr, cid: gl.constexpr, qb, dob, kb, vb, kf, ke, vf, ve, s, dq, zs, it, qs, nlse, ndelta,
    n0, low, high, NB: gl.constexpr, NBV: gl.constexpr
):  # fmt: skip
    """Tile `it`, whose S comes in; S of the next goes out, unless this is the LAST of the item."""
    q_l: gl.constexpr = dq.type.layout
    it = again(it)
    mine = again(cid)
    q = qb.index(mine)
    do = dob.index(mine)
    slot = it % NB
    slot_v = again(it % NBV)
    mbarrier.wait(vf.index(slot_v), (it // NBV) % 2)
    dpt = warpgroup_mma(do, vb.index(slot_v).permute([1, 0]), zs, use_acc=False, is_async=True)
    if MASK:
        s = kept(s, n0, low, high)
    p = gl.exp2(gl.fma(s, qs, nlse[:, None]))
    dp = warpgroup_mma_wait(0, deps=[dpt])
    mbarrier.arrive(ve.index(slot_v), count=1)
    ds = p * (dp + ndelta[:, None])
    operand = as_operand(ds, q.dtype, q_l)
    dq = warpgroup_mma(operand, kb.index(slot), dq, is_async=True)
    if LAST:
        dq, operand = warpgroup_mma_wait(0, deps=[dq, operand])
        mbarrier.arrive(ke.index(slot), count=1)
    else:
        nxt = (it + 1) % NB
        mbarrier.wait(kf.index(nxt), ((it + 1) // NB) % 2)
        st = warpgroup_mma(q, kb.index(nxt).permute([1, 0]), zs, use_acc=False, is_async=True)
        dq, operand = warpgroup_mma_wait(1, deps=[dq, operand])
        mbarrier.arrive(ke.index(slot), count=1)
        s = warpgroup_mma_wait(0, deps=[st])
    return s, dq, it + 1


@gluon.jit
def consumer(
    cid: gl.constexpr, qb, dob, kb, vb, qf, qe, kf, ke, vf, ve, DQ, NLSE, NDELTA, blocks, segments, order, qs, scale, rounds,
    heads, t_q,
    BN: gl.constexpr, D: gl.constexpr, COLUMNS: gl.constexpr, NB: gl.constexpr, NBV: gl.constexpr, ADD: gl.constexpr,
    FOLD: gl.constexpr
):  # fmt: skip
    """Rows cid * 64 .. + 63 of each block."""
    s_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    q_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    r_l: gl.constexpr = gl.SliceLayout(1, s_l)
    zs = gl.zeros([64, BN], gl.float32, layout=s_l)
    q = qb.index(cid)
    it = 0
    for r in range(rounds):
        live, block, b, h = pick(r, order, rounds, heads)
        if live:
            start = gl.load(blocks + 4 * block) + cid * 64
            stop = gl.load(blocks + 4 * block + 1)
            seg = gl.load(blocks + 4 * block + 2)
            end = seg + gl.load(blocks + 4 * block + 3)
            rows = start + gl.arange(0, 64, layout=r_l)
            line = (b * heads + h) * ((again(t_q) + 130) & -4)  # gradients._padded: an argument more would be spilled
            nlse = gl.load(NLSE + line + rows, mask=rows < stop, other=float("-inf"))
            ndelta = gl.load(NDELTA + line + rows, mask=rows < stop, other=0.0)
            if FOLD:  # stats hold -delta * scale; one register less over the loop without the scale
                ndelta = ndelta / scale
            dq = gl.zeros([64, D], gl.float32, layout=q_l)
            mbarrier.wait(qf.index(0), r & 1)  # a program's items have no gaps: item r is the r-th Q
            first_slot = again(it) % NB
            mbarrier.wait(kf.index(first_slot), (again(it) // NB) % 2)
            st = warpgroup_mma(q, kb.index(first_slot).permute([1, 0]), zs, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=[st])
            for sg in range(seg, end):
                live, block, b, h = pick(again(r), order, rounds, again(heads))
                first, low, high, left, inner, total = limits(segments, sg, gl.load(blocks + 4 * block) + cid * 64, r_l)
                masked = total - inner
                stay = total - gl.where(sg + 1 == end, 1, 0)  # the item's last tile has no next
                for i in range(gl.minimum(masked, stay)):
                    n0 = first + tile_of(i, left, inner, masked) * BN
                    s, dq, it = step(
                        True, False, cid, qb, dob, kb, vb, kf, ke, vf, ve, s, dq, zs, it, qs, nlse, ndelta, n0, low, high, NB, NBV
                    )  # fmt: skip
                for _ in range(masked, stay):
                    s, dq, it = step(
                        False, False, cid, qb, dob, kb, vb, kf, ke, vf, ve, s, dq, zs, it, qs, nlse, ndelta, 0, low, high, NB, NBV
                    )  # fmt: skip
            live, block, b, h = pick(again(r), order, rounds, again(heads))
            start = gl.load(blocks + 4 * block) + cid * 64
            sg = gl.load(blocks + 4 * block + 2) + gl.load(blocks + 4 * block + 3) - 1
            first, low, high, left, inner, total = limits(segments, sg, start, r_l)
            n0 = first + tile_of(total - 1, left, inner, total - inner) * BN
            s, dq, it = step(
                True, True, cid, qb, dob, kb, vb, kf, ke, vf, ve, s, dq, zs, it, qs, nlse, ndelta, n0, low, high, NB, NBV
            )  # fmt: skip
            mbarrier.arrive(qe.index(0), count=1)

            heads_out = again(heads)
            live, block, b, h = pick(again(r), order, rounds, heads_out)
            start = gl.load(blocks + 4 * block) + cid * 64
            store_rows(DQ, dq * scale, b, h, start, gl.load(blocks + 4 * block + 1), heads_out, again(t_q), COLUMNS, ADD)


@gluon.jit
def producer(
    desc_q, desc_k, desc_v, desc_do, qb, dob, kb, vb, qf, qe, kf, ke, vf, ve, blocks, segments, order, rounds, heads, group,
    BN: gl.constexpr, D: gl.constexpr, D_V: gl.constexpr, NB: gl.constexpr, NBV: gl.constexpr
):  # fmt: skip
    """The TMA warp: Q and dO of an item, then its K and V tile by tile, in the consumers' order."""
    it = 0
    for r in range(rounds):
        live, block, b, h = pick(r, order, rounds, heads)
        if live:
            start = gl.load(blocks + 4 * block)
            seg = gl.load(blocks + 4 * block + 2)
            n_seg = gl.load(blocks + 4 * block + 3)
            hk = h // group
            mbarrier.wait(qe.index(0), 1 - (r & 1))
            mbarrier.expect(qf.index(0), 128 * (D + D_V) * 2)
            for c in gl.static_range(2):
                tma_load(desc_q, [b, h, start + c * 64, 0], qf.index(0), qb.index(c))
                tma_load(desc_do, [b, h, start + c * 64, 0], qf.index(0), dob.index(c))
            for sg in range(seg, seg + n_seg):
                first = gl.load(segments + 8 * sg)
                left = gl.load(segments + 8 * sg + 4)
                inner = gl.load(segments + 8 * sg + 5)
                total = gl.load(segments + 8 * sg + 6)
                for i in range(total):
                    n0 = first + tile_of(i, left, inner, total - inner) * BN
                    slot = it % NB
                    slot_v = it % NBV
                    mbarrier.wait(ke.index(slot), 1 - (it // NB) % 2)
                    mbarrier.expect(kf.index(slot), BN * D * 2)
                    tma_load(desc_k, [b, hk, n0, 0], kf.index(slot), kb.index(slot))
                    mbarrier.wait(ve.index(slot_v), 1 - (it // NBV) % 2)
                    mbarrier.expect(vf.index(slot_v), BN * D_V * 2)
                    tma_load(desc_v, [b, hk, n0, 0], vf.index(slot_v), vb.index(slot_v))
                    it += 1


@gluon.jit(do_not_specialize=["rounds", "heads", "group", "t_q"])
def dq_kernel(
    desc_q, desc_k, desc_v, desc_do, DQ, NLSE, NDELTA, blocks, segments, order, qs, scale, rounds, heads, group, t_q,
    BN: gl.constexpr, D: gl.constexpr, D_V: gl.constexpr, COLUMNS: gl.constexpr, NB: gl.constexpr, NBV: gl.constexpr,
    ADD: gl.constexpr, FOLD: gl.constexpr, REGS: gl.constexpr, REGS_P: gl.constexpr
):  # fmt: skip
    """grid: any number of programs, at most `rounds` items each: order [programs, rounds, 16]. desc_*: [B, H, T, D or D_V] views, boxes of
    64 or BN rows; DQ [B, Tq, H, COLUMNS], contiguous, added to if ADD; NLSE, NDELTA of stats.py."""
    dtype: gl.constexpr = desc_q.dtype
    gl.static_assert(NB >= 2)
    ql: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, D], dtype)
    dol: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, D_V], dtype)
    kl: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, D], dtype)
    vl: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, D_V], dtype)
    qb = gl.allocate_shared_memory(dtype, [2, 64, D], ql)
    dob = gl.allocate_shared_memory(dtype, [2, 64, D_V], dol)
    kb = gl.allocate_shared_memory(dtype, [NB, BN, D], kl)
    vb = gl.allocate_shared_memory(dtype, [NBV, BN, D_V], vl)
    bl: gl.constexpr = mbarrier.MBarrierLayout()
    qf = gl.allocate_shared_memory(gl.int64, [1, 1], bl)
    qe = gl.allocate_shared_memory(gl.int64, [1, 1], bl)
    kf = gl.allocate_shared_memory(gl.int64, [NB, 1], bl)
    ke = gl.allocate_shared_memory(gl.int64, [NB, 1], bl)
    vf = gl.allocate_shared_memory(gl.int64, [NBV, 1], bl)
    ve = gl.allocate_shared_memory(gl.int64, [NBV, 1], bl)
    mbarrier.init(qf.index(0), count=1)
    mbarrier.init(qe.index(0), count=2)
    for i in gl.static_range(NB):
        mbarrier.init(kf.index(i), count=1)
        mbarrier.init(ke.index(i), count=2)
    for i in gl.static_range(NBV):
        mbarrier.init(vf.index(i), count=1)
        mbarrier.init(ve.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (consumer, (0, qb, dob, kb, vb, qf, qe, kf, ke, vf, ve, DQ, NLSE, NDELTA, blocks, segments, order, qs, scale, rounds,
             heads, t_q, BN, D, COLUMNS, NB, NBV, ADD, FOLD)),
            (consumer, (1, qb, dob, kb, vb, qf, qe, kf, ke, vf, ve, DQ, NLSE, NDELTA, blocks, segments, order, qs, scale, rounds,
             heads, t_q, BN, D, COLUMNS, NB, NBV, ADD, FOLD)),
            (producer, (desc_q, desc_k, desc_v, desc_do, qb, dob, kb, vb, qf, qe, kf, ke, vf, ve, blocks, segments, order, rounds, heads,
             group, BN, D, D_V, NB, NBV)),
        ],
        [4, 1],
        [REGS, REGS_P],
    )  # fmt: skip
