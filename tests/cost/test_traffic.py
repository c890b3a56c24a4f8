"""The model's bytes are the bytes of a real run, to the last one: every layout, order, Ulysses degree, mask and grouping."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict

import pytest
import torch

import distflash
from distflash.cost.traffic import PASSES, Scheme, Shape
from distflash.parallel.layout import LAYOUTS
from distflash.parallel.mask import Mask
from distflash.parallel.plan import ORDERS
from distflash.parallel.wire.local import LocalWire
from distflash.testing import keep_mask, spmd

DOCUMENTS = (0, 7, 8, 8, 30, 37)  # one-token and empty documents, lengths that nothing divides
WINDOWS = {"full": (None, None), "causal": (None, 0), "window": (6, 0)}
HEADS = [(6, 6, 8, 8), (6, 3, 8, 5), (6, 1, 3, 8)]  # query and key/value heads, head sizes


def traffic(scheme, cu, mask, shape, rank):
    return scheme.share(scheme.spans(cu, mask), mask, shape, rank).traffic()


@pytest.fixture
def counted(monkeypatch):
    """Bytes by (pass, source, dest): those handed to the wire, and those it was asked to receive."""
    sent, received, where = defaultdict(Counter), defaultdict(Counter), threading.local()
    exchange = LocalWire.exchange

    def counting(self, sends, recvs):
        for dest, message in sends.items():
            sent[where.phase][self.rank, dest] += message.numel()
        for source, message in recvs.items():
            received[where.phase][source, self.rank] += message.numel()
        return exchange(self, sends, recvs)

    monkeypatch.setattr(LocalWire, "exchange", counting)
    return sent, received, where


def run(group, scheme, cu, window, heads, dtype, where):
    """Attention forward and backward on one rank."""
    seq = distflash.SequenceParallel(group, layout=scheme.layout, order=scheme.order, ulysses=scheme.ulysses).sequence(cu_seqlens=cu)
    h, kv, dim, v_dim = heads
    q, k, v = (torch.ones(2, seq.local_length, *s, dtype=dtype, requires_grad=True) for s in ((h, dim), (kv, dim), (kv, v_dim)))
    left, right = window
    size = (-1 if left is None else left, -1 if right is None else right)
    where.phase = "forward"
    out = distflash.attention(q, k, v, seq, window_size=size)
    where.phase = "backward"
    out.sum().backward()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("order", ORDERS)
def test_bytes_between_every_two_ranks_are_those_of_a_real_run(layout, order, counted):
    sent, received, where = counted
    cases = [(u, cu, w) for u in (1, 2, 4) for cu in ((0, 37), DOCUMENTS) for w in WINDOWS]
    for n, (ulysses, cu, window) in enumerate(cases):
        heads, dtype = HEADS[n % 3], (torch.bfloat16, torch.float64)[n % 2]
        scheme = Scheme(layout, order, ulysses, ranks=4, per_node=2)
        shape = Shape(*heads, batch=2, itemsize=dtype.itemsize)
        for counter in (*sent.values(), *received.values()):
            counter.clear()
        spmd(4, lambda group: run(group, scheme, cu, WINDOWS[window], heads, dtype, where), per_node=2)  # noqa: B023  run at once
        for rank in range(4):
            found = traffic(scheme, cu, Mask(*WINDOWS[window], cu), shape, rank)
            for pass_ in PASSES:
                case = f"{scheme}, {window}, {cu}, {shape}, rank {rank}, {pass_}"
                assert found[pass_].sent == +Counter({b: x for (a, b), x in sent[pass_].items() if a == rank}), case
                assert found[pass_].received == +Counter({a: x for (a, b), x in received[pass_].items() if b == rank}), case


def test_a_mask_of_slices_is_balanced_and_counted_as_the_library_does(counted):
    sent, _, where = counted
    mask, scheme = distflash.Slices.sinks_and_window(64, 2, 10), Scheme("balanced", "ring", 1, ranks=4, per_node=4)

    def work(group):
        seq = distflash.SequenceParallel(group, layout="balanced").sequence(64, mask=mask)
        x = torch.ones(1, seq.local_length, 2, 8)
        where.phase = "forward"
        distflash.attention(x, x, x, seq, mask=mask)

    spmd(4, work)
    for rank in range(4):
        expected = +Counter({b: x for (a, b), x in sent["forward"].items() if a == rank})
        assert traffic(scheme, (0, 64), mask, Shape(2, 2, 8, 8, itemsize=4), rank)["forward"].sent == expected


def test_the_closed_forms_of_the_field_are_what_the_plan_counts():
    """Ring: 2 (P - 1) T Hk D elements of K and V, again in the backward, dK and dV in fp32. Ulysses: (P - 1) / P of 2 T D (H + Hk)."""
    ranks, tokens, shape = 8, 64, Shape(32, 8, 64, 64)
    cu, mask = (0, ranks * tokens), Mask(None, 0, (0, ranks * tokens))
    ring = traffic(Scheme("zigzag", "ring", 1, ranks, ranks), cu, mask, shape, 3)
    kv = 2 * tokens * shape.kv_heads * shape.head_dim
    assert ring["forward"].sent.total() == 2 * kv * (ranks - 1)
    assert ring["backward"].sent.total() == kv * (2 * (ranks - 1) + 4 * ranks)  # a gradient sets out at once: one hop more
    rows = tokens * (ranks - 1) // ranks
    swap = traffic(Scheme("zigzag", "ring", ranks, ranks, ranks), cu, mask, shape, 3)
    wide = 2 * rows * shape.head_dim * (shape.heads + shape.kv_heads)
    assert swap["forward"].sent.total() == swap["backward"].sent.total() == 2 * wide + 4 * rows * shape.heads  # lse, delta
    assert ring["forward"].sent.total() / (2 * wide) == ranks / (1 + shape.heads / shape.kv_heads)


def test_flops_are_two_matmuls_forward_and_five_backward():
    assert Shape(3, 1, 16, 16, batch=2).flops("forward") == 4 * 16 * 6 and Shape(3, 1, 16, 16, batch=2).flops("backward") == 10 * 16 * 6
    assert Shape(1, 1, 192, 128).flops("backward") == 2 * (3 * 192 + 2 * 128)
    pairs = sum(v.tiles.area for r in range(4) for v in _visits(r))
    assert pairs == int(keep_mask(37, 37, causal=True, cu_seqlens_q=DOCUMENTS).sum())


def _visits(rank):
    scheme, mask = Scheme("zigzag", "ring", 1, 4, 4), Mask(None, 0, DOCUMENTS)
    return scheme.visits(scheme.spans(DOCUMENTS, mask), mask, rank)


def test_what_the_library_refuses_is_refused_with_its_reason():
    shape = Shape(6, 3, 8, 8)
    assert Scheme("zigzag", "ring", 3, 8, 8).refusal(shape) == "ulysses=3 does not divide the 8 ranks"
    assert "needs at least as many query heads, got 6" in Scheme("zigzag", "ring", 8, 8, 8).refusal(shape)
    assert "as many consecutive ranks on each host, got 6 on hosts of 4" in Scheme("zigzag", "double_ring", 1, 6, 4).refusal(shape)
    assert "as many consecutive ranks on each host, got 6 on hosts of 3" in Scheme("zigzag", "double_ring", 2, 6, 3).refusal(shape)
    assert Scheme("zigzag", "double_ring", 2, 8, 4).refusal(shape) is None
