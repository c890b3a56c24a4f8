"""How a tile is cut into rectangles that another project's kernel can express."""

from __future__ import annotations

import random

import pytest
import torch

from distflash.kernels.adapters.pieces import pieces, window
from distflash.tile import Band, Tile, Tiles

FAR = 1 << 20


def kept(piece: Tile) -> torch.Tensor:
    offset = torch.arange(piece.columns) - torch.arange(piece.rows).unsqueeze(1)
    return (offset >= piece.band.lo) & (offset <= piece.band.hi)


def tiles_of(rows, columns, causal, left, right, bottom_right=True) -> Tiles:
    """What a FlashAttention call keeps, as a tile table; -1 and None are unlimited."""
    corner = columns - rows if bottom_right else 0
    left, right = (None if w is None or w < 0 else w for w in (left, 0 if causal else right))
    band = Band(-FAR if left is None else corner - left, FAR if right is None else corner + right)
    return Tiles((Tile(slice(0, rows), slice(0, columns), band),), rows, columns)


@pytest.mark.parametrize("windows", [False, True])
def test_pieces_keep_each_pair_of_their_tile_once_and_are_such_as_the_kernel_can_express(windows):
    choose = random.Random(1)
    sizes = [(n, m) for n in (1, 2, 5, 9) for m in (1, 2, 4, 8, 13)]
    for rows, columns in sizes:
        bands = [(lo, hi) for lo in (-FAR, *range(-rows, columns + 1)) for hi in (*range(-rows, columns + 1), FAR) if lo <= hi]
        for lo, hi in choose.sample(bands, min(60, len(bands))):
            tile = Tile(slice(3, 3 + rows), slice(7, 7 + columns), Band(lo, hi))
            seen = torch.zeros(3 + rows, 7 + columns, dtype=torch.int)
            for piece in pieces(tile, windows):
                mine = kept(piece)
                seen[piece.q, piece.kv] += mine
                assert mine.any(1).all() and mine.any(0).all()  # no row or key for which the kernel has no answer
                keep = window(piece)
                assert windows or keep == (None, None) or (piece.rows == piece.columns and keep in ((None, 0), (0, None)))
                assert torch.equal(mine, kept(tiles_of(piece.rows, piece.columns, keep.causal, *keep).tiles[0]))
                assert all(w is None or w >= 0 for w in keep)  # a negative window is an unlimited one
            assert torch.equal(seen[3:, 7:], kept(tile).int()) and seen.sum() == tile.area, tile


def test_a_full_or_causal_tile_is_one_call_and_a_causal_rectangle_two():
    square = Tile(slice(0, 8), slice(0, 8), Band(-FAR, 0))
    assert list(pieces(square, True)) == list(pieces(square, False)) == [square]
    whole = Tile.whole(slice(0, 3), slice(2, 9))
    assert list(pieces(whole, False)) == [whole]
    wide, late = Tile(slice(0, 4), slice(0, 9), Band(-FAR, 5)), Tile(slice(0, 4), slice(0, 9), Band(-FAR, 7))
    assert [len(list(pieces(t, windows))) for t in (wide, late) for windows in (True, False)] == [1, 2, 2, 3]
