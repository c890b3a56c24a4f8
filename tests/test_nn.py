"""The module: what attention() gives with the same options, on one device and over ranks, in a graph too."""

from __future__ import annotations

import copy

import pytest
import torch

import distflash
from distflash.testing import spmd
from tests.schemes import inputs

S, H = 12, 4
SLOPES = torch.linspace(0.1, 1.0, H)
CASES = {
    "causal": {"causal": True},
    "a window and softcap": {"window_size": (3, 0), "softcap": 2.0, "softmax_scale": 0.5},
    "slopes": {"alibi_slopes": SLOPES, "deterministic": True},
    "a kernel": {"kernel": "reference"},
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_attention_with_its_options(case):
    x, options = inputs(S), CASES[case]
    module = distflash.nn.Attention(**options)
    assert not list(module.parameters()) and not module.state_dict()
    found, lse = module(*x[:3], return_lse=True)
    expected, expected_lse = distflash.attention(*x[:3], **options, return_lse=True)
    assert torch.equal(found, expected) and torch.equal(lse, expected_lse)


def test_documents_and_masks_are_given_at_the_call():
    x, module = inputs(S), distflash.nn.Attention()
    borders, mask = torch.tensor([0, 5, S]), distflash.Slices.prefix_lm(S, 4)
    assert torch.equal(module(*x[:3], cu_seqlens_q=borders), distflash.attention(*x[:3], cu_seqlens_q=borders))
    assert torch.equal(module(*x[:3], mask=mask), distflash.attention(*x[:3], mask=mask))


def test_dropout_is_for_training_only():
    x, module = inputs(S), distflash.nn.Attention(dropout_p=0.5)
    plain = distflash.attention(*x[:3])
    assert not torch.equal(module(*x[:3]), plain)
    assert torch.equal(module.eval()(*x[:3]), plain)


def test_sinks_are_learned_over_ranks():
    x = inputs(S)
    whole = torch.nn.Module()
    whole.attention = distflash.nn.Attention(causal=True, sinks=H)
    assert [*whole.state_dict()] == ["attention.sinks"]
    with torch.no_grad():
        whole.attention.sinks.copy_(SLOPES)
    whole.attention(*x[:3]).square().sum().backward()

    def work(group):
        module = distflash.nn.Attention(causal=True, sinks=H)
        module.load_state_dict({"sinks": SLOPES})
        seq = distflash.SequenceParallel(group).sequence(S)
        module(*(seq.shard(t) for t in x[:3]), seq).square().sum().backward()
        return module.sinks.grad

    torch.testing.assert_close(sum(spmd(2, work)), whole.attention.sinks.grad, rtol=1e-5, atol=1e-6)


def test_it_compiles_without_a_graph_break_and_says_what_it_is():
    x, module = inputs(S), distflash.nn.Attention(causal=True, sinks=H)
    found = torch.compile(module, fullgraph=True, backend="aot_eager")(*x[:3])
    assert torch.equal(found, module(*x[:3]))
    assert "causal=True" in repr(module) and "sinks=4" in repr(module)


def test_slopes_keep_their_numbers_whatever_the_module_is_cast_to():
    x = inputs(S, dtype=torch.bfloat16)
    expected = distflash.attention(*x[:3], causal=True, alibi_slopes=SLOPES)
    model = torch.nn.Sequential(distflash.nn.Attention(causal=True, alibi_slopes=SLOPES), torch.nn.Linear(2, 2))
    for change in (
        lambda m: m.to(torch.bfloat16),
        torch.nn.Module.half,
        lambda m: m.to("meta").to_empty(device="cpu"),
        copy.deepcopy,
        lambda m: m.double(),
    ):
        model = change(model)
        assert model[0].alibi_slopes.dtype == torch.float32
        assert torch.equal(model[0](*x[:3]), expected)
    assert model[1].weight.dtype == torch.float64 and not list(model[0].state_dict())
