"""Schemes are data, so they are proved as data: no kernel, no wire, every pair counted."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distflash.parallel.layout import LAYOUTS, Layout, gathered, lengths, split
from distflash.parallel.mask import Mask, needs, tiles
from distflash.parallel.plan import ORDERS, Order, Visit, alone, plan, readers
from distflash.parallel.slices import Slices
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
        owner = [[order.owner(rank, t) for t in everyone] for rank in everyone]
        assert [row[0] for row in owner] == everyone, f"{name}: step 0 works on the own block"
        assert all(sorted(row) == everyone for row in owner), f"{name}: a rank meets a block twice"
        assert all(sorted(column) == everyone for column in zip(*owner, strict=True)), f"{name}: two ranks hold one block"
        assert all(order.holder(owner[rank][t], t) == rank for rank in everyone for t in everyone), f"{name}: who holds a block"
        assert all(0 <= order.sent[t] < t for t in range(1, ranks)), f"{name}: a block sets out after it is needed"


def test_a_double_ring_goes_round_inside_its_node_and_then_on_to_the_next_node():
    order = ORDERS["double_ring"](6, 3)
    assert [[order.owner(rank, t) for t in range(6)] for rank in (0, 4)] == [[0, 2, 1, 3, 5, 4], [4, 3, 5, 1, 0, 2]]
    assert order.sent[1:] == (0, 1, 0, 3, 4), "to the next node while the first time round lasts"
    one, ring = ORDERS["double_ring"](6, 6), ORDERS["ring"](6, 3)
    assert (one.node, one.sent[1:]) == (ring.node, ring.sent[1:]), "one node is a ring"


TRAFFIC = {  # what is needed of whom: everything, the lower half, neighbours, scattered documents
    "full": Mask(),
    "causal": Mask(None, 0),
    "window": Mask(9, 0),
    "both sides": Mask(3, 12),
    "documents": Mask(None, 0, (0, 3, 20, 20, 22, 41, S)),
    "only far keys": Slices([((40, S), (0, 5), "full"), ((0, 4), (30, 38), "causal")]),
    "nothing": Slices([]),
}


@pytest.mark.parametrize("ranks", RANKS)
def test_what_a_rank_sends_is_what_its_receiver_expects_and_nobody_waits_in_a_circle(ranks):
    for case, plans in _traffic(ranks):
        sent, expected = _messages(plans)
        assert sent == expected, f"{case}: messages do not match"
        for posts in (*sent.values(), *expected.values()):
            assert posts == sorted(posts), f"{case}: not in the order of steps: {posts}"


@pytest.mark.parametrize("ranks", RANKS)
def test_a_block_comes_once_to_whoever_keeps_something_of_it_and_to_nobody_else(ranks):
    for case, plans in _traffic(ranks):
        for rank, visits in enumerate(plans):
            arrives = {hop.step: visits_of(visits)[hop.step].owner for visit in visits for hop in visit.hops if hop.source is not None}
            busy = {visit.step: visit.owner for visit in visits if visit.tiles and visit.step}
            assert arrives == busy, f"{case}: rank {rank} works on blocks {busy}, gets {arrives}"
            for visit in visits:
                passed_on = [hop for hop in visit.hops if hop.onward is not None]
                assert not passed_on or visit.tiles or visit.step == 0, f"{case}: rank {rank} passes on what it does not hold: {visit}"
                assert visit.step == 0 or visit.tiles or visit.hops or visit.home.busy, f"{case}: rank {rank}: an idle step"


@pytest.mark.parametrize("ranks", RANKS)
def test_a_gradient_comes_home_with_one_part_of_every_rank_that_keeps_something(ranks):
    for case, plans in _traffic(ranks):
        steps = max(visit.step for visits in plans for visit in visits) + 1
        by_step = [visits_of(visits) for visits in plans]
        carried: list[dict[int, Counter]] = [{} for _ in plans]  # by rank and owner: whose parts are in the gradient it holds
        home = [Counter() for _ in plans]
        for step in range(steps):
            moved: list[dict[int, Counter]] = [{} for _ in plans]
            for rank, visits in enumerate(by_step):
                if step not in visits:
                    assert not carried[rank], f"{case}: rank {rank} got a gradient that it does not work on"
                    continue
                visit = visits[step]
                held = carried[rank].pop(visit.owner, Counter()) + Counter({rank: int(bool(visit.tiles) or step == 0)})
                assert not carried[rank], f"{case}: rank {rank} got another block's gradient"
                if visit.home.dest is not None:
                    moved[visit.home.dest][visit.owner] = held
                elif held:
                    assert visit.owner == rank, f"{case}: rank {rank} keeps the gradient of another's block"
                    home[rank] += held
            for rank, arrived in enumerate(moved):
                visit = by_step[rank].get(step)
                wanted = set() if visit is None else {peer for peer in (visit.home.source, visit.home.ours) if peer is not None}
                assert len(wanted) == len(arrived), f"{case}: rank {rank}, step {step}: {arrived}"
                home[rank] += arrived.pop(rank, Counter())
            carried = moved
        for owner, parts in enumerate(home):
            busy = {rank: 1 for rank, visits in enumerate(plans) if any(v.owner == owner and v.tiles for v in visits)}
            assert parts == busy | {owner: 1}, f"{case}: block {owner} of {busy}: {parts}"


@pytest.mark.parametrize("ranks", [4, 8, 16])
def test_a_ring_without_holes_holds_two_blocks_and_any_ring_three(ranks):
    """The block at hand, the next one under way and, where others skip it, a copy of the own one that is sent past them."""
    for case, plans in _traffic(ranks, ("ring",)):
        for rank, visits in enumerate(plans):
            for visit in visits:
                under_way = [hop for hop in visit.hops if hop.source is not None]
                assert len(visit.hops) <= 1 and all(hop.step == visit.step + 1 for hop in under_way), f"{case}: rank {rank}: {visit}"


def test_a_window_over_contiguous_shards_meets_neighbours_only():
    for ranks in (2, 8, 64):
        layout = LAYOUTS["contiguous"]((0, 16 * ranks), ranks)
        for rank, visits in enumerate(plans_of(layout, Mask(20, 0), ORDERS["ring"](ranks, 1))):
            received = {visits_of(visits)[hop.step].owner for visit in visits for hop in visit.hops if hop.source is not None}
            assert received == {rank - 1, rank - 2} & set(range(ranks)), f"rank {rank} of {ranks} gets blocks of {received}"


def test_who_needs_whom_is_what_the_tiles_say():
    masks = TRAFFIC | {"stripes": Mask(1, 0), "far": Mask(30, 0, (0, 25, S))}
    for name, layout in LAYOUTS.items():
        for ranks in RANKS:
            for case, mask in masks.items():
                spans = layout(mask.documents or (0, S) if isinstance(mask, Mask) else (0, S), ranks)
                expected = [sum(1 << owner for owner in range(ranks) if tiles(spans[rank], spans[owner], mask)) for rank in range(ranks)]
                assert needs(spans, mask) == tuple(expected), f"{name}, P={ranks}, {case}"


def test_who_needs_whom_is_found_out_once_for_all_ranks_and_anew_for_another_mask_or_layout():
    """It looks at every pair of ranks: for each rank again, it would be most of what 64 plans take."""
    order = ORDERS["ring"](16, 16)
    needs.cache_clear()
    for name, mask in (("contiguous", Mask(9, 0)), ("contiguous", Mask(None, 0)), ("zigzag", Mask(None, 0))):
        for rank in range(16):  # equal ones will do: each caller makes its own
            layout = LAYOUTS[name]((0, 16 * S), 16)
            received = {visit.owner for visit in plan(layout, mask, order, rank) if visit.tiles}
            assert received == {owner for owner in range(16) if tiles(layout[rank], layout[owner], mask)}
            assert rank not in readers(layout, mask, rank)
    assert needs.cache_info().misses == 3


def _traffic(ranks: int, names: tuple[str, ...] | None = None) -> Iterator[tuple[str, list[tuple[Visit, ...]]]]:
    for mask_name, mask in TRAFFIC.items():
        for layout in LAYOUTS:
            for length in (3, S):
                if length == S or (isinstance(mask, Mask) and mask.documents is None):
                    borders = mask.documents if isinstance(mask, Mask) and mask.documents else (0, length)
                    for name, order in orders(ranks).items():
                        if names is None or name in names:
                            case = f"{layout}, {name}, P={ranks}, S={length}, {mask_name}"
                            yield case, plans_of(LAYOUTS[layout](borders, ranks), mask, order)


def visits_of(visits: tuple[Visit, ...]) -> dict[int, Visit]:
    return {visit.step: visit for visit in visits}


def _messages(plans: list[tuple[Visit, ...]]) -> tuple[dict, dict]:
    """By pair (from, to), in the order of posting: (step, kind, for which step, owner of the block); as sent, as expected."""
    sent, expected = defaultdict(list), defaultdict(list)
    for rank, visits in enumerate(plans):
        by_step = visits_of(visits)
        for visit in visits:
            for hop in visit.hops:
                for dest, owner in ((hop.onward, visit.owner), (hop.own, rank)):
                    if dest is not None:
                        sent[rank, dest].append((visit.step, 0, hop.step, owner))
                if hop.source is not None:
                    expected[hop.source, rank].append((visit.step, 0, hop.step, by_step[hop.step].owner))
            home = visit.home
            if home.dest is not None:
                sent[rank, home.dest].append((visit.step, 1, 0, visit.owner))
            if home.source is not None:
                expected[home.source, rank].append((visit.step, 1, 0, by_step[visit.step + 1].owner))
            if home.ours is not None:
                expected[home.ours, rank].append((visit.step, 1, 0, rank))
    return sent, expected


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
    assert [(visit.step, len(visit.tiles)) for visit in visits] == [(0, 1), (1, 1), (2, 0)]  # at 2 our gradient comes home
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
