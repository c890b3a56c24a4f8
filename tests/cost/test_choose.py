"""The ranking: one answer on every rank, what is refused and why, and the choices that the theory demands."""

from __future__ import annotations

import random

import pytest

from distflash.cost import choose as choosing
from distflash.cost.choose import WIRES, candidates, choose, judge, looked_at, worst_ranks
from distflash.cost.devices import DEVICES, network
from distflash.cost.models import MODELS
from distflash.cost.time import Cluster
from distflash.cost.traffic import PASSES, Scheme, Shape
from distflash.parallel.mask import Mask
from distflash.parallel.plan import ORDERS
from distflash.parallel.slices import Slices
from distflash.testing import spmd

H200 = DEVICES["h200"]


def ranking(ranks, per_node, length, shape, mask=(None, 0), **fixed):
    cu = (0, length)
    return choose(cu, Mask(*mask, cu), shape, Cluster(H200, ranks, per_node, network(400)), **fixed)


def test_all_ranks_get_the_same_ranking():
    shape, cu = Shape(6, 3, 64, 64), (0, 100, 101, 101, 900, 2011)

    def work(group):
        found = choose(cu, Mask(None, 0, cu), shape, Cluster(H200, group.size, 2, network(100)), WIRES)
        return [(c.scheme, c.wire, c.seconds if not c.refused else 0, c.memory, c.reason) for c in found]

    first, *others = spmd(4, work)
    assert all(found == first for found in others)
    served = [row for row in first if row[2]]
    assert [row[2] for row in served] == sorted(row[2] for row in served)


def test_every_candidate_is_ranked_or_refused_with_a_reason():
    cluster = Cluster(H200, 12, 4, network(400))
    found = choose((0, 3000), Mask(None, 0, (0, 3000)), Shape(6, 3, 64, 64), cluster, WIRES)
    assert sorted(map(str, ((c.scheme, c.wire) for c in found))) == sorted(map(str, candidates(cluster, WIRES)))
    assert len(found) == 4 * 3 * 6 * 2
    reasons = {c.refused for c in found if c.refused}
    assert any("ulysses=12 needs at least as many query heads, got 6" in r for r in reasons)
    assert any("symmetric memory reaches 4 ranks" in r for r in reasons)
    assert all(c.reason for c in found)


def test_a_mask_that_keeps_nothing_has_a_reason_too():
    found = choose((0, 8), Slices([]), Shape(8, 2, 64, 64), Cluster(H200, 4, 4, network(400)), WIRES)
    assert all(c.reason for c in found) and any(c.seconds == 0 and not c.refused for c in found)


def test_ties_are_broken_by_memory_then_by_a_fixed_order():
    found = [c for c in ranking(4, 4, 4096, Shape(8, 8, 64, 64), mask=(None, None)) if not c.refused]
    place = {pair: n for n, pair in enumerate(candidates(Cluster(H200, 4, 4, network(400))))}
    keys = [(c.seconds, c.memory, place[c.scheme, c.wire]) for c in found]
    assert keys == sorted(keys) and len({key[:2] for key in keys}) < len(keys), "there should be ties"


def test_causal_work_is_balanced_and_full_attention_needs_no_zigzag():
    best = ranking(4, 4, 262144, Shape(2, 1, 128, 128), ulysses=1)
    assert best[0].scheme.layout != "contiguous"
    by_layout = {c.scheme.layout: c.seconds for c in best if c.scheme.order == "ring"}
    assert by_layout["contiguous"] > 1.5 * by_layout["zigzag"]
    full = ranking(4, 4, 262144, Shape(2, 1, 128, 128), mask=(None, None), ulysses=1)
    assert full[0].scheme.layout == "contiguous"


def test_a_window_that_reaches_the_next_rank_alone_keeps_tokens_together():
    best = ranking(8, 8, 65536, Shape(4, 4, 128, 128), mask=(4096, 0), ulysses=1)[0]
    assert best.scheme.layout in ("contiguous", "balanced") and best.passes["forward"].tiers["links"] > 0


def test_on_a_slow_network_heads_are_shared_inside_the_host():
    found = ranking(32, 8, 1 << 18, MODELS["llama-2-7b"].shape(), layout="zigzag")
    seconds = {u: min(c.seconds for c in found if c.scheme.ulysses == u) for u in (1, 2, 4, 8)}
    assert seconds[1] > seconds[2] > seconds[4] > seconds[8] and found[0].scheme.ulysses >= 8


def test_what_is_fixed_stays_fixed_and_what_nothing_serves_is_refused():
    found = ranking(8, 8, 8192, Shape(8, 2, 64, 64), layout="striped", order="ring", ulysses=2)
    assert [(c.scheme.layout, c.scheme.order, c.scheme.ulysses) for c in found] == [("striped", "ring", 2)]
    assert [c.refused for c in ranking(4, 4, 4096, Shape(8, 8, 64, 64), layout="zigzag", order="double_ring", ulysses=4)] == [None]
    with pytest.raises(ValueError, match="needs at least as many query heads, got 2"):
        ranking(8, 8, 8192, Shape(2, 2, 64, 64), ulysses=8)
    with pytest.raises(ValueError, match="there is none"):
        ranking(8, 8, 8192, Shape(2, 2, 64, 64), ulysses=3)


def test_a_mask_of_slices_is_ranked_too():
    mask = Slices.sinks_and_window(4096, 16, 512)
    found = choose((0, 4096), mask, Shape(4, 4, 64, 64), Cluster(H200, 4, 4, network(400)))
    assert found[0].passes["forward"].tiers["matmul"] == pytest.approx(
        4 * 64 * 4 * mask.area / 4 / H200.rate("forward", 64)[0].flops, rel=0.05
    )


def test_large_rings_are_ranked_in_closed_form_or_refused():
    found = ranking(256, 8, 1 << 21, Shape(2, 1, 64, 64), layout="zigzag", ulysses=1)
    assert {c.scheme.order: c.refused for c in found} == dict.fromkeys(ORDERS)
    scheme, cu = Scheme("contiguous", "all_gather", 1, 256, 8), (0, 1 << 21)
    told = judge(scheme, "p2p", cu, Mask(64, 0, cu), Shape(2, 1, 64, 64), Cluster(H200, 256, 8, network(400)))
    assert "in closed form only: there is none where a rank needs nothing of another's block" in told.reason


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("order", ORDERS)
def test_the_closed_form_is_what_the_plans_of_all_ranks_say(order, wire, monkeypatch):
    cu, shape = (0, 1 << 15), Shape(4, 2, 64, 64)
    scheme, mask = Scheme("zigzag", order, 1, 24, 24 if wire == "symmetric" else 8), Mask(None, 0, cu)
    case = scheme, wire, cu, mask, shape, Cluster(H200, 24, scheme.per_node, network(400))
    seconds, nbytes = all_ranks(*case)
    monkeypatch.setattr(choosing, "_PLANNED", 16)
    told = judge(*case, ("order",))
    assert {name: one.seconds for name, one in told.passes.items()} == pytest.approx(seconds, rel=1e-3) and told.memory == nbytes


def all_ranks(scheme, wire, cu, mask, shape, cluster):
    """(seconds by pass, bytes) of the slowest and of the fullest of all ranks."""
    spans = scheme.spans(cu, mask)
    found = [looked_at(scheme, wire, spans, mask, shape, cluster, rank) for rank in range(scheme.ranks)]
    return {name: max(passes[name].seconds for passes, _ in found) for name in PASSES}, max(nbytes for _, nbytes in found)


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("heads, kv_heads", [(12, 12), (25, 25), (12, 4), (9, 3)])
def test_the_rank_with_the_most_heads_is_the_one_that_counts(heads, kv_heads, wire):
    """12 heads among 8 ranks are 1, 2, 1, 2, ...: a rank with one is done in half of the time."""
    shape, cu, cluster = Shape(heads, kv_heads, 64, 64), (0, 1 << 17), Cluster(H200, 8, 8, network(400), wire)
    for ulysses in (2, 4, 8):
        scheme, mask = Scheme("zigzag", "ring", ulysses, 8, 8), Mask(None, 0, cu)
        told = judge(scheme, wire, cu, mask, shape, cluster, ("order", "layout"))
        seconds, nbytes = all_ranks(scheme, wire, cu, mask, shape, cluster)
        assert {name: one.seconds for name, one in told.passes.items()} == pytest.approx(seconds, rel=1e-3) and told.memory == nbytes


@pytest.mark.parametrize("layout", ["contiguous", "balanced", "zigzag"])
@pytest.mark.parametrize("documents, window", [(1, 4096), (40, None), (7, 2000)])
def test_no_rank_that_waits_for_the_network_or_has_the_most_work_is_missed(layout, documents, window):
    """Messages of a window cross the network between hosts alone, where a spread of ranks need not meet them."""
    length, shape, cluster = 1 << 19, MODELS["llama-3-8b"].shape(), Cluster(H200, 32, 8, network(100))
    cu = (0, *sorted(random.Random(documents).sample(range(1, length), documents - 1)), length)
    for order, ulysses in (("ring", 1), ("double_ring", 1), ("all_gather", 1)):
        scheme, mask = Scheme(layout, order, ulysses, 32, 8), Mask(window, 0, cu)
        told = judge(scheme, "p2p", cu, mask, shape, cluster, ("order", "layout"))
        seconds, nbytes = all_ranks(scheme, "p2p", cu, mask, shape, cluster)
        assert sum(seconds.values()) >= told.seconds > 0.97 * sum(seconds.values()), f"{scheme}: {told.seconds}, {seconds}"
        assert told.memory > 0.97 * nbytes


def test_the_ranks_that_are_looked_at_are_few_and_hold_every_border_of_a_host():
    cu = (0, 1 << 16)
    for ranks, per_node, ulysses in ((8, 8, 1), (64, 8, 1), (64, 8, 4), (64, 1, 1), (256, 8, 1), (48, 6, 4), (96, 8, 2)):
        scheme, mask = Scheme("contiguous", "ring", ulysses, ranks, per_node), Mask(None, 0, cu)
        found = worst_ranks(scheme, scheme.spans(cu, mask), mask)
        assert found == sorted(set(found)) and found[-1] == scheme.ring - 1 and len(found) <= 25
        assert scheme.ring > 16 or found == list(range(scheme.ring))
    scheme = Scheme("contiguous", "ring", 1, 64, 8)
    window = Mask(100, 0, cu)
    assert worst_ranks(scheme, scheme.spans(cu, window), window) == sorted({1, *range(0, 64, 4), *range(7, 64, 8)}), "1 keeps the most"
    alike = Scheme("zigzag", "ring", 1, 64, 8)
    assert worst_ranks(alike, alike.spans(cu, mask), mask) == [0, 4, 7, 56, 60, 63]
    # the busiest rank need not be a border
    near = (*range(0, 1 << 15, 64), (1 << 15) + 3 * 1024, *range((1 << 15) + 3 * 1024 + 64, (1 << 16) + 1, 64))
    assert 34 in worst_ranks(scheme, scheme.spans(near, Mask(None, 0, near)), Mask(None, 0, near))
