"""How the partitions of a forward wait for each other: slots of K and V that go round, and turns at the tensor cores.

Named barrier 9 + c is consumer c's turn. With NAMED, the number of consumers or 0, a slot is given back at a named barrier of its own,
behind those, and not at an mbarrier, before whose arrivals Triton puts a bar.sync: an arrival at a named barrier stops nobody.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from distflash.kernels.hopper.compat import named_barrier

_TURN = gl.constexpr(9)


@gluon.jit
def before(idx, ph, NB: gl.constexpr):
    """The slot filled before this one, and its phase. Computed, not carried: the loop has no register to spare."""
    wrap = idx == 0
    return gl.where(wrap, NB - 1, idx - 1), gl.where(wrap, ph ^ 1, ph)


@gluon.jit
def after(idx, ph, NB: gl.constexpr):
    """The slot filled next, and its phase."""
    wrap = idx == NB - 1
    return gl.where(wrap, 0, idx + 1), gl.where(wrap, ph ^ 1, ph)


@gluon.jit
def release(empty, slot, NAMED: gl.constexpr, FIRST: gl.constexpr, pred=True):
    """This consumer is done with a slot of K (FIRST 0) or of V (FIRST NB)."""
    if NAMED:
        named_barrier("arrive", _TURN + NAMED + FIRST + slot, 128 * NAMED + 32, pred=pred)
    else:
        mbarrier.arrive(empty.index(slot), count=1, pred=pred)


@gluon.jit
def reclaim(empty, it, NAMED: gl.constexpr, FIRST: gl.constexpr, NB: gl.constexpr):
    """Wait, in the producer, until the slot for tile `it` is free."""
    if NAMED:
        if it >= NB:
            named_barrier("sync", _TURN + NAMED + FIRST + it % NB, 128 * NAMED + 32, 1)
    else:
        mbarrier.wait(empty.index(it % NB), 1 - (it // NB) % 2)


@gluon.jit
def take_turn(cid: gl.constexpr, TURNS: gl.constexpr):
    """Wait until the consumer before this one has issued its products of the tile; the first one, until the last has of the tile before."""
    if TURNS:
        named_barrier("sync", _TURN + cid, 256)


@gluon.jit
def pass_turn(cid: gl.constexpr, TURNS: gl.constexpr):
    """The next consumer's turn."""
    if TURNS:
        named_barrier("arrive", _TURN + (cid + 1) % TURNS, 256)
