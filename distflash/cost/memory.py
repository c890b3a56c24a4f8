"""Peak memory of attention on one rank, above its inputs q, k, v (and dout), from its plan.

Legend: B batch, T local tokens, H query heads, Hk key/value heads, D head dim, Dv value head dim, R ranks of a ring.

What is alive follows from ring.py: a block of K and V from the posting of its exchange until the next one is at hand, a sent message
until its exchange is waited for. The plan's integers and the kernels' tables are not in it.
"""

from __future__ import annotations

from collections.abc import Sequence

from distflash.cost.traffic import Shape, Share, Step


def peak(share: Share) -> dict[str, int]:
    """By pass: bytes above the inputs at the peak of the ring; `backward` holds what the forward saved.

    With Ulysses, q, k, v and dout are what an all-to-all brought, and count; that its messages may be more for a moment does not.
    """
    shape, bytes_ = share.shape, _ring(share.steps, share.shape, share.last)
    if share.swap is None:
        return bytes_
    tiles = share.steps[0].visit.tiles
    dout = shape.batch * tiles.q_len * shape.heads * shape.v_head_dim * shape.itemsize
    q = shape.batch * tiles.q_len * shape.heads * shape.head_dim * shape.itemsize
    kv = shape.message(tiles.kv_len, shape.itemsize)
    return {"forward": bytes_["forward"] + q + kv, "backward": bytes_["backward"] + q + kv + dout}


def _ring(found: Sequence[Step], shape: Shape, last: int) -> dict[str, int]:
    s, visits = shape, [step.visit for step in found]
    tokens = visits[0].tiles.q_len
    rows = s.batch * tokens * s.heads
    out, lse = rows * s.v_head_dim * s.itemsize, rows * s.wide
    saved = out + 3 * lse  # out, lse, its copy in base 2, delta
    dq = rows * s.head_dim
    if len(visits) == 1:
        return {"forward": out + lse, "backward": saved + dq * s.itemsize + s.message(tokens, s.itemsize)}
    running, kv = rows * s.v_head_dim * s.wide + lse, _blocks(found, s)
    forward = max(kv[v.step] + running + (out if v.step == last else 0) for v in visits)
    back = []
    for v, (during, after) in zip(visits, _gradients(found, s), strict=True):
        narrow = dq * s.itemsize * (v.step == last)  # dq in the inputs' dtype beside the running one
        back += [kv[v.step] + during + narrow, kv[v.step] + after - lse]
    return {"forward": forward, "backward": saved + dq * s.wide + max(back)}


def _blocks(found: Sequence[Step], s: Shape) -> dict[int, int]:
    """By step: bytes of K and V that are alive while it computes."""
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
        alive[now] = sum(sizes[max(0, block)] for block in here.union(*flying.values()))
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
