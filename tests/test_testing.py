"""The judge is judged: the oracle from its definition, the error budget by errors that it must see, ranks by what they must do."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from distflash import testing
from distflash.testing import Attention, check, dense, errors, keep_mask, oracle, spmd, spmd_processes
from tests.schemes import inputs

S = 11
INF, NAN = float("inf"), float("nan")


def results(dtype=torch.float64) -> tuple[Attention, Attention]:
    x = inputs(S, dtype=dtype)
    keep = keep_mask(S, S, causal=True)
    return oracle(*x[:4], keep, dlse=x.dlse), oracle(*x[:4], keep, dlse=x.dlse, dtype=dtype)


def test_dense_attention_is_softmax_row_by_row():
    q, k, v = inputs(S, batch=1, heads=2, kv_heads=1, dim=3)[:3]
    keep = keep_mask(S, S, window_size=(3, 1))
    out, lse = dense(q, k, v, keep, scale=0.6)
    for h in range(2):
        for i in range(S):
            weights = {j: torch.exp(0.6 * q[0, i, h] @ k[0, j, 0]) for j in range(S) if keep[i, j]}
            total = sum(weights.values())
            row = sum(w * v[0, j, 0] for j, w in weights.items()) / total
            assert (out[0, i, h] - row).abs().max() < 1e-14 and abs(lse[0, h, i] - total.log()) < 1e-14


def test_rows_that_see_nothing_are_zero_and_minus_infinity_with_zero_gradients():
    x = inputs(S)
    found = oracle(*x[:4], torch.zeros(S, S, dtype=torch.bool), dlse=x.dlse)
    assert (found.lse == -INF).all() and all((t == 0).all() for t in (found.out, *found[2:]))


def test_the_budget_accepts_the_truth_and_the_low_precision_formula():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        truth, low = results(dtype)
        check(truth, truth, low, dtype)
        check(Attention(*(t.to(dtype) for t in truth[:1]), truth.lse, *(t.to(dtype) for t in truth[2:])), truth, low, dtype)


@pytest.mark.parametrize("name", Attention._fields)
@pytest.mark.parametrize(
    "dtype, size", [(torch.float64, 1e-9), (torch.float32, 1e-3), (torch.bfloat16, 0.2), (torch.float16, 0.05)], ids=str
)
def test_one_wrong_element_is_seen(name, dtype, size):
    truth, low = results(dtype)
    broken = getattr(truth, name).clone(memory_format=torch.contiguous_format)
    broken.view(-1)[17] += size
    assert set(errors(truth._replace(**{name: broken}), truth, low, dtype)) == {name}


@pytest.mark.parametrize("factor", [2.0, 0.5, 4.0, 1.02])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_factor_is_seen(factor, dtype):
    truth, low = results(dtype)
    found = truth._replace(dk=truth.dk * factor, dv=truth.dv * factor)
    assert set(errors(found, truth, low, dtype)) == {"dk", "dv"}


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("name", Attention._fields)
def test_nan_and_infinity_are_seen(name, value):
    truth, _ = results()
    broken = getattr(truth, name).clone(memory_format=torch.contiguous_format)
    broken.view(-1)[5] = value
    assert "NaN or inf" in errors(truth._replace(**{name: broken}), truth, truth, torch.float64)[name]


def test_plus_for_minus_infinity_and_a_finite_lse_of_a_blind_row_are_seen():
    x = inputs(S)
    truth = oracle(*x[:4], keep_mask(S, S, causal=True) & (torch.arange(S) > 2)[:, None], dlse=x.dlse)
    for value in (INF, 0.0, NAN):
        lse = torch.where(truth.lse == -INF, value, truth.lse)
        assert "lse" in errors(truth._replace(lse=lse), truth, truth, torch.float64), value
    check(truth, truth, truth, torch.float64)


def test_a_wrong_shape_is_seen_and_named():
    truth, _ = results()
    with pytest.raises(AssertionError, match=r"out: shape \(2, 10, 4, 8\), expected \(2, 11, 4, 8\)"):
        check(truth._replace(out=truth.out[:, 1:]), truth, truth, torch.float64)


def test_rank_results_come_in_rank_order():
    assert spmd(5, lambda group: (group.rank, group.size)) == [(rank, 5) for rank in range(5)]
    assert spmd_processes(3, lambda: dist.get_rank()) == [0, 1, 2]


def test_tensors_come_back_from_processes_whatever_their_dtype():
    def work():
        return torch.arange(3), [{"ones": torch.ones(2, dtype=torch.bfloat16)}, (torch.zeros(0, 4), "text", None)]

    for count, (found, (nothing, *rest)) in spmd_processes(2, work):
        ones = found["ones"]
        assert count.tolist() == [0, 1, 2] and ones.dtype == torch.float64 and ones.tolist() == [1.0, 1.0]
        assert nothing.shape == (0, 4) and rest == ["text", None]


def test_the_error_of_a_process_is_raised_with_its_own_traceback():
    def work():
        if dist.get_rank() == 1:
            raise ZeroDivisionError("rank 1's own error")
        dist.barrier()

    with pytest.raises(RuntimeError, match="ZeroDivisionError: rank 1's own error"):
        spmd_processes(2, work, timeout=20.0)


def test_a_process_that_dies_is_named():
    def work():
        if dist.get_rank() == 1:
            os._exit(3)

    with pytest.raises(RuntimeError, match=r"rank 1 died without a word|[Cc]onnection"):
        spmd_processes(2, work, timeout=20.0)


def test_processes_that_never_finish_are_killed_and_named():
    def work():
        if dist.get_rank() == 1:
            time.sleep(60.0)

    start = time.monotonic()
    with pytest.raises((TimeoutError, RuntimeError), match=r"ranks \[.*1\] did not finish within 2 s|[Tt]ime"):
        spmd_processes(2, work, timeout=2.0)
    assert time.monotonic() - start < 15.0


def test_a_small_factor_is_seen_where_no_single_element_is_wrong():
    true = torch.randn(2, 128, 4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    low = true.bfloat16().double()
    assert testing._error(low, true, low, torch.bfloat16, 7e-3) is None
    assert testing._error(low * 1.002, true, low, torch.bfloat16, 7e-3).startswith("scale 1.00")
    assert testing._error(low[:, :1] * 1.002, true[:, :1], low[:, :1], torch.bfloat16, 7e-3) is None, "of two tokens it may be rounding"


def test_one_element_that_was_rounded_once_is_within_the_budget():
    for true in torch.rand(500, 1, dtype=torch.float64) + 0.5:
        rounded = true.bfloat16().double()
        assert testing._error(rounded, true, rounded, torch.bfloat16, 7e-3) is None, true
