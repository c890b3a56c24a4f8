"""The same schemes over real processes and gloo. Many schemes share one fork: starting ranks costs more than running them."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import distflash
from distflash.parallel.wire import p2p
from distflash.testing import errors, spmd_processes
from tests.parallel.test_loss import step
from tests.schemes import Call, inputs, run_rank, truth_of, whole

S = 37
RAGGED = (0, 7, 8, 8, 30, S)


def agree(calls, x, replies, case=""):
    """replies[rank][n] is what a rank found for calls[n]."""
    for n, call in enumerate(calls):
        truth = truth_of(call, x)
        broken = errors(whole([reply[n] for reply in replies]), truth, truth, torch.float64)
        assert not broken, f"{case} {call}: {broken}"


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_scheme_gives_the_gradients_of_dense_attention(ranks):
    x, few = inputs(S), inputs(2)
    calls = [
        Call(layout, order, ulysses, **mask)
        for layout in ("contiguous", "zigzag", "striped")
        for order in ("ring", "all_gather")
        for ulysses in (1, 2, 3, 4)
        if ranks % ulysses == 0
        for mask in ({"causal": True, "documents": RAGGED}, {"window_size": (5, 3)})
    ]
    small = [Call(layout, ulysses=ulysses, causal=True) for layout in ("zigzag", "contiguous") for ulysses in {1, ranks}]  # empty shards
    replies = spmd_processes(ranks, lambda: ([run_rank(call, x) for call in calls], [run_rank(call, few) for call in small]))
    agree(calls, x, [reply[0] for reply in replies])
    agree(small, few, [reply[1] for reply in replies], "two tokens")


def test_two_hosts_make_a_double_ring_without_being_asked(monkeypatch):
    x, call = inputs(S), Call("zigzag", "auto", causal=True, documents=RAGGED)
    monkeypatch.setattr(p2p, "host_name", lambda: f"host{dist.get_rank() // 2}")

    def work():
        sp = distflash.SequenceParallel()
        return sp.order, sp.wire.per_node, run_rank(call, x), run_rank(call._replace(order="double_ring", ulysses=2), x)

    replies = spmd_processes(4, work)
    assert [reply[:2] for reply in replies] == [("double_ring", 2)] * 4
    agree([call, call._replace(ulysses=2)], x, [reply[2:] for reply in replies])


@pytest.mark.parametrize(
    "hosts, runs", [("aab", "2 runs of 1 or 2 on 2 hosts"), ("abb", "2 runs of 1 or 2 on 2 hosts"), ("aba", "3 runs of 1 on 2 hosts")]
)
def test_hosts_that_hold_unequal_or_scattered_ranks_make_one_ring_of_ranks_that_share_none(monkeypatch, hosts, runs):
    monkeypatch.setattr(p2p, "host_name", lambda: hosts[dist.get_rank()])

    def work():
        with pytest.raises(ValueError, match="ulysses=2 must divide the 3 ranks"):
            distflash.SequenceParallel(ulysses=2)
        with pytest.raises(ValueError, match=f"double_ring needs as many consecutive ranks on each host, got {runs}: use ring"):
            distflash.SequenceParallel(order="double_ring")
        sp = distflash.SequenceParallel()
        return sp.order, sp.wire.per_node

    assert spmd_processes(3, work) == [("ring", 1)] * 3


def test_a_group_of_some_ranks_counts_its_own_ranks():
    x = inputs(S)
    calls = [Call("zigzag", ulysses=ulysses, causal=True) for ulysses in (1, 2)]

    def work():
        groups = [dist.new_group(ranks) for ranks in ([1, 3], [0, 2])]
        mine = groups[dist.get_rank() % 2 == 0]
        other = groups[dist.get_rank() % 2 == 1]
        with pytest.raises(TypeError, match="this rank belongs to"):
            distflash.SequenceParallel(other)
        return distflash.SequenceParallel(mine).rank, [run_rank(call, x, mine) for call in calls]

    replies = spmd_processes(4, work)
    assert [rank for rank, _ in replies] == [0, 0, 1, 1]
    agree(calls, x, [replies[n][1] for n in (1, 3)], "ranks 1 and 3")
    agree(calls, x, [replies[n][1] for n in (0, 2)], "ranks 0 and 2")


def test_meshes_of_one_and_two_dimensions():
    x = inputs(S)
    calls = [Call("zigzag", causal=True), Call("zigzag", ulysses="auto", causal=True), Call("zigzag", causal=True)]

    def work():
        line = init_device_mesh("cpu", (4,), mesh_dim_names=("cp",))
        grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ring", "ulysses"))
        data = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
        sp = distflash.SequenceParallel(grid)
        assert (sp.ulysses, sp.size, sp.ring_wire.size) == (2, 4, 2)
        with pytest.raises(ValueError, match="ulysses=4 disagrees with the mesh"):
            distflash.SequenceParallel(grid, ulysses=4)
        with pytest.raises(ValueError, match="axes 'ring' and 'ulysses'"):
            distflash.SequenceParallel(data)
        with pytest.raises(ValueError, match="Ulysses inner"):
            distflash.SequenceParallel(init_device_mesh("cpu", (2, 2), mesh_dim_names=("ulysses", "ring")))
        with pytest.raises(ValueError, match="ascending order"):
            distflash.SequenceParallel(DeviceMesh("cpu", torch.tensor([[0, 2], [1, 3]]), mesh_dim_names=("ring", "ulysses")))
        meshes = line, grid, data["sp"]
        return [run_rank(call, x, mesh) for call, mesh in zip(calls, meshes, strict=True)]

    replies = spmd_processes(4, work)
    agree(calls[:2], x, replies)
    for pair in (replies[:2], replies[2:]):  # two data-parallel ranks, each with a ring of its own
        agree(calls[2:], x, [reply[2:] for reply in pair], "dp x sp")


def test_losses_and_gradients_are_those_of_one_process_with_a_rank_that_has_no_label():
    x, targets, ignore = torch.randn(2, 23, 6).double(), torch.randn(2, 23, 6).double(), torch.rand(2, 23) > 0.6
    ignore[:, :12] = True  # all that rank 0 holds
    loss, grads = step(distflash.SequenceParallel.single().sequence(23), x, targets, ignore)

    def work():
        seq = distflash.SequenceParallel(layout="contiguous").sequence(23)
        assert bool(seq.shard(ignore).all()) == (dist.get_rank() == 0)
        return step(seq, x, targets, ignore)

    replies = spmd_processes(2, work)
    for found, _ in replies:
        assert abs(found - loss) < 1e-12
    for n, expected in enumerate(grads):
        assert (sum(mine[n] for _, mine in replies) / 2 - expected).abs().max() < 1e-11


@pytest.mark.parametrize("dp, sp", [(4, 1), (2, 2), (1, 4)])
def test_data_and_sequence_parallel_ranks_make_the_same_update(dp, sp):
    """Four sequences on dp x sp ranks: gradients averaged over all of them are those of one process."""
    x, targets, ignore = torch.randn(4, 23, 6).double(), torch.randn(4, 23, 6).double(), torch.rand(4, 23) > 0.7

    def work():
        mesh = init_device_mesh("cpu", (dp, sp), mesh_dim_names=("dp", "sp"))
        seq = distflash.SequenceParallel(mesh["sp"]).sequence(23)
        rows = slice(mesh.get_local_rank("dp") * 4 // dp, (mesh.get_local_rank("dp") + 1) * 4 // dp)
        parts = (t[rows] for t in (x, targets, ignore))
        return step(seq, *parts, group=dist.group.WORLD)

    loss, grads = step(distflash.SequenceParallel.single().sequence(23), x, targets, ignore)
    replies = spmd_processes(4, work)
    for found, _ in replies:
        assert abs(found - loss) < 1e-12, f"dp={dp}, sp={sp}"
    for n, expected in enumerate(grads):
        assert (sum(mine[n] for _, mine in replies) / 4 - expected).abs().max() < 1e-11, f"dp={dp}, sp={sp}, weight {n}"


def test_messages_of_two_ranks_do_not_swap():
    """Two exchanges under way between two ranks, equal in size: only their order tells them apart."""

    def work():
        wire = p2p.P2PWire(dist.group.WORLD)
        other, size = 1 - wire.rank, 1 << 16
        rooms = [torch.zeros(size, dtype=torch.uint8) for _ in range(8)]
        pending = [
            wire.exchange({other: torch.full((size,), 16 * wire.rank + n, dtype=torch.uint8)}, {other: room})
            for n, room in enumerate(rooms)
        ]
        for one in pending:
            one.wait()
        return [(int(room.min()), int(room.max())) for room in rooms]

    first, second = spmd_processes(2, work)
    assert first == [(16 + n, 16 + n) for n in range(8)] and second == [(n, n) for n in range(8)]


def test_bad_calls_raise_on_every_rank_and_leave_the_group_usable():
    x = inputs(S)

    def work():
        seq = distflash.SequenceParallel().sequence(S)
        q, k, v = (seq.shard(t) for t in x[:3])
        for bad in ({"softcap": -1.0}, {"window_size": (1,)}, {"kernel": "none"}):
            with pytest.raises((ValueError, NotImplementedError)):
                distflash.attention(q, k, v, seq, **bad)
        return [run_rank(Call(causal=True), x)]

    agree([Call(causal=True)], x, spmd_processes(2, work))
