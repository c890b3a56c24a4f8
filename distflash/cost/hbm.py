"""HBM bytes of tiled attention on one device, as a function of its tiles, and the blocks that on-chip memory has room for.

Legend: B batch, T local queries, H query heads, Hk key/value heads, D head dim, Dv value head dim, M on-chip memory in elements.

What is counted are the two loops of FlashAttention-2 (arXiv:2307.08691): forward, a block of queries stays on chip while the keys that
it sees stream past; backward, a block of keys stays and queries stream past, dQ being added to in memory.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from distflash.cost.traffic import Shape, covered
from distflash.tile import Tiles


class Blocks(NamedTuple):
    """How many queries, and how many keys, are on chip at a time."""

    queries: int
    keys: int


def standard(q_len: int, k_len: int, head_dim: int) -> int:
    """Elements that standard attention moves for a head: S = Q Kᵀ, A = softmax(S) and O = A V, each of them read and written."""
    return 2 * (q_len + k_len) * head_dim + 4 * q_len * k_len


def largest(on_chip: int, head_dim: int, keys: int = 1) -> Blocks:
    """The largest block of b queries when these share M = `on_chip` elements with c `keys`: Q and O, K and V, scores, two statistics a row.

    2 b d + 2 c d + b c + 2 b <= M. Raises ValueError if not even one query fits.
    """
    queries = (on_chip - 2 * keys * head_dim) // (2 * head_dim + keys + 2)
    if queries < 1:
        least = 2 * head_dim + 2 + keys * (2 * head_dim + 1)
        raise ValueError(f"{on_chip} elements do not hold a query and {keys} keys of {head_dim}: {least} is the least")
    return Blocks(queries, keys)


def forward(tiles: Tiles, shape: Shape, blocks: Blocks, first: bool = True, last: bool = True) -> int:
    """Bytes of one visit: Q once, K and V once for each block of queries that sees them, out and lse once.

    Not `first`: the running out and lse of earlier visits are read; not `last`: out is written as it accumulates.
    """
    s, rows = shape, covered(t.q for t in tiles)
    streamed = sum(_streamed(t.rows, t.columns, t.band.lo, t.band.hi, *blocks) for t in tiles)
    inputs = (rows * s.head_dim + streamed * (s.head_dim + s.v_head_dim)) * s.itemsize
    outputs = rows * (s.v_head_dim * (s.itemsize if last else s.wide) + s.wide)
    running = 0 if first else rows * (s.v_head_dim + 1) * s.wide
    return s.batch * s.heads * (inputs + outputs + running)


def backward(tiles: Tiles, shape: Shape, blocks: Blocks) -> int:
    """Bytes of one visit: K and V once, dK and dV once; Q, dO, lse, delta, and dQ there and back for each block of keys they meet."""
    s, columns = shape, covered(t.kv for t in tiles)
    streamed = sum(_streamed(t.columns, t.rows, -t.band.hi, -t.band.lo, blocks.keys, blocks.queries) for t in tiles)
    both = s.head_dim + s.v_head_dim
    queries = s.heads * streamed * (both * s.itemsize + 2 * s.wide + 2 * s.head_dim * s.wide)
    return s.batch * (queries + s.kv_heads * columns * both * (s.itemsize + s.wide))


@lru_cache(maxsize=1 << 16)
def _streamed(rows: int, columns: int, lo: int, hi: int, block: int, step: int) -> int:
    """Columns that stream past, for all blocks of rows: whole steps of them, from the first that the block sees to the last."""
    total = 0
    for start in range(0, rows, block):
        stop = min(start + block, rows)
        first, end = max(0, start + lo), min(columns, stop + hi)
        if first < end:
            total += min(columns, -(-end // step) * step) - first // step * step
    return total
