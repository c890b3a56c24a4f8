"""Attention forward for sm_90: one TMA producer warp feeds 2 or 3 consumer warpgroups of 64 query rows each, persistent over work items.

    item      one block of rows of one head of one batch element
    segment   the columns that a block meets in one entry: `total` tiles of BN columns from `first`; tiles `left` ..
              `left + inner - 1` need no mask, and are done last so that the loop over them has no mask code
    slot      one of NB buffers of K and of V; (slot, phase) walks on across items and never restarts. NQ buffers of Q: item r is in r % NQ
    line      an item's line of Schedule.order. It comes to shared memory with the item's Q: read from there it costs tens of clocks each
              time, from global memory hundreds, four times an item
    part      columns of a head: a side of a tensor or a box is a power of two, so 96, 192 and 256 are two (tma.parts). q, k, v (shared
              memory) and acc are tuples of one or two parts: Q Kᵀ is a sum over them, P V one product for each

Barriers (count): q_full (1, TMA), q_empty (NC), k_full, v_full (1, TMA), k_empty, v_empty (NC): qf, qe, kf, vf, ke, ve. A wait on an
`empty` one starts with parity 1, which a fresh mbarrier lets pass. Six arrays, not one: for what may alias, Triton adds a bar.sync.
An item's first Q Kᵀ is issued at the end of the item before: after its epilogue, or if AHEAD before its last P V is waited for, so that it
runs beside the epilogue. After a program's last item it is issued once more, on whatever lies there, and nobody reads it: a wgmma under
way cannot pass the end of an `if`. With a `desc_o`, 64 rows that are the block's own leave by TMA: through the item's Q buffer, or if there
is but one of it, through a buffer of one part of their own.
TURNS, the number of consumers or 0: they issue a tile's products in turn, told by the one before at a named barrier, so that one's softmax
runs beside another's products (FlashAttention-3, arXiv:2407.08608, section 3.1). A tile that a consumer is spared is a turn, too, or their
numbers would differ; an item's first Q Kᵀ is none.
Q_REGS columns of Q's first part are held in registers (qr) during an item: with 64 keys a tile, wgmma reads as much of Q as of K, and
shared memory limits the rate.
NAMED, the number of consumers or 0: slots of K and V are given back at named barriers, not at ke and ve (slots.py), and a row's sum stays
with the four threads that share the row until the item's end.
ANEW: a masked tile looks its segment up in memory, instead of keeping it in registers, as a forward onto a running partial always does.
BOUNDS, 1 or 2: with 1, no row's columns begin later than its segment does (Schedule.left), and masks look at the other end alone.
Statistics are base 2 inside: m and the exponent are in units of log2(e) * scale.
Longer than the house's 60 lines a function: a wgmma and what it overlaps with must stand in one body.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma_wait

from distflash.kernels.hopper.common import again, entry, kept, lines
from distflash.kernels.hopper.feed import buffers, producer
from distflash.kernels.hopper.items import bounds, from_right, line_of, number, segment, spared
from distflash.kernels.hopper.out import leave, padded, scaled, stage
from distflash.kernels.hopper.products import cast, finished, held, rescaled, row_sums, scores, values, weights, zeros
from distflash.kernels.hopper.slots import after, before, pass_turn, release, take_turn


@gluon.jit
def step(
    MASK: gl.constexpr, cid: gl.constexpr, TURNS: gl.constexpr, NAMED: gl.constexpr, qr, q, k, v, mine, kf, ke, vf, ve, m, l, acc, p, zero,
    idx, ph, qs, n0, low, high
):  # fmt: skip
    """One column tile, of which MASK bounds are looked at: QK of this one and PV of the last one, of the weights p, run together; the
    softmax of this one beside PV."""
    NB: gl.constexpr = k[0].shape[0]
    mbarrier.wait(kf.index(idx), ph)
    take_turn(cid, TURNS)
    s = scores(qr, q, k, mine, idx, zero)
    pidx, pph = before(idx, ph, NB)
    mbarrier.wait(vf.index(pidx), pph)
    acc = values(p, v, pidx, acc)
    pass_turn(cid, TURNS)
    s = warpgroup_mma_wait(len(v), deps=[s])
    release(ke, idx, NAMED, 0)
    if MASK:
        s = kept(s, n0, low, high, MASK)
    top = gl.maximum(m, gl.max(s, 1) * qs)
    shift = gl.where(top == float("-inf"), 0.0, top) if MASK else top
    alpha = gl.exp2(m - shift)
    x = weights(s, qs, shift)
    l = rescaled(l, alpha) + row_sums(x, NAMED > 0)
    acc = finished(acc, p)
    release(ve, pidx, NAMED, NB)
    acc = scaled(acc, alpha)
    idx, ph = after(idx, ph, NB)
    return top, l, acc, cast(x, k, acc), idx, ph


@gluon.jit
def first_scores(q, k, cid: gl.constexpr, dealt, qf, kf, ke, idx, ph, zero, r, more, NQ: gl.constexpr,
    Q_REGS: gl.constexpr, NAMED: gl.constexpr
):  # fmt: skip
    """(item r's qr; its first Q Kᵀ, issued, its slot and phase) if there are `more` items; K of a first tile that is not wanted is given
    back."""
    NC: gl.constexpr = q[0].shape[0] // NQ
    NB: gl.constexpr = k[0].shape[0]
    mbarrier.wait(qf.index(r % NQ), (r // NQ) & 1, pred=more)
    skip = more & (spared(line_of(dealt, r), cid)[0] > 0)
    mbarrier.wait(kf.index(idx), ph, pred=skip)
    release(ke, idx, NAMED, 0, skip)
    nxt, nph = after(idx, ph, NB)
    idx = gl.where(skip, nxt, idx)
    ph = gl.where(skip, nph, ph)
    mbarrier.wait(kf.index(idx), ph, pred=more)
    mine = cid if NQ == 1 else cid + r % NQ * NC
    qr = held(q[0].index(mine), zero, Q_REGS)
    return qr, scores(qr, q, k, mine, idx, zero), idx, ph


@gluon.jit
def next_scores(q, k, cid: gl.constexpr, dealt, qf, kf, ke, idx, ph, zero, r, NQ: gl.constexpr,
    Q_REGS: gl.constexpr, NAMED: gl.constexpr
):  # fmt: skip
    """Whether there is an item after item r, and `first_scores` of it."""
    more = r + 1 < number(line_of(dealt, r), 6)
    qr, s, idx, ph = first_scores(q, k, cid, dealt, qf, kf, ke, idx, ph, zero, r + 1, more, NQ, Q_REGS, NAMED)
    return more, qr, s, idx, ph


@gluon.jit
def give_back(kf, ke, vf, ve, idx, ph, NB: gl.constexpr, NAMED: gl.constexpr):
    """A tile that none of this consumer's rows wants: K of it is not read, nor V of the one before, whose weights are nobody's."""
    mbarrier.wait(kf.index(idx), ph)
    release(ke, idx, NAMED, 0)
    pidx, pph = before(idx, ph, NB)
    mbarrier.wait(vf.index(pidx), pph)
    release(ve, pidx, NAMED, NB)
    return after(idx, ph, NB)


@gluon.jit
def consumer(
    cid: gl.constexpr, desc_o, desc_o2, q, k, v, way, dealt, qf, qe, kf, ke, vf, ve, O, M, A, AM, segments, order, qs, rounds, heads, t_q,
    NQ: gl.constexpr, Q_REGS: gl.constexpr, DV: gl.constexpr, HAS_ACC: gl.constexpr, AHEAD: gl.constexpr, TURNS: gl.constexpr,
    BOUNDS: gl.constexpr, NAMED: gl.constexpr, ANEW: gl.constexpr
):  # fmt: skip
    """Rows cid * 64 .. + 63 of each block."""
    NB: gl.constexpr = k[0].shape[0]
    NC: gl.constexpr = q[0].shape[0] // NQ
    BN: gl.constexpr = k[0].shape[1]
    s_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    r_l: gl.constexpr = gl.SliceLayout(1, s_l)
    LN2: gl.constexpr = 0.6931471805599453
    LOG2E: gl.constexpr = 1.4426950408889634
    HELD: gl.constexpr = 0 if HAS_ACC and padded(v, DV) else Q_REGS  # registers: an epilogue that needs the most addresses
    zero = gl.zeros([64, BN], gl.float32, layout=s_l)
    r = 0
    if cid == NC - 1:
        pass_turn(cid, TURNS)  # the first consumer's first
    more = gl.load(entry(0, order, rounds) + 6) > 0
    qr, s, idx, ph = first_scores(q, k, cid, dealt, qf, kf, ke, 0, 0, zero, 0, more, NQ, HELD, NAMED)
    s = warpgroup_mma_wait(0, deps=[s])
    while more:
        # the first tile: its Q Kᵀ is done, no PV to go with it
        release(ke, idx, NAMED, 0)
        line = line_of(dealt, r)
        skipped, plain = spared(line, cid)
        if skipped > 0:
            take_turn(cid, TURNS)
            pass_turn(cid, TURNS)
        pidx, pph = before(idx, ph, NB)
        mbarrier.wait(vf.index(pidx), pph, pred=skipped > 0)
        release(ve, pidx, NAMED, NB, skipped > 0)
        first, low, high, left, inner, total = bounds(line, number(line, 2) + cid * 64 + lines(r_l))
        if total - inner - plain > skipped:
            s = kept(s, first + from_right(skipped, left, inner, total - inner) * BN, low, high, BOUNDS)
        m = gl.max(s, 1) * qs
        x = weights(s, qs, gl.where(m == float("-inf"), 0.0, m))
        l = row_sums(x, NAMED > 0)
        acc = (zeros(v[0]),) if len(v) == 1 else (zeros(v[0]), zeros(v[1]))
        x = cast(x, k, acc)
        idx, ph = after(idx, ph, NB)
        if NQ == 1:
            mine = cid
        else:
            mine = cid + (r % NQ) * NC
            if desc_o is not None:
                tma.store_wait(0)  # the last item's way out, which has had a tile's time
            mbarrier.arrive(qe.index((r + 1) % NQ), count=1, pred=r > 0)

        for n in range(number(line_of(dealt, r), 5)):
            item = line_of(dealt, r)
            rows_from = number(item, 2) + cid * 64
            skipped, plain = spared(item, cid)
            done = gl.where(n == 0, 1 + skipped, 0)  # not carried: a constant assigned in a loop is lost in Triton's inliner
            first, low, high, left, inner, total = bounds(segment(item, segments, n), rows_from + lines(r_l))
            masked = total - inner - gl.where(n == 0, plain, 0)
            idle = gl.where(rows_from < number(item, 3), 0, total - done)  # a block's last rows need not be as many as a consumer's
            for _ in range(idle):
                take_turn(cid, TURNS)
                pass_turn(cid, TURNS)
                idx, ph = give_back(kf, ke, vf, ve, idx, ph, NB, NAMED)
            done += idle
            for i in range(done, masked):
                if HAS_ACC or ANEW:  # registers: looked up anew
                    item = line_of(dealt, r)
                    rows = number(item, 2) + cid * 64 + lines(r_l)
                    first, low, high, left, inner, total = bounds(segment(item, segments, again(n)), rows)
                n0 = first + from_right(i, left, inner, total - inner) * BN
                m, l, acc, x, idx, ph = step(
                    BOUNDS, cid, TURNS, NAMED, qr, q, k, v, mine, kf, ke, vf, ve, m, l, acc, x, zero, idx, ph, qs, n0, low, high
                )  # fmt: skip
            for _ in range(gl.maximum(masked, done), total):
                m, l, acc, x, idx, ph = step(
                    0, cid, TURNS, NAMED, qr, q, k, v, mine, kf, ke, vf, ve, m, l, acc, x, zero, idx, ph, qs, 0, low, high
                )  # fmt: skip
        if NQ == 1:
            mbarrier.arrive(qe.index(0), count=1)
        pidx, pph = before(idx, ph, NB)
        mbarrier.wait(vf.index(pidx), pph)
        acc = values(x, v, pidx, acc)
        if AHEAD and not HAS_ACC:  # registers: the earlier visits' rows come in too
            more, qr, ahead, idx, ph = next_scores(q, k, cid, dealt, qf, kf, ke, idx, ph, zero, again(r), NQ, HELD, NAMED)
            acc = finished(acc, x, len(k))
        else:
            acc = finished(acc, x)
        release(ve, pidx, NAMED, NB)
        if NAMED:
            l = gl.convert_layout(gl.sum(l, 1), r_l)

        heads_out = again(heads)
        t_out = again(t_q)
        line = line_of(dealt, r)
        start = number(line, 2) + cid * 64
        stop = number(line, 3)
        bh = number(line, 1)
        b = bh // heads_out
        h = bh % heads_out
        rows = start + lines(r_l)
        at = bh.to(gl.int64) * t_out
        if HAS_ACC:  # merge with the earlier visits' (out, lse), 2^x inside: both weights are over the new sum
            old = gl.load(AM + at + rows, mask=rows < stop, other=float("-inf")) * LOG2E
            top = gl.maximum(m, old)
            shift = gl.where(top == float("-inf"), 0.0, top)
            new = gl.exp2(m - shift)
            old = gl.exp2(old - shift)
            l = l * new + old
            weight = gl.where(l == 0.0, 0.0, 1.0 / l)  # not l > 0: a NaN stays one, and -inf says that a row saw no key
            gl.store(M + at + rows, gl.where(l == 0.0, float("-inf"), (top + gl.log2(l)) * LN2), mask=rows < stop)
            new = weight * new
            old = weight * old
        else:
            new = gl.where(l == 0.0, 0.0, 1.0 / l)
            old = new
            gl.store(M + at + rows, gl.where(l == 0.0, float("-inf"), (m + gl.log2(l)) * LN2), mask=rows < stop)
        if start < stop:  # also: what follows is not computed before the first item, and spilled
            if desc_o is None:
                leave(O, A, b, h, start, stop, heads_out, t_out, acc, new, old, v, DV, HAS_ACC)
            elif (start + 64 <= stop) | (stop == t_out):  # what lies past the last row of all, TMA leaves out
                stage(scaled(acc, new), desc_o, desc_o2, way, cid if NQ == 1 else cid + again(r) % NQ * NC, NQ == 1, b, h, start)
            else:
                leave(O, A, b, h, start, stop, heads_out, t_out, acc, new, old, v, DV, HAS_ACC)

        if AHEAD and not HAS_ACC:
            s = warpgroup_mma_wait(0, deps=[ahead])
        else:
            more, qr, ahead, idx, ph = next_scores(q, k, cid, dealt, qf, kf, ke, idx, ph, zero, again(r), NQ, HELD, NAMED)
            s = warpgroup_mma_wait(0, deps=[ahead])
        r = r + 1
    if cid == 0:
        take_turn(cid, TURNS)  # the last one passed: no barrier is left half full
    if desc_o is not None:
        tma.store_wait(0)


@gluon.jit(do_not_specialize=["rounds", "heads", "group", "t_q"])
def forward_kernel(
    desc_q, desc_q2, desc_k, desc_k2, desc_v, desc_v2, desc_o, desc_o2, desc_order, O, M, A, AM, segments, order, qs, rounds, heads, group,
    t_q, NC: gl.constexpr, NB: gl.constexpr, NQ: gl.constexpr, Q_REGS: gl.constexpr, DV: gl.constexpr, HAS_ACC: gl.constexpr,
    AHEAD: gl.constexpr, TURNS: gl.constexpr, BOUNDS: gl.constexpr, NAMED: gl.constexpr, ANEW: gl.constexpr, REGS: gl.constexpr,
    REGS_P: gl.constexpr
):  # fmt: skip
    """grid: any number of programs, at least one item and at most `rounds` each: order [programs, rounds, 16]. desc_*: [B, H, T, D]
    views, boxes of 64 or BN rows and of the first part of the columns; desc_*2: of the second part, None if there is none. O, A
    [B, T, H, DV]; M, AM [B, H, T] natural log. desc_o, desc_o2: of O, or None: all of it by direct stores; with two buffers of Q in the
    boxes of q, with one in boxes that are alike. desc_order: of order, as one vector, in boxes of 16."""
    q = buffers(NQ * NC, desc_q, desc_q2)
    gl.static_assert(desc_o is None or not HAS_ACC)
    gl.static_assert(NAMED == 0 or NC + 2 * NB <= 7)  # named barriers 9 to 15: turns, and slots of K and of V
    k = buffers(NB, desc_k, desc_k2)
    v = buffers(NB, desc_v, desc_v2)
    way = buffers(NC, desc_o, None) if NQ == 1 and desc_o is not None else q
    # of item r in 2 * (r % 2): TMA writes at multiples of 128 bytes. Item r + 2's comes once every consumer is done with item r
    dealt = gl.allocate_shared_memory(gl.int32, [4, 16], desc_order.layout)
    bl: gl.constexpr = mbarrier.MBarrierLayout()
    qf = gl.allocate_shared_memory(gl.int64, [NQ, 1], bl)
    qe = gl.allocate_shared_memory(gl.int64, [NQ, 1], bl)
    kf = gl.allocate_shared_memory(gl.int64, [NB, 1], bl)
    ke = gl.allocate_shared_memory(gl.int64, [NB, 1], bl)
    vf = gl.allocate_shared_memory(gl.int64, [NB, 1], bl)
    ve = gl.allocate_shared_memory(gl.int64, [NB, 1], bl)
    for i in gl.static_range(NQ):
        mbarrier.init(qf.index(i), count=1)
        mbarrier.init(qe.index(i), count=NC)
    for i in gl.static_range(NB):
        mbarrier.init(kf.index(i), count=1)
        mbarrier.init(vf.index(i), count=1)
        mbarrier.init(ke.index(i), count=NC)
        mbarrier.init(ve.index(i), count=NC)
    fence_async_shared()
    if NC == 2:
        gl.warp_specialize(
            [
                (consumer, (0, desc_o, desc_o2, q, k, v, way, dealt, qf, qe, kf, ke, vf, ve, O, M, A, AM, segments, order, qs, rounds,
                 heads, t_q, NQ, Q_REGS, DV, HAS_ACC, AHEAD, TURNS, BOUNDS, NAMED, ANEW)),
                (consumer, (1, desc_o, desc_o2, q, k, v, way, dealt, qf, qe, kf, ke, vf, ve, O, M, A, AM, segments, order, qs, rounds,
                 heads, t_q, NQ, Q_REGS, DV, HAS_ACC, AHEAD, TURNS, BOUNDS, NAMED, ANEW)),
                (producer, (desc_q, desc_q2, desc_k, desc_k2, desc_v, desc_v2, desc_order, q, k, v, dealt, qf, qe, kf, ke, vf, ve, segments,
                 order, rounds, heads, group, NQ, NAMED)),
            ],
            [4, 1],
            [REGS, REGS_P],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (consumer, (0, desc_o, desc_o2, q, k, v, way, dealt, qf, qe, kf, ke, vf, ve, O, M, A, AM, segments, order, qs, rounds,
                 heads, t_q, NQ, Q_REGS, DV, HAS_ACC, AHEAD, TURNS, BOUNDS, NAMED, ANEW)),
                (consumer, (1, desc_o, desc_o2, q, k, v, way, dealt, qf, qe, kf, ke, vf, ve, O, M, A, AM, segments, order, qs, rounds,
                 heads, t_q, NQ, Q_REGS, DV, HAS_ACC, AHEAD, TURNS, BOUNDS, NAMED, ANEW)),
                (consumer, (2, desc_o, desc_o2, q, k, v, way, dealt, qf, qe, kf, ke, vf, ve, O, M, A, AM, segments, order, qs, rounds,
                 heads, t_q, NQ, Q_REGS, DV, HAS_ACC, AHEAD, TURNS, BOUNDS, NAMED, ANEW)),
                (producer, (desc_q, desc_q2, desc_k, desc_k2, desc_v, desc_v2, desc_order, q, k, v, dealt, qf, qe, kf, ke, vf, ve, segments,
                 order, rounds, heads, group, NQ, NAMED)),
            ],
            [4, 4, 1],
            [REGS, REGS, REGS_P],
        )  # fmt: skip
