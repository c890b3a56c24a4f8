"""What "auto" stands for: the scheme that the model ranks first for a sequence like the one at hand, the same on every rank.

A ranking makes plans for dozens of schemes, and every batch may have other documents. So it is made for a typical sequence: its length is
rounded to three bits, and its documents are as many, within a factor of two, as the document that a token is in on average says. Batches
that are alike share one ranking. Nothing is looked at that may differ between ranks.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch

from distflash.cost.choose import Candidate, choose
from distflash.cost.devices import DEVICES, Device, find, network
from distflash.cost.time import Cluster
from distflash.cost.traffic import Scheme, Shape
from distflash.parallel.mask import Mask
from distflash.parallel.wire.base import Wire

ASSUMED = (32, 8, 128)  # query heads, key/value heads, head dim: Llama-3-8B's
NIC = 400  # Gbit/s of each device that are assumed between hosts
WORTH = 0.02  # how much shorter both passes must be than with the usual scheme
ROOM = 1 / 8  # of the device's memory: what needs more is passed over
_TILES = 512  # documents times ranks of a typical sequence, at most


class Choice(NamedTuple):
    """A scheme, and why this one."""

    layout: str
    order: str
    ulysses: int
    why: str


def common_device(wire: Wire) -> Device | None:
    """The slowest among the devices of a group's ranks; None if they are no GPUs, or nothing is known of one. A collective of GPUs."""
    if wire.device.type != "cuda" or wire.size == 1:
        return None
    return slowest(wire, torch.cuda.get_device_name(wire.device))


def slowest(wire: Wire, name: str) -> Device | None:
    """The slowest of the devices whose names the ranks give, None if one is unknown: every rank gets the same. A collective."""
    known = [*DEVICES.values()]
    try:
        mine = known.index(find(name))
    except ValueError:
        mine = len(known)
    slots = torch.zeros(len(known) + 1, dtype=torch.int64, device=wire.device)
    slots[mine] = 1
    *counts, unknown = wire.all_reduce(slots).tolist()
    there = [device for device, count in zip(known, counts, strict=True) if count]
    return None if unknown else min(there, key=lambda device: (device.matmul, device.hbm))


def choice(
    usual: Scheme, free: tuple[str, ...], cu: tuple[int, ...], heads: tuple[int, int, int] | None, device: Device | None, wire: str
) -> Choice:
    """The scheme for documents `cu`: `usual`, with another layout, order or Ulysses degree where these are `free`.

    `heads`: (H, Hk, D) of the attention to come. None: `ASSUMED`, and the degree stays, for heads must be known to be dealt out.
    """
    names = tuple(name for name in free if name != "ulysses" or heads is not None)
    kept = usual.layout, usual.order, usual.ulysses
    if not names:
        return Choice(*kept, "as asked for")
    link = device and next((name for name in device.wires if wire.startswith(name)), None)
    if device is None or link is None or usual.ranks == 1:
        alone = "there is one rank" if usual.ranks == 1 else f"nothing is known of these devices, or of the wire {wire}"
        return Choice(*kept, f"the usual one: {alone}")
    return _ranked(usual, names, typical(cu, usual.ranks), heads, device, link)


def typical(cu: tuple[int, ...], ranks: int) -> tuple[int, ...]:
    """The borders that stand for all sequences like this one."""
    lengths = [stop - start for start, stop in pairwise(cu)]
    low = max(0, cu[-1].bit_length() - 4)
    length = max(1, cu[-1] + (1 << low >> 1) >> low << low)
    count = cu[-1] ** 2 // sum(n * n for n in lengths)
    count = min(1 << count.bit_length() - 1, max(1, _TILES // ranks), length)
    shares = [1000 + 2 * (618 * n % 1000) for n in range(count)]  # lengths within a factor of three, spread evenly
    return 0, *(length * share // sum(shares) for share in accumulate(shares))


@lru_cache(maxsize=1024)
def _ranked(
    usual: Scheme, names: tuple[str, ...], cu: tuple[int, ...], heads: tuple[int, int, int] | None, device: Device, link: str
) -> Choice:
    shape = _shape(heads, usual.ulysses, device)
    fixed = {name: getattr(usual, name) for name in ("layout", "order", "ulysses") if name not in names}
    cluster = Cluster(device, usual.ranks, usual.per_node, network(NIC), link)
    try:
        ranking = [c for c in choose(cu, Mask(None, 0, cu), shape, cluster, (link,), **fixed) if c.refused is None]
    except ValueError as error:
        return Choice(usual.layout, usual.order, usual.ulysses, f"the usual one: {error}")
    best = next((c for c in ranking if c.memory <= ROOM * device.memory), min(ranking, key=lambda c: c.memory))
    stays = next((c for c in ranking if c.scheme == usual), None)
    for_what = f"{shape.heads}/{shape.kv_heads} heads of {shape.head_dim}{'' if heads else ' (assumed)'}, causal, on {device.name}"
    if stays is not None and stays.memory <= max(best.memory, ROOM * device.memory) and stays.seconds <= (1 + WORTH) * best.seconds:
        return _told(stays, f"the usual one, within {WORTH:.0%} of the fastest predicted for {for_what}")
    instead = f", {_words(usual)} {1e3 * stays.seconds:.3f} ms" if stays else ""
    return _told(best, f"predicted {1e3 * best.seconds:.3f} ms a layer forward and backward{instead}, for {for_what}")


def _told(found: Candidate, why: str) -> Choice:
    return Choice(found.scheme.layout, found.scheme.order, found.scheme.ulysses, why)


def _shape(heads: tuple[int, int, int] | None, ulysses: int, device: Device) -> Shape:
    """Assumed heads grow until a degree that was asked for can deal them out."""
    grown = -(-ulysses // ASSUMED[0])
    h, kv, dim = heads or (ASSUMED[0] * grown, ASSUMED[1] * grown, ASSUMED[2])
    return Shape(h, kv, dim, dim, itemsize=device.itemsize)


def _words(scheme: Scheme) -> str:
    return f"{scheme.layout}, {scheme.order}, ulysses {scheme.ulysses}"
