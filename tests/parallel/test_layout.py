"""Who holds which tokens."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distflash.parallel.layout import LAYOUTS, contiguous, gathered, lengths, split, striped, zigzag

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
