"""Peak memory of attention on one rank, above its inputs q, k, v (and dout), from its plan.

Legend: B batch, T local tokens, H query heads, Hk key/value heads, D head dim, Dv value head dim, R ranks of a ring.

What is alive follows from ring.py: a block of K and V from the posting of its exchange until the next one is at hand, a sent message
until its exchange is waited for. Where blocks are copied (direct.py): a block from the start of its copy until it was worked on, its
gradient until that of the next visit is on its way. The plan's integers and the kernels' tables are not in it.
"""

from __future__ import annotations

from collections.abc import Sequence

from distflash.cost.traffic import Shape, Share, Step
from distflash.parallel.plan import Visit
from distflash.parallel.wire.symmetric import GRAIN

Copies = tuple[Sequence[Visit], Sequence[Visit]]  # visits of a forward and of a backward, `distflash.parallel.staging.copies`


def peak(share: Share, copies: Copies | None = None) -> dict[str, int]:
    """By pass: bytes above the inputs at the peak of the ring; `backward` holds what the forward saved.

    `copies`: blocks are copied so, None: they are sent. What `windows` counts comes beside it. With Ulysses, q, k, v and dout are what an
    all-to-all brought, and count; that its messages may be more for a moment does not.
    """
    shape = share.shape
    if copies is None:
        bytes_ = _ring(share.steps, shape, share.last)
    else:
        bytes_ = {"forward": _forward(copies[0], shape), "backward": _back(copies[1], shape)}
    if share.swap is None:
        return bytes_
    tiles = share.steps[0].visit.tiles
    dout = shape.batch * tiles.q_len * shape.heads * shape.v_head_dim * shape.itemsize
    q = shape.batch * tiles.q_len * shape.heads * shape.head_dim * shape.itemsize
    kv = shape.message(tiles.kv_len, shape.itemsize)
    return {"forward": bytes_["forward"] + q + kv, "backward": bytes_["backward"] + q + kv + dout}


def windows(shape: Shape, tokens: int, ranks: int) -> int:
    """Bytes of a rank's memory that the others copy from and to, which stay from call to call; `tokens` of the longest block.

    One holds the own block of K and V, the other a place for what each other rank has of its gradient.
    """
    blocks, gradients = shape.message(tokens, shape.itemsize), (ranks - 1) * shape.message(tokens, shape.wide)
    return sum((-(-nbytes // GRAIN) + 1) * GRAIN for nbytes in (blocks, gradients)) if ranks > 1 else 0  # flags take a grain


def staging(share: Share, copies: Copies | None = None) -> int:
    """Bytes that others' K and V take at most while they are on their way."""
    if copies is None:
        return max(_blocks(share.steps, share.shape, own=False).values())
    return max(share.shape.token * max(_copied(visits)) for visits in copies)


def _copied(visits: Sequence[Visit]) -> list[int]:
    """For each visit, tokens of others' blocks that are there or coming while it computes."""
    size = {visit.step: visit.tiles.kv_len for visit in visits}
    found, here = [], {visits[0].step: 0}
    for visit in visits:
        here |= {hop.step: size[hop.step] for hop in visit.hops}
        found.append(sum(here.values()))
        here.pop(visit.step, None)
    return found


def _forward(visits: Sequence[Visit], s: Shape) -> int:
    rows = s.batch * visits[0].tiles.q_len * s.heads
    out, lse = rows * s.v_head_dim * s.itemsize, rows * s.wide
    last = max((n for n, visit in enumerate(visits) if visit.tiles), default=0)
    running = rows * s.v_head_dim * s.wide * (last > 0)
    return max(s.token * kv + running + lse + out * (n == last) for n, kv in enumerate(_copied(visits)))


def _back(visits: Sequence[Visit], s: Shape) -> int:
    tokens = visits[0].tiles.q_len
    rows, like = s.batch * tokens * s.heads, s.token // s.itemsize  # elements of K and V of a token
    out, lse, dq = rows * s.v_head_dim * s.itemsize, rows * s.wide, rows * s.head_dim
    saved = out + 3 * lse  # out, lse, its copy in base 2, delta
    own = tokens * like * s.itemsize
    if len(visits) == 1:
        return saved + dq * s.itemsize + 2 * own  # at most: a gradient that nobody adds to is stored as it is, and copied
    back, kept, moving = [], 0, 0
    for n, (visit, kv) in enumerate(zip(visits, _copied(visits), strict=True)):
        mine = visit.tiles.kv_len * like * s.wide
        back.append(s.token * kv + mine + moving + kept + dq * (s.wide + s.itemsize * (n + 1 == len(visits))))
        if visit.owner == visits[0].owner:
            kept += mine
        else:
            moving = mine
    return saved + max(*back, kept + moving + own + dq * s.itemsize - lse)  # the last: while the sum of all parts is made


def _ring(found: Sequence[Step], shape: Shape, last: int) -> dict[str, int]:
    s, visits = shape, [step.visit for step in found]
    tokens = visits[0].tiles.q_len
    rows = s.batch * tokens * s.heads
    out, lse = rows * s.v_head_dim * s.itemsize, rows * s.wide
    saved = out + 3 * lse  # out, lse, its copy in base 2, delta
    dq = rows * s.head_dim
    if len(visits) == 1:
        return {"forward": out + lse, "backward": saved + dq * s.itemsize + s.message(tokens, s.itemsize)}
    running, kv = rows * s.v_head_dim * s.wide * (last > 0), _blocks(found, s)  # what is finished in step 0 is never wide
    forward = max(kv[v.step] + running + lse + (out if v.step == last else 0) for v in visits)
    back = []
    for v, (during, after) in zip(visits, _gradients(found, s), strict=True):
        narrow = dq * s.itemsize * (v.step == last)  # dq in the inputs' dtype beside the running one
        back += [kv[v.step] + during + narrow, kv[v.step] + after - lse + dq * s.itemsize * (last == 0)]
    return {"forward": forward, "backward": saved + dq * s.wide * (last > 0) + max(back)}


def _blocks(found: Sequence[Step], s: Shape, own: bool = True) -> dict[int, int]:
    """By step: bytes of K and V that are alive while it computes, with the copies of our own block that are sent or without."""
    sizes = {step.visit.step: s.message(step.visit.tiles.kv_len, s.itemsize) for step in found}
    packed = any(hop.onward is not None for hop in found[0].visit.hops)
    here, flying = {0} if packed else set(), {}  # blocks by their step, -n is our own packed again for step n
    alive = {}
    for step in found:
        now = step.visit.step
        for then in [then for then in flying if then <= now]:
            if then in flying.pop(then):
                here = {then}
        for hop in step.visit.hops:
            refs = {now} if hop.onward is not None else set()
            refs |= {-hop.step} if hop.own is not None else set()
            flying[hop.step] = refs | ({hop.step} if hop.source is not None else set())
        alive[now] = sum(sizes[max(0, block)] for block in here.union(*flying.values()) if own or block > 0)
    return alive


def _gradients(found: Sequence[Step], s: Shape) -> list[tuple[int, int]]:
    """For each visit, bytes of dK and dV alive while it computes, and while its own are sent: these, those under way, ours that stayed."""
    alive, under_way, kept = [], 0, 0
    for step in found:
        visit = step.visit
        mine = s.message(visit.tiles.kv_len, s.wide) if visit.tiles or visit.step == 0 else 0
        moving = sum(m.nbytes for m in step.home_out + step.home_in)
        alive.append((mine + under_way + kept, mine + moving + kept))
        kept = mine if visit.step == 0 and visit.home.dest is None else kept
        under_way = moving
    return alive
