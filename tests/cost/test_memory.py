"""Peak memory: measured bytes of benchmarks/results, the count of the benchmark's own formula, and what kernels allocate."""

from __future__ import annotations

import json
import random
from functools import partial
from itertools import accumulate

import pytest
import torch

from distflash.cost.memory import least, peak
from distflash.cost.traffic import Scheme, Shape
from distflash.kernels.base import Counted, Problem
from distflash.kernels.eager import EagerKernel
from distflash.parallel import ring
from distflash.parallel.layout import LAYOUTS, lengths
from distflash.parallel.mask import Mask
from distflash.parallel.messages import Messages
from distflash.parallel.plan import ORDERS
from distflash.testing import spmd
from tests.parallel.test_staging import Bare, Meter, held  # noqa: F401  a fixture


def peaks(ranks, tokens, shape, order="ring", layout="zigzag", rank=0, per_node=8, window=None, scratch=least):
    scheme, cu = Scheme(layout, order, 1, ranks, per_node), (0, tokens * ranks)
    mask = Mask(window, 0, cu)
    return peak(scheme.share(scheme.spans(cu, mask), mask, shape, rank), scratch=scratch)


def test_it_is_what_was_measured_and_what_the_benchmark_awaits():
    from benchmarks.bench_memory import expected  # a mutant has no benchmarks
    from benchmarks.record import RESULTS

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


@pytest.fixture
def kernels(monkeypatch):
    """The host side of both, by name, with launches that do nothing."""
    pytest.importorskip("triton")
    from distflash.kernels.hopper import HopperKernel, gradients, host
    from distflash.kernels.triton.kernel import TritonKernel

    for module in (host, gradients):
        monkeypatch.setattr(module, "launch", lambda *args, **options: None)
        monkeypatch.setattr(module, "sms", lambda device: 132)
    monkeypatch.setattr(TritonKernel, "_launch", lambda *args, **options: None)
    return {"one pass": HopperKernel(), "two passes": HopperKernel().deterministic(), "portable": TritonKernel()}


@pytest.mark.parametrize("kernel", ["one pass", "two passes", "portable"])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("ranks, tokens", [(1, 250), (2, 256), (3, 256)])
def test_every_byte_that_a_kernel_allocates_is_counted(kernels, held, kernel, dim, ranks, tokens):  # noqa: F811
    shape, chosen = Shape(4, 2, dim, dim, batch=2), kernels[kernel]
    cu, scratch = (0, tokens * ranks), partial(chosen.scratch, Problem(torch.device("cpu"), torch.bfloat16, 4, 2, dim, dim))
    scheme, mask = Scheme("zigzag", "ring", 1, ranks, ranks), Mask(None, 0, cu)
    spans = scheme.spans(cu, mask)

    def measured(wire):
        q, dout = (torch.empty(2, tokens, 4, dim, dtype=torch.bfloat16) for _ in range(2))
        k, v = (torch.empty(2, tokens, 2, dim, dtype=torch.bfloat16) for _ in range(2))
        share = scheme.share(spans, mask, shape, wire.rank)
        visits, carrier = [step.visit for step in share.steps], Messages(wire)
        for _ in range(2):  # the first makes tables
            with Meter().over(q, k, v, dout) as there:
                out, lse = ring.forward(visits, carrier, chosen, q, k, v, 1.0)
            delta = torch.empty_like(lse)
            with Meter().over(q, k, v, dout, out, lse, delta) as back:
                ring.backward(visits, carrier, chosen, dout, q, k, v, lse, delta, 1.0, dkv_dtype=k.dtype)
        return {"forward": there.peak, "backward": back.peak + sum(x.nbytes for x in (out, lse, delta))}, peak(share, scratch=scratch)

    for rank, (found, told) in enumerate(spmd(ranks, measured)):
        assert found == told, f"rank {rank}"


def test_one_pass_takes_a_wide_dq_more_where_one_visit_is_all_there_is(kernels):
    problem = Problem(torch.device("cpu"), torch.bfloat16, 32, 8, 128, 128)
    one, two = (kernels[name].scratch(problem, 32, 4096, True) for name in ("one pass", "two passes"))
    assert one - two == 4 * 32 * 4096 * 128 and 0 <= two - kernels["portable"].scratch(problem, 32, 4096, True) <= 2 * 4 * 32 * 128
    assert all(isinstance(kernel, Counted) for kernel in kernels.values()) and not isinstance(EagerKernel(), Counted)
    shape = Shape(32, 8, 128, 128)
    told = [peaks(1, 4096, shape, scratch=partial(kernels[name].scratch, problem))["backward"] for name in ("one pass", "two passes")]
    assert told[0] - told[1] == one - two


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_byte_is_counted_for_windows_and_documents_over_messages(layout, order, held):  # noqa: F811
    """A rank may get what others have of its gradient at any step, and pass on what it needs no more."""
    random_ = random.Random(f"{layout}, {order}")
    for _ in range(8):
        ranks, node = random_.choice([(2, 2), (3, 3), (4, 2), (6, 3)])
        cu = (0, *accumulate(64 * random_.randint(1, 8) for _ in range(random_.choice([1, 2, 5]))))
        mask = Mask(random_.choice([None, 40, 0]), random_.choice([0, 0, None, 7]), cu)
        heads = random_.choice([(2, 2), (6, 2), (4, 1)])
        scheme, shape = Scheme(layout, order, 1, ranks, node), Shape(*heads, 64, 64, batch=2)
        spans = scheme.spans(cu, mask)

        def measured(wire):
            share = scheme.share(spans, mask, shape, wire.rank)  # noqa: B023  run at once
            visits, carrier, tokens = [step.visit for step in share.steps], Messages(wire), lengths(spans)[wire.rank]  # noqa: B023
            q, k, v, dout = (torch.empty(2, tokens, n, 64, dtype=torch.bfloat16) for n in (*heads, heads[1], heads[0]))  # noqa: B023
            with Meter().over(q, k, v, dout) as there:
                out, lse = ring.forward(visits, carrier, Bare(), q, k, v, 1.0)
            delta = torch.empty_like(lse)
            with Meter().over(q, k, v, dout, out, lse, delta) as back:
                ring.backward(visits, carrier, Bare(), dout, q, k, v, lse, delta, 1.0, dkv_dtype=k.dtype)
            return {"forward": there.peak, "backward": back.peak + sum(x.nbytes for x in (out, lse, delta))}, peak(share)

        for rank, (found, told) in enumerate(spmd(ranks, measured)):
            assert found == told, f"{scheme}, {mask}, {shape}, rank {rank}"
