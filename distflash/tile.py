"""What a plan hands to a kernel: which local queries meet which local keys. Integers only.

Band    keep (i, j) iff lo <= j - i <= hi              full, causal, sliding window, and shifts of them
Tile    a rectangle of rows x columns, and the band kept inside it: local in what a kernel gets, global in a mask
Tiles   every rectangle of one visit: a kernel works through all of them in one launch
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Band:
    """Keep key j for query i iff lo <= j - i <= hi, both counted from the tile's corner."""

    lo: int
    hi: int


@dataclass(frozen=True)
class Tile:
    """Local queries `q` against local keys `kv`, the band counted from (q.start, kv.start)."""

    q: slice
    kv: slice
    band: Band

    @property
    def rows(self) -> int:
        return self.q.stop - self.q.start

    @property
    def columns(self) -> int:
        return self.kv.stop - self.kv.start

    @property
    def full(self) -> bool:
        """True if the band keeps the whole rectangle."""
        return self.band.hi >= self.columns - 1 and self.band.lo <= 1 - self.rows

    @property
    def area(self) -> int:
        """How many (query, key) pairs are kept."""
        return _kept(self.rows, self.columns, self.band.hi) - _kept(self.rows, self.columns, self.band.lo - 1)

    def cropped(self) -> Tile | None:
        """Without the rows that see no key and the keys that no row sees. None if nothing is left."""
        m, n, lo, hi = self.rows, self.columns, self.band.lo, self.band.hi
        i0, i1 = max(0, -hi), min(m, n - lo)
        j0, j1 = max(0, lo), min(n, m + hi)
        if i0 >= i1 or j0 >= j1 or lo > hi:
            return None
        if (i0, i1, j0, j1) == (0, m, 0, n):
            return self
        q, kv = slice(self.q.start + i0, self.q.start + i1), slice(self.kv.start + j0, self.kv.start + j1)
        return Tile(q, kv, Band(lo - j0 + i0, hi - j0 + i0))

    def within(self, keys: range) -> Tile | None:
        """What is kept of it among some of the keys, which are counted from the first of these. None if nothing is."""
        start, stop = max(self.kv.start, keys.start), min(self.kv.stop, keys.stop)
        ahead = start - self.kv.start
        kv = slice(start - keys.start, stop - keys.start)
        return Tile(self.q, kv, Band(self.band.lo - ahead, self.band.hi - ahead)).cropped() if start < stop else None

    @classmethod
    def whole(cls, q: slice, kv: slice) -> Tile:
        """The rectangle without a mask."""
        return cls(q, kv, Band(q.start - q.stop + 1, kv.stop - kv.start - 1))


def _kept(rows: int, columns: int, hi: int) -> int:
    """Pairs of a rows x columns rectangle with j - i <= hi: sum over i of clamp(i + hi + 1, 0, columns)."""
    ramp, flat = max(0, -hi), max(0, columns - hi)  # first row that keeps a key; first row that keeps them all
    ramp, flat = min(ramp, rows), min(max(ramp, flat), rows)
    return (ramp + flat + 1 + 2 * hi) * (flat - ramp) // 2 + columns * (rows - flat)


@dataclass(frozen=True, eq=False)
class Tiles:
    """The rectangles of one visit, over `q_len` local queries and `kv_len` local keys.

    No pair (query, key) is kept by two tiles. Compared by identity, so that kernels can cache what they derive from it.
    """

    tiles: tuple[Tile, ...]
    q_len: int
    kv_len: int

    def __iter__(self) -> Iterator[Tile]:
        return iter(self.tiles)

    def __len__(self) -> int:
        return len(self.tiles)

    @cached_property
    def keys(self) -> range:
        """From the first to the last local key that some query sees."""
        return range(min((t.kv.start for t in self.tiles), default=0), max((t.kv.stop for t in self.tiles), default=0))

    def within(self, keys: range) -> Tiles:
        """The rectangles of some of the keys, as a block of their own."""
        return Tiles(tuple(tile for t in self.tiles if (tile := t.within(keys))), self.q_len, len(keys))

    @property
    def area(self) -> int:
        """How many (query, key) pairs are kept: attention costs 4 * area * D FLOPs a head forward, 10 backward."""
        return sum(t.area for t in self.tiles)
