"""What is allowed to meet: a mask in global positions, and the tiles it leaves of queries x keys. Integers only: no torch.

A mask is a union of disjoint pieces, each a Tile in global positions: a rectangle of queries x keys and the band kept inside it.
Documents are pieces, a window is a band, `Slices` are any pieces. Every question is asked of global positions, never of ranks or
steps: the same mask serves every layout and order.

    piece    lo <= j - i <= hi for global positions i, j inside the rectangle
    spans    what a rank holds: ascending, of one step
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

from distflash.parallel.slices import Slices
from distflash.tile import Band, Tile, Tiles

_FAR = 1 << 62  # beyond every position


@dataclass(frozen=True)
class Mask:
    """Query at position i sees key at position j iff -left <= j - i <= right and both lie in the same document.

    `left`, `right`: None is unlimited; causal is right = 0. `documents`: borders (cu_seqlens), None is one document.
    """

    left: int | None = None
    right: int | None = None
    documents: tuple[int, ...] | None = None

    @cached_property
    def pieces(self) -> tuple[Tile, ...]:
        """One for each document."""
        documents = (0, _FAR) if self.documents is None else self.documents
        return _pieces(documents, documents, self)


AnyMask = Mask | Slices


def packed(cu_q: tuple[int, ...], cu_k: tuple[int, ...], mask: AnyMask) -> Tiles:
    """Tiles of one device that holds all documents, whose queries and keys may differ in number.

    A window is aligned at each document's end (one document is the dense case: key j is seen by query i iff
    -left <= j - (i + Sk - Sq) <= right); other masks are in positions of queries and of keys.
    """
    pieces = _pieces(cu_q, cu_k, mask) if isinstance(mask, Mask) else mask.pieces
    return meet(cut([range(cu_q[-1])], pieces), [range(cu_k[-1])], cu_q[-1])


def tiles(q_spans: Sequence[range], kv_spans: Sequence[range], mask: AnyMask) -> Tiles:
    """Every non-empty rectangle of q x kv, cropped to the rows and columns that take part."""
    return meet(cut(q_spans, mask.pieces), kv_spans, sum(map(len, q_spans)))


def unseen(tables: Iterable[Tiles]) -> tuple[range, ...]:
    """The keys of which none of these tables, all of the same keys, keeps any; by their storage index."""
    tables = list(tables)
    return _outside([tile.kv for table in tables for tile in table], tables[0].kv_len)


def blind(tables: Iterable[Tiles]) -> tuple[range, ...]:
    """The queries of which none of these tables, all of the same queries, keeps any; by their storage index."""
    tables = list(tables)
    return _outside([tile.q for table in tables for tile in table], tables[0].q_len)


def _outside(parts: Iterable[slice], length: int) -> tuple[range, ...]:
    """What of 0 .. length - 1 is in none of these sides of tiles, which are cropped: all that is in one takes part."""
    found, at = [], 0
    for start, stop in sorted({(part.start, part.stop) for part in parts}):
        found.append(range(at, start))
        at = max(at, stop)
    return tuple(part for part in (*found, range(at, length)) if part)


class Run(NamedTuple):
    """Queries of one span that lie in one piece: `span` is number `n` of those given, and starts at storage index `at`."""

    piece: Tile
    n: int
    at: int
    span: range


def cut(spans: Sequence[range], pieces: Iterable[Tile]) -> list[Run]:
    """The queries that a rank holds, cut at the borders of the pieces; piece by piece."""
    return list(_Held(spans).cut(pieces))


def meet(rows: Iterable[Run], kv_spans: Sequence[range], q_len: int) -> Tiles:
    """The tiles of `q_len` queries that were cut by pieces, and the keys of a block."""
    keys = _Held(kv_spans)
    found = (_meeting(run, at, kv) for run in rows for _, at, kv in keys.inside(*_reach(run)))
    return Tiles(tuple(_coalesced(found)), q_len, keys.at[-1])


def kept(run: Run) -> int:
    """How many pairs (query, key) are kept of a run of step 1, whoever holds the keys."""
    kv = run.piece.kv
    band = _band(run.piece, run.span, range(kv.start, kv.stop))
    return Tile(slice(0, len(run.span)), slice(0, kv.stop - kv.start), band).area


@lru_cache(maxsize=1)  # every rank's plan asks it of the same two, one after the other
def needs(layout: tuple[tuple[range, ...], ...], mask: AnyMask) -> tuple[int, ...]:
    """For each rank, as bits, the ranks of whose keys some query of its own sees one.

    All ranks' spans are sorted once, so that a run of queries finds the owners of the keys it reaches by bisection. Stripes
    interleave and are each sorted by themselves; those that no multiple of the step brings into the band are passed over.
    """
    held = sorted(((span, rank) for rank, spans in enumerate(layout) for span in spans), key=lambda item: item[0].start)
    step = held[0][0].step
    groups = [held] if step == 1 else [[item] for item in held]
    columns = [(_Held([span for span, _ in group]), [rank for _, rank in group]) for group in groups]
    everyone = sum(1 << rank for rank, spans in enumerate(layout) if spans)
    found = [0] * len(layout)
    for rows, ranks in columns:
        for run in rows.cut(mask.pieces):
            rank = ranks[run.n]
            if found[rank] == everyone:
                continue
            reach, (lo, hi) = _reach(run), _bounds(run.piece)
            for keys, owners in columns:
                if step > 1 and (found[rank] >> owners[0] & 1 or (keys.spans[0].start - run.span.start - lo) % step > hi - lo):
                    continue
                for n, _, kv in keys.inside(*reach):
                    if not found[rank] >> owners[n] & 1 and _meeting(run, 0, kv):
                        found[rank] |= 1 << owners[n]
    return tuple(found)


class _Held:
    """Ascending spans of one step, searched by position."""

    def __init__(self, spans: Sequence[range]):
        assert len({span.step for span in spans}) <= 1, f"spans must share a step, got {spans}"
        self.spans, self.ends = spans, [span.stop for span in spans]
        self.at = [0, *accumulate(map(len, spans))]
        assert all(a < b for a, b in pairwise(span.start for span in spans)), f"spans must ascend, got {spans}"

    def inside(self, start: int, stop: int) -> Iterator[tuple[int, int, range]]:
        """(number, storage index, part) of the spans that have tokens in start..stop, cut to them."""
        for n in range(bisect_right(self.ends, start), len(self.spans)):
            span = self.spans[n]
            if span.start >= stop:
                return
            if start <= span.start and span.stop <= stop:
                yield n, self.at[n], span
                continue
            i, j = (max(0, min(len(span), -((span.start - token) // span.step))) for token in (start, stop))
            if i < j:
                yield n, self.at[n] + i, span[i:j]

    def cut(self, pieces: Iterable[Tile]) -> Iterator[Run]:
        """The spans' parts that lie in each piece's queries."""
        for piece in pieces:
            for found in self.inside(piece.q.start, piece.q.stop):
                yield Run(piece, *found)


def _pieces(cu_q: tuple[int, ...], cu_k: tuple[int, ...], mask: Mask) -> tuple[Tile, ...]:
    """A window in each document, aligned at the document's end."""
    left, right = (_FAR if side is None else side for side in (mask.left, mask.right))
    found = []
    for (q0, q1), (k0, k1) in zip(pairwise(cu_q), pairwise(cu_k), strict=True):
        shift = (k1 - k0) - (q1 - q0)
        found.append(Tile(slice(q0, q1), slice(k0, k1), Band(shift - left, shift + right)).cropped())
    return tuple(filter(None, found))


def _meeting(run: Run, at: int, kv: range) -> Tile | None:
    """What is kept of a run of queries x a run of keys that starts at storage index `at`; None if nothing is."""
    q = slice(run.at, run.at + len(run.span))
    return Tile(q, slice(at, at + len(kv)), _band(run.piece, run.span, kv)).cropped()


def _reach(run: Run) -> tuple[int, int]:
    """The first key that the run's first query may see, and one past the last that its last may."""
    kv, (lo, hi) = run.piece.kv, _bounds(run.piece)
    return max(kv.start, run.span[0] + lo), min(kv.stop, run.span[-1] + hi + 1)


def _bounds(piece: Tile) -> tuple[int, int]:
    """lo <= j - i <= hi for the global positions i, j that the piece keeps."""
    shift = piece.kv.start - piece.q.start
    return piece.band.lo + shift, piece.band.hi + shift


def _band(piece: Tile, q: range, kv: range) -> Band:
    """The piece's band in local indices: q[i] = a + s*i, kv[j] = b + s*j."""
    assert q.step == kv.step, f"spans must share a step, got {q.step} and {kv.step}"
    shift, step, far = q.start - kv.start, q.step, len(q) + len(kv)
    lo, hi = _bounds(piece)
    return Band(max(-((-shift - lo) // step), -far), min((shift + hi) // step, far))


def _coalesced(found: Iterable[Tile | None]) -> list[Tile]:
    """Join neighbours that are both wholly kept: fewer, larger rectangles."""
    done: list[Tile] = []
    for tile in found:
        if tile is None:
            continue
        last = done[-1] if done else None
        if last and last.full and tile.full and last.q == tile.q and last.kv.stop == tile.kv.start:
            done[-1] = Tile.whole(tile.q, slice(last.kv.start, tile.kv.stop))
        elif last and last.full and tile.full and last.kv == tile.kv and last.q.stop == tile.q.start:
            done[-1] = Tile.whole(slice(last.q.start, tile.q.stop), tile.kv)
        else:
            done.append(tile)
    return done
