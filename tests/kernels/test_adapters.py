"""Other people's kernels behind the protocol. Theirs need a GPU; here stand dense functions with their signatures, and what
surrounds them is held against the oracle: merging, the global lse and delta, rows that see nothing."""

from __future__ import annotations

import itertools
import sys
import types

import pytest
import torch

import distflash
from distflash import preparation
from distflash.kernels.adapters import CudnnKernel, Fa2Kernel, Fa3Kernel, Fa4Kernel, cudnn, flash
from distflash.kernels.adapters.adapter import Adapter, _stand_ins
from distflash.kernels.base import Partial, Problem
from distflash.kernels.reference import ReferenceKernel
from distflash.kernels.select import BY_NAME_ONLY, candidates, select
from distflash.parallel.mask import Mask, packed
from distflash.parallel.slices import Slices
from distflash.testing import Attention, check, keep_mask, oracle, spmd
from distflash.tile import Tiles
from tests.kernels.test_pieces import tiles_of
from tests.schemes import inputs

INF = float("inf")
ADAPTED = {"cudnn": CudnnKernel, "fa2": Fa2Kernel, "fa3": Fa3Kernel, "fa4": Fa4Kernel}
GPU, CPU = (Problem(torch.device(name), torch.bfloat16, 4, 2, 128, 128) for name in ("cuda:0", "cpu"))


# ------------------------------------------------------------------ dense functions with the signatures of the kernels


def attend(q, k, v, scale, causal, left=None, right=None, bottom_right=True):
    out, lse = ReferenceKernel().forward(q, k, v, tiles_of(q.shape[1], k.shape[1], causal, left, right, bottom_right), scale)
    return out.to(q.dtype), torch.where(lse == -INF, INF, lse)  # FlashAttention-2 says +inf of a row that sees nothing


def gradients(dout, q, k, v, out, lse, scale, causal, left=None, right=None, bottom_right=True):
    kernel, tiles = ReferenceKernel(), tiles_of(q.shape[1], k.shape[1], causal, left, right, bottom_right)
    return tuple(x.to(q.dtype) for x in kernel.backward(dout, q, k, v, lse, kernel.delta(out, dout), tiles, scale))


def heads_first(*tensors):
    return [x.transpose(1, 2) for x in tensors]


class FakeAten:
    """torch.ops.aten with the four operators, as PyTorch declares them."""

    @staticmethod
    def _flash_attention_forward(
        query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *,
        scale=None, window_size_left=None, window_size_right=None,
    ):  # fmt: skip
        assert (max_q, max_k, dropout_p, return_debug_mask, cum_seq_q) == (query.shape[1], key.shape[1], 0.0, False, None)
        return *attend(query, key, value, scale, is_causal, window_size_left, window_size_right), None, None, None

    @staticmethod
    def _flash_attention_backward(
        grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, rng_state, unused, *,
        scale=None, window_size_left=None, window_size_right=None,
    ):  # fmt: skip
        assert (max_q, max_k, dropout_p, rng_state.dtype) == (query.shape[1], key.shape[1], 0.0, torch.uint64)
        return gradients(grad_out, query, key, value, out, logsumexp, scale, is_causal, window_size_left, window_size_right)

    @staticmethod
    def _scaled_dot_product_cudnn_attention(
        query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None
    ):
        assert compute_log_sumexp and attn_bias is None and key.shape[2] > 1  # cuDNN refuses a single key
        out, lse = attend(*heads_first(query, key, value), scale, is_causal, bottom_right=False)
        return out.transpose(1, 2), lse.unsqueeze(-1), *(None,) * 7

    @staticmethod
    def _scaled_dot_product_cudnn_attention_backward(
        grad_out, query, key, value, out, logsumexp, philox_seed, philox_offset, attn_bias, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p,
        is_causal, *, scale=None,
    ):  # fmt: skip
        assert (max_q, max_k, dropout_p) == (query.shape[2], key.shape[2], 0.0)
        grads = gradients(*heads_first(grad_out, query, key, value, out), logsumexp.squeeze(-1), scale, is_causal, bottom_right=False)
        return tuple(heads_first(*grads))


def fake_fa2():
    def _flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, return_softmax
    ):
        assert (dropout_p, softcap, alibi_slopes, return_softmax) == (0.0, 0.0, None, False)
        return *attend(q, k, v, softmax_scale, causal, window_size_left, window_size_right), None, None

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap,
        alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        grads = gradients(dout, q, k, v, out, softmax_lse, softmax_scale, causal, window_size_left, window_size_right)
        for into, grad in zip((dq, dk, dv), grads, strict=True):
            into.copy_(grad)

    return types.SimpleNamespace(_flash_attn_forward=_flash_attn_forward, _flash_attn_backward=_flash_attn_backward)


def fake_fa3():
    def _flash_attn_forward(q, k, v, *, softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1):
        return *attend(q, k, v, softmax_scale, causal, window_size_left, window_size_right), None, None

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, *, dq, dk, dv, softmax_scale=None, is_causal=False, window_size_left=-1, window_size_right=-1
    ):
        grads = gradients(dout, q, k, v, out, softmax_lse, softmax_scale, is_causal, window_size_left, window_size_right)
        for into, grad in zip((dq, dk, dv), grads, strict=True):
            into.copy_(grad)

    return types.SimpleNamespace(_flash_attn_forward=_flash_attn_forward, _flash_attn_backward=_flash_attn_backward)


def fake_fa4():
    def _flash_attn_fwd(q, k, v, *, softmax_scale=None, causal=False, window_size_left=None, window_size_right=None, return_lse=False):
        assert return_lse
        return *attend(q, k, v, softmax_scale, causal, window_size_left, window_size_right), None, None, None

    def _flash_attn_bwd(q, k, v, out, dout, lse, *, softmax_scale=None, causal=False, window_size_left=None, window_size_right=None):
        return gradients(dout, q, k, v, out, lse, softmax_scale, causal, window_size_left, window_size_right)

    return types.SimpleNamespace(_flash_attn_fwd=_flash_attn_fwd, _flash_attn_bwd=_flash_attn_bwd)


@pytest.fixture(params=["cudnn", "fa2", "fa2 package", "fa3", "fa4"])
def kernel(request, monkeypatch) -> Adapter:
    """An adapter over its stand-in, free to run on a CPU in any dtype."""
    modules = {"flash_attn.flash_attn_interface": fake_fa2, "flash_attn_interface": fake_fa3, "flash_attn.cute.interface": fake_fa4}
    monkeypatch.setattr(flash, "import_module", lambda name: modules[name]())
    monkeypatch.setattr(flash, "_installed", lambda name: name in modules and request.param != "fa2")
    for module in (cudnn, flash):
        monkeypatch.setattr(module, "_ATEN", FakeAten)
    made = ADAPTED[request.param.split()[0]]()
    monkeypatch.setattr(type(made), "supports", lambda self, problem: None)
    monkeypatch.setattr(preparation, "select", lambda name, problem: made)
    return made


# ------------------------------------------------------------------ the protocol over stand-ins


MASKS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (5, 3)},
    "narrow": {"window_size": (0, 0)},
    "past": {"window_size": (9, -1)},
    "causal window": {"causal": True, "window_size": (4, -1)},
    "documents": {"causal": True, "cu_seqlens_q": (0, 1, 1, 14, 29, 40)},
}


def found_by(x, dlse=None, **options) -> Attention:
    leaves = [t.detach().requires_grad_() for t in x[:3]]
    options = {name: torch.tensor(value) if "cu_" in name else value for name, value in options.items()}
    out, lse = distflash.attention(*leaves, return_lse=True, **options)
    target = (out * x.dout).sum() + (0 if dlse is None else (torch.where(lse > -INF, lse, 0.0) * dlse).sum())
    target.backward()
    return Attention(out.detach(), lse.detach(), *(leaf.grad for leaf in leaves))


def agree(x, mask, dlse=None, scale=None) -> None:
    dtype, keep = x.q.dtype, keep_mask(x.q.shape[1], x.k.shape[1], **mask)
    truth, low = (oracle(*x[:4], keep, dlse=dlse, scale=scale, dtype=kind) for kind in (torch.float64, dtype))
    found = found_by(x, dlse, softmax_scale=scale, **mask)
    if (keep.sum(1) <= 1).all() or not x.dout.any():  # gradients that are 0 by cancellation come out as a rounding of delta
        for name, a, b in zip(Attention._fields, found, truth, strict=True):
            allowed = 16 * torch.finfo(dtype).eps * max(1.0, b[b > -INF].abs().max())
            assert torch.equal(a == -INF, b == -INF) and (a - b)[b > -INF].abs().max() <= allowed, name
    else:
        check(found, truth, low, dtype)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_mask_is_the_oracle_s_forward_and_backward(kernel, dtype, mask):
    agree(inputs(40, dtype=dtype), MASKS[mask])


@pytest.mark.parametrize(("q_len", "k_len"), [(1, 1), (1, 9), (2, 17), (20, 33), (33, 20), (20, 1)])
def test_unequal_lengths_and_rows_that_see_nothing(kernel, q_len, k_len):
    short, long = inputs(q_len, dtype=torch.float32), inputs(k_len, dtype=torch.float32)
    for mask in ({}, {"causal": True}, {"window_size": (2, 1)}):
        agree(short._replace(k=long.k, v=long.v), mask)


def test_a_single_key_beside_one_piece_that_covers_every_row_is_not_forgotten(kernel):
    x, (_, k, v, *_) = inputs(8, dtype=torch.float32), inputs(9, dtype=torch.float32)
    agree(x._replace(k=k, v=v), {"causal": True})  # squares only: column 0, and the causal rest
    keep, mask = torch.arange(9).expand(8, 9) != 1, Slices([((0, 8), (0, 1)), ((0, 8), (2, 9))])
    truth, low = (oracle(x.q, k, v, x.dout, keep, dtype=kind) for kind in (torch.float64, torch.float32))
    check(found_by(x._replace(k=k, v=v), mask=mask), truth, low, torch.float32)


@pytest.mark.parametrize("heads, kv_heads", [(4, 1), (6, 3), (2, 2)])
def test_grouped_heads(kernel, heads, kv_heads):
    agree(inputs(21, heads=heads, kv_heads=kv_heads, dtype=torch.float32), {"causal": True})


@pytest.mark.parametrize("scale", [-0.5, 0.0, 2.0])
def test_any_scale(kernel, scale):
    agree(inputs(18, dtype=torch.float32), {"causal": True}, scale=scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_through_lse_also_where_out_has_none(kernel, dtype):
    x = inputs(24, dtype=dtype)
    agree(x, {"causal": True}, dlse=x.dlse)
    rows = torch.arange(24)[:, None, None] % 2 == 0
    agree(x._replace(dout=torch.where(rows, x.dout, 0)), {"causal": True}, dlse=x.dlse)
    agree(x._replace(dout=torch.zeros_like(x.dout)), {"causal": True}, dlse=x.dlse)


@pytest.mark.parametrize("dout", [0.0, 6e-8, 1e-6, 1e-3])
@pytest.mark.parametrize("dlse", [1e-4, 1e-2, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_lse_far_larger_and_smaller_than_those_of_out(kernel, dtype, dlse, dout):
    x, tiles, oracle = inputs(24, dtype=dtype), packed((0, 24), (0, 24), Mask(right=0)), ReferenceKernel()
    dout = (x.dout * dout).to(dtype)
    out, lse = oracle.forward(*x[:3], tiles, 0.25)
    delta = kernel.delta(out.to(dtype), dout) - dlse
    truth = oracle.backward(dout.double(), *(t.double() for t in x[:3]), lse.double(), delta.double(), tiles, 0.25)
    for name, a, b in zip(("dq", "dk"), kernel.backward(dout, *x[:3], lse, delta, tiles, 0.25), truth, strict=False):
        rounded = (b.to(dtype) - b).norm()  # results leave these kernels in the inputs' dtype
        assert (a - b).norm() <= 2 * rounded + 2 * torch.finfo(dtype).eps * b.norm(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stand_ins_multiply_to_delta_and_leave_dout_alone_where_they_can(dtype):
    eps, least = torch.finfo(dtype).eps, torch.finfo(torch.float16).smallest_normal
    for size, dlse in itertools.product((0.0, 1e-7, 1e-5, 1e-3, 1.0, 1e3), (0.0, least, 1.0, 1e6)):
        dout = (torch.randn(1, 9, 2, 64) * size).to(dtype)
        delta = torch.full((1, 2, 9), dlse)
        found, out = _stand_ins(dout, delta)
        assert found.dtype == out.dtype == dtype and out.isfinite().all()
        product = (found.double() * out.double()).sum(-1).transpose(1, 2)
        steps = dout.double().abs().sum(-1).max() * torch.finfo(dtype).tiny * eps  # of an out' that is subnormal
        assert (product - delta).abs().max() <= 2 * eps * dlse + steps, (size, dlse)
        assert torch.equal(found[..., 1:], dout[..., 1:]) and (found - dout).abs().max() <= dlse * 2**-10
        assert torch.equal(found, dout) or size * 2**14 < dlse, "there is room in fp16 for delta / |dout|"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_strided_gradient_of_the_output_gives_the_same_bits(kernel, dtype):
    x = inputs(40, dim=64, dtype=dtype)
    for strided in (x.dout.mT.contiguous().mT, x.dout.transpose(1, 2).contiguous().transpose(1, 2)):
        for a, b in zip(found_by(x, causal=True), found_by(x._replace(dout=strided), causal=True), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("factor", [2.0**90, 2.0**-90])
def test_huge_and_tiny_gradients_of_the_output_scale_exactly(kernel, factor):
    x = inputs(24, dtype=torch.bfloat16)
    plain, scaled = (found_by(x._replace(dout=x.dout * f), causal=True) for f in (1.0, factor))
    for a, b in zip(plain[2:], scaled[2:], strict=True):
        assert torch.equal(a * factor, b)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_visits_in_any_order_merge_with_the_running_result_and_share_the_global_lse(kernel, order):
    x, edges, keep = inputs(30, dtype=torch.float32), (0, 11, 12, 30), keep_mask(30, 30)
    truth, low = (oracle(*x[:4], keep, dtype=kind) for kind in (torch.float64, torch.float32))
    scale, blocks = x.q.shape[3] ** -0.5, [packed((0, 30), (0, b - a), Mask()) for a, b in itertools.pairwise(edges)]
    acc, dq, dk, dv = None, None, torch.zeros_like(x.k), torch.zeros_like(x.v)
    for at in order:
        part = slice(edges[at], edges[at + 1])
        acc = kernel.forward(x.q, x.k[:, part], x.v[:, part], blocks[at], scale, acc=acc)
    delta = kernel.delta(acc.out, x.dout)
    for at in order:
        part = slice(edges[at], edges[at + 1])
        dq, dk[:, part], dv[:, part] = kernel.backward(
            x.dout, x.q, x.k[:, part], x.v[:, part], acc.lse, delta, blocks[at], scale, dq=dq
        )  # fmt: skip
    check(Attention(acc.out, acc.lse, dq, dk, dv), truth, low, torch.float32)


def test_rows_whose_lse_is_minus_infinity_contribute_nothing_even_inside_a_tile(kernel):
    x = inputs(16, dtype=torch.float32)
    tiles = packed((0, 16), (0, 16), Mask())
    out, lse = kernel.forward(x.q, x.k, x.v, tiles, 0.3)
    delta, hidden = kernel.delta(out, x.dout), torch.arange(16) < 5
    grads = kernel.backward(x.dout, x.q, x.k, x.v, torch.where(hidden, -INF, lse), delta, tiles, 0.3)
    short = packed((0, 11), (0, 16), Mask())
    expected = kernel.backward(x.dout[:, 5:], x.q[:, 5:], x.k, x.v, lse[:, :, 5:], delta[:, :, 5:], short, 0.3)
    assert (grads[0][:, :5] == 0).all() and torch.allclose(grads[0][:, 5:], expected[0], atol=1e-6)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(grads[1:], expected[1:], strict=True))


def test_without_tiles_the_running_result_comes_back_and_the_rest_is_zero(kernel):
    x, nothing = inputs(9, dtype=torch.bfloat16), Tiles((), 9, 9)
    out, lse = kernel.forward(x.q, x.k, x.v, nothing, 0.3, dtype=torch.bfloat16)
    assert out.dtype == torch.bfloat16 and (out == 0).all() and (lse == -INF).all()
    kept = kernel.forward(x.q, x.k, x.v, nothing, 0.3, acc=Partial(torch.ones(out.shape), torch.zeros(lse.shape)))
    assert (kept.out == 1).all() and (kept.lse == 0).all()
    grads = kernel.backward(x.dout, x.q, x.k, x.v, lse, lse, nothing, 0.3, dq=torch.ones(x.q.shape), dkv_dtype=torch.bfloat16)
    assert (grads[0] == 1).all() and all((g == 0).all() and g.dtype == torch.bfloat16 for g in grads[1:])


def test_a_ring_of_four_runs_on_it(kernel):
    x = inputs(40, dtype=torch.float32)

    def rank(group):
        seq = distflash.SequenceParallel(group).sequence(40)
        local = x._replace(**{name: seq.shard(getattr(x, name), dim=1).detach() for name in ("q", "k", "v", "dout")})
        return [seq.unshard(t, dim=1) for t in found_by(local, seq=seq, causal=True)[2:]]

    truth, low = (oracle(*x[:4], keep_mask(40, 40, causal=True), dtype=kind) for kind in (torch.float64, torch.float32))
    grads = spmd(4, rank)[0]
    check(truth._replace(dq=grads[0], dk=grads[1], dv=grads[2]), truth, low, torch.float32)


# ------------------------------------------------------------------ the kernels themselves, as far as a CPU goes


class CpuFlash(CudnnKernel):
    """PyTorch's CPU flash attention: squares and top-left alignment, as cuDNN has them; a real backend."""

    def _attend(self, q, k, v, scale, keep):
        back = keep == (0, None)
        turned = (cudnn._turned(x, back).transpose(1, 2) for x in (q, *_repeated(q, k, v)))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*turned, 0.0, back or keep.causal, scale=scale)
        return cudnn._turned(out.transpose(1, 2), back), lse.flip(2) if back else lse

    def _gradients(self, dout, q, k, v, out, lse, scale, keep):
        back = keep == (0, None)
        turned = [cudnn._turned(x, back).transpose(1, 2) for x in (dout, q, *_repeated(q, k, v), out)]
        lse = lse.flip(2) if back else lse
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        dq, dk, dv = (cudnn._turned(x.transpose(1, 2), back) for x in op(*turned, lse, 0.0, back or keep.causal, scale=scale))
        dk, dv = (x.unflatten(2, (k.shape[2], -1)).sum(3) for x in (dk, dv))
        return dq, dk, dv


def _repeated(q, k, v):
    return (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))


@pytest.mark.parametrize("mask", MASKS)
def test_a_flash_kernel_that_computes_delta_itself_takes_the_global_one_through_out(monkeypatch, mask):
    monkeypatch.setattr(preparation, "select", lambda name, problem: CpuFlash())
    x = inputs(40, dtype=torch.bfloat16)
    agree(x, MASKS[mask], dlse=x.dlse)


@pytest.mark.parametrize("name", ["cudnn", "fa2"])
def test_pytorch_declares_the_operators_as_they_are_called(name):
    adapter = ADAPTED[name]()
    x = [t.to("meta") for t in inputs(40, dim=16, dtype=torch.bfloat16)[:4]]
    tiles = packed((0, 40), (0, 40), Mask(9, 3))
    out, lse = adapter.forward(*x[:3], tiles, 0.3, dtype=torch.bfloat16)
    assert (out.shape, lse.shape) == (x[0].shape, (2, 4, 40))
    grads = adapter.backward(x[3], *x[:3], lse, lse, tiles, 0.3)
    assert [g.shape for g in grads] == [t.shape for t in x[:3]]


# ------------------------------------------------------------------ supports, select


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


@pytest.mark.parametrize("name", ADAPTED)
def test_they_say_what_they_cannot_serve(name, hopper, monkeypatch):
    adapter = ADAPTED[name]()
    monkeypatch.setattr(type(adapter), "_missing", lambda self: None)
    assert adapter.supports(GPU) is None
    reasons = {
        "not on cpu": {"device": torch.device("cpu")},
        "not in torch.float32": {"dtype": torch.float32},
        "not bit-equal": {"deterministic": True},
        "got 60 and 60": {"head_dim": 60, "v_head_dim": 60},
        "got 192 and 128": {"head_dim": 192},
        "got 320 and 320": {"head_dim": 320, "v_head_dim": 320},
    }
    for reason, change in reasons.items():
        assert reason in adapter.supports(Problem(**{**vars(GPU), **change}))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert "compute capability" in adapter.supports(GPU)


def test_a_package_that_is_missing_too_old_or_without_backward_is_the_reason(hopper, monkeypatch):
    assert "flash_attn_interface" in Fa3Kernel().supports(GPU) and "flash_attn.cute" in Fa4Kernel().supports(GPU)
    monkeypatch.setattr(flash, "_installed", lambda name: True)
    config = types.SimpleNamespace(CONFIG={"build_flags": {"FLASHATTENTION_DISABLE_BACKWARD": True}})
    monkeypatch.setitem(sys.modules, "flash_attn_config", config)
    assert "no backward" in Fa3Kernel().supports(GPU)
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", types.ModuleType("flash_attn.flash_attn_interface"))
    assert "which version it stands for is not known" in Fa2Kernel().supports(GPU), "a module on the path, not a package"
    monkeypatch.setattr(flash, "version", {"flash_attn": "2.6.3.post1"}.get)
    assert "flash_attn 2.6.3.post1 is installed, 2.7 or newer" in Fa2Kernel().supports(GPU)


@pytest.mark.parametrize("name", ADAPTED)
def test_they_are_chosen_by_name_only(name, hopper, monkeypatch):
    monkeypatch.setattr(ADAPTED[name], "_missing", lambda self: None)
    assert dict(candidates(GPU))[name] == BY_NAME_ONLY[name] and isinstance(select(name, GPU), ADAPTED[name])
    with pytest.raises(ValueError, match=f"kernel='{name}' cannot serve this problem: {name} runs on NVIDIA GPUs, not on cpu"):
        select(name, CPU)
