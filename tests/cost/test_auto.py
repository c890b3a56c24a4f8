"""What "auto" stands for: the same on every rank, near the top of the ranking, and the usual scheme wherever nothing is known."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

import distflash
from distflash.cost import auto
from distflash.cost.choose import candidates, choose, judge
from distflash.cost.devices import DEVICES, Rate, network
from distflash.cost.time import Cluster
from distflash.cost.traffic import Scheme, Shape
from distflash.integrations.deepspeed_ulysses import Beneath
from distflash.parallel.agreement import Disagreement
from distflash.parallel.layout import gathered
from distflash.parallel.mask import Mask
from distflash.parallel.wire.local import LocalGroup, LocalWire
from distflash.testing import spmd

H200 = DEVICES["h200"]
FREE = ("layout", "order", "ulysses")
HEADS = (32, 8, 128)


def usual(ranks, per_node=None):
    return Scheme("zigzag", "ring", 1, ranks, per_node or ranks)


def documents(count, length):
    return (0, *sorted(random.Random(count).sample(range(1, length), count - 1)), length)


def scheme_of(chosen, ranks, per_node=None):
    return Scheme(chosen.layout, chosen.order, chosen.ulysses, ranks, per_node or ranks)


@pytest.fixture
def gpus(monkeypatch):
    """Threads whose devices and wire the model takes for those of a host of H200."""
    monkeypatch.setattr(auto, "common_device", lambda wire: H200)
    monkeypatch.setattr(LocalWire, "name", "p2p (threads)")


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("count, length", [(1, 4096), (1, 1 << 17), (8, 6000), (64, 1 << 16)])
@pytest.mark.parametrize("heads", [None, HEADS])
def test_the_choice_is_near_the_top_of_the_ranking_of_the_very_sequence(ranks, count, length, heads):
    cu, cluster = documents(count, length), Cluster(H200, ranks, ranks, network(auto.NIC))
    chosen = auto.choice(usual(ranks), FREE, cu, heads, H200, "p2p (nccl)")
    fixed = {} if heads else {"ulysses": 1}
    served = {c.scheme: c.seconds for c in choose(cu, Mask(None, 0, cu), Shape(*HEADS, 128), cluster, **fixed) if not c.refused}
    best, mine, default = min(served.values()), served[scheme_of(chosen, ranks)], served[usual(ranks)]
    assert mine <= 1.35 * best and mine <= 1.02 * default
    if count == 1:
        assert mine <= 1.03 * best
    if default > 1.5 * best:
        assert mine < 0.75 * default, "much is to be gained"


def test_for_one_document_it_is_the_first_of_the_ranking_unless_the_usual_one_is_as_fast():
    for ranks, length in ((4, 1 << 12), (8, 1 << 16), (8, 1 << 20)):
        ranking = choose((0, length), Mask(None, 0, (0, length)), Shape(*HEADS, 128), Cluster(H200, ranks, ranks, network(400)))
        default = next(c for c in ranking if c.scheme == usual(ranks))
        first = usual(ranks) if default.seconds <= 1.02 * ranking[0].seconds else ranking[0].scheme
        assert scheme_of(auto.choice(usual(ranks), FREE, (0, length), HEADS, H200, "p2p"), ranks) == first


def test_a_typical_sequence_is_as_long_and_holds_as_many_documents_within_what_is_rounded():
    for length in (1, 2, 7, 1000, 65536, 65537, 999_999):
        assert auto.typical((0, length), 8)[-1] == pytest.approx(length, rel=1 / 16) and len(auto.typical((0, length), 8)) == 2
    found = auto.typical(tuple(range(0, 4097, 64)), 8)
    assert len(found) - 1 == 64 and found[-1] == 4096 and found == tuple(sorted(found))
    assert len(auto.typical((0, 2048, *range(2080, 4097, 32)), 8)) - 1 == 2, "half of the tokens are in one document"
    assert len(auto.typical(tuple(range(5001)), 64)) - 1 <= 512 // 64 and auto.typical((0, 0, 3, 3), 8) == auto.typical((0, 3), 8)
    assert auto.typical(documents(60, 60000), 8) == auto.typical(documents(60, 60010), 8), "batches that are alike share a ranking"


def test_what_is_asked_for_stays_and_what_nothing_is_known_of_is_the_usual_scheme():
    cu, asked = (0, 1 << 14), Scheme("striped", "all_gather", 2, 8, 8)
    assert auto.choice(asked, (), cu, HEADS, H200, "p2p") == ("striped", "all_gather", 2, "as asked for")
    assert auto.choice(asked, ("ulysses",), cu, None, H200, "p2p")[3] == "as asked for", "without heads there is nothing to choose"
    assert auto.choice(asked, ("order",), cu, HEADS, H200, "p2p")[::2] == ("striped", 2)
    for device, wire in ((None, "p2p"), (H200, "local")):
        assert auto.choice(usual(8), FREE, cu, HEADS, device, wire)[:3] == ("zigzag", "ring", 1)
    assert "there is one rank" in auto.choice(usual(1), FREE, cu, HEADS, H200, "p2p").why
    many = Scheme("zigzag", "ring", 64, 128, 8)  # more than the assumed heads: they grow
    assert auto.choice(many, ("layout",), cu, None, H200, "p2p").ulysses == 64
    none = auto.choice(Scheme("contiguous", "ring", 1, 128, 8), ("order",), cu, None, H200, "p2p")
    assert none[:3] == ("contiguous", "ring", 1) and "in closed form only" in none.why


def test_what_takes_too_much_memory_is_passed_over(monkeypatch):
    rates = {
        "forward": {128: Rate(698e12, 2.0)},
        "backward": {128: Rate(593e12, 3.2)},
    }  # the next measured ones may prefer another order here
    cu, gpu = documents(8, 6000), replace(H200, kernels=rates)
    fast = auto.choice(usual(4), ("order", "layout"), cu, None, gpu, "p2p")
    assert fast.order == "all_gather"
    monkeypatch.setattr(auto, "ROOM", 1e-6)
    auto._ranked.cache_clear()
    try:
        lean = auto.choice(usual(4), ("order", "layout"), cu, None, gpu, "p2p")
    finally:
        auto._ranked.cache_clear()
    assert lean.order != "all_gather"


@pytest.mark.parametrize("heads", [None, (4, 2, 16)])
def test_all_ranks_choose_alike_and_attend_as_one_device_does(gpus, heads):
    cu = (0, 40, 41, 41, 150, 333)
    q, k, v = (torch.randn(1, cu[-1], n, 16, dtype=torch.float64) for n in (4, 2, 2))
    alone = distflash.attention(q, k, v, causal=True, cu_seqlens_q=cu, cu_seqlens_k=cu)

    def work(group):
        sp = distflash.SequenceParallel(group)
        seq = sp.sequence(cu_seqlens=cu, heads=heads)
        again = sp.sequence(cu_seqlens=cu, heads=heads)
        assert again.sp is seq.sp, "made once"
        local = [seq.shard(x) for x in (q, k, v)]
        out = seq.unshard(distflash.attention(*local, seq, causal=True))
        why = distflash.explain(local[0].shape, local[1].shape, seq, causal=True, dtype=torch.float32)
        return (seq.sp.layout, seq.sp.order, seq.sp.ulysses, seq.why, str(why)), out, (sp.layout, sp.order, sp.ulysses)

    (chosen, _, kept), *_ = found = spmd(4, work)
    assert all(one[0][:4] == chosen[:4] for one in found)
    assert kept == ("zigzag", "ring", 1) != chosen[:3] and (heads is not None or chosen[2] == 1)
    assert f"why: {chosen[3]}" in chosen[4] and "predicted" in chosen[3] and ("(assumed)" in chosen[3]) == (heads is None)
    assert all(torch.allclose(one[1], alone, atol=1e-12) for one in found)


def test_ranks_that_are_told_different_heads_disagree_before_anything_is_sent(gpus):
    x = torch.randn(1, 4096, 4, 8)

    def work(group):
        seq = distflash.SequenceParallel(group).sequence(4096, heads=(8, 8, 128) if group.rank else (1, 1, 128))
        with pytest.raises(Disagreement, match="ulysses"):
            seq.unshard(seq.shard(x))

    spmd(4, work)


def test_heads_are_checked_whatever_the_device():
    sp = distflash.SequenceParallel()
    for heads in ((32, 5, 128), (0, 1, 8), [4, 2, 8], (4, 2), (4, 2, 1.0), 4):
        with pytest.raises(ValueError, match=r"heads=.* must be \(query heads, key/value heads, head dim\)"):
            sp.sequence(8, heads=heads)
    assert sp.sequence(8, heads=(4, 2, 8)).why == "the usual one: there is one rank"


def test_a_group_of_different_devices_is_as_fast_as_its_slowest():
    def named(names):
        return spmd(len(names), lambda group: auto.slowest(group, names[group.rank]))

    assert named(["NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA H200"]) == [DEVICES["h100"]] * 3
    assert named(["NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"]) == [DEVICES["a100"]] * 2
    assert named(["NVIDIA H200", "Abacus 1"]) == [None, None]


def test_the_wire_needs_no_length_symmetric_memory_is_ranked_first_for_every_one():
    """So the wire can be chosen where the group is: `SequenceParallel` takes symmetric memory wherever it can be."""
    cluster = Cluster(H200, 4, 4, network(400))
    for length in (1 << 12, 1 << 15, 1 << 18):
        cu, shape = (0, length), Shape(*HEADS, 128)
        for scheme, _ in candidates(cluster):
            by_wire = [judge(scheme, wire, cu, Mask(None, 0, cu), shape, cluster) for wire in ("symmetric", "p2p")]
            assert by_wire[0].refused == by_wire[1].refused
            assert by_wire[0].refused or by_wire[0].seconds <= by_wire[1].seconds


def test_beneath_deepspeed_s_ulysses_a_ring_works_on_the_tokens_that_were_dealt_out(gpus):
    """It has a `SequenceParallel` of its own, of fewer ranks, which by itself could choose another layout."""
    cu = tuple(range(0, 6401, 100))

    def work(group):
        sp = distflash.SequenceParallel(group, ulysses=2)
        ring = distflash.SequenceParallel(LocalGroup(2).wire(group.rank // 2))
        seq = sp.sequence(cu_seqlens=cu)
        assert seq.sp is not sp and seq.sp.layout != "zigzag"
        assert Beneath(sp, ring).sequence(seq).layout == gathered(seq.layout, 2)
        with pytest.raises(TypeError, match=r"made by mpu\.sp\.sequence"):
            Beneath(sp, ring).sequence(distflash.SequenceParallel().sequence(8))

    spmd(4, work)
