"""Who holds which tokens. Integers only: no torch.

    Span      a builtin `range` of global token indices        zigzag: two a rank and document; striped: one with a step
    Layout    tuple over ranks of tuples of Spans              layout[rank] lists that rank's tokens in storage order
    cu        document borders: 0 = cu[0] <= cu[1] <= ... <= cu[-1] = S, the global number of tokens
    P ranks, R ranks of the outer ring, U ranks of a Ulysses group: P = R * U

Nothing is padded: shards of any length, also empty ones, are legal.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

Span = range
Layout = tuple[tuple[Span, ...], ...]


def contiguous(cu: tuple[int, ...], ranks: int) -> Layout:
    """Rank r holds the r-th of P equal pieces of the whole sequence."""
    return tuple(tuple(_joined([piece])) for piece in _pieces(range(cu[-1]), ranks))


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


LAYOUTS = {"contiguous": contiguous, "zigzag": zigzag, "striped": striped}


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
