"""The tile table against brute force: every (row, column) pair that the tiles keep, once, and no other."""

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distflash.kernels.table import column_table, row_table
from distflash.tile import Band, Tile, Tiles

CPU = torch.device("cpu")


@st.composite
def tables(draw) -> Tiles:
    """Rectangles that share no pair: a grid of cuts, each cell with a band of its own or left out."""
    q_len, kv_len = draw(st.integers(0, 40)), draw(st.integers(0, 40))
    cuts = [sorted({0, n, *draw(st.lists(st.integers(0, n), max_size=3))}) for n in (q_len, kv_len)]
    tiles = []
    for q0, q1 in pairwise(cuts[0]):
        for k0, k1 in pairwise(cuts[1]):
            if draw(st.booleans()):
                lo = draw(st.integers(-50, 50))
                tiles.append(Tile(slice(q0, q1), slice(k0, k1), Band(lo, lo + draw(st.integers(0, 60)))))
    return Tiles(tuple(tiles), q_len, kv_len)


def kept_by_tiles(tiles: Tiles) -> torch.Tensor:
    count = torch.zeros(tiles.q_len, tiles.kv_len, dtype=torch.int)
    for tile in tiles:
        ahead = torch.arange(tile.columns)[None, :] - torch.arange(tile.rows)[:, None]
        count[tile.q, tile.kv] += (ahead >= tile.band.lo) & (ahead <= tile.band.hi)
    return count


def kept_by_table(table, rows: int, columns: int) -> torch.Tensor:
    count = torch.zeros(rows, columns, dtype=torch.int)
    for start, stop, first, entries in table.blocks.tolist():
        for begin, end, lo, hi in table.entries.tolist()[first : first + entries]:
            ahead = torch.arange(begin, end)[None, :] - torch.arange(start, stop)[:, None]
            count[start:stop, begin:end] += (ahead >= lo) & (ahead <= hi)
    return count


@settings(max_examples=150, deadline=None)
@given(tiles=tables(), block=st.sampled_from([1, 4, 16, 64]))
def test_both_tables_keep_exactly_what_the_tiles_keep(tiles, block):
    kept = kept_by_tiles(tiles)
    assert torch.equal(kept_by_table(row_table(tiles, block, CPU), tiles.q_len, tiles.kv_len), kept)
    assert torch.equal(kept_by_table(column_table(tiles, block, CPU), tiles.kv_len, tiles.q_len), kept.T)


@settings(max_examples=150, deadline=None)
@given(tiles=tables(), block=st.sampled_from([1, 4, 16, 64]))
def test_blocks_cover_every_row_once_and_busy_ones_come_first_longest_first(tiles, block):
    table, kept = row_table(tiles, block, CPU), kept_by_tiles(tiles)
    rows = [row for start, stop, *_ in table.blocks.tolist() for row in range(start, stop)]
    assert sorted(rows) == list(range(tiles.q_len))
    assert all(0 < stop - start <= block for start, stop, *_ in table.blocks.tolist())
    for start, stop, *_ in table.blocks.tolist()[table.busy :]:
        assert not kept[start:stop].any(), "a block that is not busy keeps nothing"


@settings(max_examples=150, deadline=None)
@given(tiles=tables())
def test_without_a_lower_bound_no_row_starts_inside_an_entry(tiles):
    table = row_table(tiles, 8, CPU)
    if not table.has_lo:
        for start, stop, first, entries in table.blocks.tolist():
            for begin, _, lo, _ in table.entries.tolist()[first : first + entries]:
                assert all(row + lo <= begin for row in range(start, stop))


def test_a_table_is_built_once_for_a_device_and_block():
    tiles = Tiles((Tile.whole(slice(0, 9), slice(0, 9)),), 9, 9)
    assert row_table(tiles, 4, CPU) is row_table(tiles, 4, CPU)
    assert row_table(tiles, 4, CPU) is not row_table(tiles, 8, CPU)


def test_causal_blocks_run_longest_first():
    tiles = Tiles((Tile(slice(0, 64), slice(0, 64), Band(-63, 0)),), 64, 64)
    assert row_table(tiles, 16, CPU).blocks[:, 0].tolist() == [48, 32, 16, 0]
    assert column_table(tiles, 16, CPU).blocks[:, 0].tolist() == [0, 16, 32, 48]
