"""What is allowed to meet: a mask in global positions, and the tiles it leaves of queries x keys. Integers only: no torch.

Every question is asked of global positions, never of ranks or steps: the same mask serves every layout and order.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from distflash.parallel.layout import Span
from distflash.tile import Band, Tile, Tiles


@dataclass(frozen=True)
class Mask:
    """Query at position i sees key at position j iff -left <= j - i <= right and both lie in the same document.

    `left`, `right`: None is unlimited; causal is right = 0. `documents`: borders (cu_seqlens), None is one document.
    """

    left: int | None = None
    right: int | None = None
    documents: tuple[int, ...] | None = None

    def band(self, q: Span, kv: Span) -> Band:
        """The part of q x kv inside the window, in local indices: q[i] = a + s*i, kv[j] = b + s*j."""
        assert q.step == kv.step, f"spans must share a step, got {q.step} and {kv.step}"
        shift, step, far = q.start - kv.start, q.step, len(q) + len(kv)
        hi = far if self.right is None else (shift + self.right) // step
        lo = -far if self.left is None else -((self.left - shift) // step)
        return Band(max(lo, -far), min(hi, far))


def tiles(q_spans: Sequence[Span], kv_spans: Sequence[Span], mask: Mask) -> Tiles:
    """Every non-empty rectangle of q x kv, cropped to the rows and columns that take part."""
    by_document = defaultdict(list)
    for at, kv, document in _pieces(kv_spans, mask.documents):
        by_document[document].append((at, kv))
    found = (
        _crop(q_at, len(q), kv_at, len(kv), mask.band(q, kv))
        for q_at, q, document in _pieces(q_spans, mask.documents)
        for kv_at, kv in by_document[document]
    )
    return Tiles(tuple(_coalesced(found)), sum(map(len, q_spans)), sum(map(len, kv_spans)))


def packed(cu_q: tuple[int, ...], cu_k: tuple[int, ...], mask: Mask) -> Tiles:
    """Tiles of documents whose queries and keys may differ in number; a mask is aligned at each document's end.

    One document is the dense case: key j is seen by query i iff -left <= j - (i + Sk - Sq) <= right.
    """
    found = []
    for (q0, q1), (k0, k1) in zip(pairwise(cu_q), pairwise(cu_k), strict=True):
        m, n = q1 - q0, k1 - k0
        found.append(_crop(q0, m, k0, n, mask.band(range(n - m, n), range(n))))
    return Tiles(tuple(_coalesced(found)), cu_q[-1], cu_k[-1])


def _pieces(spans: Sequence[Span], documents: tuple[int, ...] | None) -> Iterator[tuple[int, Span, int]]:
    """Cut spans at document borders; yield (local offset, piece, document)."""
    at = 0
    for span in spans:
        if documents is None:
            yield at, span, 0
        else:
            first, last = (bisect_right(documents, token) - 1 for token in (span[0], span[-1]))
            for document in range(first, last + 1):
                i, j = (_first_at_least(span, documents[n]) for n in (document, document + 1))
                if i < j:
                    yield at + i, span[i:j], document
        at += len(span)


def _first_at_least(span: Span, token: int) -> int:
    """Index of the first element of the span that is >= token."""
    return max(0, min(len(span), -((span.start - token) // span.step)))


def _crop(q_at: int, m: int, kv_at: int, n: int, band: Band) -> Tile | None:
    """Drop rows that see no key and keys that no row sees. None if nothing is left."""
    i0, i1 = max(0, -band.hi), min(m, n - band.lo)
    j0, j1 = max(0, band.lo), min(n, m + band.hi)
    if i0 >= i1 or j0 >= j1 or band.lo > band.hi:
        return None
    moved = Band(band.lo - j0 + i0, band.hi - j0 + i0)
    return Tile(slice(q_at + i0, q_at + i1), slice(kv_at + j0, kv_at + j1), moved)


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
