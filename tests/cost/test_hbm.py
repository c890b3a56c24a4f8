"""HBM bytes: the formula against loops that count every element they load or store, and the bounds that docs/io-model.md derives."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from distflash.cost import hbm
from distflash.cost.hbm import Blocks
from distflash.cost.traffic import Shape
from distflash.parallel.mask import Mask, packed
from distflash.tile import Band, Tile, Tiles

SHAPE = Shape(heads=4, kv_heads=2, head_dim=8, v_head_dim=5, batch=3)
CASES = {
    "full": packed((0, 37), (0, 37), Mask()),
    "causal": packed((0, 37), (0, 37), Mask(None, 0)),
    "cross": packed((0, 20), (0, 37), Mask(None, 0)),
    "window": packed((0, 50), (0, 50), Mask(7, 3)),
    "documents": packed((0, 7, 8, 8, 30, 37), (0, 7, 8, 8, 30, 37), Mask(None, 0)),
    "two tiles over the same rows": Tiles((Tile.whole(slice(0, 9), slice(0, 4)), Tile(slice(2, 9), slice(6, 20), Band(-3, 2))), 12, 20),
    "nothing": Tiles((), 5, 5),
}


def keep(tile):
    offset = np.arange(tile.columns)[None, :] - np.arange(tile.rows)[:, None]
    return (offset >= tile.band.lo) & (offset <= tile.band.hi)


def stream(grid, rows, columns):
    """Run one tile's loops over a mask: for each block of rows, the whole steps between the first and the last one with a kept pair."""
    loaded = 0
    for start in range(0, grid.shape[0], rows):
        seen = np.flatnonzero(grid[start : start + rows].any(0))
        if len(seen):
            for step in range(seen[0] // columns, seen[-1] // columns + 1):
                loaded += grid[:, step * columns : (step + 1) * columns].shape[1]
    return loaded


def union(slices):
    return len({i for s in slices for i in range(s.start, s.stop)})


@pytest.mark.parametrize("name", CASES)
def test_the_formula_counts_what_the_loops_load_and_store(name):
    tiles, s = CASES[name], SHAPE
    for blocks, first, last in product((Blocks(1, 1), Blocks(4, 3), Blocks(16, 8), Blocks(100, 100)), (True, False), (True, False)):
        rows, columns = union(t.q for t in tiles), union(t.kv for t in tiles)
        streamed = sum(stream(keep(t), blocks.queries, blocks.keys) for t in tiles)
        loads = 2 * rows * 8 + 2 * streamed * (8 + 5) + (0 if first else 4 * rows * 6)
        stores = rows * (5 * (2 if last else 4) + 4)
        assert hbm.forward(tiles, s, blocks, first, last) == 3 * 4 * (loads + stores), (blocks, first, last)
        streamed = sum(stream(keep(t).T, blocks.keys, blocks.queries) for t in tiles)
        queries = streamed * (2 * (8 + 5) + 2 * 4 + 2 * 4 * 8)  # Q, dO; lse, delta; dQ there and back
        assert hbm.backward(tiles, s, blocks) == 3 * (4 * queries + 2 * columns * 13 * (2 + 4)), blocks


@pytest.mark.parametrize("d", [16, 64, 128])
def test_flash_attention_is_between_the_bounds_of_the_io_model(d):
    """N²d²/(3M) - M <= elements <= 2N²d(2d + 3)/(M - 4d - 3) + 4Nd for d² <= M, one key streamed at a time."""
    for n, m in product((512, 4096), (d * d, 4 * d * d, 16 * d * d)):
        blocks, one = hbm.largest(m, d), Shape(1, 1, d, d)
        tiles = packed((0, n), (0, n), Mask())
        elements = (hbm.forward(tiles, one, blocks) - 4 * n) // 2  # the lse besides
        assert elements == 2 * n * d + 2 * n * d * -(-n // blocks.queries)
        assert n * n * d * d / (3 * m) - m <= elements <= 2 * n * n * d * (2 * d + 3) / (m - 4 * d - 3) + 4 * n * d
        if n > m // d:
            assert elements < hbm.standard(n, n, d) or m == d * d


def test_more_on_chip_memory_is_fewer_bytes_down_to_reading_everything_once():
    tiles, one = packed((0, 4096), (0, 4096), Mask()), Shape(1, 1, 64, 64)
    found = [hbm.forward(tiles, one, hbm.largest(m, 64)) for m in (1 << 12, 1 << 13, 1 << 14, 1 << 16, 1 << 20)]
    assert found == sorted(found, reverse=True)
    assert found[-1] == 4096 * (4 * 64 * 2 + 4)
    ratio = (found[0] - found[-1]) / (found[2] - found[-1])
    assert 3.5 < ratio < 5  # Θ(1/M)


def test_what_is_on_chip_fits_with_its_scores_and_statistics_and_one_query_more_does_not():
    for m, d, keys in product((1 << 12, 1 << 14, 1 << 17), (16, 64, 128), (1, 8)):
        b, c = hbm.largest(m, d, keys)

        def held(queries, keys=c, dim=d):
            return 2 * queries * dim + 2 * keys * dim + queries * keys + 2 * queries

        assert held(b) <= m < held(b + 1)


def test_too_little_on_chip_memory_is_refused():
    assert hbm.largest(259, 64) == Blocks(1, 1) and hbm.largest(130 + 2 * 129, 64, keys=2) == Blocks(1, 2)
    with pytest.raises(ValueError, match="259 is the least"):
        hbm.largest(258, 64)
