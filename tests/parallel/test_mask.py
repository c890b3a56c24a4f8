"""What is allowed to meet, and the tiles it leaves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distflash.parallel.mask import Mask, packed, tiles
from distflash.testing import keep_mask
from distflash.tile import Tiles

SIDES = st.none() | st.integers(0, 9)


def pairs(found: Tiles) -> np.ndarray:
    count = np.zeros((found.q_len, found.kv_len), dtype=int)
    for tile in found:
        offset = np.arange(tile.columns)[None, :] - np.arange(tile.rows)[:, None]
        keep = (offset >= tile.band.lo) & (offset <= tile.band.hi)
        assert keep.any(0).all() and keep.any(1).all(), f"{tile} is not tight"
        count[tile.q, tile.kv] += keep
    return count


@st.composite
def spans(draw, step: int) -> list[range]:
    """Increasing, disjoint, of one step, as a rank holds them."""
    start, found = draw(st.integers(0, 6)), []
    for _ in range(draw(st.integers(1, 3))):
        found.append(range(start, start + step * draw(st.integers(1, 9)), step))
        start = found[-1].stop + draw(st.integers(1, 9))
    return found


@settings(max_examples=400)
@given(data=st.data(), step=st.integers(1, 3), left=SIDES, right=SIDES, sizes=st.none() | st.lists(st.integers(0, 15), max_size=6))
def test_tiles_keep_exactly_the_pairs_that_the_mask_allows(data, step, left, right, sizes):
    q_spans, kv_spans = data.draw(spans(step)), data.draw(spans(step))
    documents = None
    if sizes is not None:
        documents = tuple(int(n) for n in np.cumsum([0, *sizes, 200]))  # the last one holds all that is left
    q, kv = (np.concatenate([np.array(span) for span in held]) for held in (q_spans, kv_spans))
    distance = kv[None, :] - q[:, None]
    expected = np.ones_like(distance, dtype=bool)
    if left is not None:
        expected &= distance >= -left
    if right is not None:
        expected &= distance <= right
    if documents is not None:
        q_document, kv_document = (np.searchsorted(documents, x, side="right") for x in (q, kv))
        expected &= q_document[:, None] == kv_document[None, :]
    assert (pairs(tiles(q_spans, kv_spans, Mask(left, right, documents))) == expected).all()


@settings(max_examples=300)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=5),
    causal=st.booleans(),
    window=st.tuples(st.integers(-1, 6), st.integers(-1, 6)),
)
def test_packed_documents_are_aligned_at_the_end_of_each(sizes, causal, window):
    cu_q, cu_k = (tuple(int(n) for n in np.cumsum([0, *column])) for column in zip(*sizes, strict=True))
    left, right = (None if side == -1 else side for side in window)
    expected = keep_mask(cu_q[-1], cu_k[-1], causal=causal, window_size=window, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k).numpy()
    assert (pairs(packed(cu_q, cu_k, Mask(left, 0 if causal else right))) == expected).all()


@pytest.mark.parametrize("q_len, k_len", [(3, 5), (5, 3), (4, 4), (1, 6), (6, 1)])
def test_causal_is_bottom_right_aligned(q_len, k_len):
    count = pairs(packed((0, q_len), (0, k_len), Mask(None, 0)))
    expected = [[int(j <= i + k_len - q_len) for j in range(k_len)] for i in range(q_len)]
    assert count.tolist() == expected


@pytest.mark.parametrize("left, right", [(-1, -1), (2, -1), (-1, 1), (2, 1), (0, 0), (100, 0)])
def test_the_oracles_mask_is_the_documented_one(left, right):
    keep = keep_mask(4, 6, window_size=(left, right))
    for i in range(4):
        for j in range(6):
            at = i + 6 - 4
            expected = (left == -1 or j >= at - left) and (right == -1 or j <= at + right)
            assert keep[i, j] == expected, (i, j)


def test_neighbouring_whole_rectangles_become_one():
    found = tiles([range(10, 14)], [range(4), range(4, 8)], Mask(None, 0))
    assert len(found) == 1 and found.tiles[0].full and found.area == 32
