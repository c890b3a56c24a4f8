"""What a child process of `bench_kernel` does: compile, check, time, repeat. A job is a dict (bench_kernel.jobs), its result rows."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

import torch

import distflash
from benchmarks import children, correctness, peers
from benchmarks.peers import OURS, PEERS

PASS_MS, LEAST, MOST = 40.0, 4, 40  # of each of the two turns: about so long, so many calls
Rows = list[dict[str, Any]]


def work(job: dict[str, Any]) -> Rows:
    return {"time": time_cell, "warm": warm, "check": check, "repeats": repeats}[job["kind"]](job)


def attempt(name: str, do: Callable[[], Any]) -> tuple[Any, str | None]:
    """(what it gives, None) or (None, why not). An error after which the GPU's context is lost ends the child instead."""
    children.starting(name)
    try:
        result = do()
        torch.cuda.synchronize()
        return result, None
    except Exception as error:
        if "CUDA error" in str(error) or "[CUDA]" in str(error):
            raise
        return None, f"{type(error).__name__}: {str(error)[:300]}"


def cell_of(job: dict[str, Any]) -> peers.Cell:
    borders = job["cell"]["documents"]
    return peers.Cell(**{**job["cell"], "documents": borders and tuple(borders)})


def warm(job: dict[str, Any]) -> Rows:
    """Compile what a cell needs, into the caches on disk; errors show up when it is timed."""
    torch._dynamo.reset()
    cell = cell_of(job)
    inputs = cell.inputs()
    for name in job["names"]:
        attempt(name, lambda name=name: [run() for run in peers.contender(name)(cell, *inputs) if run])
    return []


def check(job: dict[str, Any]) -> Rows:
    """The small cases of one of our configurations."""
    rows = []
    for name in job["names"]:
        wrong, error = attempt(name, lambda name=name: correctness.small(peers.hopper(name, job["D"]), job["D"]))
        text = "; ".join(f"{case}: {reason}" for case, reason in (wrong or {}).items())
        rows.append({"name": name, "pass": "check", **({"error": error} if error else {"wrong": text} if text else {})})
    return rows


def time_cell(job: dict[str, Any]) -> Rows:
    """Rows of one cell: in each direction every kernel compared with fp64, then all timed in turn."""
    torch._dynamo.reset()
    cell, rows = cell_of(job), []
    inputs = cell.inputs()
    for direction, wanted in job["passes"].items():
        backward, ready = direction == "backward", {}
        for name in (name for name in wanted if name in job["names"]):
            rows.append({"name": name, "pass": direction})
            prepare = peers.contender(name)
            wrong, error = attempt(name, partial(correctness.sampled, prepare, cell, inputs, backward=backward))
            if wrong:
                rows[-1]["wrong"] = wrong
            if wrong and name not in PEERS and not job.get("force"):
                error = "wrong, so not timed"
            if not error:
                runs, error = attempt(name, partial(prepare, cell, *inputs))
                ready[name] = runs and runs[backward]
            if error or ready[name] is None:
                rows[-1]["error"] = error or "no backward"
                ready.pop(name, None)
        mine = {row["name"]: row for row in rows if row["pass"] == direction}
        for name, (turns, error) in in_turn(ready, job.get("turns", 1)).items():
            mine[name] |= {"error": error} if error else figures(turns, cell.flops(backward))
    return rows


def figures(turns: list[list[float]], flops: float) -> dict[str, Any]:
    """Median, and the fast and slow 20 %, in TFLOP/s; the medians of single turns, of more than there and back."""
    milliseconds = list(chain(*turns))
    fast, *_, slow = statistics.quantiles(milliseconds, n=5)
    middle = statistics.median(milliseconds)
    rates = {"tflops": middle, "tflops_low": slow, "tflops_high": fast}
    of_turns = {"ms_of_turns": [statistics.median(turn) for turn in turns]} if len(turns) > 2 else {}
    return {"ms": middle, "calls": len(milliseconds), **{word: flops / ms / 1e9 for word, ms in rates.items()}, **of_turns}


def in_turn(runs: dict[str, Callable[[], Any]], times: int) -> dict[str, tuple[list[list[float]], str | None]]:
    """Milliseconds of each call, turn by turn, `times` forwards and backwards through the list; or why a kernel failed."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    found: dict[str, tuple[list[list[float]], str | None]] = {name: ([], None) for name in runs}
    for name in (*runs, *reversed(runs)) * times:
        turns, error = found[name]
        if error is None:
            turn, error = attempt(name, partial(one_turn, runs[name], flush))
            found[name] = ([*turns, turn] if turn else turns, error)
    return found


def one_turn(run: Callable[[], Any], flush: torch.Tensor) -> list[float]:
    """Milliseconds of single calls, each with a cold L2 cache, about PASS_MS in all."""

    def call(times: int) -> list[float]:
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(times)]
        for start, end in events:
            flush.zero_()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]

    call(2)
    return call(max(LEAST, min(MOST, round(PASS_MS / max(call(1)[0], 1e-3)))))


def repeats(job: dict[str, Any]) -> Rows:
    """How often forward, and deterministic backward, came out bit for bit as at first."""
    rows, cell = [], cell_of(job)
    q, k, v, dout = cell.inputs()
    leaves = q.requires_grad_(), k.requires_grad_(), v.requires_grad_()

    def once() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        result = distflash.attention(*leaves, causal=cell.causal, kernel="hopper", deterministic=True, return_lse=True)
        return [x.detach() for x in result], list(torch.autograd.grad(result[0], leaves, dout))

    def count() -> dict[str, int]:
        first, equal = once(), {"forward": 0, "backward": 0}
        for _ in range(job["times"]):
            for direction, a, b in zip(equal, first, once(), strict=True):
                equal[direction] += all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        return equal

    equal, error = attempt(OURS, count)
    for direction in ("forward", "backward"):
        shown = {"error": error} if error else {"equal": equal[direction]}
        rows.append({"name": OURS, "pass": direction, "times": job["times"], **shown})
    return rows
