"""What the rows of `bench_kernel` say: figures beside each other, the ratio to the best peer, means and minima; text, Markdown, a plot.

A row is one kernel in one cell and direction: part, D, S, H, Hk, causal, pass, kernel, and tflops with tflops_low and tflops_high (the
slow and the fast 20 %), or the error that kept it from being measured. Pure Python: made from the JSON alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

OURS, PEERS = "distflash", ("fa3", "fa4", "cudnn", "fa2", "flex")
DIRECTIONS = ("forward", "backward")
TITLES = {"d64": "D = 64", "d128": "D = 128", "d256": "D = 256", "gqa": "D = 128, 32 over 8 heads"}
NAMES = {"fa3": "FlashAttention-3", "fa4": "FlashAttention-4", "cudnn": "cuDNN", "fa2": "FlashAttention-2", "flex": "FlexAttention"}
RUNS = ("kernels_h100_80gb_hbm3", "history/hopper_15_grid", "history/hopper_13_grid")  # newest first; one of each, a machine each
Rows = list[dict[str, Any]]
Key = tuple[str, str, int, bool]  # part, direction, S, causal


def cells(rows: Rows) -> dict[Key, dict[str, dict[str, Any]]]:
    """Rows by cell, then by kernel; parts and directions in their order, lengths ascending."""
    found: dict[Key, dict[str, dict[str, Any]]] = {}
    for row in rows:
        if row["pass"] in DIRECTIONS and row["part"] != "repeats":
            found.setdefault((row["part"], row["pass"], row["S"], row["causal"]), {})[row["kernel"]] = row
    parts = list(dict.fromkeys(part for part, *_ in found))
    return dict(sorted(found.items(), key=lambda item: (parts.index(item[0][0]), item[0][1] != "forward", not item[0][3], item[0][2])))


def best_peer(cell: dict[str, dict[str, Any]]) -> str | None:
    """The fastest other kernel that was measured here."""
    speeds = {name: row["tflops"] for name, row in cell.items() if name in PEERS and "tflops" in row}
    return max(speeds, key=lambda name: speeds[name]) if speeds else None


def ratio(cell: dict[str, dict[str, Any]]) -> float | None:
    """Our speed over that of the best peer; None if either was not measured."""
    peer = best_peer(cell)
    return cell[OURS]["tflops"] / cell[peer]["tflops"] if peer and "tflops" in cell.get(OURS, {}) else None


def summary(rows: Rows) -> list[dict[str, Any]]:
    """Geometric mean and minimum of the ratios by part and direction, with the number of cells that have one and of those that should."""
    groups: dict[tuple[str, str], list[float | None]] = {}
    for (part, direction, *_), cell in cells(rows).items():
        groups.setdefault((part, direction), []).append(ratio(cell))
    lines = []
    for (part, direction), ratios in groups.items():
        known = [r for r in ratios if r is not None]
        figures = {"geomean": geometric_mean(known), "min": min(known)} if known else {}
        lines.append({"part": part, "pass": direction, "cells": len(ratios), "measured": len(known), **figures})
    return lines


def overall(rows: Rows) -> dict[str, float]:
    """By direction, the geometric mean of the ratios of every dense cell."""
    dense = [(direction, ratio(cell)) for (part, direction, *_), cell in cells(rows).items() if part in TITLES]
    known = {direction: [r for name, r in dense if name == direction and r is not None] for direction in DIRECTIONS}
    return {direction: geometric_mean(found) for direction, found in known.items() if found}


def ratios(rows: Rows) -> list[dict[str, Any]]:
    """The best peer and our ratio to it, cell by cell."""
    words = ("part", "pass", "S", "causal")
    return [{**dict(zip(words, key, strict=True)), "best_peer": best_peer(cell), "ratio": ratio(cell)} for key, cell in cells(rows).items()]


def ragged(rows: Rows) -> dict[str, float]:
    """Our speed on packed documents over that on dense sequences of the same run, by direction."""
    speeds = {(row["part"], row["pass"]): row.get("tflops") for row in rows if row["part"] in ("ragged", "dense") and row["kernel"] == OURS}
    pairs = {direction: (speeds.get(("ragged", direction)), speeds.get(("dense", direction))) for direction in DIRECTIONS}
    return {direction: mine / dense for direction, (mine, dense) in pairs.items() if mine and dense}


def lines(rows: Rows, spread: bool = False) -> tuple[list[str], list[list[str]]]:
    """Head and lines of the table: TFLOP/s of every kernel, the best peer and our ratio to it."""
    by_cell = cells(rows)
    names = [name for name in dict.fromkeys(row["kernel"] for row in rows if row["pass"] in DIRECTIONS) if name not in PEERS]
    names += [peer for peer in PEERS if any(peer in cell for cell in by_cell.values())]
    body = []
    for (part, direction, S, causal), cell in by_cell.items():
        figures = [_figure(cell.get(name), spread) for name in names]
        against = ratio(cell)
        last = [best_peer(cell) or "", f"{against:.2f}" if against else ""]
        body.append([part, direction, str(S), "causal" if causal else "full", *figures, *last])
    return ["part", "pass", "S", "mask", *names, "best peer", "ratio"], body


def _figure(row: dict[str, Any] | None, spread: bool) -> str:
    if row is None:
        return ""
    if "tflops" not in row:
        return "no backward" if row["error"] == "no backward" else "failed"
    mark = " !" if row.get("wrong") else ""
    band = f" ({row['tflops_low']:.0f} to {row['tflops_high']:.0f})" if spread else ""
    return f"{row['tflops']:.0f}{band}{mark}"


def troubles(rows: Rows) -> list[str]:
    """Every error, every result out of its error budget, every repeat that was not bit-equal."""
    found = []
    for row in rows:
        cell = [f"S={row['S']}", "causal" if row["causal"] else "full"] if "S" in row else []
        where = " ".join([row["part"], row["pass"], *cell, row["kernel"]])
        if row.get("wrong"):
            found.append(f"{where}: WRONG: {row['wrong']}")
        if row.get("error", "no backward") != "no backward":
            found.append(f"{where}: {row['error']}")
        if row.get("equal", row.get("times")) != row.get("times"):
            found.append(f"{where}: {row['equal']} of {row['times']} bit-equal")
    return found


def markdown(rows: Rows, others: Sequence[Rows] = ()) -> str:
    """The table with the spread of each figure, and the means and minima; beside these the means and minima of other runs."""
    head, body = lines(rows, spread=True)
    runs = [{(line["part"], line["pass"]): line for line in summary(run)} for run in (rows, *others)]
    short = []
    for line in summary(rows):
        found = [run.get((line["part"], line["pass"]), {}) for run in runs]
        figures = [_three(some, word) for some in (found[:1], found[1:]) if some for word in ("geomean", "min")]
        short.append([line["part"], line["pass"], *figures, str(line["measured"])])
    named = ["geometric mean of the ratios", "least", *(["in runs before", "least there"] if others else [])]
    return _table(head, body) + "\n" + _table(["part", "pass", *named, "cells"], short)


def _three(lines: Rows, word: str) -> str:
    return ", ".join(f"{line[word]:.3f}" for line in lines if word in line)


def _table(head: list[str], body: list[list[str]]) -> str:
    return "".join("| " + " | ".join(line) + " |\n" for line in (head, ["---"] * len(head), *body))


def plot(rows: Rows, title: str, path: Path) -> None:
    """TFLOP/s over S: a column for each part, a row for each direction and mask, a colour for each kernel; causal solid, full dashed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    by_cell = cells(rows)
    parts = [part for part in dict.fromkeys(key[0] for key in by_cell) if len({S for p, _, S, _ in by_cell if p == part}) > 1]
    names = [OURS, *(peer for peer in PEERS if any("tflops" in cell.get(peer, {}) for cell in by_cell.values()))]
    panels = [(direction, causal) for direction in DIRECTIONS for causal in (True, False)]
    figure, axes = plt.subplots(
        len(panels), len(parts), figsize=(3.6 * len(parts), 2.7 * len(panels)), sharex=True, sharey=True, squeeze=False
    )
    for line, (direction, causal) in zip(axes, panels, strict=True):
        for axis, part in zip(line, parts, strict=True):
            lengths = sorted({S for p, d, S, c in by_cell if (p, d, c) == (part, direction, causal)})
            for number, name in enumerate(names):
                found = [(S, by_cell[part, direction, S, causal].get(name, {}).get("tflops")) for S in lengths]
                points = [(S, speed) for S, speed in found if speed]
                if points:
                    first = name == OURS
                    axis.plot(*zip(*points, strict=True), "-" if causal else "--", color=f"C{number}", linewidth=2.5 if first else 1.2,
                              marker="o", markersize=4, zorder=3 if first else 2)  # fmt: skip
            axis.set_xscale("log", base=2)
            axis.set_xticks(lengths, [f"{S // 1024}k" for S in lengths])
            axis.minorticks_off()
            axis.set_title(f"{TITLES.get(part, part)}, {direction}, {'causal' if causal else 'full'}", fontsize=10)
            axis.grid(alpha=0.3)
        line[0].set_ylabel("TFLOP/s")
    axes[0][0].set_ylim(bottom=0)  # shared: once all of it is drawn
    for axis in axes[-1]:
        axis.set_xlabel("tokens per sequence")
    handles = [
        plt.Line2D([], [], color=f"C{n}", linewidth=2.5 if name == OURS else 1.2, marker="o", markersize=4) for n, name in enumerate(names)
    ]
    figure.legend(
        handles, ["DistFlash" if name == OURS else NAMES[name] for name in names], loc="lower center", ncol=len(names), fontsize=10
    )
    figure.suptitle(title, fontsize=10)
    figure.tight_layout(rect=(0, 0.03, 1, 0.99))
    figure.savefig(path, dpi=80)
    plt.close(figure)
