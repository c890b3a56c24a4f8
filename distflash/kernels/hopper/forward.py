"""Attention forward for sm_90: one TMA producer warp feeds 2 or 3 consumer warpgroups of 64 query rows each, persistent over work items.

    item      one block of rows of one head of one batch element
    segment   the columns that a block meets in one entry: `total` tiles of BN columns from `first`; tiles `left` ..
              `left + inner - 1` need no mask, and are done last so that the loop over them has no mask code
    slot      one of NB buffers of K and of V; (slot, phase) walks on across items and never restarts
    part      columns of a head: a side of a tensor or a box is a power of two, so 96, 192 and 256 are two (tma.parts). q, k, v (shared
              memory) and acc are tuples of one or two parts: Q Kᵀ is a sum over them, P V one product for each

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
def cast(x, k, acc):
    """as_operand for every part of acc: how P lies in registers does not depend on their widths."""
    o_l: gl.constexpr = acc[0].type.layout
    return as_operand(x, k[0].dtype, o_l)


@gluon.jit
def scaled(acc, factor):
    """The rows of every part times `factor`."""
    new = (acc[0] * gl.convert_layout(factor, gl.SliceLayout(1, acc[0].type.layout))[:, None],)
    for c in gl.static_range(1, len(acc)):
        new = new + (acc[c] * gl.convert_layout(factor, gl.SliceLayout(1, acc[c].type.layout))[:, None],)
    return new


@gluon.jit
def scores(q, k, cid: gl.constexpr, idx, zero):
    """Issue Q Kᵀ of a tile: a sum over the parts of the head dim."""
    s = warpgroup_mma(q[0].index(cid), k[0].index(idx).permute([1, 0]), zero, use_acc=False, is_async=True)
    for c in gl.static_range(1, len(k)):
        s = warpgroup_mma(q[c].index(cid), k[c].index(idx).permute([1, 0]), s, is_async=True)
    return s


@gluon.jit
def values(p, v, idx, acc):
    """Issue P V of a tile, each part of its columns into an accumulator of its own."""
    new = (warpgroup_mma(p, v[0].index(idx), acc[0], is_async=True),)
    for c in gl.static_range(1, len(v)):
        new = new + (warpgroup_mma(p, v[c].index(idx), acc[c], is_async=True),)
    return new


@gluon.jit
def finished(acc, p):
    """Wait for P V, of which p is an operand until then."""
    if len(acc) == 1:
        a, p = warpgroup_mma_wait(0, deps=[acc[0], p])
        return (a,)
    else:
        a, b, p = warpgroup_mma_wait(0, deps=[acc[0], acc[1], p])
        return a, b


@gluon.jit
def before(idx, ph, NB: gl.constexpr):
    """The slot filled before this one, and its phase. Computed, not carried: the loop has no register to spare."""
    wrap = idx == 0
    return gl.where(wrap, NB - 1, idx - 1), gl.where(wrap, ph ^ 1, ph)


@gluon.jit
def step(
    MASK: gl.constexpr, LATE: gl.constexpr, POLY: gl.constexpr, q, k, v, cid: gl.constexpr, kf, ke, vf, ve, m, l, acc, x, zero, idx, ph, qs,
    n0, low, high
):  # fmt: skip
    """One column tile: QK of this tile and PV of the last one run together, the softmax of this tile beside PV.

    `x` carries the last tile's probabilities, in fp32 if LATE: the cast then hides behind QK, and the loop carries whole
    registers (16-bit values carried over a loop cost two PRMT a pair). Needs 32 more registers at BN = 128.
    """
    s_l: gl.constexpr = zero.type.layout
    BN: gl.constexpr = zero.type.shape[1]
    NB: gl.constexpr = k[0].shape[0]
    mbarrier.wait(kf.index(idx), ph)
    s = scores(q, k, cid, idx, zero)
    p = cast(x, k, acc) if LATE else x
    pidx, pph = before(idx, ph, NB)
    mbarrier.wait(vf.index(pidx), pph)
    acc = values(p, v, pidx, acc)
    s = warpgroup_mma_wait(len(v), deps=[s])
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
    acc = finished(acc, p)
    mbarrier.arrive(ve.index(pidx), count=1)
    acc = scaled(acc, alpha)
    nxt = idx + 1
    wrap = nxt == NB
    return top, l, acc, (x if LATE else cast(x, k, acc)), gl.where(wrap, 0, nxt), gl.where(wrap, ph ^ 1, ph)


@gluon.jit
def lines(layout: gl.constexpr):
    """0 .. 63. Of these a thread holds two, 8 apart: one register over the main loop, not two, of which three consumers would spill one."""
    i = gl.arange(0, 64, layout=layout)
    return again(i & 0x37) + (i & 8)


@gluon.jit
def limits(segments, sg, start, r_l: gl.constexpr):
    """A segment, and the columns low <= j < high that each of 64 rows from `start` keeps in it."""
    return bounds(segments, sg, start + gl.arange(0, 64, layout=r_l))


@gluon.jit
def bounds(segments, sg, rows):
    """`limits` of these rows."""
    at = segments + 8 * sg
    low = rows + gl.load(at + 2)
    high = gl.minimum(rows + gl.load(at + 3) + 1, gl.load(at + 1))
    return gl.load(at), low, high, gl.load(at + 4), gl.load(at + 5), gl.load(at + 6)


@gluon.jit
def write(O, A, b, h, start, stop, heads, t, acc, new, old, FIRST: gl.constexpr, DV: gl.constexpr, HAS_ACC: gl.constexpr):
    """One part, columns from FIRST on, of 64 rows of contiguous [B, T, H, DV]: O = acc * new, plus A * old if there is one."""
    layout: gl.constexpr = acc.type.layout
    W: gl.constexpr = acc.type.shape[1]
    r_l: gl.constexpr = gl.SliceLayout(1, layout)
    gl.static_assert(FIRST < DV)  # the compiler removes a product that nobody stores, and step's wait would count one that is not there
    rows = start + lines(r_l)
    cols = FIRST + gl.arange(0, W, layout=gl.SliceLayout(0, layout))
    line = (b.to(gl.int64) * t * heads + h) * DV + rows.to(gl.int64) * (heads * DV)  # B * T * H * DV may pass 2^31
    at = line[:, None] + cols[None, :]
    inside = rows[:, None] < stop
    if FIRST + W > DV:
        inside = inside & (cols[None, :] < DV)
    acc = acc * gl.convert_layout(new, r_l)[:, None]
    if HAS_ACC:
        acc += gl.load(A + at, mask=inside, other=0.0) * gl.convert_layout(old, r_l)[:, None]
    gl.store(O + at, acc.to(O.dtype.element_ty), mask=inside)


@gluon.jit
def zeros(columns):
    """An accumulator for one part of V."""
    D: gl.constexpr = columns.shape[2]
    return gl.zeros([64, D], gl.float32, layout=gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16]))


@gluon.jit
def consumer(
    cid: gl.constexpr, q, k, v, qf, qe, kf, ke, vf, ve, O, M, A, AM, blocks, segments, order, qs, rounds, heads, t_q,
    DV: gl.constexpr, HAS_ACC: gl.constexpr, LATE: gl.constexpr, POLY: gl.constexpr
):  # fmt: skip
    """Rows cid * 64 .. + 63 of each block."""
    NB: gl.constexpr = k[0].shape[0]
    BN: gl.constexpr = k[0].shape[1]
    s_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    r_l: gl.constexpr = gl.SliceLayout(1, s_l)
    LN2: gl.constexpr = 0.6931471805599453
    LOG2E: gl.constexpr = 1.4426950408889634
    zero = gl.zeros([64, BN], gl.float32, layout=s_l)
    idx = 0
    ph = 0
    for r in range(rounds):
        live, block, b, h = pick(r, order, rounds, heads)
        if live:
            start = gl.load(blocks + 4 * block) + cid * 64
            seg = gl.load(blocks + 4 * block + 2)
            n_seg = gl.load(blocks + 4 * block + 3)
            first, low, high, left, inner, total = bounds(segments, seg, start + lines(r_l))

            # the first tile, always masked (a mask that cuts nothing costs little once an item): no PV to go with it
            n0 = first + tile_of(0, left, inner, total - inner) * BN
            mbarrier.wait(qf.index(0), r & 1)  # a program's items have no gaps: item r is the r-th Q
            mbarrier.wait(kf.index(idx), ph)
            s = scores(q, k, cid, idx, zero)
            s = warpgroup_mma_wait(0, deps=[s])
            mbarrier.arrive(ke.index(idx), count=1)
            cols = n0 + gl.arange(0, BN, layout=gl.SliceLayout(0, s_l))
            s = gl.where((cols[None, :] >= low[:, None]) & (cols[None, :] < high[:, None]), s, float("-inf"))
            m = gl.max(s, 1) * qs
            x = gl.exp2(gl.fma(s, qs, -gl.where(m == float("-inf"), 0.0, m)[:, None]))
            l = gl.sum(x, 1)
            acc = (zeros(v[0]),) if len(v) == 1 else (zeros(v[0]), zeros(v[1]))
            if not LATE:
                x = cast(x, k, acc)
            idx = idx + 1
            wrap = idx == NB
            idx = gl.where(wrap, 0, idx)
            ph = gl.where(wrap, ph ^ 1, ph)

            for sg in range(seg, seg + n_seg):
                first, low, high, left, inner, total = bounds(segments, sg, start + lines(r_l))
                masked = total - inner
                done = gl.where(sg == seg, 1, 0)  # not carried: a constant assigned in a loop is lost in Triton's inliner
                for i in range(done, masked):
                    n0 = first + tile_of(i, left, inner, masked) * BN
                    m, l, acc, x, idx, ph = step(
                        True, LATE, POLY, q, k, v, cid, kf, ke, vf, ve, m, l, acc, x, zero, idx, ph, qs, n0, low, high
                    )  # fmt: skip
                for _ in range(gl.maximum(masked, done), total):
                    m, l, acc, x, idx, ph = step(
                        False, LATE, POLY, q, k, v, cid, kf, ke, vf, ve, m, l, acc, x, zero, idx, ph, qs, 0, low, high
                    )  # fmt: skip
            mbarrier.arrive(qe.index(0), count=1)
            p = cast(x, k, acc) if LATE else x
            pidx, pph = before(idx, ph, NB)
            mbarrier.wait(vf.index(pidx), pph)
            acc = finished(values(p, v, pidx, acc), p)
            mbarrier.arrive(ve.index(pidx), count=1)

            heads_out = again(heads)
            t_out = again(t_q)
            live, block, b, h = pick(again(r), order, rounds, heads_out)
            start = gl.load(blocks + 4 * block) + cid * 64
            stop = gl.load(blocks + 4 * block + 1)
            rows = start + lines(r_l)
            line = (b.to(gl.int64) * heads_out + h) * t_out
            if HAS_ACC:  # merge with the earlier visits' (out, lse), 2^x inside: both weights are over the new sum
                old = gl.load(AM + line + rows, mask=rows < stop, other=float("-inf")) * LOG2E
                top = gl.maximum(m, old)
                shift = gl.where(top == float("-inf"), 0.0, top)
                new = gl.exp2(m - shift)
                old = gl.exp2(old - shift)
                l = l * new + old
                weight = gl.where(l > 0.0, 1.0 / l, 0.0)
                gl.store(M + line + rows, gl.where(l > 0.0, (top + gl.log2(l)) * LN2, float("-inf")), mask=rows < stop)
                new = weight * new
                old = weight * old
            else:
                new = gl.where(l > 0.0, 1.0 / l, 0.0)
                old = new
                gl.store(M + line + rows, gl.where(l > 0.0, (m + gl.log2(l)) * LN2, float("-inf")), mask=rows < stop)
            write(O, A, b, h, start, stop, heads_out, t_out, acc[0], new, old, 0, DV, HAS_ACC)
            if len(acc) == 2:  # after the first part's store, from addresses of its own: the registers of one part at a time
                write(O, A, b, h, again(start), stop, heads_out, t_out, acc[1], new, old, v[0].shape[2], DV, HAS_ACC)


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
    desc_q, desc_q2, desc_k, desc_k2, desc_v, desc_v2, q, k, v, qf, qe, kf, ke, vf, ve, blocks, segments, order, rounds, heads, group
):  # fmt: skip
    """The TMA warp: Q of an item, then its K and V tile by tile, in the consumers' order. Past a tensor's last row or column a box is
    filled with zeros, and counts in full."""
    NC: gl.constexpr = q[0].shape[0]
    NB: gl.constexpr = k[0].shape[0]
    BN: gl.constexpr = k[0].shape[1]
    idx = 0
    ph = 1
    q_bytes: gl.constexpr = NC * tile_bytes(q)
    k_bytes: gl.constexpr = tile_bytes(k)
    v_bytes: gl.constexpr = tile_bytes(v)
    for r in range(rounds):
        live, block, b, h = pick(r, order, rounds, heads)
        if live:
            start = gl.load(blocks + 4 * block)
            seg = gl.load(blocks + 4 * block + 2)
            n_seg = gl.load(blocks + 4 * block + 3)
            hk = h // group
            mbarrier.wait(qe.index(0), (r & 1) ^ 1)
            mbarrier.expect(qf.index(0), q_bytes)
            for c in gl.static_range(NC):
                fill(q, c, desc_q, desc_q2, b, h, start + c * 64, qf.index(0))
            for sg in range(seg, seg + n_seg):
                first = gl.load(segments + 8 * sg)
                left = gl.load(segments + 8 * sg + 4)
                inner = gl.load(segments + 8 * sg + 5)
                total = gl.load(segments + 8 * sg + 6)
                for i in range(total):
                    n0 = first + tile_of(i, left, inner, total - inner) * BN
                    mbarrier.wait(ke.index(idx), ph)
                    mbarrier.expect(kf.index(idx), k_bytes)
                    fill(k, idx, desc_k, desc_k2, b, hk, n0, kf.index(idx))
                    mbarrier.wait(ve.index(idx), ph)
                    mbarrier.expect(vf.index(idx), v_bytes)
                    fill(v, idx, desc_v, desc_v2, b, hk, n0, vf.index(idx))
                    idx = idx + 1
                    wrap = idx == NB
                    idx = gl.where(wrap, 0, idx)
                    ph = gl.where(wrap, ph ^ 1, ph)


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


@gluon.jit(do_not_specialize=["rounds", "heads", "group", "t_q"])
def forward_kernel(
    desc_q, desc_q2, desc_k, desc_k2, desc_v, desc_v2, O, M, A, AM, blocks, segments, order, qs, rounds, heads, group, t_q,
    NC: gl.constexpr, NB: gl.constexpr, DV: gl.constexpr, HAS_ACC: gl.constexpr, LATE: gl.constexpr, POLY: gl.constexpr,
    REGS: gl.constexpr, REGS_P: gl.constexpr
):  # fmt: skip
    """grid: any number of programs, at most `rounds` items each: order [programs, rounds, 2]. desc_*: [B, H, T, D] views, boxes of 64 or
    BN rows and of the first part of the columns; desc_*2: of the second part, None if there is none. O, A [B, T, H, DV]; M, AM [B, H, T]
    natural log."""
    q = buffers(NC, desc_q, desc_q2)
    k = buffers(NB, desc_k, desc_k2)
    v = buffers(NB, desc_v, desc_v2)
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
                (consumer, (0, q, k, v, qf, qe, kf, ke, vf, ve, O, M, A, AM, blocks, segments, order, qs, rounds, heads,
                 t_q, DV, HAS_ACC, LATE, POLY)),
                (consumer, (1, q, k, v, qf, qe, kf, ke, vf, ve, O, M, A, AM, blocks, segments, order, qs, rounds, heads,
                 t_q, DV, HAS_ACC, LATE, POLY)),
                (producer, (desc_q, desc_q2, desc_k, desc_k2, desc_v, desc_v2, q, k, v, qf, qe, kf, ke, vf, ve, blocks, segments, order,
                 rounds, heads, group)),
            ],
            [4, 1],
            [REGS, REGS_P],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (consumer, (0, q, k, v, qf, qe, kf, ke, vf, ve, O, M, A, AM, blocks, segments, order, qs, rounds, heads,
                 t_q, DV, HAS_ACC, LATE, POLY)),
                (consumer, (1, q, k, v, qf, qe, kf, ke, vf, ve, O, M, A, AM, blocks, segments, order, qs, rounds, heads,
                 t_q, DV, HAS_ACC, LATE, POLY)),
                (consumer, (2, q, k, v, qf, qe, kf, ke, vf, ve, O, M, A, AM, blocks, segments, order, qs, rounds, heads,
                 t_q, DV, HAS_ACC, LATE, POLY)),
                (producer, (desc_q, desc_q2, desc_k, desc_k2, desc_v, desc_v2, q, k, v, qf, qe, kf, ke, vf, ve, blocks, segments, order,
                 rounds, heads, group)),
            ],
            [4, 4, 1],
            [REGS, REGS, REGS_P],
        )  # fmt: skip
