"""How much memory others' blocks of K and V may take while they are on their way, and what of a plan follows from it. Integers only.

Staging holds the blocks of other ranks that are worked on, that arrive, and that are still being passed on. Not in it: the copy of the
own block that others get, and gradients (`distflash.cost.memory` counts all).
"""

from __future__ import annotations

import re

from distflash.parallel.plan import Order, Visit, halved, narrowed, staged

CAP = 2 << 30  # bytes that blocks copied ahead take at most where the user sets no limit: a merge fewer is worth little on larger ones
# Pairs of a query and a key, of as many query as key heads, that are worked through while a key is copied: 600e12 / 4 D FLOP/s beside
# 300e9 / 4 D bytes/s, H100's forward and a copy engine's pull (docs/perf-notes.md). A backward takes 2.5 times as long a pair.
PACE = 2000

_UNITS = {"": 1, "B": 1} | {f"{m}B": 1000**n for n, m in enumerate("KMGT", 1)} | {f"{m}iB": 1024**n for n, m in enumerate("KMGT", 1)}


def parsed(staging: object) -> int | None:
    """A limit in bytes: an integer, text like "512MiB" or "2GB", or None for none. Raises TypeError, ValueError."""
    if staging is None:
        return None
    if isinstance(staging, bool) or not isinstance(staging, (int, str)):
        raise TypeError(f"staging={staging!r} must be None, bytes as an integer, or text like '512MiB'")
    said = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(staging))
    if said is None or said[2] not in _UNITS or not (limit := int(float(said[1]) * _UNITS[said[2]])):
        raise ValueError(f"staging={staging!r} is not a positive number of bytes: give an integer, or text like '512MiB' or '2GB'")
    return limit


def within(order: Order, limit: int | None, block: int) -> Order:
    """The order of messages in which no rank holds more of others' blocks, of `block` bytes each, than the limit allows.

    Raises ValueError if it allows too few.
    """
    if limit is None:
        return order
    found = order.within(limit // block)
    _check(limit, found.held, block)
    return found


def room(limit: int | None, tokens: int, token: int, ranks: int) -> int:
    """How many tokens others' blocks may have that are copied: of `token` bytes each, `tokens` in the longest block.

    Raises ValueError if the limit allows less than two blocks, the one worked on and the one that arrives.
    """
    least = min(2, ranks - 1)
    if limit is None:
        return max(least * tokens, min((ranks - 1) * tokens, CAP // token))
    _check(limit, least, tokens * token)
    return limit // token


def copies(visits: tuple[Visit, ...], space: int, kv_heads: int, heads: int, one_each: bool) -> tuple[tuple[Visit, ...], tuple[Visit, ...]]:
    """The visits of a forward and of a backward for a plan whose blocks are copied into `space` tokens; `one_each`: one block a visit."""
    pace = None if one_each else PACE * kv_heads / heads
    visits = narrowed(visits)
    return staged(visits, space, pace), staged(halved(visits), space, pace)


def _check(limit: int, blocks: int, block: int) -> None:
    if limit < blocks * block:
        raise ValueError(
            f"staging={limit} bytes hold less than this call needs, {blocks * block}: {blocks} block{'s' * (blocks > 1)} of K and V of "
            f"other ranks, {block} bytes each: allow as much, or share the sequence among more ranks"
        )
