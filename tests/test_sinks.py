"""Attention sinks: one learned logit a head joins every row's denominator, under every scheme alike.

Legend: B batch, S global tokens, H query heads, Hk key/value heads, D head dim, P ranks.
"""

import pytest
import torch

import distflash
from distflash.testing import dense, keep_mask, spmd

B, S, H, HK, D = 2, 37, 4, 2, 8
DOCUMENTS = (0, 7, 8, 8, 30, 37)
NAMES = ("out", "lse", "dq", "dk", "dv", "dsinks")


def make(dtype=torch.float64):
    shapes = ((S, H, D), (S, HK, D), (S, HK, D), (S, H, D))
    q, k, v, dout = (torch.randn(B, *shape, dtype=torch.float64).to(dtype) for shape in shapes)
    return q, k, v, dout, torch.randn(B, H, S, dtype=torch.float64), torch.randn(H, dtype=torch.float64)


def run(attend, q, k, v, dout, dlse, sinks):
    leaves = [x.detach().requires_grad_() for x in (q, k, v, sinks)]
    out, lse = attend(*leaves)
    ((out * dout).sum() + (torch.where(lse > float("-inf"), lse, 0.0) * dlse).sum()).backward()
    return [out.detach(), lse.detach(), *(x.grad for x in leaves)]


def truth(x, keep):
    return run(lambda q, k, v, sinks: dense(q, k, v, keep, sinks=sinks), *x)


def close(found, wanted, case, tolerance=1e-12):
    for name, a, b in zip(NAMES, found, wanted, strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance), f"{case}: {name} is off by {(a - b).abs().max()}"


@pytest.mark.parametrize("documents", [None, DOCUMENTS])
@pytest.mark.parametrize(("ranks", "ulysses"), [(1, 1), (2, 1), (2, 2), (3, 1), (4, 2)])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_every_scheme_gives_the_dense_result_and_the_whole_gradient_of_the_sinks(layout, ranks, ulysses, documents):
    x = make()
    keep = keep_mask(S, S, causal=True, cu_seqlens_q=documents)

    def rank(group):
        sp = distflash.SequenceParallel(group, layout=layout, ulysses=ulysses)
        seq = sp.sequence(cu_seqlens=documents) if documents else sp.sequence(S)
        q, k, v, dout = (seq.shard(t) for t in x[:4])
        local = run(
            lambda q, k, v, sinks: distflash.attention(q, k, v, seq, causal=True, sinks=sinks, return_lse=True),
            q, k, v, dout, seq.shard(x[4], dim=2), x[5],
        )  # fmt: skip
        whole = [seq.unshard(t, dim) for t, dim in zip(local[:5], (1, 2, 1, 1, 1), strict=True)]
        return [*whole, local[5]]

    results = spmd(ranks, rank)
    found = [*results[0][:5], sum(result[5] for result in results)]
    close(found, truth(x, keep), f"{layout}, P={ranks}, U={ulysses}")


@pytest.mark.parametrize("size", [1e4, -1e4, 30.0])
def test_large_sinks_neither_overflow_nor_lose_their_gradient(size):
    x = (*make()[:5], torch.full((H,), size, dtype=torch.float64))
    found = run(lambda q, k, v, sinks: distflash.attention(q, k, v, causal=True, sinks=sinks, return_lse=True), *x)
    close(found, truth(x, keep_mask(S, S, causal=True)), f"sinks of {size}")
    assert all(torch.isfinite(t).all() for t in found)


def test_a_sink_of_minus_infinity_is_no_sink():
    q, k, v, dout, dlse, _ = make()
    sinks = torch.full((H,), float("-inf"), dtype=torch.float64)
    found = run(lambda q, k, v, s: distflash.attention(q, k, v, causal=True, sinks=s, return_lse=True), q, k, v, dout, dlse, sinks)
    plain = run(lambda q, k, v, s: distflash.attention(q, k, v, causal=True, return_lse=True), q, k, v, dout, dlse, sinks)
    for name, a, b in zip(NAMES[:5], found, plain, strict=False):
        assert torch.equal(a, b), name
    assert not found[5].any()


def test_a_row_that_sees_no_key_sees_its_sink_alone():
    q, k, v, dout, dlse, sinks = make()
    k, v = k[:, :5], v[:, :5]  # bottom-right aligned: the first S - 5 queries see no key
    x = (q, k, v, dout, dlse, sinks)
    found = run(lambda q, k, v, s: distflash.attention(q, k, v, causal=True, sinks=s, return_lse=True), *x)
    close(found, truth(x, keep_mask(S, 5, causal=True)), "rows without a key")
    assert not found[0][:, : S - 5].any() and torch.equal(found[1][..., 0], sinks.expand(B, H))


def test_gradcheck():
    q, k, v, *_, sinks = make()
    leaves = [t[:1, :6].detach().requires_grad_() for t in (q, k, v)] + [sinks.requires_grad_()]
    assert torch.autograd.gradcheck(lambda q, k, v, s: distflash.attention(q, k, v, causal=True, sinks=s, return_lse=True), leaves)


@pytest.mark.parametrize(("dtype", "budget"), [(torch.bfloat16, 7e-3), (torch.float16, 9e-4), (torch.float32, 1e-5)])
def test_low_precision_stays_within_its_budget_and_its_dtype(dtype, budget):
    q, k, v, dout, dlse, sinks = make(dtype)
    found = run(
        lambda q, k, v, s: distflash.attention(q, k, v, causal=True, sinks=s, return_lse=True), q, k, v, dout, dlse.float(), sinks.to(dtype)
    )
    assert [t.dtype for t in found] == [dtype, torch.float32, dtype, dtype, dtype, dtype]
    wide = tuple(t.double() for t in (q, k, v, dout, dlse, sinks.to(dtype)))
    for name, a, b in zip(NAMES, found, truth(wide, keep_mask(S, S, causal=True)), strict=True):
        error = (a.double() - b).norm() / b.norm()
        assert error <= budget, f"{name}: relative error {error:.1e}"


def test_the_gradient_of_a_small_sink_keeps_its_digits():
    x = make()
    x = (20 * x[0][:1], *(t[:1] for t in x[1:5]), torch.full((H,), -3.0, dtype=torch.float64))  # exp(sink - lse) is 1e-10 and less
    wanted = truth(x, keep_mask(S, S))[5]
    found = run(lambda q, k, v, s: distflash.attention(q, k, v, sinks=s, return_lse=True), *(t.float() for t in x))[5]
    assert ((found.double() - wanted).abs() <= 1e-3 * wanted.abs()).all(), f"{found}, expected {wanted}"
