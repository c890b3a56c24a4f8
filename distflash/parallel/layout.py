"""Who holds which tokens. Integers only: no torch.

    Span      a builtin `range` of global token indices, ascending in a rank; striped: one with a step
    Layout    tuple over ranks of tuples of Spans              layout[rank] lists that rank's tokens in storage order
    cu        document borders: 0 = cu[0] <= cu[1] <= ... <= cu[-1] = S, the global number of tokens
    P ranks, R ranks of the outer ring, U ranks of a Ulysses group: P = R * U

Nothing is padded: shards of any length, also empty ones, are legal.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from heapq import heappop, heappush
from itertools import pairwise

from distflash.parallel.mask import AnyMask, Mask, cut, kept

Span = range
Layout = tuple[tuple[Span, ...], ...]


def contiguous(cu: tuple[int, ...], ranks: int) -> Layout:
    """Rank r holds the r-th of P equal pieces of the whole sequence."""
    return tuple(tuple(_joined([piece])) for piece in _pieces(range(cu[-1]), ranks))


def by_document(cu: tuple[int, ...], ranks: int) -> Layout:
    """Rank r holds the r-th of P equal pieces of each document."""
    documents = [_pieces(range(start, stop), ranks) for start, stop in pairwise(cu)]
    return tuple(tuple(_joined(pieces[r] for pieces in documents)) for r in range(ranks))


def zigzag(cu: tuple[int, ...], ranks: int) -> Layout:
    """Rank r holds chunks r and 2P-1-r of each document, an early and a late one: causal work is equal on all ranks.

    Chunks of a document differ by one token at most; the tokens left over go to the ranks that hold the fewest so far.
    """
    held, spans = [0] * ranks, [[] for _ in range(ranks)]
    for start, stop in pairwise(cu):
        size, left = divmod(stop - start, 2 * ranks)
        sizes = [size] * (2 * ranks)
        takers = sorted(range(ranks), key=lambda r: (held[r], r))
        for n in range(left):
            rank = takers[n % ranks]
            sizes[rank if n < ranks else 2 * ranks - 1 - rank] += 1
        edges = [start]
        for s in sizes:
            edges.append(edges[-1] + s)
        for r in range(ranks):
            early, late = (range(edges[c], edges[c + 1]) for c in (r, 2 * ranks - 1 - r))
            spans[r] += [early, late]
            held[r] += len(early) + len(late)
    return tuple(tuple(_joined(s)) for s in spans)


def striped(cu: tuple[int, ...], ranks: int) -> Layout:
    """Rank r holds tokens r, r + P, r + 2P, ... (Striped Attention, arXiv:2311.09431)."""
    return tuple(tuple(_joined([range(r, cu[-1], ranks)])) for r in range(ranks))


def balanced(cu: tuple[int, ...], ranks: int, mask: AnyMask | None = None) -> Layout:
    """Chunks of equal length, as many for each rank, dealt out so that every rank has the same work, whatever the mask.

    Work is the number of pairs kept of a rank's queries: of `mask`, or of causal attention inside each document. A rank gets one
    chunk, or two, four, ... up to 64, until the busiest has at most 1.03 of the mean; more than eight only of 128 tokens or more.
    """
    mask, length = Mask(None, 0, cu) if mask is None else mask, cu[-1]
    best: tuple[int, Layout] | None = None
    for share in (1, 2, 4, 8, 16, 32, 64):
        if best and length < ranks * share * (1 if share <= 8 else 128):
            break
        chunks = _pieces(range(length), ranks * share)
        work, tokens = [0] * len(chunks), [n for n, chunk in enumerate(chunks) if chunk]
        for run in cut([chunks[n] for n in tokens], mask.pieces):
            work[tokens[run.n]] += kept(run)
        held = sorted(_dealt(work, [len(chunk) for chunk in chunks], ranks), key=min)  # neighbours are near each other
        busiest = max(sum(work[n] for n in mine) for mine in held)
        if best is None or busiest < best[0]:
            best = busiest, tuple(tuple(_joined(chunks[n] for n in sorted(mine))) for mine in held)
        if 100 * ranks * busiest <= 103 * sum(work):
            break
    assert best is not None
    return best[1]


LAYOUTS = {"contiguous": contiguous, "zigzag": zigzag, "striped": striped, "balanced": balanced}


def split(layout: Layout, ulysses: int) -> Layout:
    """Cut each rank's storage into `ulysses` equal pieces, one for each of as many adjacent ranks.

    The inverse of `gathered`: after the all-to-all of Ulysses the group holds again what one rank of the outer ring held, in
    the same order, so that its tiles are as large as if there were no Ulysses.
    """
    return tuple(piece for spans in layout for piece in _cut(spans, ulysses))


def gathered(layout: Layout, ulysses: int) -> Layout:
    """What each rank of the outer ring holds after an all-to-all over `ulysses` adjacent ranks."""
    groups = (layout[i : i + ulysses] for i in range(0, len(layout), ulysses))
    return tuple(tuple(_joined(span for spans in group for span in spans)) for group in groups)


def lengths(layout: Layout) -> tuple[int, ...]:
    """How many tokens each rank holds."""
    return tuple(sum(map(len, spans)) for spans in layout)


def _pieces(span: Span, parts: int) -> list[Span]:
    """Cut a span into `parts` runs whose lengths differ by one at most."""
    n = len(span)
    return [span[i * n // parts : (i + 1) * n // parts] for i in range(parts)]


def _dealt(work: Sequence[int], sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """The chunks of each rank: as many for all, as many long ones too, and the largest sum of `work` about as small as it gets.

    Sizes differ by one at most. The next largest chunk goes to the rank with the least work that has room for one of its size
    (Graham's LPT rule), then the busiest rank swaps with idle ones while that helps.
    """
    kinds = [size > min(sizes) for size in sizes]
    long, share = sum(kinds), len(sizes) // ranks
    room = [{True: (n := long // ranks + (rank < long % ranks)), False: share - n} for rank in range(ranks)]
    held: list[dict[bool, list[int]]] = [{True: [], False: []} for _ in range(ranks)]
    load = [0] * ranks
    heaps = {kind: [(0, rank) for rank in range(ranks) if room[rank][kind]] for kind in (True, False)}
    for n in sorted(range(len(work)), key=lambda n: -work[n]):
        heap = heaps[kinds[n]]
        while load[heap[0][1]] != heap[0][0]:  # it got a chunk of the other size since
            _, rank = heappop(heap)
            heappush(heap, (load[rank], rank))
        _, rank = heappop(heap)
        held[rank][kinds[n]].append(n)
        load[rank] += work[n]
        if len(held[rank][kinds[n]]) < room[rank][kinds[n]]:
            heappush(heap, (load[rank], rank))
    for _ in range(4 * ranks):
        if not _swapped(work, held, load):
            break
    return [mine[True] + mine[False] for mine in held]


def _swapped(work: Sequence[int], held: list[dict[bool, list[int]]], load: list[int]) -> bool:
    """Swap two chunks of one size between the busiest rank and one of the eight idlest, those that help most. False: none does."""
    busiest = max(range(len(load)), key=load.__getitem__)
    best = None
    for idle in sorted(range(len(load)), key=load.__getitem__)[:8]:
        gap = load[busiest] - load[idle]
        for kind, theirs in held[idle].items():
            theirs.sort(key=work.__getitem__)
            small = [work[n] for n in theirs]
            for i, n in enumerate(held[busiest][kind]):
                at = bisect_left(small, work[n] - gap / 2)  # what would make both equal
                for j in range(max(0, at - 1), min(len(small), at + 1)):
                    less = min(work[n] - small[j], gap - work[n] + small[j])  # how far the larger of both sums falls
                    if less > 0 and (best is None or less > best[0]):
                        best = less, idle, kind, i, j
    if best is None:
        return False
    _, idle, kind, i, j = best
    ours, theirs = held[busiest][kind], held[idle][kind]
    moved = work[ours[i]] - work[theirs[j]]
    load[busiest], load[idle] = load[busiest] - moved, load[idle] + moved
    ours[i], theirs[j] = theirs[j], ours[i]
    return True


def _cut(spans: tuple[Span, ...], parts: int) -> list[tuple[Span, ...]]:
    total, found = sum(map(len, spans)), []
    for piece in _pieces(range(total), parts):
        at, mine = 0, []
        for span in spans:
            mine.append(span[max(0, piece.start - at) : max(0, piece.stop - at)])
            at += len(span)
        found.append(tuple(_joined(mine)))
    return found


def _joined(spans: Iterable[Span]) -> list[Span]:
    """Drop empty spans and join neighbours that continue each other."""
    done: list[Span] = []
    for span in filter(len, spans):
        if done and done[-1].step == span.step and done[-1][-1] + span.step == span.start:
            done[-1] = range(done[-1].start, span.stop, span.step)
        else:
            done.append(span)
    return done
