"""The Hopper kernels' work list covers each kept pair exactly once, marks no tile as inner that needs a mask, and sorts longest first."""

import random

import numpy as np
import pytest
import torch

pytest.importorskip("triton")  # the package's front imports it, the schedule does not

from distflash.kernels.hopper.schedule import schedule
from distflash.tile import Band, Tile, Tiles

FAR = 1 << 20


def kept(tiles: Tiles) -> np.ndarray:
    seen = np.zeros((tiles.q_len, tiles.kv_len), int)
    for t in tiles:
        i, j = np.arange(t.rows)[:, None], np.arange(t.columns)[None, :]
        seen[t.q, t.kv] += (j - i >= t.band.lo) & (j - i <= t.band.hi)
    return seen


def in_turn(left: int, inner: int, total: int) -> list[int]:
    """A segment's tiles in the forward's order (forward.from_right): masked on the right, the last first; masked on the left; inner."""
    right = total - inner - left
    return [*range(total - 1, total - 1 - right, -1), *range(left), *range(left, left + inner)]


def covered(tiles: Tiles, rows: int, width: int, transposed: bool) -> np.ndarray:
    """What a kernel that follows the schedule would compute, tile by tile, in the kernel's order."""
    work = schedule(tiles, rows, width, torch.device("cpu"), transposed)
    shape = (tiles.kv_len, tiles.q_len) if transposed else (tiles.q_len, tiles.kv_len)
    seen = np.zeros(shape, int)
    for start, stop, at, count in work.blocks.tolist()[: work.busy]:
        assert count > 0 and stop - start <= rows
        for first, limit, lo, hi, left, inner, total, begin in work.segments[at : at + count].tolist():
            masked = total - inner
            order = in_turn(left, inner, total)
            assert sorted(order) == list(range(total)) and total > 0
            assert first >= 0 and (first % 4 == 0 or not transposed)  # what TMA can read of a vector of fp32
            for i, tile in enumerate(order):
                row = np.arange(start, start + rows)[:, None]
                col = np.arange(first + tile * width, first + (tile + 1) * width)[None, :]
                low = np.maximum(row + lo, begin) if work.left or transposed else first  # a forward with one bound
                keep = (col >= low) & (col < np.minimum(row + hi + 1, limit)) if i < masked else np.ones((rows, width), bool)
                if transposed:  # rows past the block's end must not reach dQ
                    assert i < masked or stop - start == rows
                keep = keep & (row < stop)
                at_row, at_col = np.nonzero(keep)
                assert (col[0, at_col] < work.reach).all()
                np.add.at(seen, (row[at_row, 0], col[0, at_col]), 1)
    return seen.T if transposed else seen


def some_tiles(seed: int) -> Tiles:
    r = random.Random(seed)
    tq, tk = r.randint(1, 70), r.randint(1, 70)
    if seed % 3 == 0:
        return Tiles((Tile(slice(0, tq), slice(0, tk), Band(r.randint(-80, 10), r.randint(0, 60))),), tq, tk)
    tiles, q, k = [], 0, 0
    for _ in range(3):
        q0, k0 = r.randint(q, tq), r.randint(k, tk)
        q1, k1 = r.randint(q0, tq), r.randint(k0, tk)
        tiles.append(Tile(slice(q0, q1), slice(k0, k1), Band(r.choice([-99, -9, -3, 0]), r.choice([-2, 0, 5, 99]))))
        q, k = (q1, k1) if seed % 3 == 1 else (0, k1)
    return Tiles(tuple(tiles), tq, tk)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("seed", range(45))
def test_each_kept_pair_is_computed_once(seed, transposed):
    tiles = some_tiles(seed)
    for rows, width in ((16, 8), (8, 16), (16, 16)):
        np.testing.assert_array_equal(covered(tiles, rows, width, transposed), kept(tiles))


@pytest.mark.parametrize("transposed", [False, True])
def test_rows_that_meet_two_entries(transposed):
    """The table of the device script on which a kernel that skips the first tile of every entry was found."""
    a, b = Tile(slice(0, 320), slice(0, 190), Band(-FAR, FAR)), Tile(slice(64, 320), slice(250, 500), Band(-FAR, 20))
    tiles = Tiles((a, b), 320, 512)
    for rows, width in ((128, 128), (192, 128), (128, 64), (64, 32)):
        np.testing.assert_array_equal(covered(tiles, rows, width, transposed), kept(tiles))


def spared_of(work, block: int, rows: int, width: int) -> list[tuple[bool, bool]]:
    """Of the 64 rows of each consumer: do they skip the first tile, need no mask in the last that has some? What is told must be true."""
    start, _, at, _ = work.blocks[block].tolist()
    first, limit, lo, hi, left, inner, total, begin = work.segments[at].tolist()
    told = [tuple(bool(work.lines[block, 4] >> shift + c & 1) for shift in (0, 8)) for c in range(rows // 64)]
    for c, (late, plain) in enumerate(told):
        row = np.arange(start + 64 * c, start + 64 * c + 64)[:, None]
        for tile, claimed, wanted in ((0, late, False), (total - inner - 1, plain, True)):
            if claimed:
                assert total > 1 or wanted
                col = first + in_turn(left, inner, total)[tile] * width + np.arange(width)[None, :]
                assert (((col >= np.maximum(row + lo, begin)) & (col < np.minimum(row + hi + 1, limit))) == wanted).all()
    return told


@pytest.mark.parametrize("seed", range(20))
def test_who_is_spared_a_tile_or_its_mask_does_not_need_it(seed):
    small = some_tiles(seed)
    longer = lambda x: slice(9 * x.start, 9 * x.stop)  # noqa: E731
    entries = [Tile(longer(t.q), longer(t.kv), Band(9 * t.band.lo, 9 * t.band.hi)) for t in small]
    tiles = Tiles(tuple(entries), 9 * small.q_len, 9 * small.kv_len)
    for rows, width in ((128, 64), (192, 128), (128, 128)):
        work = schedule(tiles, rows, width, torch.device("cpu"))
        for block in range(work.busy):
            spared_of(work, block, rows, width)


def test_on_the_diagonal_a_consumer_skips_what_is_right_of_it_and_masks_nothing_left_of_it():
    n, both, neither, skips, plain = 768, (True, True), (False, False), (True, False), (False, True)
    causal = Tiles((Tile(slice(0, n), slice(0, n), Band(-FAR, 0)),), n, n)
    for rows, width, wanted in (
        (192, 128, [[skips, skips, plain], [skips, plain, plain]] * 2),
        (128, 64, [[skips, plain]] * 6),
        (128, 128, [[neither, neither]] * 6),
        (192, 64, [[skips, both, plain]] * 4),
    ):
        work = schedule(causal, rows, width, torch.device("cpu"))
        told = [spared_of(work, block, rows, width) for block in reversed(range(work.busy))]
        assert told == wanted


def test_a_causal_block_has_masks_on_its_diagonal_only():
    n = 1024
    work = schedule(Tiles((Tile(slice(0, n), slice(0, n), Band(-FAR, 0)),), n, n), 128, 128, torch.device("cpu"))
    totals = [row[6] for row in work.segments.tolist()]
    masked = [row[6] - row[5] for row in work.segments.tolist()]
    assert sorted(totals) == list(range(1, 9)) and set(masked) == {1} and not work.idle
    assert work.blocks[:, 0].tolist() == sorted(work.blocks[:, 0].tolist(), reverse=True)  # longest first


@pytest.mark.parametrize(
    ("blocks", "heads", "at_once", "programs"), [(64, 64, 4, 132), (16, 256, 16, 132), (256, 16, 1, 132), (5, 6, 3, 7), (3, 2, 1, 6)]
)
def test_every_program_gets_the_same_work(blocks, heads, at_once, programs):
    """Causal. Dealt out in rounds back and forth, as once, the first three gave one program 1.45 to 1.51 times the mean."""
    n = blocks * 128
    work = schedule(Tiles((Tile(slice(0, n), slice(0, n), Band(-FAR, 0)),), n, n), 128, 128, torch.device("cpu"))
    order = work.order(heads, at_once, programs)
    assert order.dtype == torch.int32 and order.shape[0] == programs and order is work.order(heads, at_once, programs)
    items = [[tuple(x[:2]) for x in row if x[0] >= 0] for row in order.tolist()]
    for p, row in enumerate(items):  # what a kernel reads of an item is its block's, and its first segment's
        assert row
        for r, (block, _) in enumerate(row):
            fields = work.blocks[block].tolist()
            assert order[p, r, 2:].tolist() == [*fields, len(row), work.lines[block, 4], *work.segments[fields[2]].tolist()]
    assert sorted(x for row in items for x in row) == [(b, h) for b in range(blocks) for h in range(heads)]
    assert all((order[p, len(row) :, 0] == -1).all() for p, row in enumerate(items))  # nothing after the first hole
    loads = [sum(work.work[b] for b, _ in row) for row in items]
    mean, longest = sum(loads) / programs, max(work.work)
    assert max(loads) <= max(1.02 * mean, longest) if programs == 132 else max(loads) <= mean + longest


def test_heads_are_worked_on_in_groups():
    n = 1024
    work = schedule(Tiles((Tile(slice(0, n), slice(0, n), Band(-FAR, 0)),), n, n), 128, 128, torch.device("cpu"))
    order = work.order(8, 2, 4)
    for row in order.tolist():
        groups = [h // 2 for b, h, *_ in row if b >= 0]
        assert groups == sorted(groups)
    alone = work.order(8, 2, 64)  # a program an item: longest blocks of the first two heads first
    assert alone.shape == (64, 1, 16) and alone[:3, 0, :2].tolist() == [[0, 0], [0, 1], [1, 0]]


def test_only_a_band_that_cuts_on_the_left_needs_the_left_bound():
    causal, window = Band(-FAR, 0), Band(-100, 0)
    for bands, left in (([causal], False), ([Band(-FAR, FAR)], False), ([window], True), ([causal, window], True)):
        tiles = Tiles(tuple(Tile(slice(300 * n, 300 * n + 300), slice(10, 310), band) for n, band in enumerate(bands)), 600, 310)
        assert schedule(tiles, 128, 128, torch.device("cpu")).left == left


def test_rows_in_no_tile_are_idle():
    n = 300
    work = schedule(Tiles((Tile(slice(50, 100), slice(0, n), Band(-FAR, FAR)),), n, n), 64, 64, torch.device("cpu"))
    assert work.idle and work.busy == 1 and work.blocks[0, :2].tolist() == [50, 100]
    assert schedule(Tiles((), n, n), 64, 64, torch.device("cpu")).busy == 0
