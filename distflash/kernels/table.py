"""A tile table as the integers that a GPU kernel reads: blocks of rows, and for each the column ranges it meets.

    blocks   [n, 4] int32: (start, stop, first entry, number of entries)   a run of at most `block` rows
    entries  [m, 4] int32: (start, stop, lo, hi)   columns start..stop, of which (i, j) is kept iff lo <= j - i <= hi,
             i and j counted from the start of the local tensors

Rows are cut wherever the set of tiles that cover them changes, so every row of a block has the same entries and the kernel
needs no row mask but the block's end. Blocks without entries are listed last: a kernel that has nothing to write there
launches fewer programs. Longest blocks come first, so that the last wave of programs is short.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from distflash.tile import Tile, Tiles

FAR = 1 << 30  # a bound no local index reaches; the sum of two stays inside int32


@dataclass(frozen=True)
class Table:
    """One launch: `blocks` and `entries` on the device, `busy` blocks that have entries, and what the kernel may skip."""

    blocks: Tensor  # [n, 4] int32
    entries: Tensor  # [max(m, 1), 4] int32
    busy: int
    has_lo: bool  # some entry has a lower bound that cuts something


_TABLES: WeakKeyDictionary[Tiles, dict[tuple, Table]] = WeakKeyDictionary()  # a table lives as long as its tiles


def row_table(tiles: Tiles, block: int, device: torch.device) -> Table:
    """Blocks of at most `block` queries, each with the key ranges it reads."""
    return _cached(tiles, block, device, transposed=False)


def column_table(tiles: Tiles, block: int, device: torch.device) -> Table:
    """Blocks of at most `block` keys, each with the query ranges that read it; bands are on i - j."""
    return _cached(tiles, block, device, transposed=True)


def _cached(tiles: Tiles, block: int, device: torch.device, transposed: bool) -> Table:
    held = _TABLES.setdefault(tiles, {})
    key = (block, device, transposed)
    if key not in held:
        held[key] = _build(tiles, block, device, transposed)
    return held[key]


def _build(tiles: Tiles, block: int, device: torch.device, transposed: bool) -> Table:
    blocks, entries, length = [], [], tiles.kv_len if transposed else tiles.q_len
    spans = [span(t, transposed) for t in tiles]
    cuts = sorted({0, length, *(edge for span in spans for edge in span[:2])})
    at = {edge: n for n, edge in enumerate(cuts)}
    covering: list[list[tuple[int, int, int, int]]] = [[] for _ in cuts]
    for start, stop, *entry in spans:
        for n in range(at[start], at[stop]):
            covering[n].append(tuple(entry))  # type: ignore[arg-type]
    for n, (start, stop) in enumerate(pairwise(cuts)):
        for at_row in range(start, stop, block):
            blocks.append((at_row, min(at_row + block, stop), len(entries), len(covering[n])))
        entries += sorted(covering[n])
    work = [-sum(_width(e, b) for e in entries[b[2] : b[2] + b[3]]) for b in blocks]
    order = sorted(range(len(blocks)), key=lambda n: (work[n], blocks[n][0]))
    as_int32 = lambda rows: torch.from_numpy(np.array(rows or [(0, 0, 0, 0)], dtype=np.int32)).to(device)  # noqa: E731
    return Table(
        as_int32([blocks[n] for n in order]) if blocks else torch.empty((0, 4), dtype=torch.int32, device=device),
        as_int32(entries),
        sum(w < 0 for w in work),
        any(lo > -FAR for *_, lo, _ in entries),
    )


def span(tile: Tile, transposed: bool) -> tuple[int, int, int, int, int, int]:
    """(row start, row stop, column start, column stop, lo, hi); a bound that cuts nothing becomes ±FAR."""
    shift = tile.kv.start - tile.q.start
    lo = tile.band.lo + shift if tile.band.lo > 1 - tile.rows else -FAR
    hi = tile.band.hi + shift if tile.band.hi < tile.columns - 1 else FAR
    if transposed:
        return tile.kv.start, tile.kv.stop, tile.q.start, tile.q.stop, -hi, -lo
    return tile.q.start, tile.q.stop, tile.kv.start, tile.kv.stop, lo, hi


def _width(entry: tuple[int, int, int, int], block: tuple[int, int, int, int]) -> int:
    """Columns of the entry that the block of rows reaches."""
    return max(0, min(entry[1], block[1] - 1 + entry[3] + 1) - max(entry[0], block[0] + entry[2]))
