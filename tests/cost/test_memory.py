"""Peak memory: measured bytes of benchmarks/results, and the count of the benchmark's own formula."""

from __future__ import annotations

import json

import pytest

from benchmarks.bench_memory import expected
from benchmarks.record import RESULTS
from distflash.cost.memory import peak
from distflash.cost.traffic import Scheme, Shape
from distflash.parallel.mask import Mask


def peaks(ranks, tokens, shape, order="ring", layout="zigzag", rank=0, per_node=8, window=None):
    scheme, cu = Scheme(layout, order, 1, ranks, per_node), (0, tokens * ranks)
    mask = Mask(window, 0, cu)
    return peak(scheme.share(scheme.spans(cu, mask), mask, shape, rank))


def test_it_is_what_was_measured_and_what_the_benchmark_awaits():
    rows = json.loads((RESULTS / "memory.json").read_text())["rows"]
    assert len(rows) >= 12
    for r in rows:
        shape = Shape(r["heads"], r["kv_heads"], 128, 128)
        found = peaks(r["ranks"], r["tokens_a_gpu"], shape)
        forward, backward = expected(r["tokens_a_gpu"], r["heads"], r["kv_heads"], r["ranks"])
        assert (found["forward"], found["backward"]) == (forward, pytest.approx(backward, rel=1e-3))
        assert found[r["pass"]] == pytest.approx(r["bytes"], rel=1e-3)


def test_a_ring_holds_two_blocks_whatever_its_size_and_an_all_gather_all_of_them():
    shape = Shape(2, 2, 64, 64)
    block = shape.message(1024, 2)
    ring = [peaks(ranks, 1024, shape)["forward"] for ranks in (3, 4, 8)]
    assert len(set(ring)) == 1
    gathered = [peaks(ranks, 1024, shape, "all_gather")["forward"] for ranks in (3, 4, 8)]
    assert [found - ring[0] for found in gathered] == [block * (ranks - 2) for ranks in (3, 4, 8)]
    assert peaks(8, 1024, shape, "double_ring", per_node=4)["forward"] <= ring[0] + 2 * block


def test_what_does_not_come_is_not_held():
    shape = Shape(8, 2, 64, 64)
    near = peaks(8, 1024, shape, "all_gather", "contiguous", rank=4, window=900)["forward"]
    assert near < peaks(8, 1024, shape, "all_gather", "contiguous", rank=4)["forward"]
