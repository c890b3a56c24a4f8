"""Attention forward for sm_90: one TMA producer warp feeds 2 or 3 consumer warpgroups of 64 query rows each, persistent over work items.

    item      one block of rows of one head of one batch element
    segment   the columns that a block meets in one entry: `total` tiles of BN columns from `first`; tiles `left` ..
              `left + inner - 1` need no mask, and are done last so that the loop over them has no mask code
    slot      one of NB buffers of K and of V; (slot, phase) walks on across items and never restarts

Barriers (count): q_full (1, TMA), q_empty (NC), k_full, v_full (1, TMA), k_empty, v_empty (NC): qf, qe, kf, vf, ke, ve. A wait on an
`empty` one starts with parity 1, which a fresh mbarrier lets pass. Six arrays, not one: for what may alias, Triton adds a bar.sync.
Statistics are base 2 inside: m and the exponent are in units of log2(e) * scale.
Longer than the house's 60 lines a function: a wgmma and what it overlaps with must stand in one body.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait

from distflash.kernels.hopper.compat import tma_load


@gluon.jit
def exp2(x, POLY: gl.constexpr):
    """2 ** x; POLY in 1..3 computes that many of each 4 by polynomial on the FMA units, for finite x <= 0 only.

    Cody-Waite: x = n + f, n to nearest, |f| <= 1/2; 2^f by a cubic (relative error 1e-4, far under bf16's 4e-3), n added
    to the exponent field.
    """
    if POLY == 0:
        return gl.exp2(x)
    elif POLY == 1:
        return gl.inline_asm_elementwise(
            """{
            .reg .f32 t, r, n;
            ex2.approx.ftz.f32 $0, $4;
            ex2.approx.ftz.f32 $1, $5;
            ex2.approx.ftz.f32 $2, $6;
            max.f32 t, $7, 0fC2FC0000;
            add.rn.f32 r, t, 0f4B400000;
            sub.rn.f32 n, r, 0f4B400000;
            sub.rn.f32 t, t, n;
            fma.rn.f32 n, t, 0f3D61510A, 0f3E780628;
            fma.rn.f32 n, n, t, 0f3F317AFD;
            fma.rn.f32 n, n, t, 0f3F800000;
            .reg .b32 e, p;
            mov.b32 e, r;
            mov.b32 p, n;
            shl.b32 e, e, 23;
            add.s32 p, p, e;
            mov.b32 $3, p;
            }""",
            "=f,=f,=f,=f,f,f,f,f",
            [x],
            dtype=gl.float32,
            is_pure=True,
            pack=4,
        )
    else:
        gl.static_assert(POLY == 2)
        return gl.inline_asm_elementwise(
            """{
            .reg .f32 t, r, n;
            ex2.approx.ftz.f32 $0, $2;
            max.f32 t, $3, 0fC2FC0000;
            add.rn.f32 r, t, 0f4B400000;
            sub.rn.f32 n, r, 0f4B400000;
            sub.rn.f32 t, t, n;
            fma.rn.f32 n, t, 0f3D61510A, 0f3E780628;
            fma.rn.f32 n, n, t, 0f3F317AFD;
            fma.rn.f32 n, n, t, 0f3F800000;
            .reg .b32 e, p;
            mov.b32 e, r;
            mov.b32 p, n;
            shl.b32 e, e, 23;
            add.s32 p, p, e;
            mov.b32 $1, p;
            }""",
            "=f,=f,f,f",
            [x],
            dtype=gl.float32,
            is_pure=True,
            pack=2,
        )


@gluon.jit
def again(x):
    """x, hidden from the optimiser: what follows from it is computed anew, not kept in registers (spilled) over the main loop,
    nor computed before the kernel parts into its partitions (and spilled there)."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def pick(r, order, rounds, heads):
    """Work item of round r: (is there one, row of the block table, batch element, head). The host has dealt the items out so that every
    program gets the same work (schedule.py)."""
    at = order + 2 * (gl.program_id(0) * again(rounds) + r)
    block = gl.load(at)
    bh = gl.load(at + 1)
    return block >= 0, gl.maximum(block, 0), bh // heads, bh % heads


@gluon.jit
def tile_of(i, left, inner, masked):
    """Column tile of step i: the masked ones on the left, those on the right, then the inner ones."""
    return gl.where(i < left, i, gl.where(i < masked, i + inner, i - masked + left))


@gluon.jit
def as_operand(x, dtype: gl.constexpr, o_l: gl.constexpr):
    """Probabilities as the register operand of PV: a cast, no data moves between threads."""
    return gl.convert_layout(x.to(dtype), gl.DotOperandLayout(0, o_l, 2))


@gluon.jit
def step(
    MASK: gl.constexpr, LATE: gl.constexpr, POLY: gl.constexpr, q, kv, kf, ke, vf, ve, m, l, acc, x, zero, idx, ph, pidx, pph, qs,
    n0, low, high, NB: gl.constexpr
):  # fmt: skip
    """One column tile: QK of this tile and PV of the last one run together, the softmax of this tile beside PV.

    `x` carries the last tile's probabilities, in fp32 if LATE: the cast then hides behind QK, and the loop carries whole
    registers (16-bit values carried over a loop cost two PRMT a pair). Needs 32 more registers at BN = 128.
    """
    o_l: gl.constexpr = acc.type.layout
    s_l: gl.constexpr = zero.type.layout
    BN: gl.constexpr = zero.type.shape[1]
    mbarrier.wait(kf.index(idx), ph)
    s = warpgroup_mma(q, kv.index(idx).permute([1, 0]), zero, use_acc=False, is_async=True)
    p = as_operand(x, q.dtype, o_l) if LATE else x
    mbarrier.wait(vf.index(pidx), pph)
    acc = warpgroup_mma(p, kv.index(NB + pidx), acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s])
    mbarrier.arrive(ke.index(idx), count=1)
    if MASK:
        cols = n0 + gl.arange(0, BN, layout=gl.SliceLayout(0, s_l))
        s = gl.where((cols[None, :] >= low[:, None]) & (cols[None, :] < high[:, None]), s, float("-inf"))
        top = gl.maximum(m, gl.max(s, 1) * qs)
        shift = gl.where(top == float("-inf"), 0.0, top)
        x = gl.exp2(gl.fma(s, qs, -shift[:, None]))
        alpha = gl.exp2(m - shift)
    else:
        top = gl.maximum(m, gl.max(s, 1) * qs)
        x = exp2(gl.fma(s, qs, -top[:, None]), POLY)
        alpha = gl.exp2(m - top)
    l = l * alpha + gl.sum(x, 1)
    acc, p = warpgroup_mma_wait(0, deps=[acc, p])
    mbarrier.arrive(ve.index(pidx), count=1)
    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, o_l))[:, None]
    nxt = idx + 1
    wrap = nxt == NB
    return top, l, acc, (x if LATE else as_operand(x, q.dtype, o_l)), gl.where(wrap, 0, nxt), gl.where(wrap, ph ^ 1, ph), idx, ph


@gluon.jit
def cells(b, h, rows, heads, t, D: gl.constexpr, layout: gl.constexpr):
    """Offsets of rows of a contiguous [B, T, H, D] tensor, in int64: B * T * H * D may pass 2^31."""
    at = (b.to(gl.int64) * t * heads + h) * D + rows.to(gl.int64) * (heads * D)
    return at[:, None] + gl.arange(0, D, layout=gl.SliceLayout(0, layout))[None, :]


@gluon.jit
def limits(segments, sg, start, r_l: gl.constexpr):
    """A segment, and the columns low <= j < high that each of 64 rows from `start` keeps in it."""
    at = segments + 8 * sg
    rows = start + gl.arange(0, 64, layout=r_l)
    low = rows + gl.load(at + 2)
    high = gl.minimum(rows + gl.load(at + 3) + 1, gl.load(at + 1))
    return gl.load(at), low, high, gl.load(at + 4), gl.load(at + 5), gl.load(at + 6)


@gluon.jit
def consumer(
    cid: gl.constexpr, qb, kv, qf, qe, kf, ke, vf, ve, O, M, A, AM, blocks, segments, order, qs, rounds, heads, t_q,
    BN: gl.constexpr, D: gl.constexpr, NB: gl.constexpr, HAS_ACC: gl.constexpr, LATE: gl.constexpr, POLY: gl.constexpr
):  # fmt: skip
    """Rows cid * 64 .. + 63 of each block."""
    s_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    o_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    r_l: gl.constexpr = gl.SliceLayout(1, s_l)
    ro_l: gl.constexpr = gl.SliceLayout(1, o_l)
    LN2: gl.constexpr = 0.6931471805599453
    LOG2E: gl.constexpr = 1.4426950408889634
    zero = gl.zeros([64, BN], gl.float32, layout=s_l)
    q = qb.index(cid)
    idx = 0
    ph = 0
    qph = 0
    for r in range(rounds):
        live, block, b, h = pick(r, order, rounds, heads)
        if live:
            start = gl.load(blocks + 4 * block) + cid * 64
            seg = gl.load(blocks + 4 * block + 2)
            n_seg = gl.load(blocks + 4 * block + 3)
            first, low, high, left, inner, total = limits(segments, seg, start, r_l)

            # the first tile, always masked (a mask that cuts nothing costs little once an item): no PV to go with it
            n0 = first + tile_of(0, left, inner, total - inner) * BN
            mbarrier.wait(qf.index(0), qph)
            mbarrier.wait(kf.index(idx), ph)
            s = warpgroup_mma(q, kv.index(idx).permute([1, 0]), zero, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=[s])
            mbarrier.arrive(ke.index(idx), count=1)
            cols = n0 + gl.arange(0, BN, layout=gl.SliceLayout(0, s_l))
            s = gl.where((cols[None, :] >= low[:, None]) & (cols[None, :] < high[:, None]), s, float("-inf"))
            m = gl.max(s, 1) * qs
            x = gl.exp2(gl.fma(s, qs, -gl.where(m == float("-inf"), 0.0, m)[:, None]))
            l = gl.sum(x, 1)
            acc = gl.zeros([64, D], gl.float32, layout=o_l)
            if not LATE:
                x = as_operand(x, q.dtype, o_l)
            pidx = idx
            pph = ph
            idx = idx + 1
            wrap = idx == NB
            idx = gl.where(wrap, 0, idx)
            ph = gl.where(wrap, ph ^ 1, ph)

            for sg in range(seg, seg + n_seg):
                first, low, high, left, inner, total = limits(segments, sg, start, r_l)
                masked = total - inner
                done = gl.where(sg == seg, 1, 0)  # not carried: a constant assigned in a loop is lost in Triton's inliner
                for i in range(done, masked):
                    n0 = first + tile_of(i, left, inner, masked) * BN
                    m, l, acc, x, idx, ph, pidx, pph = step(
                        True, LATE, POLY, q, kv, kf, ke, vf, ve, m, l, acc, x, zero, idx, ph, pidx, pph, qs, n0, low, high, NB
                    )  # fmt: skip
                for _ in range(gl.maximum(masked, done), total):
                    m, l, acc, x, idx, ph, pidx, pph = step(
                        False, LATE, POLY, q, kv, kf, ke, vf, ve, m, l, acc, x, zero, idx, ph, pidx, pph, qs, 0, low, high, NB
                    )  # fmt: skip
            mbarrier.arrive(qe.index(0), count=1)
            qph = qph ^ 1
            p = as_operand(x, q.dtype, o_l) if LATE else x
            mbarrier.wait(vf.index(pidx), pph)
            acc = warpgroup_mma(p, kv.index(NB + pidx), acc, is_async=True)
            acc, p = warpgroup_mma_wait(0, deps=[acc, p])
            mbarrier.arrive(ve.index(pidx), count=1)

            heads_out = again(heads)
            t_out = again(t_q)
            live, block, b, h = pick(again(r), order, rounds, heads_out)
            start = gl.load(blocks + 4 * block) + cid * 64
            stop = gl.load(blocks + 4 * block + 1)
            rows = start + gl.arange(0, 64, layout=r_l)
            rows_o = start + gl.arange(0, 64, layout=ro_l)
            line = (b.to(gl.int64) * heads_out + h) * t_out
            at = cells(b, h, rows_o, heads_out, t_out, D, o_l)
            inside = rows_o[:, None] < stop
            if HAS_ACC:  # merge with the earlier visits' (out, lse), 2^x inside: both weights are over the new sum
                old = gl.load(AM + line + rows, mask=rows < stop, other=float("-inf")) * LOG2E
                top = gl.maximum(m, old)
                shift = gl.where(top == float("-inf"), 0.0, top)
                new = gl.exp2(m - shift)
                old = gl.exp2(old - shift)
                l = l * new + old
                weight = gl.where(l > 0.0, 1.0 / l, 0.0)
                gl.store(M + line + rows, gl.where(l > 0.0, (top + gl.log2(l)) * LN2, float("-inf")), mask=rows < stop)
                acc = acc * gl.convert_layout(weight * new, ro_l)[:, None]
                acc += gl.load(A + at, mask=inside, other=0.0) * gl.convert_layout(weight * old, ro_l)[:, None]
            else:
                weight = gl.where(l > 0.0, 1.0 / l, 0.0)
                gl.store(M + line + rows, gl.where(l > 0.0, (m + gl.log2(l)) * LN2, float("-inf")), mask=rows < stop)
                acc = acc * gl.convert_layout(weight, ro_l)[:, None]
            gl.store(O + at, acc.to(O.dtype.element_ty), mask=inside)


@gluon.jit
def producer(
    desc_q, desc_k, desc_v, qb, kv, qf, qe, kf, ke, vf, ve, blocks, segments, order, rounds, heads, group,
    NC: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, NB: gl.constexpr
):  # fmt: skip
    """The TMA warp: Q of an item, then its K and V tile by tile, in the consumers' order."""
    idx = 0
    ph = 1
    qph = 1
    q_bytes: gl.constexpr = NC * 64 * D * 2
    kv_bytes: gl.constexpr = BN * D * 2
    for r in range(rounds):
        live, block, b, h = pick(r, order, rounds, heads)
        if live:
            start = gl.load(blocks + 4 * block)
            seg = gl.load(blocks + 4 * block + 2)
            n_seg = gl.load(blocks + 4 * block + 3)
            hk = h // group
            mbarrier.wait(qe.index(0), qph)
            mbarrier.expect(qf.index(0), q_bytes)
            for c in gl.static_range(NC):
                tma_load(desc_q, [b, h, start + c * 64, 0], qf.index(0), qb.index(c))
            qph = qph ^ 1
            for sg in range(seg, seg + n_seg):
                first = gl.load(segments + 8 * sg)
                left = gl.load(segments + 8 * sg + 4)
                inner = gl.load(segments + 8 * sg + 5)
                total = gl.load(segments + 8 * sg + 6)
                for i in range(total):
                    n0 = first + tile_of(i, left, inner, total - inner) * BN
                    mbarrier.wait(ke.index(idx), ph)
                    mbarrier.expect(kf.index(idx), kv_bytes)
                    tma_load(desc_k, [b, hk, n0, 0], kf.index(idx), kv.index(idx))
                    mbarrier.wait(ve.index(idx), ph)
                    mbarrier.expect(vf.index(idx), kv_bytes)
                    tma_load(desc_v, [b, hk, n0, 0], vf.index(idx), kv.index(NB + idx))
                    idx = idx + 1
                    wrap = idx == NB
                    idx = gl.where(wrap, 0, idx)
                    ph = gl.where(wrap, ph ^ 1, ph)


@gluon.jit(do_not_specialize=["rounds", "heads", "group", "t_q"])
def forward_kernel(
    desc_q, desc_k, desc_v, O, M, A, AM, blocks, segments, order, qs, rounds, heads, group, t_q,
    NC: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, NB: gl.constexpr, HAS_ACC: gl.constexpr, LATE: gl.constexpr, POLY: gl.constexpr,
    REGS: gl.constexpr, REGS_P: gl.constexpr
):  # fmt: skip
    """grid: any number of programs, at most `rounds` items each: order [programs, rounds, 2]. desc_*: [B, H, T, D] views, boxes of 64 or
    BN rows; O, A [B, T, H, D]; M, AM [B, H, T] natural log."""
    dtype: gl.constexpr = desc_q.dtype
    ql: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, D], dtype)
    kl: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, D], dtype)
    qb = gl.allocate_shared_memory(dtype, [NC, 64, D], ql)
    kv = gl.allocate_shared_memory(dtype, [2 * NB, BN, D], kl)
    bl: gl.constexpr = mbarrier.MBarrierLayout()
    qf = gl.allocate_shared_memory(gl.int64, [1, 1], bl)
    qe = gl.allocate_shared_memory(gl.int64, [1, 1], bl)
    kf = gl.allocate_shared_memory(gl.int64, [NB, 1], bl)
    ke = gl.allocate_shared_memory(gl.int64, [NB, 1], bl)
    vf = gl.allocate_shared_memory(gl.int64, [NB, 1], bl)
    ve = gl.allocate_shared_memory(gl.int64, [NB, 1], bl)
    mbarrier.init(qf.index(0), count=1)
    mbarrier.init(qe.index(0), count=NC)
    for i in gl.static_range(NB):
        mbarrier.init(kf.index(i), count=1)
        mbarrier.init(vf.index(i), count=1)
        mbarrier.init(ke.index(i), count=NC)
        mbarrier.init(ve.index(i), count=NC)
    fence_async_shared()
    if NC == 2:
        gl.warp_specialize(
            [
                (consumer, (0, qb, kv, qf, qe, kf, ke, vf, ve, O, M, A, AM, blocks, segments, order, qs, rounds, heads,
                 t_q, BN, D, NB, HAS_ACC, LATE, POLY)),
                (consumer, (1, qb, kv, qf, qe, kf, ke, vf, ve, O, M, A, AM, blocks, segments, order, qs, rounds, heads,
                 t_q, BN, D, NB, HAS_ACC, LATE, POLY)),
                (producer, (desc_q, desc_k, desc_v, qb, kv, qf, qe, kf, ke, vf, ve, blocks, segments, order, rounds, heads,
                 group, NC, BN, D, NB)),
            ],
            [4, 1],
            [REGS, REGS_P],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (consumer, (0, qb, kv, qf, qe, kf, ke, vf, ve, O, M, A, AM, blocks, segments, order, qs, rounds, heads,
                 t_q, BN, D, NB, HAS_ACC, LATE, POLY)),
                (consumer, (1, qb, kv, qf, qe, kf, ke, vf, ve, O, M, A, AM, blocks, segments, order, qs, rounds, heads,
                 t_q, BN, D, NB, HAS_ACC, LATE, POLY)),
                (consumer, (2, qb, kv, qf, qe, kf, ke, vf, ve, O, M, A, AM, blocks, segments, order, qs, rounds, heads,
                 t_q, BN, D, NB, HAS_ACC, LATE, POLY)),
                (producer, (desc_q, desc_k, desc_v, qb, kv, qf, qe, kf, ke, vf, ve, blocks, segments, order, rounds, heads,
                 group, NC, BN, D, NB)),
            ],
            [4, 4, 1],
            [REGS, REGS, REGS_P],
        )  # fmt: skip
