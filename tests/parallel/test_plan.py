"""Schemes are data, so they are proved as data: no kernel, no wire, every pair counted."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distflash.parallel.layout import LAYOUTS, Layout, gathered, lengths, split
from distflash.parallel.mask import Mask
from distflash.parallel.plan import ORDERS, Order, Visit, alone, plan
from distflash.tile import Band, Tile, Tiles

RANKS = (1, 2, 3, 4, 6, 8)
S = 53
DOCUMENTS = {
    "one": None,
    "even": (0, 16, 32, 48, S),
    "ragged": (0, 7, 8, 8, 30, 31, S),  # one-token and empty documents
    "empty at both ends": (0, 0, 20, S, S),
    "one token each": tuple(range(S + 1)),
}
MASKS = {
    "full": (None, None),
    "causal": (None, 0),
    "window left": (5, None),
    "window right": (None, 3),
    "window both": (4, 2),
    "causal window": (9, 0),
    "itself alone": (0, 0),
}


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def orders(ranks: int) -> dict[str, Order]:
    found = {name: ORDERS[name](ranks, 1) for name in ("ring", "all_gather")}
    return found | {f"double_ring of {n}": ORDERS["double_ring"](ranks, n) for n in divisors(ranks)}


def allowed(length: int, mask: Mask) -> np.ndarray:
    """The mask by its words: same document, and -left <= j - i <= right."""
    at = np.arange(length)
    distance = at[None, :] - at[:, None]
    keep = np.ones((length, length), dtype=bool)
    if mask.left is not None:
        keep &= distance >= -mask.left
    if mask.right is not None:
        keep &= distance <= mask.right
    if mask.documents is not None:
        document = np.concatenate([np.full(b - a, n) for n, (a, b) in enumerate(pairwise(mask.documents))])
        keep &= document[None, :] == document[:, None]
    return keep


def kept(tile: Tile) -> np.ndarray:
    """A tile's pairs by brute force."""
    offset = np.arange(tile.columns)[None, :] - np.arange(tile.rows)[:, None]
    return (offset >= tile.band.lo) & (offset <= tile.band.hi)


def tokens(layout: Layout) -> list[np.ndarray]:
    return [np.array([token for span in spans for token in span], dtype=int) for spans in layout]


def plans_of(layout: Layout, mask: Mask, order: Order) -> list[tuple[Visit, ...]]:
    return [plan(layout, mask, order, rank) for rank in range(len(layout))]


def assert_covers(plans: list[tuple[Visit, ...]], layout: Layout, mask: Mask, case: object) -> None:
    """Each allowed pair is in exactly one tile of one visit of one rank, nothing else is, and tiles are tight."""
    index, length = tokens(layout), sum(lengths(layout))
    count = np.zeros((length, length), dtype=int)
    for rank, visits in enumerate(plans):
        for visit in visits:
            assert (visit.tiles.q_len, visit.tiles.kv_len) == (len(index[rank]), len(index[visit.owner])), case
            for tile in visit.tiles:
                keep = kept(tile)
                assert keep.any(0).all() and keep.any(1).all(), f"{case}: {tile} holds a row or a column that takes no part"
                assert tile.area == keep.sum() and tile.full == keep.all(), f"{case}: {tile} counts itself wrong"
                count[np.ix_(index[rank][tile.q], index[visit.owner][tile.kv])] += keep
    wrong = np.argwhere(count != allowed(length, mask))
    assert not len(wrong), f"{case}: pair {wrong[0]} is computed {count[tuple(wrong[0])]} times, {len(wrong)} pairs are wrong"


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_allowed_pair_is_in_exactly_one_tile_whatever_the_order_and_the_mask(layout, ranks):
    for borders_name, borders in DOCUMENTS.items():
        spans = LAYOUTS[layout](borders or (0, S), ranks)
        for mask_name, (left, right) in MASKS.items():
            mask = Mask(left, right, borders)
            for order_name, order in orders(ranks).items():
                case = f"{layout}, {order_name}, P={ranks}, {mask_name}, documents {borders_name}"
                assert_covers(plans_of(spans, mask, order), spans, mask, case)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_length_is_served_by_every_number_of_ranks(layout):
    for length in range(1, 65):
        for ranks in range(1, 9):
            spans, mask = LAYOUTS[layout]((0, length), ranks), Mask(None, 0, (0, length))
            assert_covers(plans_of(spans, mask, ORDERS["ring"](ranks, 1)), spans, mask, f"{layout}, S={length}, P={ranks}")


@settings(max_examples=150)
@given(
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=8).filter(any),
    left=st.none() | st.integers(0, 20),
    right=st.none() | st.integers(0, 20),
    ranks=st.integers(1, 8),
    layout=st.sampled_from(sorted(LAYOUTS)),
    data=st.data(),
)
def test_random_documents_windows_and_orders_are_covered(sizes, left, right, ranks, layout, data):
    borders = tuple(int(b) for b in np.cumsum([0, *sizes]))
    name, order = data.draw(st.sampled_from(sorted(orders(ranks).items(), key=lambda item: item[0])))
    spans, mask = LAYOUTS[layout](borders, ranks), Mask(left, right, borders)
    assert_covers(plans_of(spans, mask, order), spans, mask, (layout, name, ranks, mask))


@pytest.mark.parametrize("ranks", RANKS)
def test_owner_tables_are_permutations_that_start_at_home(ranks):
    for name, order in orders(ranks).items():
        everyone = list(range(ranks))
        assert [row[0] for row in order.owner] == everyone, f"{name}: step 0 works on the own block"
        assert all(sorted(row) == everyone for row in order.owner), f"{name}: a rank meets a block twice"
        assert all(sorted(column) == everyone for column in zip(*order.owner, strict=True)), f"{name}: two ranks hold one block"
        assert all(0 <= order.sent[t] < t for t in range(1, ranks)), f"{name}: a block sets out after it is needed"


@pytest.mark.parametrize("ranks", RANKS)
def test_what_a_rank_sends_at_a_step_is_what_its_receiver_expects_at_that_step(ranks):
    for borders in ((0, 3), (0, S), (0, 7, 8, 8, 30, 31, S)):
        for layout in LAYOUTS:
            for name, order in orders(ranks).items():
                _simulate(plans_of(LAYOUTS[layout](borders, ranks), Mask(None, 0, borders), order), f"{layout}, {name}, P={ranks}")


def _simulate(plans: list[tuple[Visit, ...]], case: str) -> None:
    """Post all messages of all ranks in program order; both ends of every pair must list the same ones in the same order."""
    sent, expected = defaultdict(list), defaultdict(list)
    length = [visits[0].tiles.kv_len for visits in plans]
    for rank, visits in enumerate(plans):
        last = len(visits) - 1
        arrives = sorted(hop.step for visit in visits for hop in visit.hops)
        assert arrives == list(range(1, last + 1)), f"{case}: rank {rank} gets blocks for steps {arrives}"
        for visit in visits:
            assert visit.tiles.kv_len == length[visit.owner], f"{case}: rank {rank}, step {visit.step}: wrong size"
            for hop in visit.hops:
                assert visit.step < hop.step and rank not in (hop.dest, hop.source), f"{case}: rank {rank}: {hop}"
                sent[rank, hop.dest].append(("kv", visit.step, visit.owner, length[visit.owner]))
                expected[hop.source, rank].append(("kv", visit.step, visits[hop.step].owner, visits[hop.step].tiles.kv_len))
            if last:
                home = visit.home
                sent[rank, home.dest].append(("grad", visit.step, visit.owner, length[visit.owner]))
                expected[home.source, rank].append(("grad", visit.step, visits[home.step].owner, visits[home.step].tiles.kv_len))
                assert home.step == (visit.step + 1) % len(visits), f"{case}: rank {rank}: {home}"
    assert sent == expected, f"{case}: messages do not match"


@pytest.mark.parametrize("ranks", RANKS[1:])
def test_a_gradient_comes_home_with_a_part_of_every_rank(ranks):
    for name, order in orders(ranks).items():
        plans = plans_of(LAYOUTS["zigzag"]((0, S), ranks), Mask(), order)
        carried = [(rank, frozenset()) for rank in range(ranks)]  # (whose gradient, parts in it) that each rank holds
        for step in range(ranks):
            added = [(owner, parts | {rank}) for rank, (owner, parts) in enumerate(carried)]
            assert [owner for owner, _ in added] == [plans[rank][step].owner for rank in range(ranks)], f"{name}, step {step}"
            carried = [added[plans[rank][step].home.source] for rank in range(ranks)]
        assert carried == [(rank, frozenset(range(ranks))) for rank in range(ranks)], name


@pytest.mark.parametrize("layout", ["zigzag", "striped"])
def test_causal_work_differs_between_ranks_by_less_than_one_key_a_token(layout):
    for ranks in (2, 3, 8):
        for borders in ((0, 4096), (0, 4093), (0, 1000, 1001, 1001, 3500, 4093), tuple(range(0, 1024, 5))):
            plans = plans_of(LAYOUTS[layout](borders, ranks), Mask(None, 0, borders), ORDERS["ring"](ranks, 1))
            work = [sum(visit.tiles.area for visit in visits) for visits in plans]
            assert max(work) - min(work) < borders[-1], f"{layout}, P={ranks}, {len(borders) - 1} documents: {work}"


def test_zigzag_gives_every_rank_the_same_causal_work_where_chunks_divide():
    for ranks in RANKS:
        plans = plans_of(LAYOUTS["zigzag"]((0, 96 * ranks), ranks), Mask(None, 0), ORDERS["ring"](ranks, 1))
        assert len({sum(visit.tiles.area for visit in visits) for visits in plans}) == 1, ranks


def test_a_causal_ring_has_tiles_of_half_blocks_and_skips_what_is_masked():
    visits = plan(LAYOUTS["contiguous"]((0, 64), 4), Mask(None, 0), ORDERS["ring"](4, 1), 1)
    assert [len(visit.tiles) for visit in visits] == [1, 1, 0, 0]
    assert not visits[0].tiles.tiles[0].full and visits[1].tiles.tiles[0].full


def test_one_device_is_one_visit_without_messages():
    tiles = Tiles((Tile.whole(slice(0, 3), slice(0, 3)),), 3, 3)
    (visit,) = alone(tiles)
    assert visit.tiles is tiles and not visit.hops


def test_the_area_of_a_tile_is_the_number_of_its_pairs():
    for rows in range(1, 6):
        for columns in range(1, 6):
            for lo in range(-8, 9):
                for hi in range(lo, 9):
                    tile = Tile(slice(2, 2 + rows), slice(3, 3 + columns), Band(lo, hi))
                    assert tile.area == kept(tile).sum(), tile
                    assert tile.full == kept(tile).all(), tile


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_ulysses_group_holds_what_one_rank_of_the_ring_held_in_the_same_order(layout, ranks):
    for ulysses in divisors(ranks):
        for borders in (b or (0, S) for b in DOCUMENTS.values()):
            ring = LAYOUTS[layout](borders, ranks // ulysses)
            shards = split(ring, ulysses)
            assert len(shards) == ranks and gathered(shards, ulysses) == ring, (layout, ranks, ulysses, borders)
            assert max(lengths(shards)) - min(lengths(shards)) <= 1, (layout, ranks, ulysses, borders)
            assert sorted(np.concatenate(tokens(shards))) == list(range(S)), (layout, ranks, ulysses, borders)
