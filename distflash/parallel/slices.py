"""Custom masks: a union of disjoint rectangles of queries x keys, each with its kind. Integers only: no torch."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Sequence
from contextlib import suppress
from heapq import heappop, heappush
from itertools import pairwise
from operator import index
from typing import Any, NamedTuple

from distflash.parallel import handles
from distflash.tile import Band, Tile

KINDS = ("full", "causal", "inverse-causal", "band")


class Slice(NamedTuple):
    """Queries q[0]..q[1] see keys k[0]..k[1] (global positions, ends excluded; a builtin range will do too), by kind:

    full             all of them
    causal           up to the diagonal that ends in the last query and the last key: k[1] - j >= q[1] - i
    inverse-causal   from the diagonal that begins in the first query and the first key: j - k[0] >= i - q[0]
    band             -left <= j - i <= right for window_size (left, right), -1 is unlimited: i and j are global positions
    """

    q: tuple[int, int] | range
    k: tuple[int, int] | range
    kind: str = "full"
    window_size: tuple[int, int] = (-1, -1)


class Slices:
    """A mask: query i sees key j iff one of the slices says so. No pair may be in two of them; what is in none is not seen.

    `Slices([((0, 512), (0, 512), "causal"), ((512, 1024), (0, 128))])`: each a `Slice` or a tuple of its fields. Positions are
    global, on one device the indices of q and k. Causal is aligned at the last query and the last key of its rectangle, as
    FlashAttention and MagiAttention align it, inverse-causal at the first ones (MagiAttention again), and a band counts global
    positions, as FlexAttention's mask functions do: a rectangle on the diagonal has them all alike. The cost of attention
    follows `area`. Make it once and use it in all layers: plans are kept by its value.

    Raises TypeError or ValueError on what is no slice, on bad ranges and kinds, and on slices that share a pair.
    """

    def __init__(self, slices: Iterable[Slice | tuple[Any, ...]]):
        self.slices = tuple(_checked(n, given) for n, given in enumerate(slices))
        self._hash = hash(self.slices)
        self.handle = handles.new(self)
        found = [(n, piece) for n, piece in enumerate(_piece(s).cropped() for s in self.slices) if piece]
        _refuse_overlaps(found)
        self.pieces = tuple(sorted((piece for _, piece in found), key=lambda piece: (piece.q.start, piece.kv.start)))

    @classmethod
    def documents(cls, cu_seqlens: Sequence[int], *, causal: bool = True, window_size: tuple[int, int] = (-1, -1)) -> Slices:
        """Packed documents with borders (0, ..., S), each attending to itself, causal and within a window as asked."""
        left, right = _window("documents", window_size)
        window = (left, 0 if causal else right)
        return cls(Slice((a, b), (a, b), "band", window) for a, b in pairwise(checked_borders(cu_seqlens)) if a != b)

    @classmethod
    def prefix_lm(cls, length: int, prefix: int) -> Slices:
        """Every token sees the `prefix` first ones, and those up to itself (T5's prefix LM, arXiv:1910.10683, section 3.2.1)."""
        prefix = min(prefix, length)
        return cls([Slice((0, length), (0, prefix)), Slice((prefix, length), (prefix, length), "causal")])

    @classmethod
    def sinks_and_window(cls, length: int, sinks: int, window: int) -> Slices:
        """Causal: the `sinks` first tokens, the `window` tokens before, and itself (StreamingLLM, arXiv:2309.17453)."""
        if type(window) is not int or window < 0:
            raise ValueError(f"window={window!r} must be an integer, 0 (only itself) or more: causal=True has no limit")
        sinks = min(sinks, length)
        near = Slice((sinks, length), (sinks, length), "band", (window, 0))
        return cls([Slice((0, sinks), (0, sinks), "causal"), Slice((sinks, length), (0, sinks)), near])

    @classmethod
    def from_block_mask(
        cls, blocks: Any, block_size: int | tuple[int, int], lengths: tuple[int, int] | None = None, *, causal: bool = False
    ) -> Slices:
        """Blocks of queries x keys that are kept (1) or not (0): a matrix, as nested sequences, numpy array or tensor.

        `block_size` is one number or (queries, keys); `lengths` (queries, keys) cut the last blocks where they are no multiple.
        `causal` keeps only keys at or before the query's position. Neighbouring blocks become one slice.
        """
        rows = blocks.tolist() if hasattr(blocks, "tolist") else [list(row) for row in blocks]
        if not rows or not all(isinstance(row, list) and len(row) == len(rows[0]) for row in rows):
            raise ValueError("a block mask must be a matrix of 0 and 1 with at least one row")
        wrong = next((x for row in rows for x in row if x not in (0, 1)), None)
        if wrong is not None:
            raise ValueError(f"a block mask must hold 0 and 1, got {wrong!r}")
        size = _block_size(block_size)
        ends = (len(rows) * size[0], len(rows[0]) * size[1])
        if lengths and not (len(lengths) == 2 and all(end - s < n <= end for n, end, s in zip(lengths, ends, size, strict=True))):
            raise ValueError(
                f"{len(rows)} x {len(rows[0])} blocks of {size} cover {ends} (queries, keys): lengths={lengths} must end in the last blocks"
            )
        q_end, k_end = lengths or ends
        kind = ("band", (-1, 0)) if causal else ("full", (-1, -1))
        return cls(
            Slice((i * size[0], min(i1 * size[0], q_end)), (j * size[1], min(j1 * size[1], k_end)), *kind)
            for i, i1, j, j1 in _rectangles(rows)
        )

    @property
    def area(self) -> int:
        """How many (query, key) pairs are kept."""
        return sum(piece.area for piece in self.pieces)

    def check(self, cu_q: tuple[int, ...], cu_k: tuple[int, ...]) -> None:
        """Raise ValueError unless every slice lies inside the sequence, and inside one document where there are several."""
        for n, s in enumerate(self.slices):
            if s.q[0] == s.q[1] or s.k[0] == s.k[1]:
                continue
            if s.q[1] > cu_q[-1] or s.k[1] > cu_k[-1]:
                raise ValueError(f"slice {n} is {_shown(s)}, but there are {cu_q[-1]} queries and {cu_k[-1]} keys: cut it")
            documents = {bisect_right(cu, token) for cu, span in ((cu_q, s.q), (cu_k, s.k)) for token in (span[0], span[1] - 1)}
            if len(documents) > 1:
                raise ValueError(
                    f"slice {n} is {_shown(s)} and crosses a border of documents: cut it there, or, if tokens of one document are to see "
                    "another one, give the sequence its length instead of cu_seqlens"
                )

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Slices) and self._hash == other._hash and self.slices == other.slices)

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[Any, ...]:
        return Slices, (self.slices,)  # a copy has a handle of its own

    def __len__(self) -> int:
        return len(self.slices)

    def __repr__(self) -> str:
        return f"Slices({len(self)} slices, {self.area} pairs)"


def _checked(n: int, given: Any) -> Slice:
    """A slice of integers; the ends of ranges are in order."""
    try:
        s = Slice(*given)
    except TypeError:
        raise TypeError(f"slice {n} must be (q, k), (q, k, kind) or (q, k, 'band', (left, right)), got {given!r}") from None
    if s.kind not in KINDS:
        raise ValueError(f"slice {n} has kind={s.kind!r}: use one of {', '.join(map(repr, KINDS))}")
    q, k, window = _range(n, "q", s.q), _range(n, "k", s.k), _window(f"slice {n}", s.window_size)
    if s.kind != "band" and window != (-1, -1):
        raise ValueError(f"slice {n} is {s.kind} and has window_size={window!r}: only a slice of kind 'band' has a window")
    return Slice(q, k, s.kind, window)


def _window(name: str, given: Any) -> tuple[int, int]:
    if not (isinstance(given, Sequence) and len(given) == 2 and all(type(w) is int and w >= -1 for w in given)):
        raise ValueError(f"{name}: window_size={given!r} must be two integers (left, right), each -1 (unlimited) or more")
    return given[0], given[1]


def _range(n: int, name: str, given: Any) -> tuple[int, int]:
    if isinstance(given, range):
        if given.step != 1:
            raise ValueError(f"slice {n} has {name}={given}: positions must be consecutive")
        given = given.start, given.stop
    try:
        start, stop = map(index, given)
    except (TypeError, ValueError):
        raise TypeError(f"slice {n} has {name}={given!r}: it must be two integers (start, stop), or a range") from None
    if not 0 <= start <= stop:
        raise ValueError(f"slice {n} has {name}=({start}, {stop}): it must be 0 <= start <= stop, the stop excluded")
    return start, stop


def _shown(s: Slice) -> str:
    return f"(q={s.q}, k={s.k}, {s.kind!r})"


def _piece(s: Slice) -> Tile:
    """The slice as a tile in global positions."""
    (q0, q1), (k0, k1) = s.q, s.k
    m, n = q1 - q0, k1 - k0
    lo, hi = 1 - m, n - 1
    if s.kind == "causal":
        hi = n - m
    elif s.kind == "inverse-causal":
        lo = 0
    elif s.kind == "band":
        left, right = s.window_size
        lo = lo if left == -1 else q0 - k0 - left
        hi = hi if right == -1 else q0 - k0 + right
    return Tile(slice(q0, q1), slice(k0, k1), Band(lo, hi))


def _refuse_overlaps(pieces: list[tuple[int, Tile]]) -> None:
    """Raise ValueError if two pieces keep one pair: a sweep over the queries, with the pieces open there sorted by their keys."""
    opened: list[tuple[int, int]] = []  # (first key, index) of the pieces that hold the query where the sweep is
    closing: list[tuple[int, tuple[int, int]]] = []  # (end of its queries, entry in opened)
    widest = max((piece.columns for _, piece in pieces), default=0)
    for at, (n, piece) in sorted(enumerate(pieces), key=lambda item: item[1][1].q.start):
        while closing and closing[0][0] <= piece.q.start:
            _, entry = heappop(closing)
            del opened[bisect_left(opened, entry)]
        kv = piece.kv
        for _, other in opened[bisect_left(opened, (kv.start - widest, 0)) : bisect_left(opened, (kv.stop, 0))]:
            m, held = pieces[other]
            if pair := _shared(piece, held):
                a, b = sorted((n, m))
                raise ValueError(
                    f"slices {a} and {b} both let query {pair[0]} see key {pair[1]}, but must be disjoint: end one where the other begins"
                )
        entry = (kv.start, at)
        insort(opened, entry)
        heappush(closing, (piece.q.stop, entry))


def _shared(a: Tile, b: Tile) -> tuple[int, int] | None:
    """A pair (query, key) that two pieces keep, or None."""
    q = slice(max(a.q.start, b.q.start), min(a.q.stop, b.q.stop))
    kv = slice(max(a.kv.start, b.kv.start), min(a.kv.stop, b.kv.stop))
    if q.start >= q.stop or kv.start >= kv.stop:
        return None
    bands = [(t.band.lo + shift, t.band.hi + shift) for t in (a, b) for shift in [t.kv.start - t.q.start - kv.start + q.start]]
    both = Tile(q, kv, Band(max(lo for lo, _ in bands), min(hi for _, hi in bands))).cropped()
    return None if both is None else (both.q.start, both.kv.start + max(0, both.band.lo))


def checked_borders(cu_seqlens: Iterable[Any]) -> tuple[int, ...]:
    """Borders of documents (0, ..., S) as integers. Raises TypeError on others, ValueError where they do not start at 0 or fall."""
    try:
        cu = tuple(index(c) for c in cu_seqlens)
    except TypeError:
        raise TypeError(f"cu_seqlens must hold integers, got {cu_seqlens!r}") from None
    if len(cu) < 2 or cu[0] != 0:
        told = list(cu) if len(cu) <= 6 else f"[{', '.join(map(str, cu[:5]))}, ...]"
        raise ValueError(f"cu_seqlens must start at 0 and have one border more than documents, got {told}: prepend 0")
    falls = next((n for n in range(1, len(cu)) if cu[n] < cu[n - 1]), None)
    if falls is not None:
        raise ValueError(f"cu_seqlens must never decrease, got {cu[falls]} after {cu[falls - 1]} at index {falls}: give cumulative lengths")
    return cu


def _block_size(given: int | Iterable[int]) -> tuple[int, int]:
    """Of one number or (queries, keys)."""
    sizes: tuple[int, ...] = ()
    with suppress(TypeError):
        sizes = tuple(map(index, given if isinstance(given, Iterable) else (given, given)))
    if len(sizes) != 2 or min(sizes) < 1:
        raise ValueError(f"block_size={given!r} must be a positive integer or a pair of them, (queries, keys)")
    return sizes[0], sizes[1]


def _rectangles(rows: list[list[Any]]) -> list[tuple[int, int, int, int]]:
    """(first row, end row, first column, end column) of rectangles of ones: runs in a row, joined with equal runs above."""
    done, growing = [], {}  # growing: run of columns -> first row
    for i, row in enumerate([*rows, []]):
        edges = [0, *map(int, row), 0]
        starts = [j for j, (a, b) in enumerate(pairwise(edges)) if a < b]
        stops = [j for j, (a, b) in enumerate(pairwise(edges)) if a > b]
        runs = list(zip(starts, stops, strict=True))
        done += [(first, i, *run) for run, first in growing.items() if run not in set(runs)]
        growing = {run: growing.get(run, i) for run in runs}
    return done
