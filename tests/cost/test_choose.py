"""The ranking: one answer on every rank, what is refused and why, and the choices that the theory demands."""

from __future__ import annotations

import pytest

from distflash.cost.choose import WIRES, candidates, choose
from distflash.cost.devices import DEVICES, network
from distflash.cost.models import MODELS
from distflash.cost.time import Cluster
from distflash.cost.traffic import Shape
from distflash.parallel.mask import Mask
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
    assert {c.scheme.order: c.refused is None for c in found} == {"ring": True, "double_ring": True, "all_gather": False}
    assert "in closed form only: all_gather has none" in found[-1].reason
