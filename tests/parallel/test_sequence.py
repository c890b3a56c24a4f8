"""What users hold: tokens, positions, shards and back."""

from __future__ import annotations

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

import distflash
from distflash.parallel.layout import LAYOUTS
from distflash.parallel.mask import Mask
from distflash.parallel.wire.local import LocalGroup
from distflash.testing import spmd
from tests.schemes import inputs

S = 37
RAGGED = (0, 0, 7, 8, 8, 30, S, S)


def test_without_process_groups_one_device_holds_everything():
    seq = distflash.SequenceParallel().sequence(5)
    assert seq.indices.tolist() == seq.positions.tolist() == [0, 1, 2, 3, 4]
    x = torch.randn(2, 5, 3)
    assert torch.equal(seq.shard(x), x) and torch.equal(seq.unshard(x), x)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ranks, ulysses", [(1, 1), (3, 1), (4, 2), (4, 4), (8, 2)])
def test_indices_are_a_partition_and_positions_count_from_the_documents_start(layout, ranks, ulysses):
    start = torch.zeros(S, dtype=torch.long)
    for a, b in pairwise(RAGGED):
        start[a:b] = a

    def work(group):
        seq = distflash.SequenceParallel(group, layout=layout, ulysses=ulysses).sequence(cu_seqlens=torch.tensor(RAGGED, dtype=torch.int32))
        assert seq.indices.dtype == seq.positions.dtype == torch.long
        assert len(seq.indices) == len(seq.positions) == seq.local_length
        assert torch.equal(seq.positions, seq.indices - start[seq.indices])
        return seq.indices

    assert sorted(torch.cat(spmd(ranks, work)).tolist()) == list(range(S))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [1, 3, S])
def test_unshard_undoes_shard_along_any_dim_and_dtype(layout, tokens):
    made = [torch.randn(2, tokens, 3), torch.randn(tokens), torch.randn(2, 3, tokens).half(), torch.arange(tokens * 2).view(tokens, 2)]
    made.append(torch.randn(3, tokens, 2).transpose(0, 2))  # not contiguous
    made.append(torch.rand(2, tokens) > 0.5)

    def work(group):
        seq = distflash.SequenceParallel(group, layout=layout, ulysses=2).sequence(tokens)
        for x, dim in zip(made, (1, 0, -1, 0, 1, 1), strict=True):
            local = seq.shard(x, dim)
            assert local.shape[dim] == seq.local_length
            assert torch.equal(local, x.index_select(dim, seq.indices))
            assert torch.equal(seq.unshard(local, dim), x), (x.dtype, dim)

    spmd(4, work)


def test_shard_and_unshard_are_each_others_exact_adjoint():
    x, g = torch.randn(2, S, 3, dtype=torch.float64), [torch.randn(2, S, 3, dtype=torch.float64) for _ in range(3)]

    def work(group):
        seq = distflash.SequenceParallel(group).sequence(S)
        whole = x.clone().requires_grad_()
        seq.shard(whole).backward(seq.shard(g[0]))
        local = seq.shard(x).requires_grad_()
        seq.unshard(local).backward(g[group.rank])  # every rank has its own use of the whole
        return whole.grad, local.grad, seq.shard(sum(g))

    results = spmd(3, work)
    assert torch.equal(sum(grad for grad, _, _ in results), g[0]), "the gradients of shard() add up to the whole"
    for _, found, expected in results:
        assert (found - expected).abs().max() < 1e-14, "the gradient of unshard() is the sum over ranks"


def test_gradients_of_unshard_are_summed_in_fp32():
    grads = [torch.full((1, 8, 1), value, dtype=torch.bfloat16) for value in (256.0, 1.0, 1.0, -256.0)]

    def work(group):
        seq = distflash.SequenceParallel(group).sequence(8)
        local = torch.zeros(1, seq.local_length, 1, dtype=torch.bfloat16, requires_grad=True)
        seq.unshard(local).backward(grads[group.rank])
        return local.grad

    for grad in spmd(4, work):
        assert (grad == 2).all()  # 256 + 1 is 256 in bf16


def test_a_length_may_be_any_integer():
    sp = distflash.SequenceParallel.single()
    plain = sp.sequence(8)
    for length in (np.int64(8), torch.tensor(8)):
        assert type(sp.sequence(length).cu_seqlens[-1]) is int and sp.sequence(length).cu_seqlens == plain.cu_seqlens


def test_a_plan_is_made_once_and_shared_by_all_layers():
    seq = distflash.SequenceParallel().sequence(S)
    q = torch.randn(1, S, 2, 4)
    for _ in range(3):
        distflash.attention(q, q, q, seq, causal=True)
    distflash.attention(q, q, q, seq)
    assert seq._planner._planned.cache_info().misses == len(seq._schemes) == 2


@pytest.mark.parametrize("per_node, ulysses, expected", [(2, 1, "double_ring"), (4, 1, "ring"), (2, 2, "ring"), (1, 1, "ring")])
def test_auto_is_a_double_ring_across_several_hosts_only(per_node, ulysses, expected):
    orders = spmd(4, lambda group: distflash.SequenceParallel(group, ulysses=ulysses).order, per_node=per_node)
    assert orders == [expected] * 4


@pytest.mark.parametrize("ranks, per_node, ulysses", [(4, 4, 1), (4, 1, 1), (4, 2, 2), (1, 1, 1)])
def test_a_double_ring_that_is_asked_for_where_one_ring_is_all_there_is_is_that_ring(ranks, per_node, ulysses):
    """On one host, or with one rank of it on each: what runs on several hosts runs there, too."""
    asked = distflash.SequenceParallel(LocalGroup(ranks, per_node=per_node).wire(0), order="double_ring", ulysses=ulysses)
    ring = distflash.SequenceParallel(LocalGroup(ranks, per_node=per_node).wire(0), order="ring", ulysses=ulysses)
    steps = range(ranks // ulysses)
    assert [asked._order.owner(0, step) for step in steps] == [ring._order.owner(0, step) for step in steps]
    assert asked._order.sent[1:] == ring._order.sent[1:]


def test_auto_is_no_double_ring_where_ulysses_leaves_hosts_with_unequal_numbers_of_ranks():
    """Of 5 ranks a host, 3 are of one ring, of the next host's 2: inner rings of 2 would cross the network."""
    assert distflash.SequenceParallel(LocalGroup(20, per_node=5).wire(0), ulysses=2).order == "ring"


def test_balanced_shares_out_the_work_of_the_mask_it_is_given():
    cu, mask = (0, 40, 400, 1000), distflash.Slices.documents((0, 40, 400, 1000), causal=False)

    def work(group, given, asked):
        seq = distflash.SequenceParallel(group, layout="balanced", ulysses=2).sequence(cu_seqlens=cu, mask=given)
        return sum(visit.tiles.area for visit in seq.visits(asked))

    for given, asked in ((None, Mask(None, 0, cu)), (mask, mask)):
        load = spmd(8, lambda group, given=given, asked=asked: work(group, given, asked))
        assert max(load) <= 1.05 * sum(load) / 8, load
    unfit = spmd(8, lambda group: work(group, None, mask))
    assert max(unfit) > 1.05 * sum(unfit) / 8, "the mask makes a difference"


def test_one_device_ignores_the_process_group():
    def work(group):
        distflash.SequenceParallel(group)
        return distflash.SequenceParallel.single().size

    assert spmd(2, work) == [1, 1]


def test_they_say_what_they_are():
    sp = distflash.SequenceParallel(order="ring")
    assert repr(sp) == "SequenceParallel(rank 0 of 1, zigzag, ring, ulysses=1, local)"
    assert "7 tokens, 2 documents, 7 here" in repr(sp.sequence(cu_seqlens=[0, 3, 7]))


def test_what_a_sequence_keeps_serves_training_also_if_it_was_made_for_inference():
    x = inputs(7)

    def work(group):
        with torch.inference_mode():
            seq = distflash.SequenceParallel(group).sequence(cu_seqlens=[0, 3, 7])
            seq.unshard(seq.shard(x.q) * seq.positions[:, None, None])
        leaves = [t.detach().requires_grad_() for t in x[:3]]
        table = torch.ones(7, 1, 1, dtype=torch.float64, requires_grad=True)
        q, k, v = (seq.shard(leaf) * table[seq.positions] for leaf in leaves)
        seq.unshard(distflash.attention(q, k, v, seq)).sum().backward()
        assert all(leaf.grad.isfinite().all() for leaf in (*leaves, table))

    spmd(2, work)


def test_indices_and_positions_are_the_callers_own():
    seq = distflash.SequenceParallel.single().sequence(cu_seqlens=[0, 3, 7])
    for name in ("indices", "positions"):
        expected = getattr(seq, name).tolist()
        getattr(seq, name).add_(1)
        assert getattr(seq, name).tolist() == expected


def test_a_model_that_holds_them_can_be_copied():
    """For an average of its weights, or as a reference: the copy shares sequences among the same ranks."""

    def work(group):
        model = nn.Linear(2, 2)
        model.sp = distflash.SequenceParallel(group)
        model.seq = model.sp.sequence(8)
        for other in (copy.deepcopy(model), torch.optim.swa_utils.AveragedModel(model).module):
            assert other.sp is model.sp and other.seq is model.seq and other.weight is not model.weight
            x = torch.zeros(1, other.seq.local_length, 2, 4)
            distflash.attention(x, x, x, other.seq)

    spmd(2, work)


def test_the_default_device_does_not_matter():
    with torch.device("meta"):
        seq = distflash.SequenceParallel.single("cpu").sequence(cu_seqlens=[0, 3, 7])
        assert seq.positions.tolist() == [0, 1, 2, 0, 1, 2, 3]
        assert seq.indices.tolist() == [*range(7)]


@pytest.mark.parametrize("dim", [1, -2])
def test_tensors_without_that_dim_are_refused(dim):
    seq = distflash.SequenceParallel.single().sequence(7)
    for call in (seq.shard, seq.unshard):
        with pytest.raises(ValueError, match=rf"need dim={dim} to hold the tokens, got a tensor of shape \(7,\)"):
            call(torch.arange(7), dim=dim)
