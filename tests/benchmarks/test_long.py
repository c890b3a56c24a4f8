"""Long sequences: what a window keeps, and a run of one process with the table that is made of it."""

from __future__ import annotations

import json

import pytest

from benchmarks import across, bench_long
from benchmarks.record import load


@pytest.mark.parametrize(("length", "window"), [(7, None), (7, 0), (7, 3), (7, 6), (7, 9)])
def test_pairs_of_a_window_are_counted(length, window):
    reach = length if window is None else window
    assert bench_long.kept_pairs(length, window) == sum(0 <= q - k <= reach for q in range(length) for k in range(length))


def test_a_run_says_how_long_and_how_much(tmp_path, monkeypatch):
    bench_long.main(["--tokens", "96", "--length", "64", "--windows", "8", "--repeats", "1", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "long_1xcpu.json").read_text())["rows"]
    assert [(r["part"], r.get("window")) for r in rows] == [("window", 8), ("window", None)] * 2 + [("whole", None)]
    assert all(r["forward"] > 0 for r in rows) and rows[-1]["finite"] and rows[-1]["explained_bytes"] > 0
    for module in ("across", "record"):
        monkeypatch.setattr(f"benchmarks.{module}.RESULTS", tmp_path)
    lines = across.long().splitlines()
    assert sum(line.startswith("| 64 |") for line in lines) == 4 and sum(line.startswith("| 96 | 32/8 |") for line in lines) == 1
    assert "1 of 1" in lines[2] and f"{bench_long.kept_pairs(64, 8) / bench_long.kept_pairs(64, None):.3f}" in lines[2]


def test_a_million_tokens_took_what_was_explained():
    (whole,) = [r for r in load("long_2xh200")["rows"] if r["part"] == "whole"]
    assert whole["tokens"] == 1 << 20 and whole["finite"]
    assert whole["peak_bytes"] == pytest.approx(whole["explained_bytes"], rel=1e-3)


def test_a_window_costs_what_it_keeps():
    """Seconds over pairs kept, of windows of 4,096 to 16,384 in 131,072 tokens: alike within 12 %, forward and both passes."""
    windows = [r for r in load("long_2xh200")["rows"] if r["part"] == "window" and r["window"] and r["window"] >= 4096]
    for layout in ("contiguous", "auto"):
        for name in ("forward", "both"):
            rates = [r[name] / r["pairs_kept"] for r in windows if r["layout"] == layout]
            assert len(rates) == 3 and max(rates) < 1.12 * min(rates)
