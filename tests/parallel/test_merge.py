"""Partial results are a commutative monoid, also at the edges of floating point."""

from __future__ import annotations

from functools import reduce
from itertools import permutations

import pytest
import torch

from distflash.kernels.base import Partial
from distflash.parallel.merge import merge
from distflash.testing import dense

B, T, H, D = 2, 6, 3, 5
INF = float("inf")


def partials(count: int, *, spread: float = 1.0, dtype=torch.float32) -> list[Partial]:
    return [Partial(torch.randn(B, T, H, D, dtype=dtype), spread * torch.randn(B, H, T, dtype=dtype)) for _ in range(count)]


def identity(dtype=torch.float32) -> Partial:
    return Partial(torch.zeros(B, T, H, D, dtype=dtype), torch.full((B, H, T), -INF, dtype=dtype))


def equal(a: Partial, b: Partial) -> bool:
    return torch.equal(a.out, b.out) and torch.equal(a.lse, b.lse)


def ulps(a: Partial, b: Partial) -> float:
    """The larger distance of out and lse in units of the last place of the largest number that took part.

    A weight is exp of a difference of two lse, each known to half a unit in its own last place: where |lse| > 1, out is known
    no better than |lse| units.
    """
    finite = [torch.where(x.lse == -INF, 0.0, x.lse).double() for x in (a, b)]
    largest = max(1.0, *(lse.abs().max().item() for lse in finite))
    out = (a.out.double() - b.out.double()).abs().max() / max(a.out.abs().max(), b.out.abs().max()) / largest
    return max(out.item(), ((finite[0] - finite[1]).abs().max() / largest).item()) / torch.finfo(torch.float32).eps


@pytest.mark.parametrize("spread", [1.0, 1e4])
def test_the_empty_partial_changes_nothing_on_either_side(spread):
    (a,) = partials(1, spread=spread)
    assert equal(merge(a, identity()), a) and equal(merge(identity(), a), a)
    assert equal(merge(identity(), identity()), identity())


@pytest.mark.parametrize("spread", [1.0, 30.0, 1e4])
def test_it_is_commutative_bit_for_bit(spread):
    a, b = partials(2, spread=spread)
    assert equal(merge(a, b), merge(b, a))


@pytest.mark.parametrize("spread", [1.0, 30.0, 1e4])
def test_it_is_associative_within_four_units_in_the_last_place(spread):
    a, b, c = partials(3, spread=spread)
    assert ulps(merge(merge(a, b), c), merge(a, merge(b, c))) <= 4


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_every_order_of_hops_gives_the_same_result(count):
    parts = partials(count, spread=10.0)
    parts[0].lse[:, :, :2] = -INF  # rows that some hop does not see
    parts[0].out[:, :2] = 0.0
    exact = reduce(merge, [Partial(p.out.double(), p.lse.double()) for p in parts])
    for order in permutations(range(count)):
        found = reduce(merge, [parts[n] for n in order])
        assert ulps(found, Partial(exact.out.float(), exact.lse.float())) <= 4, order


def test_rows_that_nobody_saw_stay_empty_and_never_become_nan():
    a, b = partials(2)
    for x in (a, b):
        x.lse[:, :, 1] = -INF
        x.out[:, 1] = 0.0
    found = merge(a, b)
    assert (found.lse[:, :, 1] == -INF).all() and (found.out[:, 1] == 0).all()
    assert torch.isfinite(found.out).all()


@pytest.mark.parametrize("garbage", [float("nan"), INF, -INF, 1e38])
def test_what_a_part_that_saw_nothing_holds_does_not_leak(garbage):
    a, b = partials(2)
    b.out[:, 2], b.lse[:, :, 2] = garbage, -INF
    for found in (merge(a, b), merge(b, a)):
        assert torch.equal(found.out[:, 2], a.out[:, 2]) and torch.equal(found.lse[:, :, 2], a.lse[:, :, 2])


@pytest.mark.parametrize("offset", [1e4, -1e4, 80.0, 1e30])
def test_large_scores_neither_overflow_nor_vanish(offset):
    a, b = partials(2)
    found = merge(a._replace(lse=torch.full_like(a.lse, offset)), b._replace(lse=torch.full_like(b.lse, offset)))
    assert torch.allclose(found.out, (a.out + b.out) / 2, rtol=1e-6) and torch.isfinite(found.lse).all()
    far = merge(a._replace(lse=torch.full_like(a.lse, offset)), b._replace(lse=torch.full_like(b.lse, -abs(offset) - 200 + min(offset, 0))))
    assert torch.equal(far.out, a.out) and (far.lse == offset).all()


def test_partials_over_disjoint_keys_are_attention_over_all_of_them():
    q, k, v = torch.randn(B, T, H, D).double(), torch.randn(B, 9, H, D).double(), torch.randn(B, 9, H, D).double()
    keep = torch.rand(T, 9) > 0.5
    parts = []
    for columns in (slice(0, 4), slice(4, 5), slice(5, 9)):
        seen = torch.zeros_like(keep)
        seen[:, columns] = keep[:, columns]
        parts.append(Partial(*dense(q, k, v, seen)))
    out, lse = dense(q, k, v, keep)
    found = reduce(merge, parts)
    assert (found.out - out).abs().max() < 1e-14
    assert torch.allclose(found.lse, lse, rtol=1e-14)
