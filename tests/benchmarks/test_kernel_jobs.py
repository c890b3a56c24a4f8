"""A cell as a child times it, on a CPU: the clock and the kernels are stand-ins."""

from __future__ import annotations

import pytest
import torch

from benchmarks import children, correctness, kernel_jobs, peers
from distflash.kernels.eager import EagerKernel


def prepared(cell, q, k, v, dout, out_factor=1.0, backward=True):
    kernel, scale = EagerKernel(), cell.D**-0.5
    out, lse = kernel.forward(q, k, v, cell.tiles, scale)
    gradients = lambda: kernel.backward(dout, q, k, v, lse, kernel.delta(out, dout), cell.tiles, scale)  # noqa: E731
    return lambda: out * out_factor, gradients if backward else None


def broken(cell, *tensors):
    raise ImportError("no module named flash")


def lost(cell, *tensors):
    raise RuntimeError("CUDA error: an illegal memory access")


CONTENDERS = {
    "distflash": prepared,
    "other": lambda *x: prepared(*x, out_factor=1.1),
    "fa2": lambda *x: prepared(*x, out_factor=1.1),
    "fa3": lambda *x: prepared(*x, backward=False),
    "fa4": broken,
    "cudnn": lost,
}


@pytest.fixture
def cpu(monkeypatch):
    turns = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(children, "starting", turns.append)
    monkeypatch.setattr(correctness, "ROWS", 20)
    monkeypatch.setattr(peers, "TOKENS", 128)
    monkeypatch.setattr(peers, "contender", CONTENDERS.__getitem__)
    monkeypatch.setattr(peers.Cell, "inputs", lambda cell: tuple(torch.randn(cell.B, cell.S, h, cell.D) for h in (4, 2, 2, 4)))
    monkeypatch.setattr(kernel_jobs, "one_turn", lambda run, flush: [1.0, 2.0, 3.0] if run() is not None else [])
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, device=None, **options: empty(*size, **options))
    return turns


def job(*names, backward=True):
    passes = {"forward": list(names), **({"backward": list(names)} if backward else {})}
    cell = {"D": 16, "S": 64, "causal": True, "H": 4, "Hk": 2, "documents": None}
    return {"kind": "time", "part": "d64", "cell": cell, "names": list(names), "passes": passes}


def test_every_kernel_gets_a_row_in_each_direction_timed_or_with_its_reason(cpu):
    rows = {(row["name"], row["pass"]): row for row in kernel_jobs.work(job("distflash", "other", "fa2", "fa3", "fa4"))}
    assert len(rows) == 10
    assert all(
        rows["distflash", direction]["ms"] == 2.0 and rows["distflash", direction]["calls"] == 6 for direction in ("forward", "backward")
    )
    assert rows["other", "forward"]["error"] == "wrong, so not timed" and "out: " in rows["other", "forward"]["wrong"]
    assert "out: " in rows["fa2", "forward"]["wrong"] and rows["fa2", "forward"]["tflops"] > 0
    assert rows["fa3", "forward"]["tflops"] > 0 and rows["fa3", "backward"]["error"] == "no backward"
    assert all(rows["fa4", direction]["error"] == "ImportError: no module named flash" for direction in ("forward", "backward"))


def test_kernels_are_timed_in_two_turns_the_second_backwards(cpu):
    kernel_jobs.work(job("distflash", "fa2", "fa3", backward=False))
    assert cpu[-6:] == ["distflash", "fa2", "fa3", "fa3", "fa2", "distflash"]
    rows = kernel_jobs.work({**job("distflash", "fa2", backward=False), "turns": 2})
    assert cpu[-8:] == ["distflash", "fa2", "fa2", "distflash"] * 2
    assert [row["ms_of_turns"] for row in rows] == [[2.0] * 4] * 2


def test_an_error_that_costs_the_gpu_s_context_ends_the_job(cpu):
    with pytest.raises(RuntimeError, match="illegal memory access"):
        kernel_jobs.work(job("distflash", "cudnn"))
    assert cpu[-1] == "cudnn"
