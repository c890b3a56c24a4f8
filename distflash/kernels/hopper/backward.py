"""Attention backward for sm_90: one pass of five matmuls, keys and values stationary, dQ summed in fp32 by TMA reduce-add.

    program   one block of 128 keys of one head of one batch element; loops over the query heads of its group (no atomics on dK, dV),
              their segments and tiles of BM queries (schedule.py's work list, transposed: rows are keys, columns are queries)
    consumer  64 of the keys. Sᵀ = K Qᵀ and dPᵀ = V dOᵀ live in registers, and as P and dS are the register operands of
              dV += P dO and dK += dS Q; dS also goes through shared memory, as dQ sums over both consumers
    DQ        who computes dQ. HALVES: each consumer half of its columns, after a barrier of both. REDUCER: a third warpgroup, so that
              the consumers never wait for each other, nor for dQ's way out; it takes the registers that D = 128 needs. NONE: dK and
              dV alone, bit-equal from run to run; dq.py computes dQ then. It is computed as dQᵀ = Kᵀ dSᵀ: a warp that stores that in
              TMA's swizzle meets every bank once, where dQ, two columns a thread, meets each twice
    KV_REGS   K (1), or K and V (2) are register operands of Sᵀ and dPᵀ: with both a third less shared memory is read. At D = 64 they
              take 16 registers each
    stats     -lse in base 2 (-inf where a row saw no key, so that its P is 0) and -delta, one fp32 vector each; a tile's slice of
              them travels with Q and dO into shared memory and is read just before use: kept in registers they spill

Barriers (count): kv_full (1, TMA), NB each of q_full, do_full (1, TMA), q_empty, do_empty (2). dS has two buffers. HALVES: named barrier
10, dS of both is stored; at that of step i the other has finished dQ of step i - 1, so buffer i + 1 is free without a second one.
REDUCER: two each of ds_full (2) and ds_empty (1).
NAMED: instead of q_empty and do_empty the named barriers 11 and 12, one a slot; of a REDUCER's ds_full, 13 and 14.
With desc_dk, 11 once more at the end: dK and dV are in the buffers of Q and dO.
Longer than the house's 60 lines a function: a wgmma and what it overlaps with must stand in one body.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from distflash.kernels.hopper import configs
from distflash.kernels.hopper.common import again, as_operand, tile_of
from distflash.kernels.hopper.compat import group_sync, named_barrier, tma_reduce_add
from distflash.kernels.hopper.gradient_feed import producer
from distflash.kernels.hopper.gradient_out import leave, store_keys
from distflash.kernels.hopper.program import band, extent, n_segments, place, segment_of

HALVES = gl.constexpr(configs.HALVES)
REDUCER = gl.constexpr(configs.REDUCER)
NONE = gl.constexpr(configs.NONE)


@gluon.jit
def probabilities(MASK: gl.constexpr, s, nlse, qs, n0, low, high):
    """exp2(s * qs - lse) of [64 keys, BM queries], nlse of shared memory; 0 outside the band."""
    s_l: gl.constexpr = s.type.layout
    return exponentials(MASK, s, nlse.load(gl.SliceLayout(0, s_l)), qs, n0, low, high)


@gluon.jit
def exponentials(MASK: gl.constexpr, s, nlse, qs, n0, low, high):
    """`probabilities`, nlse in registers."""
    s_l: gl.constexpr = s.type.layout
    BM: gl.constexpr = s.type.shape[1]
    if MASK:  # not common.kept, whose constants take registers here: 2 % at D = 128
        cols = n0 + gl.arange(0, BM, layout=gl.SliceLayout(0, s_l))
        s = gl.where((cols[None, :] >= low[:, None]) & (cols[None, :] < high[:, None]), s, float("-inf"))
    return gl.exp2(gl.fma(s, qs, nlse[None, :]))


@gluon.jit
def send_dq(desc_dq, dq_s, dqt, scale, b, h, row, column, PENDING: gl.constexpr, FOLD: gl.constexpr):
    """Add a piece of dQ, given transposed, to global memory; the copy out overlaps with what follows. PENDING copies may still read."""
    if not FOLD:
        dqt = dqt * scale
    tma.store_wait(PENDING)  # the copy that had this buffer has read it
    dq_s.permute([1, 0]).store(dqt)
    fence_async_shared()
    tma_reduce_add(desc_dq, [b, h, row, column], dq_s)


@gluon.jit
def step(
    cid: gl.constexpr, MASK: gl.constexpr, OVERLAP: gl.constexpr, LATE: gl.constexpr, FOLD: gl.constexpr,
    PROMPT: gl.constexpr, NAMED: gl.constexpr, HIDE: gl.constexpr,
    DQ: gl.constexpr, desc_dq, kb, vb, ks, vs, kd, qb, dob, st_b, dsb, dq_s, qf, dof, dsf, qe, doe, dse, s, dk, dv, zs, state, qs,
    scale, fold, b, h, n0, low, high, D: gl.constexpr, NB: gl.constexpr
):  # fmt: skip
    """The next tile of queries; `state` counts them, modulo 16.

    OVERLAP: `s` comes in ready, and the next tile's is computed beside this one's dQ and dK.
    LATE: dV is issued after dS instead of beside it: P's operand and dPᵀ are never live together, 16 to 32 registers less.
    PROMPT: lse and delta are read before the products that they follow are waited for; with LATE, dV is issued before dS is fenced.
    NAMED: Q and dO are given back together, at a named barrier, which stops nobody (an mbarrier's arrival is behind a bar.sync).
    HIDE: where K and V lie is not kept in registers from step to step."""
    s_l: gl.constexpr = zs.type.layout
    kv_l: gl.constexpr = dk.type.layout
    state = again(state)  # or each address that follows from it becomes a loop variable of its own, spilled
    it = state & 15
    slot = it % NB
    parity = (it // NB) & 1
    q = qb.index(slot)
    do = dob.index(slot)
    if HIDE:
        k = kb.index(again(0))
        ks = k.slice(cid * 64, 64, 0)
        vs = vb.index(again(0)).slice(cid * 64, 64, 0)
        kd = k.slice(cid * (D // 2), D // 2, 1)
    if not OVERLAP:
        mbarrier.wait(qf.index(slot), parity)
        st = warpgroup_mma(ks, q.permute([1, 0]), zs, use_acc=False, is_async=True)
    mbarrier.wait(dof.index(slot), parity)
    dpt = warpgroup_mma(vs, do.permute([1, 0]), zs, use_acc=False, is_async=True)
    if PROMPT:
        nlse = st_b.index(slot).load(gl.SliceLayout(0, s_l))
    if not OVERLAP:
        s = warpgroup_mma_wait(1, deps=[st])
    if PROMPT:
        p = exponentials(MASK, s, nlse, qs, n0, low, high)
        nde = st_b.index(NB + slot).load(gl.SliceLayout(0, s_l))
    else:
        p = probabilities(MASK, s, st_b.index(slot), qs, n0, low, high)
    if LATE:
        dp = warpgroup_mma_wait(0, deps=[dpt])
    else:
        pb = as_operand(p, q.dtype, kv_l)
        dv = warpgroup_mma(pb, do, dv, is_async=True)
        dp = warpgroup_mma_wait(1, deps=[dpt])
    if not PROMPT:
        nde = st_b.index(NB + slot).load(gl.SliceLayout(0, s_l))
    if FOLD:  # stats hold -delta * scale
        ds = p * gl.fma(dp, fold, nde[None, :])
    else:
        ds = p * (dp + nde[None, :])
    ds16 = ds.to(q.dtype)
    mine = dsb.index(it % 2)
    if DQ == HALVES:
        mine.slice(cid * 64, 64, 0).store(ds16)
        if not (PROMPT and LATE):
            fence_async_shared()
    if LATE:
        pb = as_operand(p, q.dtype, kv_l)
        dv = warpgroup_mma(pb, do, dv, is_async=True)
    if DQ == HALVES:
        if PROMPT and LATE:
            fence_async_shared()
        group_sync(10, 256)
    if DQ == REDUCER:
        mbarrier.wait(dse.index(it % 2), 1 - ((it // 2) & 1))
        mine.slice(cid * 64, 64, 0).store(ds16)
        fence_async_shared()
        if NAMED:
            named_barrier("arrive", 13 + it % 2, 384)
        else:
            mbarrier.arrive(dsf.index(it % 2), count=1)
    dsr = gl.convert_layout(ds16, gl.DotOperandLayout(0, kv_l, 2))
    if DQ == HALVES:
        dqt = warpgroup_mma(kd.permute([1, 0]), mine, zs, use_acc=False, is_async=True)
    SOON: gl.constexpr = LATE or (PROMPT and OVERLAP)  # P's operand goes before the next Sᵀ comes
    if SOON and DQ == HALVES:
        dv, pb = warpgroup_mma_wait(1, deps=[dv, pb])
        if not NAMED:
            mbarrier.arrive(doe.index(slot), count=1)
    dk = warpgroup_mma(dsr, q, dk, is_async=True)
    if OVERLAP:
        mbarrier.wait(qf.index((it + 1) % NB), ((it + 1) // NB) & 1)
        st = warpgroup_mma(ks, qb.index((it + 1) % NB).permute([1, 0]), zs, use_acc=False, is_async=True)
    behind: gl.constexpr = 2 if OVERLAP else 1
    if DQ == HALVES:
        if SOON:
            dq = warpgroup_mma_wait(behind, deps=[dqt])
        else:
            dv, pb, dq = warpgroup_mma_wait(behind, deps=[dv, pb, dqt])
            if not NAMED:
                mbarrier.arrive(doe.index(slot), count=1)
        send_dq(desc_dq, dq_s, dq, scale, b, h, n0, cid * (D // 2), 0, FOLD)
    else:
        dv, pb = warpgroup_mma_wait(behind, deps=[dv, pb])
        if not NAMED:
            mbarrier.arrive(doe.index(slot), count=1)
    if OVERLAP:
        dk, dsr, s = warpgroup_mma_wait(0, deps=[dk, dsr, st])
    else:
        dk, dsr = warpgroup_mma_wait(0, deps=[dk, dsr])
    if NAMED:
        named_barrier("arrive", 11 + slot, 288)
    else:
        mbarrier.arrive(qe.index(slot), count=1)
    return s, dk, dv, (state & -16) | ((state + 1) & 15)


@gluon.jit
def consumer(
    cid: gl.constexpr, desc_dq, desc_dk, kb, vb, qb, dob, st_b, dsb, dqb, kvf, qf, dof, dsf, qe, doe, dse, DK, DV, blocks, segments, qs,
    scale, fold, busy, per, kv_heads, group, t_k, BM: gl.constexpr, D: gl.constexpr, COLUMNS: gl.constexpr, COLUMNS_V: gl.constexpr,
    NB: gl.constexpr, OVERLAP: gl.constexpr, LATE: gl.constexpr, FOLD: gl.constexpr, DQ: gl.constexpr, KV_REGS: gl.constexpr,
    PROMPT: gl.constexpr, NAMED: gl.constexpr, HIDE: gl.constexpr
):  # fmt: skip
    """Keys cid * 64 .. + 63 of the block."""
    s_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    kv_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    r_l: gl.constexpr = gl.SliceLayout(1, s_l)
    gl.static_assert(16 % (2 * NB) == 0)
    dk = gl.zeros([64, D], gl.float32, layout=kv_l)
    dv = gl.zeros([64, D], gl.float32, layout=kv_l)
    zs = gl.zeros([64, BM], gl.float32, layout=s_l)
    k = kb.index(0)
    ks = k.slice(cid * 64, 64, 0)
    vs = vb.index(0).slice(cid * 64, 64, 0)
    kd = k.slice(cid * (D // 2), D // 2, 1)
    dq_s = dqb.index(cid)
    state = 0  # segments done * 16 + tiles done % 16: one register, where two would spill
    s = zs
    mbarrier.wait(kvf.index(0), 0)
    if KV_REGS:
        ks = ks.load(gl.DotOperandLayout(0, s_l, 2))
    if KV_REGS == 2:
        vs = vs.load(gl.DotOperandLayout(0, s_l, 2))
    if OVERLAP:
        mbarrier.wait(qf.index(0), 0)
        st = warpgroup_mma(ks, qb.index(0).permute([1, 0]), zs, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[st])
    while (again(state) >> 4) < group * n_segments(blocks, busy, per, kv_heads):
        start, stop, b, h, sg = segment_of(state >> 4, blocks, busy, per, kv_heads, group)
        first, left, inner, total = extent(segments, sg)
        low, high = band(segments, sg, start + cid * 64, stop, r_l, HIDE)
        masked = total - inner
        for i in range(masked):
            n0 = first + tile_of(i, left, inner, masked) * BM
            s, dk, dv, state = step(
                cid, True, OVERLAP, True, FOLD, False, NAMED, HIDE, DQ, desc_dq, kb, vb, ks, vs, kd, qb, dob, st_b,
                dsb, dq_s, qf, dof, dsf, qe, doe, dse, s, dk, dv, zs, state, qs, scale, fold, b, h, n0, low, high, D, NB
            )  # fmt: skip
        start, stop, b, h, sg = segment_of(state >> 4, blocks, busy, per, kv_heads, group)
        first, left, inner, total = extent(segments, sg)
        for i in range(left, left + inner):
            s, dk, dv, state = step(
                cid, False, OVERLAP, LATE, FOLD, PROMPT, NAMED, HIDE, DQ, desc_dq, kb, vb, ks, vs, kd, qb, dob, st_b,
                dsb, dq_s, qf, dof, dsf, qe, doe, dse, s, dk, dv, zs, state, qs, scale, fold, b, h, first + i * BM, 0, 0, D, NB
            )  # fmt: skip
        state = state + 16
    if not FOLD:
        dk = dk * scale
    if desc_dk is None:
        store_keys(DK, dk, blocks, busy, per, kv_heads, t_k, cid * 64, COLUMNS)
        store_keys(DV, dv, blocks, busy, per, kv_heads, t_k, cid * 64, COLUMNS_V)
    else:
        leave(cid, qb, dob, DK, DV, dk, dv, blocks, busy, per, kv_heads, t_k, COLUMNS, COLUMNS_V)
    tma.store_wait(0)


@gluon.jit
def reducer(
    desc_dq, kb, dsb, dqb, kvf, dsf, dse, blocks, segments, scale, busy, per, kv_heads, group, BM: gl.constexpr, D: gl.constexpr,
    FOLD: gl.constexpr, NAMED: gl.constexpr
):  # fmt: skip
    """dQᵀ = Kᵀ dSᵀ of every step, and its way out through two buffers."""
    zq = gl.zeros([D, BM], gl.float32, layout=gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16]))
    k = kb.index(0)
    block, b, kv = place(busy, per, kv_heads)
    seg = gl.load(blocks + 4 * block + 2)
    n_seg = gl.load(blocks + 4 * block + 3)
    mbarrier.wait(kvf.index(0), 0)
    it = 0
    for h in range(kv * group, kv * group + group):
        for sg in range(seg, seg + n_seg):
            first, left, inner, total = extent(segments, sg)
            for i in range(total):
                n0 = first + tile_of(i, left, inner, total - inner) * BM
                slot = it % 2
                if NAMED:
                    named_barrier("sync", 13 + slot, 384)
                else:
                    mbarrier.wait(dsf.index(slot), (it // 2) & 1)
                dqt = warpgroup_mma(k.permute([1, 0]), dsb.index(slot), zq, use_acc=False, is_async=True)
                dqt = warpgroup_mma_wait(0, deps=[dqt])
                mbarrier.arrive(dse.index(slot), count=1)
                send_dq(desc_dq, dqb.index(slot), dqt, scale, b, h, n0, 0, 1, FOLD)
                it += 1
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["busy", "per", "kv_heads", "group", "t_pad", "t_k"])
def backward_kernel(
    desc_q, desc_k, desc_v, desc_do, desc_lse, desc_delta, desc_dq, desc_dk, desc_dv, DK, DV, blocks, segments, qs, scale, fold, busy, per,
    kv_heads, group, t_pad, t_k,
    BM: gl.constexpr, D: gl.constexpr, COLUMNS: gl.constexpr, COLUMNS_V: gl.constexpr, NB: gl.constexpr, OVERLAP: gl.constexpr,
    LATE: gl.constexpr, FOLD: gl.constexpr, DQ: gl.constexpr, KV_REGS: gl.constexpr, PROMPT: gl.constexpr, NAMED: gl.constexpr,
    HIDE: gl.constexpr, REGS: gl.constexpr, REGS_R: gl.constexpr, REGS_P: gl.constexpr
):  # fmt: skip
    """grid: key blocks * kv heads * batch. desc_q, desc_do [B, H, Tq, D] boxes of BM rows; desc_k, desc_v [B, Hk, Tk, D] boxes of 128;
    desc_lse, desc_delta [B * H * t_pad] boxes [BM]; desc_dq fp32 [B, H, Tq, D] boxes [64, 64];
    DK, DV [B, Tk, Hk, COLUMNS or COLUMNS_V], contiguous; desc_dk, desc_dv: of these, boxes [64, D], or None: all by direct stores;
    D is the smallest tile that holds both."""
    dtype: gl.constexpr = desc_q.dtype
    ql: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, D], dtype)
    kl: gl.constexpr = gl.NVMMASharedLayout.get_default_for([128, D], dtype)
    sl: gl.constexpr = gl.NVMMASharedLayout.get_default_for([128, BM], dtype)
    dl: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], gl.float32)
    tl: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    kb = gl.allocate_shared_memory(dtype, [1, 128, D], kl)
    vb = gl.allocate_shared_memory(dtype, [1, 128, D], kl)
    qb = gl.allocate_shared_memory(dtype, [NB, BM, D], ql)
    dob = gl.allocate_shared_memory(dtype, [NB, BM, D], ql)
    dsb = gl.allocate_shared_memory(dtype, [2, 128, BM], sl)
    dqb = gl.allocate_shared_memory(gl.float32, [2, 64, 64], dl)
    st_b = gl.allocate_shared_memory(gl.float32, [2 * NB, BM], tl)
    bl: gl.constexpr = mbarrier.MBarrierLayout()
    kvf = gl.allocate_shared_memory(gl.int64, [1, 1], bl)
    qf = gl.allocate_shared_memory(gl.int64, [NB, 1], bl)
    qe = gl.allocate_shared_memory(gl.int64, [NB, 1], bl)
    dof = gl.allocate_shared_memory(gl.int64, [NB, 1], bl)
    doe = gl.allocate_shared_memory(gl.int64, [NB, 1], bl)
    mbarrier.init(kvf.index(0), count=1)
    for i in gl.static_range(NB):
        mbarrier.init(qf.index(i), count=1)
        mbarrier.init(qe.index(i), count=2)
        mbarrier.init(dof.index(i), count=1)
        mbarrier.init(doe.index(i), count=2)
    dsf = gl.allocate_shared_memory(gl.int64, [2, 1], bl)
    dse = gl.allocate_shared_memory(gl.int64, [2, 1], bl)
    for i in gl.static_range(2):
        mbarrier.init(dsf.index(i), count=2)
        mbarrier.init(dse.index(i), count=1)
    fence_async_shared()
    gl.static_assert(NB == 2 or not NAMED)  # numbers 11 and 12
    gl.static_assert(DQ == NONE or (64 if DQ == REDUCER else 128) == D)  # 64 rows of dQᵀ to whoever computes it
    gl.static_assert(not HIDE or not KV_REGS)
    gl.static_assert(desc_dk is None or (NB >= 2 and BM == 64))
    if DQ == REDUCER:
        gl.warp_specialize(
            [
                (reducer, (desc_dq, kb, dsb, dqb, kvf, dsf, dse, blocks, segments, scale, busy, per, kv_heads, group, BM, D, FOLD,
                 NAMED)),
                (consumer, (0, desc_dq, desc_dk, kb, vb, qb, dob, st_b, dsb, dqb, kvf, qf, dof, dsf, qe, doe, dse, DK, DV, blocks,
                 segments, qs, scale, fold, busy, per, kv_heads, group, t_k, BM, D, COLUMNS, COLUMNS_V, NB, OVERLAP, LATE, FOLD, DQ,
                 KV_REGS, PROMPT, NAMED, HIDE)),
                (consumer, (1, desc_dq, desc_dk, kb, vb, qb, dob, st_b, dsb, dqb, kvf, qf, dof, dsf, qe, doe, dse, DK, DV, blocks,
                 segments, qs, scale, fold, busy, per, kv_heads, group, t_k, BM, D, COLUMNS, COLUMNS_V, NB, OVERLAP, LATE, FOLD, DQ,
                 KV_REGS, PROMPT, NAMED, HIDE)),
                (producer, (desc_q, desc_k, desc_v, desc_do, desc_lse, desc_delta, desc_dk, desc_dv, kb, vb, qb, dob, st_b, kvf, qf, dof,
                 qe, doe, blocks, segments, busy, per, kv_heads, group, t_pad, t_k, 128, BM, D, D, NB, OVERLAP, NAMED)),
            ],
            [4, 4, 1],
            [REGS, REGS, REGS_P],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (consumer, (0, desc_dq, desc_dk, kb, vb, qb, dob, st_b, dsb, dqb, kvf, qf, dof, dsf, qe, doe, dse, DK, DV, blocks,
                 segments, qs, scale, fold, busy, per, kv_heads, group, t_k, BM, D, COLUMNS, COLUMNS_V, NB, OVERLAP, LATE, FOLD, DQ,
                 KV_REGS, PROMPT, NAMED, HIDE)),
                (consumer, (1, desc_dq, desc_dk, kb, vb, qb, dob, st_b, dsb, dqb, kvf, qf, dof, dsf, qe, doe, dse, DK, DV, blocks,
                 segments, qs, scale, fold, busy, per, kv_heads, group, t_k, BM, D, COLUMNS, COLUMNS_V, NB, OVERLAP, LATE, FOLD, DQ,
                 KV_REGS, PROMPT, NAMED, HIDE)),
                (producer, (desc_q, desc_k, desc_v, desc_do, desc_lse, desc_delta, desc_dk, desc_dv, kb, vb, qb, dob, st_b, kvf, qf, dof,
                 qe, doe, blocks, segments, busy, per, kv_heads, group, t_pad, t_k, 128, BM, D, D, NB, OVERLAP, NAMED)),
            ],
            [4, 1],
            [REGS, REGS_P],
        )  # fmt: skip
