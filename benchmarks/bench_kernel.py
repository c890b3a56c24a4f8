"""The Hopper kernels beside FlashAttention-3 (forward), FlashAttention-4, cuDNN, FlashAttention-2 and FlexAttention, in one run on one GPU.

    python -m benchmarks.bench_kernel                              every part below; writes results/kernels_DEVICE.json and prints the table
    python -m benchmarks.bench_kernel --part d64 gqa --append      some parts, added to that file
    python -m benchmarks.bench_kernel --lengths 8192 --part d128   S = 8192 alone
    python -m benchmarks.bench_kernel --plot                       draws the file, measures nothing

Parts: d64, d128, d256 (S from 2048 to 32768, causal and full, B S = 32768 tokens, H D = 2048), gqa (D = 128, 32 query heads, 8 key/value
heads), ragged (64 documents of random lengths, beside dense S = 8192), repeats (bit-equal from run to run).

First every kernel compiles, in processes side by side, and our small cases are checked. Then cell by cell: each kernel is compared with
fp64 on a sample of rows, then timed by CUDA events with the L2 cache flushed before each call, twice in turn, forwards and backwards
through the list, so that a drift of clocks meets all alike. A figure is the median; with it go the 20th and 80th percentile. What
fails is kept with its error; our kernel is not timed where it is wrong. Peers that are not installed count as failed.

FLOPs: 4 D a kept pair and head forward, 10 D backward.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import children, kernel_jobs, kernel_table, peers
from benchmarks.peers import OURS, PEERS
from benchmarks.record import RESULTS, held, versions, write

LENGTHS = (2048, 4096, 8192, 16384, 32768)
SHAPES = {"d64": (64, 32, 32), "d128": (128, 16, 16), "d256": (256, 8, 8), "gqa": (128, 32, 8)}  # D, H, Hk
PARTS = (*SHAPES, "ragged", "repeats")
ENV = {"FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "1"}  # what one process compiles for FlashAttention-4 serves the next
Rows = list[dict[str, Any]]


def documents(count: int = 64, tokens: int = peers.TOKENS, seed: int = 0) -> tuple[int, ...]:
    """Borders of documents of random lengths, none empty."""
    return (0, *sorted(random.Random(seed).sample(range(1, tokens), count - 1)), tokens)


def jobs(parts: list[str], lengths: Sequence[int], passes: list[str], ours: Callable[[int, str], list[str]], others: list[str]) -> Rows:
    """What is to be timed: a job a cell, with the kernels of each direction."""
    found: Rows = []

    def add(part: str, cell: peers.Cell, names: list[str], mine: Callable[[int, str], list[str]]) -> None:
        wanted = {name: [*mine(cell.D, name), *names] for name in passes}
        union = list(dict.fromkeys(name for one in wanted.values() for name in one))
        found.append({"kind": "time", "part": part, "cell": asdict(cell), "names": union, "passes": wanted})

    for part in (p for p in SHAPES if p in parts):
        D, H, Hk = SHAPES[part]
        for causal, S in product((True, False), lengths):
            add(part, peers.Cell(D, S, causal, H, Hk), others, ours)
    if "ragged" in parts:
        varlen = [name for name in others if name in ("fa2", "fa3", "fa4")]
        add("ragged", peers.Cell(128, peers.TOKENS, True, 16, 16, documents()), varlen, ours)
        add("dense", peers.Cell(128, 8192, True, 16, 16), [], lambda *_: [OURS])
    return found


def labelled(job: dict[str, Any], rows: Rows) -> Iterator[dict[str, Any]]:
    """Rows of a job with the cell that they belong to; what never ran is an error in every direction."""
    cell = {key: value for key, value in job["cell"].items() if key != "documents"}
    lost = {row["name"]: row for row in rows if "pass" not in row}
    where = {"part": job["part"], **cell, **({"documents": len(job["cell"]["documents"]) - 1} if job["cell"]["documents"] else {})}
    for direction, names in job["passes"].items():
        for name in names:
            known = [row for row in rows if row["name"] == name and row.get("pass") == direction]
            row = known[0] if known else lost.get(name, {"error": "wrong in the small cases, so not timed"})
            yield {**where, "kernel": name, **{key: value for key, value in row.items() if key != "name"}, "pass": direction}


def joined(old: Rows, new: Rows) -> Rows:
    """Rows of an earlier run, but for what was measured again."""
    key = lambda row: tuple(row.get(word) for word in ("part", "D", "S", "causal", "pass", "kernel"))  # noqa: E731
    again = {key(row) for row in new}
    return [row for row in old if key(row) not in again] + new


def show(rows: Rows) -> None:
    console = Console(width=170)
    head, body = kernel_table.lines(rows)
    table = Table(*head)
    for line in body:
        table.add_row(*line)
    console.print(table)
    for line in kernel_table.summary(rows):
        text = f"geometric mean {line['geomean']:.3f}, least {line['min']:.3f}" if "min" in line else "no cell with a peer"
        console.print(f"{line['part']:>7} {line['pass']:<8} against the best peer: {text} ({line['measured']} of {line['cells']} cells)")
    for direction, share in kernel_table.ragged(rows).items():
        console.print(f" ragged {direction:<8} against dense causal S = 8192: {share:.3f}")
    for row in (row for row in rows if "equal" in row):
        console.print(f"repeats {row['pass']:<8} D = {row['D']}: {row['equal']} of {row['times']} bit-equal")
    for line in kernel_table.troubles(rows):
        console.print(line, style="red", markup=False)


def compile_all(timed: Rows, checks: Rows, workers: int, options: dict[str, Any]) -> Rows:
    """Fill the caches in processes side by side, the longest lots first; rows of the checks."""
    lots: dict[tuple, Rows] = {}
    for name in ("flex", "fa4", *dict.fromkeys(name for job in timed for name in job["names"] if name not in PEERS)):
        for cell in (job["cell"] for job in timed if name in job["names"]):
            lot = lots.setdefault((name, cell["D"], cell["H"], cell["documents"] is None, cell["causal"] and name == "flex"), [])
            if name == "flex" or cell["causal"] not in [job["cell"]["causal"] for job in lot]:  # the others compile once for all lengths
                lot.append({"kind": "warm", "cell": cell, "names": [name]})
    work = [*lots.values(), *([job] for job in checks)]
    results = children.parallel(work, workers, **options, env={**ENV, "TORCHINDUCTOR_COMPILE_THREADS": "1"})
    found: Rows = []
    for job, [rows] in zip(checks, results[len(lots) :], strict=True):
        where = {"part": f"d{job['D']}", "D": job["D"], "pass": "check"}
        found += [{**where, "kernel": row["name"], **{word: row[word] for word in ("wrong", "error") if word in row}} for row in rows]
    return found


def arguments(about: str | None = __doc__, **defaults: Any) -> argparse.Namespace:
    """The command line of `measure`, for a program that is `about` this and has other defaults."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--lengths", nargs="+", type=int, default=list(LENGTHS), metavar="S", help="those of the parts above but the last two"
    )
    parser.add_argument("--only", choices=["forward", "backward"])
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--variants", nargs="+", default=[OURS], help=f"names from hopper/configs.py, {OURS} (the shipped ones), or all")
    parser.add_argument("--turns", type=int, default=1, help="times forwards and backwards through the kernels of a cell, 40 ms each")
    parser.add_argument("--times", type=int, default=1000, help="of the part repeats")
    parser.add_argument("--force", action="store_true", help="time our configurations that are found wrong too, and say so")
    parser.add_argument("--limit", type=float, default=90, help="seconds that a child may stay silent")
    parser.add_argument("--budget", type=float, default=540, help="seconds for everything")
    parser.add_argument(
        "--workers", type=int, default=min(12, os.cpu_count() or 1), help="processes that compile and check, up to 5 GB of GPU memory each"
    )
    parser.add_argument("--append", action="store_true", help="keep what the file holds of other cells")
    parser.add_argument("--plot", action="store_true", help="draw the file beside it, measure nothing")
    parser.add_argument("--out", type=Path, help="default: results/kernels_DEVICE.json")
    parser.set_defaults(**defaults)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.child:
        children.serve(str(args.child), kernel_jobs.work)
    out = args.out or RESULTS / f"kernels_{versions()['device'].lower().removeprefix('nvidia ').replace(' ', '_')}.json"
    if args.plot:
        found = json.loads(out.read_text())
        title = f"{found['versions']['device']}, bf16, B S = {peers.TOKENS}; causal solid, full dashed"
        kernel_table.plot(found["rows"], title, out.with_suffix(".png"))
        return
    rows = measure(args, out.with_suffix(".log"))
    if args.append:
        rows = joined(held(out)["rows"], rows)
    about = {"peers": peers.installed(), "dtype": "bf16", "summary": kernel_table.summary(rows), "cells": kernel_table.ratios(rows)}
    write(out.stem, rows, out.parent, **about)
    show(rows)


def measure(args: argparse.Namespace, log_path: Path) -> Rows:
    begin, rows = time.time(), []
    passes = [args.only] if args.only else ["forward", "backward"]
    names = {D: peers.variants(D) for D in (64, 128, 256)}  # name -> directions
    asked = lambda D: [n for n in names[D] if n in args.variants or "all" in args.variants]  # noqa: E731
    dims = sorted({SHAPES.get(part, SHAPES["d128"])[0] for part in args.part if part != "repeats"})
    checks: Rows = [{"kind": "check", "D": D, "names": [name]} for D in dims for name in asked(D)]
    options = {"command": children.command("benchmarks.bench_kernel"), "limit": args.limit, "deadline": begin + args.budget}
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("w") as log:
        ours = lambda D, direction: [name for name in asked(D) if direction in names[D][name]]  # noqa: E731
        timed = [{**job, "turns": args.turns} for job in jobs(args.part, args.lengths, passes, ours, args.peers)]
        rows += compile_all(timed, checks, args.workers, {**options, "log": log})
        print(f"compiled and checked after {time.time() - begin:.0f} s", flush=True)
        if args.force:
            timed = [{**job, "force": True} for job in timed]
        else:
            wrong = {(row["D"], row["kernel"]) for row in rows if row.get("wrong") or "error" in row}
            timed = [{**job, "names": [n for n in job["names"] if (job["cell"]["D"], n) not in wrong]} for job in timed]
        if "repeats" in args.part:
            cells = [peers.Cell(D, 4096, True, peers.WIDTH // D, peers.WIDTH // D) for D in (64, 128, 256)]
            timed += [
                {"kind": "repeats", "part": "repeats", "cell": asdict(cell), "names": [OURS], "times": args.times,
                 "passes": {"forward": [OURS], "backward": [OURS]}}
                for cell in cells
            ]  # fmt: skip
        for job, found in zip(timed, children.run(timed, **options, log=log, env=ENV), strict=True):
            rows += labelled(job, found)
    print(f"measured after {time.time() - begin:.0f} s", flush=True)
    return rows


if __name__ == "__main__":
    main()
