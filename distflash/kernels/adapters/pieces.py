"""A tile as the rectangles that another project's kernel can express: full, causal, or a window. Integers only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from distflash.tile import Band, Tile


class Window(NamedTuple):
    """What a piece keeps, in FlashAttention's words: bottom-right aligned, None is unlimited. (None, 0) is causal."""

    left: int | None
    right: int | None

    @property
    def causal(self) -> bool:
        return self == (None, 0)


def window(piece: Tile) -> Window:
    """The band of a piece, counted from the bottom right corner."""
    corner = piece.columns - piece.rows
    left = corner - piece.band.lo if piece.band.lo > 1 - piece.rows else None
    right = piece.band.hi - corner if piece.band.hi < piece.columns - 1 else None
    return Window(left, right)


def pieces(tile: Tile, windows: bool) -> Iterator[Tile]:
    """Cut a tile into rectangles that a kernel can express; every row of a piece sees a key, every key is seen.

    With `windows` a piece is full, causal from the bottom right corner, or a window. Without, it is full, or a square that keeps
    j <= i (causal, whatever the alignment), or a square that keeps j >= i (causal with both axes reversed).
    """
    cropped = tile.cropped()
    if cropped is None:
        return
    tile, lo, hi = cropped, cropped.band.lo, cropped.band.hi
    rows, columns = tile.rows, tile.columns
    below, above = lo > 1 - rows, hi < columns - 1  # which bound cuts something
    if not (below or above) or (below and windows):
        yield tile
    elif below and above:  # of hi - lo rows, either bound cuts on its own side of one column
        height = max(1, hi - lo)
        for at in range(0, rows, height):
            stop, middle = min(at + height, rows), min(max(0, at + hi), columns)
            yield from pieces(_part(tile, at, stop, 0, middle), windows)
            yield from pieces(_part(tile, at, stop, middle, columns), windows)
    elif below:
        yield from (_reversed(piece, tile) for piece in pieces(_reversed(tile, tile), windows))
    else:  # rows from `end` on see every key, `edge` keys are seen by every row
        end, edge = columns - hi, 0 if windows else hi
        yield _part(tile, 0, end, edge, columns)
        yield from pieces(_part(tile, 0, end, 0, edge), windows)
        yield from pieces(_part(tile, end, rows, 0, columns), windows)


def _part(tile: Tile, top: int, bottom: int, left: int, right: int) -> Tile:
    """Rows top..bottom and columns left..right of a tile."""
    q, kv, shift = tile.q.start, tile.kv.start, top - left
    return Tile(slice(q + top, q + bottom), slice(kv + left, kv + right), Band(tile.band.lo + shift, tile.band.hi + shift))


def _reversed(piece: Tile, tile: Tile) -> Tile:
    """A piece of `tile` with the rows and columns of `tile` counted from the other end."""
    q, kv = (slice(s.start + s.stop - x.stop, s.start + s.stop - x.start) for s, x in ((tile.q, piece.q), (tile.kv, piece.kv)))
    corner = piece.columns - piece.rows
    return Tile(q, kv, Band(corner - piece.band.hi, corner - piece.band.lo))
