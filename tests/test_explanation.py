"""What a call would do: names, reasons, and counts that agree with what is then sent."""

from __future__ import annotations

import threading
from collections import Counter

import pytest
import torch

import distflash
from distflash.cost.traffic import Scheme, Shape
from distflash.explanation import _predicted
from distflash.parallel import all_to_all, direct
from distflash.parallel.mask import Mask
from distflash.parallel.wire.local import LocalWire
from distflash.parallel.wire.symmetric import copy
from distflash.testing import keep_mask, spmd

S = 251  # nothing divides it: messages are padded


def test_on_one_device_it_says_what_runs_and_that_nothing_is_sent():
    found = distflash.explain((2, 10, 4, 8), (2, 10, 2, 8), causal=True, dtype=torch.float32, device="cpu")
    pairs = int(keep_mask(10, 10, causal=True).sum())
    assert (found.kernel, found.visits, found.busy_visits, found.tiles) == ("eager", 1, 1, 1)
    assert found.forward_flops == 4 * 2 * 4 * 8 * pairs and found.backward_flops == 10 * 2 * 4 * 8 * pairs
    assert found.forward_bytes == found.backward_bytes == 0 and "nothing is sent" in str(found)


def test_it_says_why_candidates_were_passed_over():
    found = distflash.explain((1, 4, 2, 8), (1, 4, 2, 8), device="cpu")
    assert dict(found.passed_over)["triton"]
    assert all(reason for _, reason in found.passed_over) and found.kernel not in dict(found.passed_over)
    assert f"not triton: {dict(found.passed_over)['triton']}" in str(found)
    assert distflash.explain((1, 4, 2, 8), (1, 4, 2, 8), device="cpu", kernel="reference").kernel == "reference"


def test_work_is_counted_exactly_and_adds_up_over_ranks():
    cu, window = (0, 7, 8, 8, 30, 37), (6, -1)
    pairs = int(keep_mask(37, 37, causal=True, window_size=window, cu_seqlens_q=cu).sum())

    def work(group, ulysses):
        seq = distflash.SequenceParallel(group, ulysses=ulysses).sequence(cu_seqlens=cu)
        shape = (2, seq.local_length, 6, 8)
        return distflash.explain(shape, (2, seq.local_length, 3, 8), seq, causal=True, window_size=window, dtype=torch.float32)

    for ulysses in (1, 2, 4):
        found = spmd(4, lambda group, ulysses=ulysses: work(group, ulysses))
        assert sum(one.forward_flops for one in found) == 4 * 2 * 6 * 8 * pairs, f"ulysses {ulysses}"
        assert f"zigzag, ring of {4 // ulysses}, ulysses {ulysses}, over local" in str(found[0])


@pytest.mark.parametrize("order", ["ring", "all_gather", "double_ring"])
@pytest.mark.parametrize("window", [(-1, -1), (70, 0)])
@pytest.mark.parametrize("ulysses, heads, kv_heads", [(1, 4, 2), (2, 4, 2), (2, 12, 6), (4, 8, 2), (4, 12, 12), (2, 6, 3)])
def test_the_bytes_it_names_are_the_bytes_that_are_sent(order, window, ulysses, heads, kv_heads, monkeypatch):
    sent, where = Counter(), threading.local()
    exchange = LocalWire.exchange

    def counted(self, sends, recvs):
        sent[self.rank, where.phase] += sum(message.numel() for message in sends.values())
        return exchange(self, sends, recvs)

    monkeypatch.setattr(LocalWire, "exchange", counted)

    def work(group):
        seq = distflash.SequenceParallel(group, layout="balanced", order=order, ulysses=ulysses).sequence(S)
        q, k, v = (torch.randn(1, seq.local_length, h, 32).bfloat16().requires_grad_() for h in (heads, kv_heads, kv_heads))
        where.phase = "forward"
        out = distflash.attention(q, k, v, seq, causal=True, window_size=window)
        where.phase = "backward"
        out.sum().backward()
        return distflash.explain(q.shape, k.shape, seq, causal=True, window_size=window)

    for rank, found in enumerate(spmd(4, work, per_node=2)):
        expected = sent[rank, "forward"], sent[rank, "backward"]
        assert (found.forward_bytes, found.backward_bytes) == expected, f"rank {rank}"


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("window", [(-1, -1), (70, 0)])
@pytest.mark.parametrize("ulysses", [1, 2, 4])
def test_where_blocks_are_copied_it_names_the_bytes_that_a_rank_copies(layout, window, ulysses, monkeypatch):
    """Over symmetric memory no message carries a block: a rank copies the keys that it sees, and their gradients."""
    carried, where = Counter(), threading.local()

    def counted(source, to):
        carried[where.rank, where.phase] += source.nbytes
        copy(source, to)

    monkeypatch.setattr(direct, "copy", counted)
    monkeypatch.setattr(all_to_all, "copy", counted)

    def work(group):
        seq = distflash.SequenceParallel(group, layout=layout, ulysses=ulysses, wire="symmetric").sequence(256)
        q, k, v = (torch.randn(1, seq.local_length, h, 32).bfloat16().requires_grad_() for h in (8, 4, 4))
        where.rank, where.phase = group.rank, "forward"
        out = distflash.attention(q, k, v, seq, causal=True, window_size=window)
        where.phase = "backward"
        out.sum().backward()
        return distflash.explain(q.shape, k.shape, seq, causal=True, window_size=window)

    for rank, found in enumerate(spmd(4, work)):
        assert (found.forward_bytes, found.backward_bytes) == (carried[rank, "forward"], carried[rank, "backward"]), f"rank {rank}"
        assert "MiB copied forward" in str(found)


def test_it_says_how_much_the_mask_keeps_and_which_steps_are_left_out():
    mask = distflash.Slices.sinks_and_window(64, 2, 10)
    alone = distflash.explain((1, 64, 2, 8), (1, 64, 2, 8), mask=mask, device="cpu")
    assert (alone.pairs_kept, alone.pairs) == (mask.area, 64 * 64)
    assert f"keeps {mask.area} of 4096 pairs of a query and a key, {mask.area / 4096:.2%}" in str(alone)

    def work(group, **options):
        seq = distflash.SequenceParallel(group, layout="contiguous").sequence(64)
        return distflash.explain((1, 8, 2, 8), (1, 8, 2, 8), seq, **options)

    found = spmd(8, lambda group: work(group, mask=mask))
    assert sum(one.pairs_kept for one in found) == mask.area and {one.pairs for one in found} == {8 * 64}
    assert [one.busy_visits for one in found] == [1, 2, 3, 4, 4, 4, 4, 4]  # itself, two of the window, the sinks
    window = spmd(8, lambda group: work(group, causal=True, window_size=(7, 0)))
    assert [one.busy_visits for one in window] == [1, 2, 2, 2, 2, 2, 2, 2] and window[-1].forward_bytes == 0 < window[0].forward_bytes


def test_it_predicts_time_where_it_knows_the_device_and_says_why_not_elsewhere(monkeypatch):
    found = distflash.explain((1, 64, 4, 8), (1, 64, 4, 8), device="cpu")
    assert (found.forward_seconds, found.backward_seconds, found.exposed_seconds) == (None, None, None)
    assert "no prediction: rates of this cpu are not known" in str(found)
    assert found.peak_bytes == 64 * 4 * (2 * 2 * 8 + 3 * 4 + 2 * 2 * 8)  # out and dq; lse, its copy and delta; dk and dv
    assert "MiB above the inputs" in str(found)

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    shape, mask = Shape(32, 8, 128, 128), Mask(None, 0, (0, 65536))
    shares = [Scheme("zigzag", "ring", 1, 4, n) for n in (4, 2)]
    mine = [scheme.share(scheme.spans((0, 65536), mask), mask, shape, 0) for scheme in shares]
    forward, backward, exposed, basis = _predicted(mine[0], torch.device("cuda"), "p2p (nccl)")
    ideal = 4 * 128 * 32 * 65536**2 / 2 / 4 / 677e12
    assert ideal < forward < 1.2 * ideal and 2 * forward < backward < 4 * forward and 0 < exposed < 0.2 * backward
    assert basis == "kernels measured on an H100, at D = 128 on two H200, links on 2 and 4 H200"
    assert "400 Gbit/s between hosts assumed" in _predicted(mine[1], torch.device("cuda"), "p2p (nccl)")[3]
    assert _predicted(mine[0], torch.device("cuda"), "local")[0] is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Abacus 1")
    assert "nothing is known of the device 'Abacus 1'" in _predicted(mine[0], torch.device("cuda"), "p2p (nccl)")[3]


def test_what_the_call_would_refuse_it_refuses_too():
    with pytest.raises(ValueError, match="kernel='fast' is not known"):
        distflash.explain((1, 4, 2, 8), (1, 4, 2, 8), kernel="fast")
    with pytest.raises(ValueError, match="window_size"):
        distflash.explain((1, 4, 2, 8), (1, 4, 2, 8), window_size=(1,))
    with pytest.raises(ValueError, match="multiple of key/value heads"):
        distflash.explain((1, 4, 3, 8), (1, 4, 2, 8))
    with pytest.raises(ValueError, match="leave these out"):
        distflash.explain((1, 4, 2, 8), (1, 4, 2, 8), causal=True, mask=distflash.Slices.prefix_lm(4, 2))
    with pytest.raises(ValueError, match="agree in batch and head_dim"):
        distflash.explain((1, 4, 2, 8), (1, 4, 2, 16))

    def work(group):
        seq = distflash.SequenceParallel(group, ulysses=4).sequence(8)
        with pytest.raises(ValueError, match="ulysses=4 needs at least as many query heads, got 2"):
            distflash.explain((1, 2, 2, 8), (1, 2, 2, 8), seq)
        with pytest.raises(ValueError, match="q has 8 tokens, but rank"):
            distflash.explain((1, 8, 4, 8), (1, 8, 4, 8), seq)

    spmd(4, work)
