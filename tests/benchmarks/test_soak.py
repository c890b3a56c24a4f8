"""The soak: what it counts, on how many ranks, and what the page makes of it."""

import numpy as np
import torch

from benchmarks import figures, soak
from benchmarks.record import write
from distflash.testing import spmd_processes

CPU = torch.device("cpu")


def test_ranks_sample_together_until_rank_0_ends_it():
    found = spmd_processes(2, lambda: soak.soak(1.5, 0.4, CPU), timeout=60.0)
    assert found[0].shape == found[1].shape and len(found[0]) >= 2 and found[0].shape[1] == 2 + len(soak.counts(CPU)) == 5
    assert torch.equal(found[0][:, 1], found[1][:, 1])  # calls
    assert (found[0][:, 2:] > 0).all() and found[0][-1, 0] >= 1.5


def test_a_growing_column_is_fitted_and_shown(tmp_path, monkeypatch):
    for module in ("figures", "record"):
        monkeypatch.setattr(f"benchmarks.{module}.RESULTS", tmp_path)
    assert figures.soak_gpu() == ""
    seconds = np.arange(0.0, 601.0, 5.0)
    samples = np.stack([seconds, 9 * seconds, 500 + seconds / 10, *(np.full_like(seconds, n) for n in (30, 7, 256, 900, 1700))], 1)
    (row,) = rows = [soak.row(0, samples)]
    assert abs(row["resident_mb"]["slope_an_hour"] - 360) < 1e-6 and row["device_mb"] == {
        "first": 1700, "last": 1700, "max": 1700, "slope_an_hour": 0, "error": 0,
    }  # fmt: skip
    write("soak_gpu", rows, tmp_path)
    shown = figures.soak_gpu()
    assert "| 0 | 10.0 | 5,400 | 530, 560, 560 | +360.0 ± 0.0 | 256, 256, 256 |" in shown
    assert "device MB: first, last, most" in shown
