"""The tiled PyTorch kernel against dense attention on inputs that break kernels."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import distflash
from distflash.kernels.base import Partial
from distflash.kernels.eager import EagerKernel
from distflash.kernels.reference import ReferenceKernel
from distflash.parallel.mask import Mask, packed
from distflash.testing import Attention, dense, errors, keep_mask, oracle
from distflash.tile import Band, Tile, Tiles
from tests.schemes import Inputs, inputs

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KERNELS = {"eager": EagerKernel(), "reference": ReferenceKernel()}


def found_by(x: Inputs, *, kernel: str = "eager", dlse: bool = True, **options) -> Attention:
    leaves = [t.detach().requires_grad_() for t in x[:3]]
    out, lse = distflash.attention(*leaves, return_lse=True, kernel=kernel, **options)
    if dlse:
        finite = torch.where(lse > -INF, lse, 0.0)
        torch.autograd.backward((out, finite), (x.dout, x.dlse.to(lse.dtype)))
    else:
        out.backward(x.dout)
    return Attention(out.detach(), lse.detach(), *(leaf.grad for leaf in leaves))


def agree(x: Inputs, case: object = "", *, kernel: str = "eager", dlse: bool = True, loose: bool = False, **options) -> Attention:
    """Hold a kernel against fp64 within the error budget; `loose` is for large scores in fp32.

    Backward recomputes P = exp(s - lse) from an lse rounded to fp32: at |lse| = 1e4 every flash-attention knows P to 1e-3 only.
    """
    dtype = x.q.dtype
    mask = {name: value for name, value in options.items() if name != "softmax_scale"}
    keep = keep_mask(x.q.shape[1], x.k.shape[1], **mask)
    exact, low = (
        oracle(*x[:4], keep, scale=options.get("softmax_scale"), dlse=x.dlse if dlse else None, dtype=d) for d in (torch.float64, dtype)
    )
    found = found_by(x, kernel=kernel, dlse=dlse, **{name: torch.tensor(v) if "cu_" in name else v for name, v in options.items()})
    broken = errors(found, exact, low, dtype)
    if loose and dtype == torch.float32:
        lse = torch.where(exact.lse > -INF, exact.lse, 0.0).abs().max().item()
        broken = {name: reason for name, reason in broken.items() if not _within(name, found, exact, low, lse)}
    assert not broken, f"{kernel}, {dtype}, {case}, {options}: {broken}"
    return found


def _within(name: str, found: Attention, exact: Attention, low: Attention, lse: float) -> bool:
    mine, truth, other = (getattr(x, name).double() for x in (found, exact, low))
    rounding = 2 * torch.finfo(torch.float32).eps * lse * truth.abs().max().item() if name.startswith("d") else 0.0
    return bool((mine - truth).abs().max() <= 2 * (other - truth).abs().max() + rounding)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 5, 17, 127, 129, 300])
def test_lengths_around_the_size_of_a_block(tokens, causal):
    agree(inputs(tokens), tokens, causal=causal)
    agree(inputs(tokens, batch=1, dtype=torch.bfloat16), tokens, causal=causal)


def test_more_keys_than_a_block_of_columns():
    x = inputs(7, batch=1)
    long = inputs(2300, batch=1)
    x = x._replace(k=long.k, v=long.v)
    agree(x)
    agree(x, window_size=(1500, 100))  # blocks that are cut on either side
    agree(x, causal=True, window_size=(1030, -1))


@pytest.mark.parametrize("dim", [1, 8, 59, 64, 256])
def test_every_head_dim(dim):
    for dtype in (torch.float64, torch.float16):
        agree(inputs(33, dim=dim, dtype=dtype), dim, causal=True)
        agree(inputs(33, dim=dim, v_dim=24, dtype=dtype), (dim, 24), causal=True)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (8, 1), (6, 2), (6, 3), (3, 3)])
def test_grouped_heads(heads, kv_heads, kernel):
    for mask in ({"causal": True}, {"window_size": (4, 2)}):
        agree(inputs(31, heads=heads, kv_heads=kv_heads), (heads, kv_heads), kernel=kernel, **mask)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_hard_scores(dtype, kernel):
    x = inputs(64, batch=1, dtype=dtype)
    huge = 40.0 / x.q.shape[-1] ** 0.5
    cases = {
        "scores around +-1e4, which fp16 products overflow": x._replace(q=(x.q.double() * 300).to(dtype), k=(x.k.double() * 30).to(dtype)),
        "all scores equal": x._replace(q=torch.ones_like(x.q), k=torch.ones_like(x.k)),
        "all scores equal and large": x._replace(q=torch.full_like(x.q, huge), k=torch.full_like(x.k, huge)),
        "all scores zero": x._replace(q=torch.zeros_like(x.q)),
        "all values zero": x._replace(v=torch.zeros_like(x.v)),
        "denormal queries": x._replace(q=torch.full_like(x.q, torch.finfo(dtype).smallest_normal / 4)),
        "one hot key": x._replace(k=torch.where(torch.arange(64)[:, None, None] == 11, x.q[:, 11:12, ::2] * 20, x.k)),
        "all but one key far away": x._replace(k=torch.where(torch.arange(64)[:, None, None] == 11, x.k, x.k - 500)),
    }
    for case, y in cases.items():
        agree(y, case, kernel=kernel, loose=True)
        agree(y, case, kernel=kernel, loose=True, causal=True, cu_seqlens_q=(0, 1, 1, 20, 64))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_hard_gradients_of_the_output(dtype):
    x = inputs(48, batch=1, dtype=dtype)
    sparse = torch.zeros_like(x.dout)
    sparse[:, 17, 2] = x.dout[:, 17, 2]
    for case, dout in {"zero": torch.zeros_like(x.dout), "sparse": sparse}.items():
        found = agree(x._replace(dout=dout), case, causal=True, dlse=False)
        if case == "zero":
            assert all((grad == 0).all() for grad in (found.dq, found.dk, found.dv))
    scale = {torch.float16: 2.0**10, torch.float64: 2.0**200}.get(dtype, 2.0**90)  # a power of two: gradients scale exactly
    plain, large = (found_by(x._replace(dout=d), causal=True, dlse=False) for d in (x.dout, x.dout * scale))
    for name in ("dq", "dk", "dv"):
        assert torch.equal(getattr(plain, name) * scale, getattr(large, name)), f"{name} of a huge dout"


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_no_query_sees_may_hold_nan(kernel):
    x = inputs(40, batch=1)
    y = inputs(12, batch=1)._replace(k=x.k.clone(), v=x.v.clone())
    unseen = slice(0, 21)  # 12 queries at the end of 40 keys, 7 to the left of the first: from key 21 on
    for poison in (NAN, INF):
        y.k[:, unseen], y.v[:, unseen] = poison, poison
        found = agree(y, f"poison {poison}", kernel=kernel, window_size=(7, 0))
        assert (found.dk[:, unseen] == 0).all() and (found.dv[:, unseen] == 0).all()
    x.k[:, 10:20], x.v[:, 10:20] = NAN, NAN  # a document without queries
    z = inputs(30, batch=1)._replace(k=x.k, v=x.v)
    agree(z, "a document without queries", kernel=kernel, cu_seqlens_q=(0, 10, 10, 30), cu_seqlens_k=(0, 10, 20, 40))


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_that_see_nothing_contribute_nothing(kernel):
    x = inputs(30)._replace(k=inputs(12).k, v=inputs(12).v)
    x.q[:, :18], x.dout[:, :18] = 1e30, 1e30  # 18 more queries than keys: the first ones see nothing
    found = found_by(x, kernel=kernel, causal=True)
    seen = Inputs(x.q[:, 18:], x.k, x.v, x.dout[:, 18:], x.dlse[:, :, 18:])
    rest = found_by(seen, kernel=kernel, causal=True)
    assert (found.out[:, :18] == 0).all() and (found.lse[:, :, :18] == -INF).all() and (found.dq[:, :18] == 0).all()
    for name in ("dk", "dv"):
        assert (getattr(found, name) - getattr(rest, name)).abs().max() < 1e-13, name


@pytest.mark.parametrize("documents", [(0, 1, 2, 3, 4), (0, 0, 0, 4), (0, 4, 4, 4), (0, 1, 1, 3, 4)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_one_token_and_empty_documents(documents, kernel):
    for dtype in (torch.float64, torch.bfloat16):
        agree(inputs(4, dtype=dtype), kernel=kernel, causal=True, cu_seqlens_q=documents)
        agree(inputs(4, dtype=dtype), kernel=kernel, cu_seqlens_q=documents, dlse=False)


@pytest.mark.parametrize("kernel", KERNELS)
def test_any_strides_give_what_contiguous_tensors_give(kernel):
    x = inputs(21)
    expected = found_by(x, kernel=kernel, causal=True, window_size=(6, -1))

    def heads_first(t):
        return t.transpose(1, 2).contiguous().transpose(1, 2)

    def spread(t):
        room = torch.full((*t.shape[:-1], 2 * t.shape[-1]), NAN, dtype=t.dtype)
        room[..., ::2] = t
        return room[..., ::2]  # the last dimension is not contiguous

    def reversed_batch(t):
        return torch.stack([t[1], t[0]]).flip(0)

    def expanded_scalar(t):
        return t[:, :1, :1, :1].expand_as(t)

    for change in (heads_first, spread, reversed_batch):
        y = Inputs(*(change(t) for t in x[:4]), x.dlse)
        for name, a, b in zip(Attention._fields, found_by(y, kernel=kernel, causal=True, window_size=(6, -1)), expected, strict=True):
            assert (a - b).abs().max() < 1e-13, f"{change.__name__}: {name}"
    agree(x._replace(dout=expanded_scalar(x.dout)), "dout of stride 0, as of a sum", kernel=kernel, causal=True)


def test_a_dout_of_a_sum_in_low_precision():
    x = inputs(40, batch=1, dtype=torch.bfloat16)
    agree(x._replace(dout=torch.ones(1, dtype=torch.bfloat16).expand_as(x.dout)), causal=True, dlse=False)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operator returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **kwargs or {})
        for x in found if isinstance(found, (list, tuple)) else (found,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return found


@pytest.mark.parametrize("mask", [Mask(None, 0), Mask(3000, 5)], ids=["causal", "window"])
def test_scores_are_never_whole_in_memory(mask):
    tokens, kernel = 4096, KERNELS["eager"]
    q = torch.randn(1, tokens, 1, 8)
    tiles = packed((0, tokens), (0, tokens), mask)
    with Largest() as largest:
        out, lse = kernel.forward(q, q, q, tiles, 0.3)
        delta = kernel.delta(out, out)
        kernel.backward(out, q, q, q, lse, delta, tiles, 0.3)
    assert largest.elements <= tokens**2 / 16, f"{largest.elements} elements at once"


# the kernel protocol: running results, dtypes, tile tables of any shape


def scattered() -> tuple[Tiles, torch.Tensor]:
    """Three tiles that overlap in rows and in columns but in no pair, with rows and columns left out."""
    tiles = (
        Tile(slice(1, 6), slice(0, 4), Band(-4, 0)),
        Tile(slice(3, 9), slice(5, 8), Band(-9, 9)),
        Tile(slice(0, 3), slice(8, 11), Band(-1, 1)),
    )
    keep = torch.zeros(10, 12, dtype=torch.bool)
    for t in tiles:
        offset = torch.arange(t.columns) - torch.arange(t.rows)[:, None]
        keep[t.q, t.kv] |= (offset >= t.band.lo) & (offset <= t.band.hi)
    return Tiles(tiles, 10, 12), keep


def operands() -> tuple[torch.Tensor, ...]:
    x, y = inputs(10), inputs(12)
    return x.q, y.k, y.v, x.dout, x.dlse


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_table_of_tiles_is_attention_over_their_union(kernel):
    tiles, keep = scattered()
    q, k, v, dout, dlse = operands()
    truth = oracle(q, k, v, dout, keep, scale=0.4, dlse=dlse)
    run = KERNELS[kernel]
    out, lse = run.forward(q, k, v, tiles, 0.4)
    grads = run.backward(dout, q, k, v, lse, run.delta(out, dout) - dlse, tiles, 0.4)
    broken = errors(Attention(out, lse, *grads), truth, truth, torch.float64)
    assert not broken, broken
    assert all(grad.is_contiguous() for grad in grads)


@pytest.mark.parametrize("kernel", KERNELS)
def test_running_results_are_merged_and_running_gradients_added(kernel):
    tiles, keep = scattered()
    q, k, v, dout, _ = operands()
    run = KERNELS[kernel]
    acc, seen = None, torch.zeros_like(keep)
    for n, tile in enumerate(tiles):
        acc = run.forward(q, k, v, Tiles((tile,), 10, 12), 0.4, acc=acc)
        part = torch.zeros_like(keep)
        offset = torch.arange(tile.columns) - torch.arange(tile.rows)[:, None]
        part[tile.q, tile.kv] = (offset >= tile.band.lo) & (offset <= tile.band.hi)
        seen |= part
        out, lse = dense(q, k, v, seen, 0.4)
        assert (acc.out - out).abs().max() < 1e-13, f"after {n + 1} tiles"
        assert torch.allclose(acc.lse, lse, rtol=1e-13), f"after {n + 1} tiles"
    before = torch.randn_like(q)
    delta = run.delta(acc.out, dout)
    plain, _, _ = run.backward(dout, q, k, v, acc.lse, delta, tiles, 0.4)
    added, _, _ = run.backward(dout, q, k, v, acc.lse, delta, tiles, 0.4, dq=before.clone())
    assert (added - plain - before).abs().max() < 1e-13


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_visit_without_tiles_writes_every_element(kernel):
    q, k, v, dout, _ = operands()
    run, nothing = KERNELS[kernel], Tiles((), 10, 12)
    out, lse = run.forward(q, k, v, nothing, 1.0)
    assert (out == 0).all() and (lse == -INF).all()
    acc = Partial(torch.randn_like(out), torch.randn_like(lse))
    same = run.forward(q, k, v, nothing, 1.0, acc=Partial(acc.out.clone(), acc.lse.clone()))
    assert torch.allclose(same.out, acc.out, rtol=1e-15) and torch.allclose(same.lse, acc.lse, rtol=1e-15)
    dq, dk, dv = (
        run.backward(dout, q, k, v, acc.lse, lse * 0, nothing, 1.0)
        if False
        else run.backward(dout, q, k, v, acc.lse, torch.zeros_like(lse), nothing, 1.0)
    )
    assert (dq == 0).all() and (dk == 0).all() and (dv == 0).all()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("q_len, k_len", [(0, 5), (5, 0), (0, 0)])
def test_empty_queries_and_keys_are_legal(kernel, q_len, k_len):
    q, k = torch.randn(2, q_len, 4, 8), torch.randn(2, k_len, 2, 8)
    run, tiles = KERNELS[kernel], Tiles((), q_len, k_len)
    out, lse = run.forward(q, k, k, tiles, 1.0, dtype=torch.float32)
    dq, dk, dv = run.backward(out, q, k, k, lse, run.delta(out, out), tiles, 1.0)
    assert out.shape == dq.shape == q.shape and lse.shape == (2, 4, q_len) and dk.shape == dv.shape == k.shape


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_results_are_wide_until_a_dtype_is_asked_for(kernel, dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    q, k, v, dout, _ = (t.to(dtype) for t in operands())
    run, tiles = KERNELS[kernel], packed((0, 10), (0, 12), Mask(None, 0))
    out, lse = run.forward(q, k, v, tiles, 1.0)
    assert out.dtype == lse.dtype == run.delta(out, dout).dtype == wide
    stored = run.forward(q, k, v, tiles, 1.0, dtype=dtype)
    assert stored.out.dtype == dtype and stored.lse.dtype == wide and torch.equal(stored.out, out.to(dtype))
    grads = run.backward(dout, q, k, v, lse, run.delta(out, dout), tiles, 1.0)
    cast = run.backward(dout, q, k, v, lse, run.delta(out, dout), tiles, 1.0, dq_dtype=dtype, dkv_dtype=dtype)
    assert all(g.dtype == wide and torch.equal(g.to(dtype), c) for g, c in zip(grads, cast, strict=True))


def test_inputs_are_not_written_to():
    x = inputs(19)
    before = [t.clone() for t in x]
    found_by(x, causal=True, cu_seqlens_q=torch.tensor([0, 4, 19]))
    assert all(torch.equal(a, b) for a, b in zip(before, x, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "window_size": (4, 0)}], ids=["full", "causal", "window"])
def test_rows_with_gaps_between_their_elements_are_read_as_they_are(options, dtype):
    x = inputs(21, dtype=dtype)
    gaps = Inputs(*(t.transpose(1, 3).contiguous().transpose(1, 3) for t in x[:4]), x.dlse)
    assert gaps.q.stride(-1) != 1
    for name, a, b in zip(Attention._fields, found_by(gaps, **options), found_by(x, **options), strict=True):
        assert torch.equal(a, b), name
