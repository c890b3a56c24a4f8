"""The benchmark's own check: it passes a right kernel and catches wrong ones."""

from __future__ import annotations

import pytest
import torch

from benchmarks import correctness
from benchmarks.peers import Cell
from distflash.kernels.eager import EagerKernel
from distflash.testing import keep_mask


class WrongScale(EagerKernel):
    def backward(self, *args, **options):
        dq, dk, dv = super().backward(*args, **options)
        return dq, dk * 1.02, dv


class ForgetsTheRunningResult(EagerKernel):
    def forward(self, *args, acc=None, **options):
        return super().forward(*args, **options)


@pytest.fixture
def quick(monkeypatch):
    """Without the case that is there to keep every program of a GPU busy."""
    cases = {name: case for name, case in correctness.CASES.items() if name != "many programs"}
    assert len(cases) == len(correctness.CASES) - 1
    monkeypatch.setattr(correctness, "CASES", cases)


def test_a_right_kernel_passes_the_small_cases(quick):
    assert correctness.small(EagerKernel(), 16, torch.float32, "cpu") == {}


def test_wrong_gradients_fail_everywhere_and_a_lost_running_result_in_the_cases_of_several_visits(quick):
    assert len(correctness.small(WrongScale(), 16, torch.float32, "cpu")) == len(correctness.CASES)
    assert set(correctness.small(ForgetsTheRunningResult(), 16, torch.float32, "cpu")) == {"visits", "visits, causal"}


def test_the_rows_kept_are_those_of_the_dense_mask():
    for borders in ((0, 40), (0, 1, 14, 40)):
        tiles, rows = correctness.tiles_of(40, 40, {"causal": True, "cu_seqlens_q": borders}), torch.tensor([0, 1, 13, 14, 39])
        assert torch.equal(correctness.kept(tiles, rows), keep_mask(40, 40, causal=True, cu_seqlens_q=borders)[rows])


def prepared(kernel):
    def prepare(cell, q, k, v, dout):
        out, lse = kernel.forward(q, k, v, cell.tiles, cell.D**-0.5)
        return lambda: out, lambda: kernel.backward(dout, q, k, v, lse, kernel.delta(out, dout), cell.tiles, cell.D**-0.5)

    return prepare


@pytest.mark.parametrize("documents", [None, (0, 3, 350, 600)])
def test_a_sample_of_rows_tells_right_from_wrong(documents, monkeypatch):
    monkeypatch.setattr(correctness, "ROWS", 40)
    monkeypatch.setattr("benchmarks.peers.TOKENS", 600 if documents else 1200)
    cell = Cell(16, 600, True, 4, 2, documents)
    inputs = tuple(torch.randn(cell.B, 600, heads, 16) for heads in (4, 2, 2, 4))
    assert correctness.sampled(prepared(EagerKernel()), cell, inputs, backward=True) == ""
    assert correctness.sampled(prepared(WrongScale()), cell, inputs, backward=False) == ""
    assert correctness.sampled(prepared(WrongScale()), cell, inputs, backward=True).startswith("dk: ")
    late = lambda cell, *x: prepared(EagerKernel())(Cell(16, 600, False, 4, 2), *x)  # noqa: E731
    assert "out: " in correctness.sampled(late, cell, inputs, backward=False)
