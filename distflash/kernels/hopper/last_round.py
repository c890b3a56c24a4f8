"""The last round of the one-pass backward's programs: split by queries where it would leave most multiprocessors idle.

Programs of a whole rectangle take equally long, so they run in rounds of one a multiprocessor: 4,096 of them on 132 are 31 rounds and four
programs, 3 % of the time for 0.1 % of the work. Programs are dealt out by key blocks and heads (`program.place`), so what is left over is
a rectangle, too: keys x heads of the last batch element. It is launched after the others with its queries in pieces, which stand where
batch elements stand; the pieces' dk and dv are summed in fp32, and dq is added up as by any program. Other masks leave little: their
longest programs start first.

Legend: B batch, T tokens, H heads, D head dim; P pieces, R of their queries each.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch import Tensor

from distflash.tile import Tile, Tiles

PIECE = 256  # queries of a piece are a multiple of this: what a program's start and end take is less than a third of its time
WORTH = 2048  # queries x heads of a group from which on a round takes longer than the launches that split it


@dataclass(frozen=True)
class LastRound:
    """Programs of the last batch element that are left over when all rounds are full."""

    programs: int
    rows: slice  # the queries that they meet
    keys: slice
    heads: slice  # of keys and values
    pieces: int
    tiles: Tiles  # what a piece keeps: all

    def queries(self, x: Tensor, group: int) -> Tensor:
        """[B, T, H, D] of queries -> their [P, R, H', D], a view."""
        return x[-1, self.rows, self.heads.start * group : self.heads.stop * group].unflatten(0, (self.pieces, -1))

    def stats(self, x: Tensor, batch: int, group: int) -> Tensor:
        """[B * H, at least T] -> [P * H', R]."""
        lines = x.unflatten(0, (batch, -1))[-1, self.heads.start * group : self.heads.stop * group, self.rows]
        return lines.unflatten(1, (self.pieces, -1)).transpose(0, 1).flatten(0, 1).contiguous()

    def repeated(self, x: Tensor) -> Tensor:
        """[B, T, Hk, D] of keys -> these, once a piece."""
        return self.here(x).expand(self.pieces, -1, -1, -1)

    def here(self, x: Tensor) -> Tensor:
        """[B, T, Hk, D] of keys -> these, a view."""
        return x[-1, self.keys, self.heads]


def last_round(tiles: Tiles, block: int, blocks: int, per: int, batch: int, heads: int, group: int, processors: int) -> LastRound | None:
    """What to split of programs of `blocks` blocks of `block` keys and batch * heads heads, `per` at a time; None if nothing is won."""
    tile, programs = next(iter(tiles)), blocks * batch * heads
    left = programs % processors
    wide, high = min(left, per), -(-left // per)  # heads, blocks: those of the highest numbers
    if len(tiles) > 1 or not tile.full or programs < processors or not left or wide > heads or high > blocks or tile.rows * group < WORTH:
        return None
    pieces = max((n for n in range(1, processors // (wide * high) + 1) if tile.rows % (n * PIECE) == 0), default=1)
    if pieces == 1:
        return None
    keys = slice(tile.kv.start + (blocks - high) * block, tile.kv.stop)
    whole = _pieces_of(tiles, tile.rows // pieces, keys.stop - keys.start)
    return LastRound(wide * high, tile.q, keys, slice(heads - wide, heads), pieces, whole)


_HELD: WeakKeyDictionary[Tiles, dict[tuple[int, int], Tiles]] = WeakKeyDictionary()


def _pieces_of(tiles: Tiles, rows: int, keys: int) -> Tiles:
    """`rows` queries that all see `keys` keys; kept as long as `tiles` live, as its schedule is: a captured graph reads that."""
    held = _HELD.setdefault(tiles, {})
    if (rows, keys) not in held:
        held[rows, keys] = Tiles((Tile.whole(slice(0, rows), slice(0, keys)),), rows, keys)
    return held[rows, keys]
