"""dK and dV for sm_90 at head sizes above 128: keys and values stationary, two consumer warpgroups of different roles, no atomics.

    program         one block of 64 keys of one kv head of one batch element; loops over the query heads of its group, their segments and
                    tiles of BM queries in one fixed order (schedule.py's work list, transposed), so that the sums are bit-equal from run
                    to run
    probabilities   consumer 0: Sᵀ = K Qᵀ, P = exp2(Sᵀ - lse), handed to the other through shared memory, and dV += P dO.
                    Sᵀ of the next tile is issued before dV of this one: exponentials run beside dV
    gradients       consumer 1: dPᵀ = V dOᵀ, dS = P * (dP - delta), dK += dS Q. dK is issued before the next tile's dPᵀ, so that Q goes
                    back to the producer as early as can be: dS runs beside the other consumer's matmuls

Why by role: dK and dV of 64 keys are 64 x 256 fp32 each, 128 registers a thread; one warpgroup cannot hold both.

Barriers (count): kv_full (1, TMA), NB each of q_full, do_full (1, TMA), q_empty, do_empty (2: both consumers read Q and dO), p_full (1).
Tile i of Q, dO and P is in slot i % NB. P needs no p_empty: its slot is written after Sᵀ, whose Q is loaded after dK of the slot's last
tile, for which P was read. NB >= 2: Sᵀ of tile i + 1 reads Q while dV of tile i reads dO.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait

from distflash.kernels.hopper.backward import probabilities
from distflash.kernels.hopper.common import again, as_operand, tile_of
from distflash.kernels.hopper.gradient_feed import producer
from distflash.kernels.hopper.gradient_out import store_keys
from distflash.kernels.hopper.program import band, extent, n_segments, place, segment_of


@gluon.jit
def hand_over(p, pb, pf, slot):
    """P to the other consumer: in fp16 for bf16 too, times 2^8, or its rounding would add to that of dS. P <= 1, so that there is room."""
    pb.index(slot).store((p * 256.0).to(gl.float16))
    mbarrier.arrive(pf.index(slot), count=1)


@gluon.jit
def step(
    MASK: gl.constexpr, ks, qb, dob, st_b, pb, qf, qe, dof, doe, pf, dv, p, zs, it, qs, n0, low, high, NB: gl.constexpr
):  # fmt: skip
    """Sᵀ and P of tile `it` beside dV of the tile before, whose probabilities are `p`."""
    kv_l: gl.constexpr = dv.type.layout
    it = again(it)
    slot = it % NB
    before = (it - 1) % NB
    mbarrier.wait(qf.index(slot), (it // NB) % 2)
    st = warpgroup_mma(ks, qb.index(slot).permute([1, 0]), zs, use_acc=False, is_async=True)
    operand = as_operand(p, dob.dtype, kv_l)
    mbarrier.wait(dof.index(before), ((it - 1) // NB) % 2)
    dv = warpgroup_mma(operand, dob.index(before), dv, is_async=True)
    s = warpgroup_mma_wait(1, deps=[st])
    p = probabilities(MASK, s, st_b.index(slot), qs, n0, low, high)
    mbarrier.arrive(qe.index(slot), count=1)
    hand_over(p, pb, pf, slot)
    dv, operand = warpgroup_mma_wait(0, deps=[dv, operand])
    mbarrier.arrive(doe.index(before), count=1)
    return dv, p, it + 1


@gluon.jit
def consume_probabilities(
    k, qb, dob, st_b, pb, kvf, qf, qe, dof, doe, pf, DV, blocks, segments, qs, busy, per, kv_heads, group, t_k,
    BM: gl.constexpr, TILE: gl.constexpr, COLUMNS: gl.constexpr, NB: gl.constexpr
):  # fmt: skip
    """Consumer 0."""
    s_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    kv_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    r_l: gl.constexpr = gl.SliceLayout(1, s_l)
    zs = gl.zeros([64, BM], gl.float32, layout=s_l)
    dv = gl.zeros([64, TILE], gl.float32, layout=kv_l)
    ks = k.index(0)
    start, stop, _, _, sg = segment_of(0, blocks, busy, per, kv_heads, group)
    first, left, inner, total = extent(segments, sg)
    low, high = band(segments, sg, start, stop, r_l, True)
    mbarrier.wait(kvf.index(0), 0)

    # the first tile, always masked (a mask that cuts nothing costs little once a program): no dV to go with it
    mbarrier.wait(qf.index(0), 0)
    st = warpgroup_mma(ks, qb.index(0).permute([1, 0]), zs, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[st])
    p = probabilities(True, s, st_b.index(0), qs, first + tile_of(0, left, inner, total - inner) * BM, low, high)
    mbarrier.arrive(qe.index(0), count=1)
    hand_over(p, pb, pf, 0)
    it = 1
    u = 0
    while again(u) < group * n_segments(blocks, busy, per, kv_heads):
        start, stop, _, _, sg = segment_of(u, blocks, busy, per, kv_heads, group)
        first, left, inner, total = extent(segments, sg)
        low, high = band(segments, sg, start, stop, r_l, True)
        masked = total - inner
        done = gl.where(u == 0, 1, 0)
        for i in range(done, masked):
            n0 = first + tile_of(i, left, inner, masked) * BM
            dv, p, it = step(True, ks, qb, dob, st_b, pb, qf, qe, dof, doe, pf, dv, p, zs, it, qs, n0, low, high, NB)
        for _ in range(gl.maximum(masked, done), total):
            dv, p, it = step(False, ks, qb, dob, st_b, pb, qf, qe, dof, doe, pf, dv, p, zs, it, qs, 0, 0, 0, NB)
        u += 1
    last = again(it) - 1
    operand = as_operand(p, dob.dtype, kv_l)
    mbarrier.wait(dof.index(last % NB), (last // NB) % 2)
    dv = warpgroup_mma(operand, dob.index(last % NB), dv, is_async=True)
    dv, operand = warpgroup_mma_wait(0, deps=[dv, operand])
    store_keys(DV, dv, blocks, busy, per, kv_heads, t_k, 0, COLUMNS)


@gluon.jit
def gradient(dp, st_b, pb, doe, pf, fold, it, FOLD: gl.constexpr, NB: gl.constexpr):
    """dS of tile `it` from its dPᵀ and the other consumer's P."""
    s_l: gl.constexpr = dp.type.layout
    slot = it % NB
    mbarrier.wait(pf.index(slot), (it // NB) % 2)
    p = pb.index(slot).load(s_l).to(gl.float32) * 0.00390625
    ndelta = st_b.index(NB + slot).load(gl.SliceLayout(0, s_l))
    mbarrier.arrive(doe.index(slot), count=1)
    if FOLD:  # stats hold -delta * scale
        return p * gl.fma(dp, fold, ndelta[None, :])
    else:
        return p * (dp + ndelta[None, :])


@gluon.jit
def consume_gradients(
    v, qb, dob, st_b, pb, kvf, qf, qe, dof, doe, pf, DK, blocks, segments, scale, fold, busy, per, kv_heads, group, t_k,
    BM: gl.constexpr, TILE: gl.constexpr, COLUMNS: gl.constexpr, NB: gl.constexpr, FOLD: gl.constexpr
):  # fmt: skip
    """Consumer 1. Knows no masks: where P is 0, so is dS."""
    s_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    kv_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    zs = gl.zeros([64, BM], gl.float32, layout=s_l)
    dk = gl.zeros([64, TILE], gl.float32, layout=kv_l)
    vs = v.index(0)
    tiles = 0
    at = blocks + 4 * place(again(busy), again(per), again(kv_heads))[0]
    seg = gl.load(at + 2)
    for sg in range(seg, seg + gl.load(at + 3)):
        tiles += gl.load(segments + 8 * sg + 6)
    tiles = tiles * again(group)
    mbarrier.wait(kvf.index(0), 0)
    mbarrier.wait(dof.index(0), 0)
    dpt = warpgroup_mma(vs, dob.index(0).permute([1, 0]), zs, use_acc=False, is_async=True)
    dp = warpgroup_mma_wait(0, deps=[dpt])
    for i in range(tiles - 1):
        it = again(i)
        slot = it % NB
        nxt = (it + 1) % NB
        ds = as_operand(gradient(dp, st_b, pb, doe, pf, fold, it, FOLD, NB), qb.dtype, kv_l)
        mbarrier.wait(qf.index(slot), (it // NB) % 2)
        dk = warpgroup_mma(ds, qb.index(slot), dk, is_async=True)
        mbarrier.wait(dof.index(nxt), ((it + 1) // NB) % 2)
        dpt = warpgroup_mma(vs, dob.index(nxt).permute([1, 0]), zs, use_acc=False, is_async=True)
        dk, ds = warpgroup_mma_wait(1, deps=[dk, ds])
        mbarrier.arrive(qe.index(slot), count=1)
        dp = warpgroup_mma_wait(0, deps=[dpt])
    last = again(tiles) - 1
    ds = as_operand(gradient(dp, st_b, pb, doe, pf, fold, last, FOLD, NB), qb.dtype, kv_l)
    mbarrier.wait(qf.index(last % NB), (last // NB) % 2)
    dk = warpgroup_mma(ds, qb.index(last % NB), dk, is_async=True)
    dk, ds = warpgroup_mma_wait(0, deps=[dk, ds])
    if not FOLD:
        dk = dk * scale
    store_keys(DK, dk, blocks, busy, per, kv_heads, t_k, 0, COLUMNS)


@gluon.jit(do_not_specialize=["busy", "per", "kv_heads", "group", "t_pad", "t_k"])
def dkv_kernel(
    desc_q, desc_k, desc_v, desc_do, desc_lse, desc_delta, DK, DV, blocks, segments, qs, scale, fold, busy, per, kv_heads, group, t_pad,
    t_k,
    BM: gl.constexpr, D: gl.constexpr, D_V: gl.constexpr, COLUMNS: gl.constexpr, COLUMNS_V: gl.constexpr, NB: gl.constexpr,
    FOLD: gl.constexpr, REGS: gl.constexpr, REGS_P: gl.constexpr
):  # fmt: skip
    """grid: key blocks * kv heads * batch. desc_q [B, H, Tq, D], desc_do [B, H, Tq, D_V] boxes of BM rows; desc_k, desc_v [B, Hk, Tk, ...]
    boxes of 64; desc_lse, desc_delta [B * H * t_pad] boxes [BM]; DK, DV [B, Tk, Hk, COLUMNS or COLUMNS_V] contiguous."""
    dtype: gl.constexpr = desc_q.dtype
    KEYS: gl.constexpr = 64
    gl.static_assert(NB >= 2)
    ql: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, D], dtype)
    dol: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, D_V], dtype)
    kl: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, D], dtype)
    vl: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, D_V], dtype)
    pl: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, BM], gl.float16)
    tl: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    k = gl.allocate_shared_memory(dtype, [1, KEYS, D], kl)
    v = gl.allocate_shared_memory(dtype, [1, KEYS, D_V], vl)
    qb = gl.allocate_shared_memory(dtype, [NB, BM, D], ql)
    dob = gl.allocate_shared_memory(dtype, [NB, BM, D_V], dol)
    pb = gl.allocate_shared_memory(gl.float16, [NB, KEYS, BM], pl)
    st_b = gl.allocate_shared_memory(gl.float32, [2 * NB, BM], tl)
    bl: gl.constexpr = mbarrier.MBarrierLayout()
    kvf = gl.allocate_shared_memory(gl.int64, [1, 1], bl)
    qf = gl.allocate_shared_memory(gl.int64, [NB, 1], bl)
    qe = gl.allocate_shared_memory(gl.int64, [NB, 1], bl)
    dof = gl.allocate_shared_memory(gl.int64, [NB, 1], bl)
    doe = gl.allocate_shared_memory(gl.int64, [NB, 1], bl)
    pf = gl.allocate_shared_memory(gl.int64, [NB, 1], bl)
    mbarrier.init(kvf.index(0), count=1)
    for i in gl.static_range(NB):
        mbarrier.init(qf.index(i), count=1)
        mbarrier.init(qe.index(i), count=2)
        mbarrier.init(dof.index(i), count=1)
        mbarrier.init(doe.index(i), count=2)
        mbarrier.init(pf.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (consume_probabilities, (k, qb, dob, st_b, pb, kvf, qf, qe, dof, doe, pf, DV, blocks, segments, qs, busy, per, kv_heads,
             group, t_k, BM, D_V, COLUMNS_V, NB)),
            (consume_gradients, (v, qb, dob, st_b, pb, kvf, qf, qe, dof, doe, pf, DK, blocks, segments, scale, fold, busy, per,
             kv_heads, group, t_k, BM, D, COLUMNS, NB, FOLD)),
            (producer, (desc_q, desc_k, desc_v, desc_do, desc_lse, desc_delta, None, None, k, v, qb, dob, st_b, kvf, qf, dof, qe, doe,
             blocks, segments, busy, per, kv_heads, group, t_pad, t_k, KEYS, BM, D, D_V, NB, False, False)),
        ],
        [4, 1],
        [REGS, REGS_P],
    )  # fmt: skip
