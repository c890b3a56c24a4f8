"""Keys that no query sees may hold anything: a kernel that reads whole tiles, and multiplies what a mask hides by 0, must not meet NaN."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import distflash
from distflash import preparation
from distflash.kernels.eager import EagerKernel
from distflash.parallel.mask import blind, packed, tiles, unseen
from distflash.parallel.plan import ORDERS
from distflash.testing import keep_mask, spmd
from tests.parallel.test_slices import S, disjoint

MASK = distflash.Slices([((0, 9), (2, 7), "full"), ((9, 29), (12, 20), "causal"), ((3, 20), (25, 28), "full")])


class WholeTiles(EagerKernel):
    """Reads every key of a block, as a kernel does whose tiles are wider than what is kept."""

    def forward(self, q, k, v, tiles, scale, **options):
        assert k.isfinite().all() and v.isfinite().all()
        return super().forward(q, k, v, tiles, scale, **options)

    def backward(self, dout, q, k, v, lse, delta, *rest, **options):
        assert all(x.isfinite().all() for x in (dout, q, k, v, delta))
        return super().backward(dout, q, k, v, lse, delta, *rest, **options)


def attended(group, poison, **scheme):
    """Out and gradients of all ranks' tokens. Keys and values that nobody sees are `poison`, so is what belongs to idle queries."""
    sp = distflash.SequenceParallel(group, **scheme) if group else distflash.SequenceParallel.single()
    seq, generator = sp.sequence(S), torch.Generator().manual_seed(1)
    whole = [torch.randn(1, S, 4, 8, generator=generator) for _ in range(4)]
    blank = ~keep_mask(S, S, mask=MASK).any(0)
    assert 0 < blank.sum() < S
    idle = ~keep_mask(S, S, mask=MASK).any(1)
    assert 0 < idle.sum() < S
    for x, where in zip(whole, (idle, blank, blank, idle), strict=True):
        x[:, where] = poison
    q, k, v, dout = (seq.shard(x) for x in whole)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = distflash.attention(*leaves, seq if group else None, mask=MASK)
    grads = torch.autograd.grad(out, leaves, dout)
    return [seq.unshard(x.detach()) for x in (out, *grads)]


def everywhere(ranks, poison, scheme):
    return spmd(ranks, partial(attended, poison=poison, **scheme)) if ranks > 1 else [attended(None, poison)]


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_no_kernel_meets_a_key_that_nobody_sees(monkeypatch, ranks, layout):
    monkeypatch.setattr(preparation, "select", lambda *_: WholeTiles())
    schemes = [{"layout": layout, "order": order} for order in ORDERS] + [{"layout": layout, "ulysses": 2}] * (ranks % 2 == 0)
    for scheme in schemes if ranks > 1 else [{}]:
        found, clean = (everywhere(ranks, poison, scheme) for poison in (float("nan"), 0.0))
        for a, b in zip(found, clean, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True)), scheme


@given(mask=disjoint(), step=st.integers(1, 4))
def test_the_keys_that_nobody_sees_and_the_queries_that_see_nobody_are_those_without_a_pair(mask, step):
    keep = keep_mask(S, S, mask=mask)
    blank, idle = ((~keep.any(axis)).nonzero().flatten().tolist() for axis in (0, 1))
    assert [n for part in unseen([packed((0, S), (0, S), mask)]) for n in part] == blank
    assert [n for part in blind([packed((0, S), (0, S), mask)]) for n in part] == idle
    stripes = [[range(n, S, step)] for n in range(step)]
    for mine in stripes:
        found = unseen([tiles(spans, mine, mask) for spans in stripes])
        assert [mine[0][n] for part in found for n in part] == [n for n in mine[0] if n in blank]
        found = blind([tiles(mine, spans, mask) for spans in stripes])
        assert [mine[0][n] for part in found for n in part] == [n for n in mine[0] if n in idle]
