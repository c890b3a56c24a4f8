"""The oracle kernel is written from the formula; here it is held against PyTorch's own softmax and autograd. What it shares with
the eager kernel is in test_eager.py."""

from __future__ import annotations

import pytest
import torch

from distflash.kernels.base import Partial
from distflash.kernels.reference import ReferenceKernel
from distflash.parallel.mask import Mask, packed
from distflash.parallel.merge import merge
from distflash.tile import Tiles
from tests.schemes import inputs

S = 9
KERNEL = ReferenceKernel()


@pytest.mark.parametrize("causal", [False, True])
def test_it_is_softmax_of_scaled_scores_times_values_and_autograd_of_that(causal):
    x = inputs(S, heads=2, kv_heads=2)
    q, k, v = (t.requires_grad_() for t in x[:3])
    s = 0.7 * torch.einsum("bihd,bjhd->bhij", q, k)
    if causal:
        s = s.masked_fill(torch.ones(S, S).triu(1).bool(), float("-inf"))
    expected = torch.einsum("bhij,bjhd->bihd", s.softmax(-1), v)
    lse = torch.logsumexp(s, -1)
    ((expected * x.dout).sum() + (lse * x.dlse).sum()).backward()
    tiles = packed((0, S), (0, S), Mask(None, 0 if causal else None))
    with torch.no_grad():
        found = KERNEL.forward(q, k, v, tiles, 0.7)
        grads = KERNEL.backward(x.dout, q, k, v, found.lse, KERNEL.delta(found.out, x.dout) - x.dlse, tiles, 0.7)
    assert (found.out - expected).abs().max() < 1e-14 and (found.lse - lse).abs().max() < 1e-13
    for name, grad, leaf in zip("qkv", grads, (q, k, v), strict=True):
        assert (grad - leaf.grad).abs().max() < 1e-13, f"d{name}"


def test_its_running_result_is_the_merge_of_the_definition():
    x = inputs(S)
    left, right = Tiles(packed((0, S), (0, 4), Mask()).tiles, S, 4), packed((0, S), (0, S - 4), Mask())
    first = KERNEL.forward(x.q, x.k[:, :4], x.v[:, :4], left, 0.3)
    second = KERNEL.forward(x.q, x.k[:, 4:], x.v[:, 4:], right, 0.3)
    found = KERNEL.forward(x.q, x.k[:, 4:], x.v[:, 4:], right, 0.3, acc=first)
    expected = merge(first, second)
    assert (found.out - expected.out).abs().max() < 1e-14 and (found.lse - expected.lse).abs().max() < 1e-13


def test_a_running_result_that_saw_nothing_changes_nothing():
    x = inputs(S)
    tiles = packed((0, S), (0, S), Mask(None, 0))
    nothing = Partial(torch.zeros_like(x.dout), torch.full_like(x.dlse, float("-inf")))
    plain, found = KERNEL.forward(x.q, x.k, x.v, tiles, 0.3), KERNEL.forward(x.q, x.k, x.v, tiles, 0.3, acc=nothing)
    assert (found.out - plain.out).abs().max() < 1e-15 and (found.lse - plain.lse).abs().max() < 1e-14


def test_it_serves_every_problem():
    assert KERNEL.supports(None) is None  # it does not look
