"""Who holds which tokens."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distflash.parallel.layout import LAYOUTS, balanced, contiguous, gathered, lengths, split, striped, zigzag
from distflash.parallel.mask import AnyMask, Mask, cut, kept
from distflash.parallel.slices import Slices

borders = (
    st.lists(st.integers(0, 40), min_size=1, max_size=12)
    .filter(any)
    .map(lambda sizes: tuple(sum(sizes[:n]) for n in range(len(sizes) + 1)))
)


@given(cu=borders, ranks=st.integers(1, 8), ulysses=st.integers(1, 4), name=st.sampled_from(sorted(LAYOUTS)))
def test_every_token_has_one_holder_and_ranks_hold_equally_many(cu, ranks, ulysses, name):
    for layout in (LAYOUTS[name](cu, ranks), split(LAYOUTS[name](cu, ranks), ulysses)):
        held = sorted(token for spans in layout for span in spans for token in span)
        assert held == list(range(cu[-1]))
        assert max(lengths(layout)) - min(lengths(layout)) <= 1, lengths(layout)


@given(cu=borders, ranks=st.integers(1, 8), ulysses=st.integers(1, 4), name=st.sampled_from(sorted(LAYOUTS)))
def test_gathered_is_the_inverse_of_split_and_spans_are_joined_again(cu, ranks, ulysses, name):
    layout = LAYOUTS[name](cu, ranks)
    assert gathered(split(layout, ulysses), ulysses) == layout


@given(cu=borders, ranks=st.integers(1, 8), name=st.sampled_from(sorted(LAYOUTS)))
def test_no_span_is_empty_and_no_two_neighbours_could_be_one(cu, ranks, name):
    for spans in LAYOUTS[name](cu, ranks):
        assert all(spans)
        assert not any(a.step == b.step and a[-1] + a.step == b.start for a, b in pairwise(spans))


def test_zigzag_gives_rank_r_chunks_r_and_2p_minus_1_minus_r():
    assert zigzag((0, 24), 3) == ((range(4), range(20, 24)), (range(4, 8), range(16, 20)), (range(8, 16),))


def test_zigzag_is_a_zigzag_of_each_document():
    # documents of 8 and 4 tokens: chunks of 2 and of 1; where two chunks touch across a border they are one span
    assert zigzag((0, 8, 12), 2) == ((range(2), range(6, 9), range(11, 12)), (range(2, 6), range(9, 11)))


def test_contiguous_and_striped_are_what_their_names_say():
    assert contiguous((0, 7), 3) == ((range(2),), (range(2, 4),), (range(4, 7),))
    assert striped((0, 7), 3) == ((range(0, 7, 3),), (range(1, 7, 3),), (range(2, 7, 3),))


@pytest.mark.parametrize("name", LAYOUTS)
def test_fewer_tokens_than_ranks_leave_some_ranks_empty(name):
    assert sorted(lengths(LAYOUTS[name]((0, 3), 5))) == [0, 0, 1, 1, 1]


def work(spans: Sequence[range], mask: AnyMask) -> int:
    return sum(kept(run) for run in cut(spans, mask.pieces))


def reachable(length: int, ranks: int, mask: AnyMask) -> float:
    """What no assignment of as many chunks to every rank can beat, at the best of the sizes that `balanced` may try.

    Some rank has more than k of the k * ranks + 1 heaviest chunks, and no less than the lightest ones for the rest of its share.
    """
    bounds = []
    for share in (1, 2, 4, 8, 16, 32, 64):
        if length >= ranks * share * (1 if share <= 8 else 128):
            edges = [n * length // (ranks * share) for n in range(ranks * share + 1)]
            w = [0] * (ranks * share)
            for run in cut([range(a, b) for a, b in pairwise(edges)], mask.pieces):
                w[run.n] += kept(run)
            w.sort(reverse=True)
            most = (sum(w[k * ranks - k : k * ranks + 1]) + sum(w[len(w) - (share - k - 1) :]) for k in range(share))
            bounds.append(max(sum(w) / ranks, *most))
    return min(bounds)


def cases(rng: random.Random, length: int) -> list[tuple[str, tuple[int, ...], Slices | None]]:
    """Documents of even, of very uneven length and within a window; slices."""
    shares = {
        "even": [rng.random() for _ in range(rng.choice([1, 20, 1000]))],
        "uneven": [rng.paretovariate(0.7) for _ in range(rng.choice([3, 100, 1000]))],
    }
    found = []
    for name, parts in shares.items():
        cu = tuple(int(length * part / sum(parts)) for part in accumulate(parts, initial=0.0))[:-1] + (length,)
        found += [(name, cu, None), (f"{name}, full", cu, Slices.documents(cu, causal=False))]
        found.append((f"{name}, window", cu, Slices.documents(cu, window_size=(length // 20, 0))))
    size = length // 32 + 1
    rows = -(-length // size)
    blocks = [[int(j <= i and rng.random() < 0.05 + 0.2 * i / rows) for j in range(rows)] for i in range(rows)]
    found.append(("blocks", (0, length), Slices.from_block_mask(blocks, size, (length, length), causal=True)))
    found.append(("prefix", (0, length), Slices.prefix_lm(length, length // 3)))
    found.append(("sinks", (0, length), Slices.sinks_and_window(length, 4, length // 10)))
    return found


@pytest.mark.parametrize("ranks", [2, 3, 8, 64])
def test_balanced_work_is_within_5_percent_of_the_mean_or_of_what_its_chunks_allow(ranks):
    rng = random.Random(ranks)
    even = []
    for length in (64 * ranks + 1, 1000 * ranks, 4096 * min(ranks, 8)):
        for name, cu, mask in cases(rng, length):
            layout, masked = balanced(cu, ranks, mask), Mask(None, 0, cu) if mask is None else mask
            load = [work(spans, masked) for spans in layout]
            case = f"P={ranks}, S={length}, {len(cu) - 1} documents, {name}"
            assert sum(load) == sum(piece.area for piece in masked.pieces), case
            assert max(load) <= 1.05 * reachable(length, ranks, masked), f"{case}: {max(load) * ranks / sum(load):.3f} of the mean"
            even.append(max(load) * ranks <= 1.05 * sum(load))
    assert sum(even) > 0.6 * len(even), f"only {sum(even)} of {len(even)} cases are within 5 % of the mean"


def test_balanced_splits_no_finer_than_it_must():
    for ranks in (2, 8, 64):
        spans = balanced((0, 4096 * ranks), ranks)
        assert max(map(len, spans)) == 2, "one causal document: two chunks a rank, as a zigzag has them"
        assert balanced((0, 4096 * ranks), ranks, Slices.documents((0, 4096 * ranks), causal=False)) == contiguous((0, 4096 * ranks), ranks)


def test_the_time_that_balanced_takes_is_printed_and_bearable(capsys):
    rng = random.Random(0)
    for ranks in (8, 64):
        parts = [rng.paretovariate(0.8) for _ in range(1000)]
        cu = tuple(int((1 << 20) * part / sum(parts)) for part in accumulate(parts, initial=0.0))
        start = time.perf_counter()
        balanced(cu, ranks)
        taken = time.perf_counter() - start
        with capsys.disabled():
            print(f"balanced: 1000 documents on {ranks} ranks in {1e3 * taken:.0f} ms")
        assert taken < 10
