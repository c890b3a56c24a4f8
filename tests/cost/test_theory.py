"""The claims of docs/io-model.md that no other test of this folder checks."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.io_model import PAGE, grids, least_moved, packed_documents, rendered, ring_bytes, threshold, ulysses_bytes
from distflash.cost import hbm
from distflash.cost.devices import DEVICES, Link, network
from distflash.cost.simulate import simulate
from distflash.cost.time import Cluster, Rank
from distflash.cost.traffic import Scheme, Shape
from distflash.parallel.mask import Mask, packed, tiles
from distflash.tile import Tiles
from tests.cost.test_time import IDEAL

ROOT = Path(__file__).parent.parent.parent


def test_where_the_ring_is_the_best_grid():
    for group in (1, 2, 3, 4, 8, 16):
        for ranks in range(2, 1025):
            volumes = dict(grids(ranks, group))
            ratio = volumes[1] / min(volumes.values())
            assert ratio == 1 or ranks > 2 * group, (group, ranks)
            assert ratio <= 1.5 or ranks > 4 * group, (group, ranks)
        even = [dict(grids(4**n * group, group)) for n in (3, 5, 7)]
        ratios = [volumes[1] / min(volumes.values()) / (0.5 * 2**n) for volumes, n in zip(even, (3, 5, 7), strict=True)]
        assert abs(ratios[-1] - 1) < abs(ratios[0] - 1) and ratios[-1] == pytest.approx(1, abs=0.02)  # tends to sqrt(P/g) / 2
    assert min(dict(grids(16, 4)).values()) < dict(grids(16, 4))[1], "past P = 2g a grid moves less"


def test_nothing_moves_less_than_the_lower_bound_and_up_to_as_many_ranks_as_heads_share_one_the_ring_moves_just_that():
    for group in (1, 2, 3, 4, 8, 16):
        for ranks in range(2, 513):
            bound = least_moved(ranks, group)
            rectangles = [group * (a - 1) + (ranks / a - 1) for a in (1 + n * (ranks - 1) / 400 for n in range(401))]
            assert bound <= min(rectangles) + 1e-9 and min(rectangles) <= bound + 0.01 * ranks
            assert bound <= min(volume for _, volume in grids(ranks, group)) + 1e-9
            assert bound == ranks - 1 or ranks > group, (group, ranks)
            assert ranks - 1 <= 1.5 * bound or ranks > 4 * group, (group, ranks)
            if ranks >= 16 * group and (ranks // group) ** 0.5 % 1 == 0 and ranks % group == 0:
                assert min(volume for _, volume in grids(ranks, group)) == pytest.approx(bound), "a grid reaches it"


@pytest.mark.parametrize("heads, kv_heads", [(32, 32), (32, 8), (32, 4), (16, 2)])
def test_what_ring_and_ulysses_move_is_what_the_plan_counts_past_as_many_ranks_as_heads(heads, kv_heads):
    """With more ranks than key/value heads each rank's one is copied to all that share it, and its gradients come back in fp32."""
    tokens, dim = 64, 64
    for ranks in (p for p in (2, 4, 8, 16, 32) if p <= heads):
        shape, cu = Shape(heads, kv_heads, dim, dim), (0, ranks * tokens)
        mask, lse = Mask(None, 0, cu), 4 * tokens * heads * (ranks - 1) // ranks
        sent = [Scheme("zigzag", "ring", u, ranks, ranks) for u in (1, ranks)]
        ring, swap = ([s.share(s.spans(cu, mask), mask, shape, r).traffic() for r in range(ranks)] for s in sent)
        for pass_ in ("forward", "backward"):
            assert {rank[pass_].sent.total() for rank in ring} == {tokens * dim * ring_bytes(ranks, kv_heads, pass_)}
            assert {rank[pass_].sent.total() - lse for rank in swap} == {tokens * dim * ulysses_bytes(ranks, heads, kv_heads, pass_)}
        group = heads // kv_heads
        told = ring_bytes(ranks, kv_heads, "forward") / ulysses_bytes(ranks, heads, kv_heads, "forward")
        assert told == pytest.approx(ranks / (group + max(1, ranks / kv_heads))) and told <= kv_heads / 2


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_spreading_attention_costs_no_more_hbm_in_order(ranks):
    """All ranks of a ring together: the streams of one device, and Q and the running out once a visit."""
    n, d, m = 4096, 64, 64 * 64
    blocks, one = hbm.largest(m, d), Shape(1, 1, d, d)
    whole = hbm.forward(packed((0, n), (0, n), Mask()), one, blocks)
    spans = Scheme("contiguous", "ring", 1, ranks, ranks).spans((0, n), Mask())
    visits = [(tiles(q, k, Mask()), r == 0, r == ranks - 1) for q in spans for r, k in enumerate(spans)]
    total = sum(hbm.forward(found, one, blocks, first, last) for found, first, last in visits)
    rows = n * (d * 2 + 2 * (d + 1) * 4)  # what a visit moves of Q and of the running out and lse
    assert n // ranks * d >= m
    assert whole < total < 1.05 * whole + ranks * rows
    assert isinstance(visits[0][0], Tiles) and total < 2 * whole


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("group", [1, 4])
def test_a_hop_is_hidden_from_the_tokens_that_the_formula_says(group, causal):
    """T = F/(gB), twice that if causal, 1.2 times that in the backward; below, the simulated ring waits, above it does not."""
    flops, bandwidth, shape = 1e12, 1e9 / group * 4, Shape(4, 4 // group, 64, 64)
    least = flops / (group * bandwidth) * (2 if causal else 1)  # 250 or 500
    device = replace(IDEAL, wires={"p2p": Link.of(0.0, bandwidth)})
    for pass_, tokens in (("forward", least), ("backward", 1.2 * least)):
        for factor, hidden in ((0.8, False), (1.25, True)):
            scheme = Scheme("zigzag", "ring", 1, 4, 4)
            cu = (0, 4 * round(tokens * factor))
            mask = Mask(None, 0 if causal else None, cu)
            shares = [scheme.share(scheme.spans(cu, mask), mask, shape, n) for n in range(4)]
            made = [Rank(share, Cluster(device, 4, 4, network(1))) for share in shares]
            found = simulate(made, pass_)
            last = shape.message(cu[-1] // 4, 4) / bandwidth if pass_ == "backward" else 0.0  # the way home of the last gradient
            waited = found.seconds - max(found.busy.values()) - last
            assert (waited < 0.05 * found.seconds) == hidden, f"{pass_}, {tokens * factor:.0f} tokens: {waited:.2e} of {found.seconds:.2e}"


def test_documents_that_no_rate_is_fitted_to_are_predicted_within_a_third():
    """Two numbers a kernel know the items and tiles of short documents, not that most of their tiles are masked."""
    for pass_, (predicted, measured) in packed_documents().items():
        assert predicted == pytest.approx(measured, rel={"forward": 0.30, "backward": 0.20}[pass_])


def test_thresholds_with_real_links_are_above_the_formula_of_the_fastest_message():
    h200, shape = DEVICES["h200"], Shape(32, 32, 128, 128)
    link = h200.wires["symmetric"]
    found = threshold(h200, link, shape, "forward", causal=False)
    assert found is not None and 0.6 < found / (677e12 / link.bandwidth) < 1.4
    assert threshold(h200, Link.of(1.0, 1.0), shape, "forward", causal=False) is None


def test_the_page_is_what_the_model_says_and_names_tests_that_exist():
    text = (ROOT / PAGE).read_text()
    assert rendered(text) == text, f"{PAGE} is out of date: run python -m benchmarks.io_model"
    sources = "".join(path.read_text() for folder in ("cost", "parallel") for path in (ROOT / "tests" / folder).glob("test_*.py"))
    named = re.findall(r"\b(test_[a-z0-9_]{25,})", text)
    assert len(named) > 10
    assert not [name for name in named if f"def {name}(" not in sources]
