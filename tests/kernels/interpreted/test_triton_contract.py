"""What the Kernel protocol promises beside the numbers: merging, dtypes, strides, garbage, running gradients, refusals."""

from itertools import pairwise

import pytest
import torch
from cases import KERNEL, Case, assert_close, banded, causal, computed, documents, full, oracle, relative

from distflash.kernels.base import Partial, Problem
from distflash.kernels.triton import configs
from distflash.kernels.triton.kernel import INTERPRETED, TritonKernel
from distflash.testing import Attention
from distflash.tile import Band, Tile, Tiles

bf16, fp32 = torch.bfloat16, torch.float32


def split_columns(Tq: int, Tk: int, *edges: int) -> list[Tiles]:
    """Bottom-right causal attention cut into visits by column."""
    cuts = [0, *edges, Tk]
    return [Tiles((Tile(slice(0, Tq), slice(a, b), Band(-Tq - Tk, Tk - Tq - a)),), Tq, Tk) for a, b in pairwise(cuts)]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
@pytest.mark.parametrize("dtype", [fp32, bf16])
def test_several_visits_equal_one(order, dtype):
    case = Case("visits", causal(90, 130), H=2, Hk=1, D=32, dtype=dtype)
    q, k, v, dout = case.tensors()
    visits, scale = split_columns(90, 130, 41, 100), case.softmax_scale
    acc = None
    for n in order:
        acc = KERNEL.forward(q, k, v, visits[n], scale, acc=acc, dtype=dtype if n == order[-1] else None)
    assert acc.out.dtype == dtype and acc.lse.dtype == fp32
    delta = KERNEL.delta(acc.out, dout)
    dq, dk, dv = None, torch.zeros(k.shape), torch.zeros(v.shape)
    for n in order:
        dq, *dkv = KERNEL.backward(dout, q, k, v, acc.lse, delta, visits[n], scale, dq=dq)
        dk, dv = dk + dkv[0], dv + dkv[1]
    assert dq.dtype == fp32
    assert_close(case, Attention(acc.out, acc.lse, dq, dk, dv), oracle(case, q, k, v, dout))


def test_a_visit_without_tiles_for_some_rows_keeps_what_was_there():
    case = Case("half", Tiles((Tile.whole(slice(64, 100), slice(0, 40)),), 128, 40))
    q, k, v, _ = case.tensors()
    acc = Partial(torch.randn(1, 128, 1, 16), torch.randn(1, 1, 128))
    before = Partial(acc.out.clone(), acc.lse.clone())
    for dtype in (torch.float16, None):
        out, lse = KERNEL.forward(q, k, v, case.tiles, 0.25, acc=Partial(acc.out.clone(), acc.lse.clone()), dtype=dtype)
        for rows in (slice(0, 64), slice(100, 128)):
            torch.testing.assert_close(out[:, rows], before.out[:, rows].to(out.dtype), rtol=1e-6 if dtype is None else 1e-3, atol=1e-6)
            torch.testing.assert_close(lse[..., rows], before.lse[..., rows], rtol=1e-6, atol=1e-6)
        assert not torch.equal(out[:, 64:100].float(), before.out[:, 64:100])


def test_merging_with_the_identity_changes_nothing():
    case = Case("identity", banded(70, 70, 10, 20))
    q, k, v, _ = case.tensors()
    alone = KERNEL.forward(q, k, v, case.tiles, 0.25)
    nothing = Partial(torch.zeros(1, 70, 1, 16), torch.full((1, 1, 70), float("-inf")))
    merged = KERNEL.forward(q, k, v, case.tiles, 0.25, acc=nothing)
    assert torch.equal(merged.out, alone.out) and torch.equal(merged.lse, alone.lse)


def test_the_running_partial_is_updated_in_place():
    q, k, v, _ = Case("place", full(20, 20)).tensors()
    acc = KERNEL.forward(q, k, v, full(20, 20), 0.25)
    again = KERNEL.forward(q, k, v, full(20, 20), 0.25, acc=acc)
    assert again.out.data_ptr() == acc.out.data_ptr() and again.lse.data_ptr() == acc.lse.data_ptr()


@pytest.mark.parametrize("dq_dtype, dkv_dtype", [(None, None), (bf16, None), (None, bf16), (bf16, bf16)])
def test_gradients_come_in_the_dtype_asked_for_and_dq_adds_to_the_running_one(dq_dtype, dkv_dtype):
    case = Case("dtypes", causal(70, 50), D=32, dtype=bf16)  # 20 rows see nothing: dq there is what came in
    q, k, v, dout = case.tensors()
    true = oracle(case, q, k, v, dout)
    out, lse = KERNEL.forward(q, k, v, case.tiles, case.softmax_scale, dtype=bf16)
    running = torch.randn(q.shape)
    before = running.clone()
    delta = KERNEL.delta(out, dout)
    dq, dk, dv = KERNEL.backward(
        dout, q, k, v, lse, delta, case.tiles, case.softmax_scale, dq=running, dq_dtype=dq_dtype, dkv_dtype=dkv_dtype
    )
    assert (dq.dtype, dk.dtype, dv.dtype) == (dq_dtype or fp32, dkv_dtype or fp32, dkv_dtype or fp32)
    assert all(t.is_contiguous() for t in (dq, dk, dv))
    assert relative(dq, before + true.dq) < 7e-3 and relative(dk, true.dk) < 7e-3 and relative(dv, true.dv) < 7e-3
    assert torch.equal(dq[:, :20].float(), before[:, :20].to(dq.dtype).float())


def strided(t: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "head first":
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "last dim strided":
        return t.transpose(1, 3).contiguous().transpose(1, 3)
    if kind == "slice of a wider tensor":
        wide = torch.full((*t.shape[:3], t.shape[3] + 7), float("nan"), dtype=t.dtype)
        wide[..., 3:-4] = t
        return wide[..., 3:-4]
    return t[:, :1].expand_as(t)  # "one token, expanded"


@pytest.mark.parametrize("kind", ["head first", "last dim strided", "slice of a wider tensor", "one token, expanded"])
def test_any_strides_are_served(kind):
    case = Case(kind, causal(66, 66), B=2, H=2, Hk=1, D=24)
    tensors = [strided(t, kind) for t in case.tensors()]
    assert_close(case, computed(case, *tensors), oracle(case, *tensors))


def test_offsets_inside_a_tile_may_pass_2_to_the_31(monkeypatch):
    monkeypatch.setattr("distflash.kernels.triton.kernel._wide", lambda *tensors: True)
    case = Case("wide", causal(66, 66), D=24)
    assert_close(case, computed(case, *case.tensors()), oracle(case, *case.tensors()))


@pytest.mark.parametrize(
    "tiles",
    [
        Tiles((Tile.whole(slice(0, 50), slice(20, 70)), Tile(slice(50, 80), slice(90, 100), Band(-40, 3))), 80, 110),
        banded(50, 200, 30, 60),
    ],
    ids=["between entries", "keys that no row sees"],
)
def test_garbage_in_keys_that_nobody_sees_does_not_leak(tiles):
    case = Case("poison", tiles, D=16)
    q, k, v, dout = case.tensors()
    true = oracle(case, q, k, v, dout)
    unseen = torch.ones(tiles.kv_len, dtype=torch.bool)
    for tile in tiles:
        first, last = max(0, tile.band.lo), min(tile.columns, tile.rows + tile.band.hi)
        unseen[tile.kv.start + first : tile.kv.start + last] = False
    assert unseen.any()
    k[:, unseen], v[:, unseen] = float("nan"), float("inf")
    found = computed(case, q, k, v, dout)
    assert not found.dk[:, unseen].any() and not found.dv[:, unseen].any()
    assert_close(case, found, true)


def test_garbage_in_queries_that_no_tile_covers_does_not_leak():
    tiles = Tiles((Tile(slice(10, 50), slice(0, 40), Band(-39, 0)),), 70, 40)
    case = Case("poison", tiles)
    q, k, v, dout = case.tensors()
    true = oracle(case, q, k, v, dout)
    out, lse = KERNEL.forward(q, k, v, tiles, 0.25)
    delta = KERNEL.delta(out, dout)
    for rows in (slice(0, 10), slice(50, 70)):
        q[:, rows], dout[:, rows], delta[..., rows] = float("nan"), float("nan"), float("nan")
    _, dk, dv = KERNEL.backward(dout, q, k, v, lse, delta, tiles, 0.25)
    assert relative(dk, true.dk) < 1e-5 and relative(dv, true.dv) < 1e-5


@pytest.mark.parametrize("merged", [False, True])
def test_minus_infinity_is_said_of_rows_that_see_nothing_and_of_no_row_that_met_a_nan(merged):
    case = Case("poison", causal(90, 70), D=16)  # the first 20 rows see nothing
    q, k, v, _ = case.tensors()
    q[:, 10], k[:, 10], q[:, 25] = float("nan"), float("nan"), float("nan")  # key 10 is seen by the rows from 30 on
    acc = Partial(torch.zeros(1, 90, 1, 16), torch.full((1, 1, 90), float("-inf"))) if merged else None
    out, lse = KERNEL.forward(q, k, v, case.tiles, 0.25, acc=acc)
    assert (lse[..., :20] == float("-inf")).all() and not out[:, :20].any()
    met = (torch.arange(90) >= 30) | (torch.arange(90) == 25)
    assert lse[..., met].isnan().all() and out[:, met].isnan().all()
    met[:20] = True
    assert lse[..., ~met].isfinite().all() and out[:, ~met].isfinite().all()


def test_a_row_whose_lse_is_minus_infinity_contributes_nothing():
    case = Case("silent", banded(70, 70, 30, 40), H=2)
    q, k, v, dout = case.tensors()
    found = computed(case, q, k, v, 1e4 * dout)
    silent = (found.lse == float("-inf")).transpose(1, 2)
    assert silent.any() and not found.dq[silent].any()
    assert all(torch.isfinite(t).all() for t in (found.dq, found.dk, found.dv))


def test_results_are_bit_equal_from_run_to_run():
    case = Case("again", documents(0, 30, 100), H=4, Hk=2, dtype=bf16)
    one, two = (computed(case, *case.tensors()) for _ in range(2))
    assert all(torch.equal(getattr(one, name), getattr(two, name)) for name in ("out", "lse", "dq", "dk", "dv"))


def test_delta_is_the_rowsum_of_out_times_dout():
    out, dout = torch.randn(2, 37, 3, 59), torch.randn(2, 3, 37, 59).transpose(1, 2)
    delta = KERNEL.delta(out, dout)
    assert delta.dtype == fp32
    torch.testing.assert_close(delta, (out * dout).sum(-1).transpose(1, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("boxes", [0, configs.WHOLE, configs.EVERY])
@pytest.mark.parametrize("tiles", [banded(60, 75, -20, 30), full(100, 64), documents(0, 7, 90, 131)], ids=["band", "full", "documents"])
def test_other_tile_sizes_and_ways_to_load_give_the_same_answer(tiles, boxes, overlap):
    kernel = TritonKernel({name: configs.Config(32, 16, 4, 1, boxes, overlap) for name in configs.PASSES})
    case = Case("small tiles", tiles, H=2, D=24)
    assert_close(case, computed(case, *case.tensors(), kernel=kernel), oracle(case, *case.tensors()))


@pytest.mark.parametrize("boxes", [0, configs.WHOLE, configs.EVERY])
def test_garbage_in_another_document_does_not_leak(boxes):
    kernel = TritonKernel({name: configs.Config(32, 16, 4, 1, boxes) for name in configs.PASSES})
    tensors = Case("neighbours", documents(0, 41, 90)).tensors()
    for t in tensors:
        t[:, 41:] = float("nan")
    case, clean = Case("first", documents(0, 41)), [t[:, :41] for t in tensors]
    found = computed(Case("first of two", documents(0, 41, 90)), *tensors, kernel=kernel)
    kept = Attention(*(t[..., :41] if name == "lse" else t[:, :41] for name, t in zip(found._fields, found, strict=True)))
    assert_close(case, kept, oracle(case, *clean))


def problem(**changes) -> Problem:
    return Problem(**{**dict(device=torch.device("cpu"), dtype=bf16, heads=4, kv_heads=2, head_dim=64, v_head_dim=64), **changes})


def test_supports_says_why_not():
    assert INTERPRETED
    assert KERNEL.supports(problem()) is None
    assert "float64" in KERNEL.supports(problem(dtype=torch.float64))
    assert "query/key head dim is 257" in KERNEL.supports(problem(head_dim=257))
    assert "value head dim is 0" in KERNEL.supports(problem(v_head_dim=0))
    assert "meta" in KERNEL.supports(problem(device=torch.device("meta")))
