"""What is read off the rows of the kernel benchmark."""

from __future__ import annotations

from itertools import pairwise

import pytest

from benchmarks import kernel_table
from benchmarks.bench_kernel import documents, jobs, joined, labelled
from benchmarks.kernel_jobs import figures
from benchmarks.peers import Cell


def row(kernel, tflops=None, part="d64", direction="forward", S=2048, causal=True, **more):
    speed = {"error": "it broke"} if tflops is None else {"tflops": tflops, "tflops_low": tflops - 1, "tflops_high": tflops + 2}
    return {"part": part, "D": 64, "S": S, "H": 32, "Hk": 32, "causal": causal, "pass": direction, "kernel": kernel, **speed, **more}


ROWS = [
    row("distflash", 400.0), row("fa4", 500.0), row("cudnn", 450.0), row("flex"),
    row("distflash", 600.0, S=8192), row("fa4", 400.0, S=8192), row("fa2", 500.0, S=8192, wrong="dq: max error 1"),
    row("distflash", direction="backward"), row("cudnn", 300.0, direction="backward"),
    row("fa3", direction="backward", error="no backward"),
]  # fmt: skip


def test_the_ratio_is_to_the_best_peer_of_each_cell_and_its_mean_is_geometric():
    forward, backward = kernel_table.summary(ROWS)
    assert forward == {"part": "d64", "pass": "forward", "cells": 2, "measured": 2, "geomean": pytest.approx(0.96**0.5), "min": 0.8}
    assert kernel_table.ratios(ROWS)[1] == {"part": "d64", "pass": "forward", "S": 8192, "causal": True, "best_peer": "fa2", "ratio": 1.2}
    assert backward == {"part": "d64", "pass": "backward", "cells": 1, "measured": 0}


def test_runs_before_stand_beside_the_means():
    others = [[row("distflash", speed), row("fa4", 500.0)] for speed in (550.0, 450.0)]
    text = kernel_table.markdown(ROWS, others)
    assert "| d64 | forward | 0.980 | 0.800 | 1.100, 0.900 | 1.100, 0.900 | 2 |" in text and "| d64 | backward |  |  |  |  | 0 |" in text
    packed = [row("distflash", 1.0, "ragged"), row("fa2", 2.0, "ragged")]  # no dense cell
    assert kernel_table.overall(ROWS + packed) == {"forward": pytest.approx(0.96**0.5)}


def test_the_table_shows_every_kernel_and_no_failure_is_dropped():
    head, body = kernel_table.lines(ROWS)
    assert head == ["part", "pass", "S", "mask", "distflash", "fa3", "fa4", "cudnn", "fa2", "flex", "best peer", "ratio"]
    assert body[0] == ["d64", "forward", "2048", "causal", "400", "", "500", "450", "", "failed", "fa4", "0.80"]
    assert body[1][8:] == ["500 !", "", "fa2", "1.20"]
    assert body[2][4:] == ["failed", "no backward", "", "300", "", "", "cudnn", ""]
    assert kernel_table.troubles(ROWS) == [
        "d64 forward S=2048 causal flex: it broke",
        "d64 forward S=8192 causal fa2: WRONG: dq: max error 1",
        "d64 backward S=2048 causal distflash: it broke",
    ]
    assert "| 400 (399 to 402) |" in kernel_table.markdown(ROWS) and "0.980" in kernel_table.markdown(ROWS)


def test_ragged_is_against_the_dense_cell_of_the_same_run_and_repeats_against_all_of_them():
    rows = [row("distflash", 300.0, "ragged", S=32768), row("fa2", 350.0, "ragged", S=32768), row("distflash", 400.0, "dense", S=8192)]
    assert kernel_table.ragged(rows) == {"forward": 0.75}
    repeats = {"part": "repeats", "D": 64, "S": 4096, "causal": True, "pass": "backward", "kernel": "distflash", "times": 1000}
    assert kernel_table.troubles([{**repeats, "equal": 1000}]) == [] and kernel_table.cells([{**repeats, "equal": 1000}]) == {}
    assert kernel_table.troubles([{**repeats, "equal": 999}]) == ["repeats backward S=4096 causal distflash: 999 of 1000 bit-equal"]


def test_the_plot_is_made_from_the_rows_alone(tmp_path):
    pytest.importorskip("matplotlib")
    kernel_table.plot(ROWS, "a title", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_run_replaces_what_it_measured_again_and_keeps_the_rest():
    new = [row("distflash", 450.0)]
    rows = joined(ROWS, new)
    assert len(rows) == len(ROWS) and [
        r["tflops"] for r in rows if r["kernel"] == "distflash" and r.get("S") == 2048 and "tflops" in r
    ] == [450.0]


def test_the_parts_make_the_whole_grid_once():
    every = jobs(
        ["d64", "d128", "d256", "gqa", "ragged"], (2048, 8192), ["forward", "backward"], lambda D, direction: ["distflash"], ["fa4", "flex"]
    )
    cells = [(job["part"], job["cell"]["S"], job["cell"]["causal"]) for job in every]
    assert len(cells) == len(set(cells)) == 4 * 2 * 2 + 2
    assert all(job["cell"]["H"] * job["cell"]["D"] == 2048 for job in every if job["part"] != "gqa")
    assert next(job for job in every if job["part"] == "ragged")["names"] == ["distflash", "fa4"]
    forward_only = jobs(["d64"], (2048,), ["forward", "backward"], lambda D, direction: ["other"] if direction == "forward" else [], [])
    assert forward_only[0]["passes"] == {"forward": ["other"], "backward": []} and forward_only[0]["names"] == ["other"]


def test_rows_carry_their_cell_and_what_never_ran_is_an_error_in_both_directions():
    job = jobs(["ragged"], (), ["forward", "backward"], lambda *_: ["distflash"], ["fa2"])[0]
    done = [
        {"name": "fa2", "error": "silent for 90 s"},
        *({"name": "distflash", "pass": p, "tflops": 1.0} for p in ("forward", "backward")),
    ]
    rows = list(labelled(job, done))
    assert [(r["pass"], r["kernel"], r.get("error")) for r in rows] == [
        ("forward", "distflash", None), ("forward", "fa2", "silent for 90 s"),
        ("backward", "distflash", None), ("backward", "fa2", "silent for 90 s"),
    ]  # fmt: skip
    assert rows[0]["documents"] == 64 and rows[0]["D"] == 128 and "name" not in rows[0]


def test_documents_are_the_same_each_time_and_none_is_empty():
    borders = documents()
    assert borders == documents() and borders[0] == 0 and borders[-1] == 32768 and len(borders) == 65
    assert all(a < b for a, b in pairwise(borders))


def test_work_is_counted_over_the_pairs_that_are_kept():
    cell = Cell(128, 32768, True, 16, 4, (0, 3, 32768))
    assert cell.flops(False) == 4 * 16 * 128 * (6 + 32765 * 32766 // 2) and cell.flops(True) == 2.5 * cell.flops(False)
    assert Cell(64, 2048, False, 32, 32).flops(False) == 4 * 16 * 32 * 64 * 2048**2


def test_a_figure_is_the_median_with_the_slow_and_the_fast_fifth():
    found = figures([[1.0, 2.0, 3.0, 4.0], [9.0, 8.0, 7.0, 6.0, 5.0]], 1e9)
    assert found["ms"] == 5.0 and found["calls"] == 9 and found["tflops"] == pytest.approx(0.2)
    assert found["tflops_high"] == pytest.approx(0.5) and found["tflops_low"] == pytest.approx(0.125)
