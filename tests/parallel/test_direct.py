"""Blocks that are copied between the memories of ranks, instead of sent: threads that share windows."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import distflash
from distflash.parallel import direct
from distflash.parallel.layout import LAYOUTS, lengths
from distflash.parallel.mask import Mask
from distflash.parallel.plan import ORDERS, halved, narrowed, plan, readers
from distflash.parallel.wire import p2p, symmetric
from distflash.parallel.wire.local import LocalGroup, LocalWire, RankLost
from distflash.testing import check, spmd, spmd_processes
from tests.parallel.test_ring import MASKS, RAGGED, S, agree, divisors
from tests.schemes import Call, inputs, on_ranks, truth_of


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("order", ["ring", "all_gather"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_scheme_gives_the_gradients_of_dense_attention(layout, order, ranks):
    x = inputs(S)
    for ulysses in divisors(ranks):
        for mask in MASKS:
            agree(ranks, Call(layout, order, ulysses, wire="symmetric", **mask), x)


def test_a_double_ring_of_copies():
    agree(4, Call("zigzag", "double_ring", causal=True, wire="symmetric"), inputs(S), per_node=2)


@pytest.mark.parametrize("variant", [{"softcap": 2.0}, {"slopes": torch.tensor([0.5, 0.1, 0.3, 0.2])}, {"dropout_p": 0.3}])
def test_variants_know_the_positions_of_the_part_of_a_block_that_came(variant):
    x, call = inputs(S), Call("zigzag", causal=True, documents=RAGGED, wire="symmetric", **variant)
    check(on_ranks(3, call, x), truth_of(call, x), truth_of(call, x), torch.float64)


def test_one_rank_copies_nothing_and_needs_no_window(monkeypatch):
    monkeypatch.setattr(LocalWire, "window", lambda *_: pytest.fail("a window for one rank"))
    agree(1, Call(causal=True, wire="symmetric"), inputs(S))


def test_the_wires_agree_to_the_bit_where_two_ranks_add():
    # of two terms there is one order; three and more may be rounded differently
    x, call = inputs(S, dtype=torch.bfloat16), Call("zigzag", causal=True, deterministic=True)
    results = [on_ranks(2, call._replace(wire=wire), x) for wire in ("p2p", "symmetric", "symmetric")]
    assert all(torch.equal(a, b) for a, b in zip(results[1], results[2], strict=True))
    torch.testing.assert_close(results[0].dk, results[1].dk, rtol=2**-7, atol=1e-2)


@pytest.fixture
def copied(monkeypatch):
    """Tokens that were copied between ranks, by dtype."""
    count, copy = Counter(), direct.copy
    monkeypatch.setattr(direct, "copy", lambda source, to: (count.update({source.dtype: source.shape[1]}), copy(source, to))[1])
    return count


def test_only_the_half_that_a_zigzag_needs_is_copied(copied):
    ranks, tokens = 4, 64
    agree(ranks, Call("zigzag", causal=True, wire="symmetric"), inputs(tokens, batch=1, dtype=torch.float64))
    shard = tokens // ranks
    pairs = ranks * (ranks - 1)
    moved = 2 * (pairs * shard // 2 + pairs * shard) // 2  # K and V: half a block from earlier ranks, whole ones from later
    assert copied == {torch.float64: 3 * moved}  # forward, backward, and gradients


def test_what_nobody_needs_is_not_copied(copied):
    agree(4, Call("contiguous", causal=True, documents=(0, 3, 8, 16, 20, 24, 32), wire="symmetric"), inputs(32))
    assert not copied
    agree(4, Call("contiguous", causal=True, documents=(0, 3, 9, 16, 20, 24, 32), wire="symmetric"), inputs(32, batch=1))
    assert copied == {torch.float64: 6 * 5}, "of rank 0's block the 5 tokens of the document that goes on, K and V, thrice"


def test_readers_and_visits_say_the_same_of_every_pair_of_ranks():
    cu = (0, 40, 41, 97)
    for layout in LAYOUTS:
        for window in (None, 9):
            shared, mask = LAYOUTS[layout](cu, 4), Mask(window, 0, cu)
            read = [readers(shared, mask, rank) for rank in range(4)]
            for rank in range(4):
                visits = narrowed(plan(shared, mask, ORDERS["ring"](4, 4), rank))
                wanted = {part.owner: part.keys for v in visits[1:] if v.tiles for part in v.parts}
                assert wanted == {owner: read[owner][rank] for owner in range(4) if rank in read[owner]}, (layout, window, rank)


def test_halves_of_the_own_block_keep_what_the_block_keeps():
    cu = (0, 40, 41, 97)
    for layout in LAYOUTS:
        shared, mask = LAYOUTS[layout](cu, 4), Mask(None, 0, cu)
        for rank in range(4):
            visits = plan(shared, mask, ORDERS["ring"](4, 4), rank)
            cut = halved(visits)
            assert [v.owner for v in cut] == [*(v.owner for v in visits), rank]
            assert cut[0].tiles.area <= cut[-1].tiles.area and cut[0].tiles.area + cut[-1].tiles.area == visits[0].tiles.area
            held = sorted((v.parts[0].keys.start, v.parts[0].keys.stop) for v in (cut[0], cut[-1]))
            assert held[0][0] == 0 and held[0][1] == held[1][0] and held[1][1] == lengths(shared)[rank]


def test_a_piece_is_not_overwritten_before_it_is_released():
    def work(wire):
        window, other = wire.window("numbers", 8), 1 - wire.rank
        seen = []
        for n in range(20):
            if wire.rank == 0:
                window.writable(other)
                window.of(0).fill_(n)
                window.give(other)
            else:
                window.take(other)
                seen.append(window.of(0).tolist())
                window.release(other)
        return seen

    assert spmd(2, work)[1] == [[n] * 8 for n in range(20)]


def test_what_is_given_without_asking_is_an_error_and_whoever_waits_for_a_lost_rank_is_woken():
    window = LocalGroup(2).wire(0).window("numbers", 8)
    window.writable(1)
    window.give(1)
    with pytest.raises(AssertionError, match="had not been asked"):
        window.give(1)

    def work(wire):
        if wire.rank == 0:
            raise KeyError("lost")
        with pytest.raises(RankLost):
            wire.window("numbers", 8).take(0)

    with pytest.raises(KeyError):
        spmd(2, work)


def test_processes_on_cpus_say_why_they_cannot():
    def work():
        chosen = distflash.SequenceParallel()
        with pytest.raises(ValueError, match="wire='symmetric' cannot serve this group: it copies between the memories of NVIDIA GPUs"):
            distflash.SequenceParallel(wire="symmetric")
        return chosen.wire_name, chosen.wire_reason

    assert spmd_processes(2, work)[0] == ("p2p (gloo)", "not symmetric: it copies between the memories of NVIDIA GPUs")


def test_gpus_that_cannot_share_memory_are_a_reason_on_every_rank(monkeypatch):
    def refused(*_):
        raise RuntimeError("pidfd_getfd: operation not permitted\nand more")

    wire = SimpleNamespace(device=torch.device("cuda", 0), size=2, per_node=2, group=None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: True)
    monkeypatch.setattr(symmetric, "_count", lambda wire, here: 2 * here)
    monkeypatch.setattr(symmetric, "CudaWindow", lambda *_: None)
    assert symmetric.obstacle(wire) is None
    monkeypatch.setattr(symmetric, "CudaWindow", refused)
    assert symmetric.obstacle(wire) == "2 of 2 ranks could not share memory: pidfd_getfd: operation not permitted"
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: False)
    assert symmetric.obstacle(wire) == "2 of 2 ranks cannot reach the memory of all GPUs of the host"
    wire.per_node = 1
    assert symmetric.obstacle(wire) == "its ranks must share a host"


@pytest.mark.parametrize("hosts, per_node", [("aaaa", 4), ("aabb", 2), ("abcd", 1), ("aaab", 1), ("abab", 1), ("abba", 1)])
def test_ranks_of_hosts_that_hold_unequal_or_scattered_runs_of_them_are_not_taken_to_share_one(monkeypatch, hosts, per_node):
    """Memory of another host would be asked for, and links between hosts be taken for those inside one."""
    monkeypatch.setattr(p2p, "host_name", lambda: hosts[dist.get_rank()])

    def work():
        wire = p2p.P2PWire(dist.group.WORLD)
        found, wire.device = wire.per_node, torch.device("cuda", 0)
        return found, hosts == "aaaa" or symmetric.obstacle(wire) == "its ranks must share a host"

    assert spmd_processes(4, work) == [(per_node, True)] * 4
