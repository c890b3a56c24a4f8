"""flash-attn's names: its signatures, its alignment, its shapes; what it leaves undefined is defined."""

from __future__ import annotations

import inspect
from itertools import pairwise

import pytest
import torch

from distflash.integrations import flash_attn as fa
from distflash.testing import Attention, Variants, errors, keep_mask, oracle

TAIL = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, "
    "return_attn_probs=False"
)
BORDERS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
SIGNATURES = {
    "flash_attn_func": f"q, k, v, {TAIL}",
    "flash_attn_kvpacked_func": f"q, kv, {TAIL}",
    "flash_attn_qkvpacked_func": f"qkv, {TAIL}",
    "flash_attn_varlen_func": f"q, k, v, {BORDERS}, {TAIL}, block_table=None",
    "flash_attn_varlen_kvpacked_func": f"q, kv, {BORDERS}, {TAIL}",
    "flash_attn_varlen_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {TAIL}",
}
CU_Q, CU_K = (0, 4, 4, 5, 11), (0, 6, 9, 9, 13)  # documents without queries, without keys, and with more queries than keys
MAX = (6, 6)


def randn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_()


def judged(out, lse, q, k, v, keep, **options) -> dict[str, str]:
    """What breaks the error budget: of (B, S, H, D) tensors and what came out of them, gradients by backward() here."""
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    finite = torch.where(lse > float("-inf"), lse, 0.0)
    grads = torch.autograd.grad((out * dout).sum() + (finite * dlse).sum(), (q, k, v))
    batched = (lambda x: x) if q.dim() == 4 else (lambda x: x.unsqueeze(0))
    found = Attention(*map(batched, (out.detach(), lse.detach(), *grads)))
    x = [batched(t.detach()) for t in (q, k, v, dout)]
    dlse = batched(dlse)
    truth = oracle(*x, keep, dlse=dlse, **options)
    return errors(found, truth, oracle(*x, keep, dlse=dlse, dtype=q.dtype, **options), q.dtype)


@pytest.mark.parametrize("name", SIGNATURES)
def test_names_order_and_defaults_are_those_of_flash_attn(name):
    shown = inspect.signature(getattr(fa, name)).parameters.values()
    assert ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in shown) == SIGNATURES[name]


@pytest.mark.parametrize("window", [(-1, -1), (3, 1), torch.tensor([2, 0]), (-7, 2)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("q_len, k_len", [(5, 9), (9, 5), (1, 7)])
def test_a_dense_call_is_aligned_bottom_right_and_windows_are_inclusive(q_len, k_len, causal, window):
    q, k, v = randn(2, q_len, 4, 8), randn(2, k_len, 2, 8), randn(2, k_len, 2, 8)
    out, lse, s_dmask = fa.flash_attn_func(q, k, v, causal=causal, window_size=window, return_attn_probs=True)
    assert lse.shape == (2, 4, q_len) and s_dmask.numel() == 0
    keep = keep_mask(q_len, k_len, causal=causal, window_size=tuple(max(-1, int(w)) for w in window))
    assert not judged(out, lse, q, k, v, keep)
    assert torch.equal(fa.flash_attn_func(q, k, v, 0.0, None, causal, window), out)


@pytest.mark.parametrize("slopes", [torch.rand(4), torch.rand(2, 4)], ids=["a head", "a batch element and head"])
def test_scale_softcap_and_slopes_mean_what_they_mean_there(slopes):
    q, k, v = randn(2, 6, 4, 8), randn(2, 9, 2, 8), randn(2, 9, 2, 8)
    asked = {"softmax_scale": 0.7, "softcap": 1.5, "alibi_slopes": slopes, "causal": True, "deterministic": True}
    out, lse, _ = fa.flash_attn_func(q, k, v, return_attn_probs=True, **asked)
    assert not judged(out, lse, q, k, v, keep_mask(6, 9, causal=True), scale=0.7, variants=Variants(1.5, slopes))
    assert torch.equal(fa.flash_attn_func(q, k, v, softcap=-1.0), fa.flash_attn_func(q, k, v)), "0 or less is off"


@pytest.mark.parametrize("dims", [4, 3])
def test_packed_tensors_are_unstacked_before_the_heads(dims):
    shape = (2, 6) if dims == 4 else (6,)
    qkv = torch.randn(*shape, 3, 4, 8, requires_grad=True)
    q, k, v = qkv.unbind(-3)
    cu = torch.tensor([0, 2, 6], dtype=torch.int32)
    packed, plain = ((), ()) if dims == 4 else ((cu, 4), (cu, cu, 4, 4))
    kind = "" if dims == 4 else "varlen_"
    expected = getattr(fa, f"flash_attn_{kind}func")(q, k, v, *plain, causal=True)
    assert torch.equal(getattr(fa, f"flash_attn_{kind}qkvpacked_func")(qkv, *packed, causal=True), expected)
    assert torch.equal(getattr(fa, f"flash_attn_{kind}kvpacked_func")(q, torch.stack((k, v), -3), *plain, causal=True), expected)
    (expected.square().sum()).backward()
    assert qkv.grad.abs().sum() > 0


@pytest.mark.parametrize("slopes", [None, torch.rand(4), torch.rand(4, 4)], ids=["no slopes", "a head", "a document and head"])
@pytest.mark.parametrize("asked", [{}, {"causal": True}, {"window_size": (1, 2)}, {"causal": True, "softcap": 2.0}])
def test_documents_may_differ_in_queries_and_keys_and_have_slopes_of_their_own(asked, slopes):
    q, k, v = randn(CU_Q[-1], 4, 8), randn(CU_K[-1], 2, 8), randn(CU_K[-1], 2, 8)
    cu = [torch.tensor(c, dtype=torch.int32) for c in (CU_Q, CU_K)]
    out, lse, _ = fa.flash_attn_varlen_func(q, k, v, *cu, *MAX, alibi_slopes=slopes, return_attn_probs=True, **asked)
    assert out.shape == q.shape and lse.shape == (4, CU_Q[-1])
    window = {name: asked[name] for name in ("causal", "window_size") if name in asked}
    keep = keep_mask(CU_Q[-1], CU_K[-1], cu_seqlens_q=CU_Q, cu_seqlens_k=CU_K, **window)
    if slopes is None or slopes.dim() == 1:
        assert not judged(out, lse, q, k, v, keep, variants=Variants(asked.get("softcap", 0.0), slopes, cu_seqlens=(CU_Q, CU_K)))
        return
    for n, ((q0, q1), (k0, k1)) in enumerate(zip(pairwise(CU_Q), pairwise(CU_K), strict=True)):
        part = out[q0:q1], lse[:, q0:q1]
        if q0 == q1 or k0 == k1:
            assert not part[0].any() and (part[1] == float("-inf")).all()
            continue
        mine = [x.detach()[a:b].unsqueeze(0).requires_grad_() for x, a, b in ((q, q0, q1), (k, k0, k1), (v, k0, k1))]
        alone = fa.flash_attn_func(*mine, alibi_slopes=slopes[n], return_attn_probs=True, **asked)
        torch.testing.assert_close(part, (alone[0][0], alone[1][0]), rtol=0, atol=1e-12)
        grads = torch.autograd.grad(part[0].square().sum(), (q, k, v), retain_graph=True)
        wanted = torch.autograd.grad(alone[0].square().sum(), mine)
        for grad, want, (a, b) in zip(grads, wanted, ((q0, q1), (k0, k1), (k0, k1)), strict=True):
            torch.testing.assert_close(grad[a:b], want[0], rtol=0, atol=1e-12)


def test_documents_are_data_in_a_compiled_graph():
    def call(q, k, v, cu):
        return fa.flash_attn_varlen_func(q, k, v, cu, cu, 6, 6, causal=True, return_attn_probs=True)[:2]

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    q, k, v = (torch.randn(9, 2, 8, requires_grad=True) for _ in range(3))
    for borders in ((0, 3, 7), (0, 1, 5)):  # with padding
        cu = torch.tensor(borders, dtype=torch.int32)
        found, expected = compiled(q, k, v, cu), call(q, k, v, cu)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        grads, wanted = (torch.autograd.grad(out.square().sum(), (q, k, v)) for out, _ in (found, expected))
        assert all(torch.equal(a, b) for a, b in zip(grads, wanted, strict=True))
    with pytest.raises(ValueError, match="max_seqlen_q=6 must be at least the longest document's length, 7"):
        compiled(q, k, v, torch.tensor([0, 7, 9], dtype=torch.int32))


def test_padding_behind_the_last_document_gives_zeros_and_gets_no_gradient():
    q, k, v = (torch.randn(9, 2, 8) for _ in range(3))
    for x in (q, k, v):
        x[7:] = float("nan")
    cu = torch.tensor([0, 3, 7], dtype=torch.int32)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse, _ = fa.flash_attn_varlen_func(*leaves, cu, cu, 4, 4, causal=True, return_attn_probs=True)
    assert out.shape == (9, 2, 8) and not out[7:].any() and (lse[:, 7:] == float("-inf")).all() and lse[:, :7].isfinite().all()
    (out * torch.randn_like(out)).sum().backward()
    assert all(x.grad[:7].isfinite().all() and not x.grad[7:].any() for x in leaves)


@pytest.mark.parametrize("slopes", [None, torch.rand(3, 4)], ids=["one call", "a call a document"])
@pytest.mark.parametrize("packed", [False, True])
def test_s_dmask_is_the_softmax_up_to_a_factor_a_row_and_its_signs_are_what_was_dropped(packed, slopes):
    rate, heads = 0.4, 4
    if packed:
        q, k, v = torch.randn(12, heads, 8), torch.randn(15, 2, 8), torch.randn(15, 2, 8)
        cu_q, cu_k = (0, 3, 8, 12), (0, 6, 9, 15)
        borders = [torch.tensor(c, dtype=torch.int32) for c in (cu_q, cu_k)]

        def call(**more):
            torch.manual_seed(3)
            return fa.flash_attn_varlen_func(q, k, v, *borders, 7, 6, rate, causal=True, alibi_slopes=slopes, **more)

        shape = (3, heads, 7, 6)
        documents = [(q[a:b], k[c:d], v[c:d]) for (a, b), (c, d) in zip(pairwise(cu_q), pairwise(cu_k), strict=True)]
    else:
        q, k, v = torch.randn(3, 5, heads, 8), torch.randn(3, 6, 2, 8), torch.randn(3, 6, 2, 8)

        def call(**more):
            torch.manual_seed(3)
            return fa.flash_attn_func(q, k, v, rate, causal=True, alibi_slopes=slopes, **more)

        shape, documents = (3, heads, 5, 6), list(zip(q, k, v, strict=True))
    out, _, s_dmask = call(return_attn_probs=True)
    assert s_dmask.shape == shape and s_dmask.dtype == q.dtype
    assert torch.equal(call(), out), "asking for probabilities changes what is dropped"
    found = out.split([len(q) for q, _, _ in documents]) if packed else out
    dropped = 0
    for n, (q_n, k_n, v_n) in enumerate(documents):
        rows, columns = len(q_n), len(k_n)
        k_n, v_n = (x.repeat_interleave(2, dim=1) for x in (k_n, v_n))
        distance = torch.arange(rows)[:, None] + columns - rows - torch.arange(columns)
        s = torch.einsum("ihd,jhd->hij", q_n, k_n) * 8**-0.5
        s = s if slopes is None else s - slopes[n][:, None, None] * distance.abs()
        p = s.masked_fill(distance < 0, float("-inf")).softmax(-1).nan_to_num()  # the first rows may see nothing
        mine = s_dmask[n, :, :rows, :columns]
        torch.testing.assert_close(mine.abs() * p.amax(-1, keepdim=True), p, rtol=1e-5, atol=1e-6)
        kept = mine >= 0
        torch.testing.assert_close(torch.einsum("hij,jhd->ihd", p * kept / (1 - rate), v_n), found[n], rtol=1e-5, atol=1e-5)
        dropped += (~kept & (p > 0)).sum()
        assert not s_dmask[n, :, rows:].any() and not s_dmask[n, :, :, columns:].any()
    assert dropped > 0


CU = torch.tensor([0, 2, 6], dtype=torch.int32)
X = torch.randn(6, 2, 8)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"block_table": torch.zeros(2, 1, dtype=torch.int32)}, "block_table is not served"),
        ({"max_seqlen_q": 3}, "max_seqlen_q=3 must be at least the longest document's length, 4"),
        ({"max_seqlen_k": 1}, "max_seqlen_k=1 must be at least"),
        ({"cu_seqlens_k": torch.tensor([0, 6], dtype=torch.int32), "max_seqlen_k": 6}, "as many documents, got 2 and 1"),
        ({"cu_seqlens_q": torch.tensor([0, 2, 8], dtype=torch.int32), "max_seqlen_q": 6}, "cu_seqlens_q ends at 8, but there are 6 tokens"),
        ({"cu_seqlens_q": torch.tensor([0, 4, 2], dtype=torch.int32)}, "never decrease"),
        ({"alibi_slopes": torch.rand(3, 2)}, "with 2 documents, got \\(3, 2\\)"),
        ({"q": X[None]}, "q must be \\(tokens, heads, head_dim\\), got \\(1, 6, 2, 8\\)"),
        ({"window_size": (1, 2, 3)}, "two integers"),
    ],
)
def test_what_cannot_be_served_is_refused_with_its_cure(change, words):
    asked = {"q": X, "k": X, "v": X, "cu_seqlens_q": CU, "cu_seqlens_k": CU, "max_seqlen_q": 4, "max_seqlen_k": 4}
    with pytest.raises(ValueError, match=words):
        fa.flash_attn_varlen_func(**asked | change)


def test_borders_that_are_no_tensors_are_refused():
    with pytest.raises(TypeError, match=r"must be int32 tensors .* got list and Tensor"):
        fa.flash_attn_varlen_func(X, X, X, [0, 2, 6], CU, 4, 4)


def test_stacked_tensors_of_another_form_are_refused():
    with pytest.raises(ValueError, match=r"qkv must be \(tokens, 3, heads, head_dim\), got \(3, 2, 8\)"):
        fa.flash_attn_varlen_qkvpacked_func(torch.randn(3, 2, 8), CU, 4)
    with pytest.raises(ValueError, match="qkv must hold 3 tensors along dim 2, got 2"):
        fa.flash_attn_qkvpacked_func(torch.randn(1, 4, 2, 2, 8))
    with pytest.raises(ValueError, match=r"qkv must be \(batch, tokens, 3, heads, head_dim\), got \(4, 3, 2, 8\)"):
        fa.flash_attn_qkvpacked_func(torch.randn(4, 3, 2, 8))
