"""Peak memory of attention on one rank, above its inputs q, k, v (and dout), from its plan.

Legend: B batch, T local tokens, H query heads, Hk key/value heads, D head dim, Dv value head dim, R ranks of a ring.

What is alive follows from ring.py: a block of K and V from the posting of its exchange until the next one is at hand, a sent message
until its exchange is waited for. Where blocks are copied (direct.py): a block from the start of its copy until it was worked on, its
gradient until that of the next visit is on its way. What Ulysses brings, and what goes home, stays until all of a pass is home
(all_to_all.py). The plan's integers and the kernels' tables are not in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from distflash.cost.traffic import Shape, Share, Step, Swap
from distflash.parallel.plan import Visit
from distflash.parallel.wire.symmetric import GRAIN

Copies = tuple[Sequence[Visit], Sequence[Visit]]  # visits of a forward and of a backward, `distflash.parallel.staging.copies`
Scratch = Callable[[int, int, bool], int]  # what a visit of a backward takes: `kernels.base.Counted.scratch` of a problem


def least(lines: int, tokens: int, alone: bool) -> int:
    """The Scratch of a kernel of which nothing is known: lse in another form."""
    return 4 * lines * tokens


def peak(share: Share, copies: Copies | None = None, reach: bool = False, scratch: Scratch = least) -> dict[str, int]:
    """By pass: bytes above the inputs at the peak; `backward` holds what the forward saved, and what the kernel takes beside its results.

    `copies`: blocks are copied so, None: they are sent. `reach`: so are the heads of Ulysses (`all_to_all.Copied`). What `windows` and
    `head_windows` count comes beside it. Where Ulysses sends messages, q, k, v and dout are what an all-to-all brought, and count; that
    its messages may be more for a moment does not.
    """
    groups, swap = share.groups if reach else 1, share.swap
    one = replace(share.shape, heads=share.shape.heads // groups, kv_heads=share.shape.kv_heads // groups)
    if copies is None:
        bytes_ = _ring(share.steps, one, share.last, scratch)
    else:
        bytes_ = {"forward": _forward(copies[0], one), "backward": _back(copies[1], one, scratch)}
    if swap is None:
        return bytes_
    there = _sizes(share.shape, share.steps[0].visit.tiles.q_len)
    if reach:
        return _copied_heads(bytes_, one, swap, there, _sizes(swap.shape, swap.tokens[share.head_rank]), groups)
    brought = there.q + there.kv
    return {"forward": bytes_["forward"] + brought, "backward": bytes_["backward"] + brought + there.out}


class _Sizes(NamedTuple):
    """Bytes of tensors of so many tokens."""

    q: int
    kv: int
    out: int
    lse: int


def _sizes(s: Shape, tokens: int) -> _Sizes:
    rows = s.batch * tokens * s.heads
    return _Sizes(rows * s.head_dim * s.itemsize, tokens * s.token, rows * s.v_head_dim * s.itemsize, rows * s.wide)


def _copied_heads(ring: dict[str, int], one: Shape, swap: Swap, there: _Sizes, here: _Sizes, groups: int) -> dict[str, int]:
    """`ring` and `one` are of a group. `there`: all heads of this rank and the tokens of all; `here`: its own tokens, all heads.

    At the peak the last group is worked on, or what all groups made is put together, or its form is changed.
    """
    wide = swap.shape.wide // swap.shape.itemsize if swap.shared else 1
    brought, turned = there.q + there.kv, there.lse * (one.heads > 1)  # lse as it goes home; of one head that is as it is kept
    grads, home = there.q + there.kv * wide, here.q + here.kv * wide
    forward = (
        (there.out + there.lse + turned) * (groups - 1) // groups + ring["forward"],
        there.out + there.lse + turned + here.out + here.lse,
        here.out + 2 * here.lse + there.lse * (1 + (groups > 1)),
    )
    backward = (  # the ring saved nothing more
        grads * (groups - 1) // groups + ring["backward"] - (there.out + 2 * there.lse - turned) // groups + there.kv * (wide - 1),
        grads + home,
        home + here.kv * swap.shared,
    )
    saved = brought + there.lse + here.out
    return {"forward": brought + max(forward), "backward": saved + here.lse + there.out + there.lse + max(backward)}  # delta, dout


def windows(shape: Shape, tokens: int, ranks: int) -> int:
    """Bytes of a rank's memory that the others copy from and to, which stay from call to call; `tokens` of the longest block.

    One holds the own block of K and V, the other a place for what each other rank has of its gradient.
    """
    blocks, gradients = shape.message(tokens, shape.itemsize), (ranks - 1) * shape.message(tokens, shape.wide)
    return _window(blocks) + _window(gradients) if ranks > 1 else 0


def head_windows(share: Share) -> int:
    """And those from and to which heads are copied: two of each group of heads."""
    if share.swap is None:
        return 0
    others = len(share.swap.tokens) - 1
    return share.groups * sum(_window(place * others) for place in share.swap.places(share.groups))


def _window(nbytes: int) -> int:
    return (-(-nbytes // GRAIN) + 1) * GRAIN  # flags take a grain


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


def _back(visits: Sequence[Visit], s: Shape, scratch: Scratch) -> int:
    tokens = visits[0].tiles.q_len
    rows, like = s.batch * tokens * s.heads, s.token // s.itemsize  # elements of K and V of a token
    out, lse, dq = rows * s.v_head_dim * s.itemsize, rows * s.wide, rows * s.head_dim
    taken = scratch(s.batch * s.heads, tokens, len(visits) == 1)
    saved = out + 2 * lse + taken  # out, lse, delta
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
    return saved + max(*back, kept + moving + own + dq * s.itemsize - taken)  # the last: while the sum of all parts is made


def _ring(found: Sequence[Step], s: Shape, last: int, scratch: Scratch) -> dict[str, int]:
    tokens = found[0].visit.tiles.q_len
    rows = s.batch * tokens * s.heads
    out, lse, dq = rows * s.v_head_dim * s.itemsize, rows * s.wide, rows * s.head_dim
    running = rows * s.v_head_dim * s.wide * (last > 0)  # what is finished in step 0 is never wide
    kv, forward, back = _blocks(found, s), [], []
    for step, (during, after) in zip(found, _gradients(found, s), strict=True):
        now, works = step.visit.step, bool(step.visit.tiles) or step.visit.step in (0, last)
        forward.append(kv[now] + running * (now <= last) + out * (now >= last))
        taken = scratch(s.batch * s.heads, tokens, last == 0) if works else 0
        wide, narrow = dq * s.wide * (last > 0), dq * s.itemsize
        back.append(kv[now] + during + taken + wide * (now <= last) + narrow * (now >= last))
        back.append(kv[now] + after + (wide if now < last else narrow))
    home = s.message(tokens, s.wide) + s.message(tokens, s.itemsize) + dq * s.itemsize  # while the sum of all parts is cast
    return {"forward": max(forward) + lse, "backward": out + 2 * lse + max(*back, home * _shared(found))}  # out, lse, delta


def _shared(found: Sequence[Step]) -> bool:
    """Whether another rank's part of a gradient comes or goes: then all are accumulated wide."""
    return any(step.visit.home.busy for step in found)


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
    alive, under_way, kept, coming = [], 0, 0, False  # coming: what another rank has of ours, which holds our part once it is here
    own, wide = found[0].visit.tiles.kv_len, s.wide if _shared(found) else s.itemsize
    for step in found:
        visit = step.visit
        mine = s.message(visit.tiles.kv_len, wide) if visit.tiles or visit.step == 0 else 0
        moving = sum(m.nbytes for m in step.home_out + step.home_in)
        arrived = s.message(own, wide) if coming else kept
        alive.append((mine + under_way + kept, mine + moving + arrived))
        kept = mine if visit.step == 0 and visit.home.dest is None else arrived
        under_way, coming = (moving, visit.home.ours is not None) if visit.home.busy else (0, False)
    return alive
