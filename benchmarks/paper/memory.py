"""Memory of attention, forward and backward, against length: a straight line for ours, a parabola for standard attention.

    python -m benchmarks.paper.memory               writes results/paper_memory.json and .png, under a minute

Peak bytes above q, k, v and dout, as torch's allocator counts them on a GPU; batch 1, 16 heads of 64, causal, no dropout. `expected` is
what `explain` says of ours. On a CPU, which does not count, it stands for the measurement, and the row says so. Legend: N tokens.
"""

from __future__ import annotations

from typing import Any

import torch

import distflash
from benchmarks.paper.common import OURS, STANDARD, Bench, Rows, both, contender, linear_fit, show

H, D = 16, 64
LENGTHS = tuple(1024 << n for n in range(8))  # 1k ... 128k


def expected(bench: Bench, tokens: int) -> int:
    shape = (1, tokens, H, D)
    return distflash.explain(shape, shape, causal=True, dtype=bench.dtype, device=bench.device).peak_bytes


def peak(bench: Bench, name: str, tokens: int) -> int:
    """Bytes above the inputs, after a first round that compiles kernels and makes tables."""
    attend, heads_first = contender(name, bench, tokens, causal=True)
    (leaves, dout), start = bench.inputs(1, tokens, H, D, heads_first), 0
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        both(attend, leaves, dout)
        torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - start


def draw(rows: Rows, figure: Any) -> None:
    axes = figure.subplots()
    for name in (STANDARD, OURS):
        mine = [r for r in rows if r["contender"] == name and "bytes" in r]
        axes.plot([r["N"] for r in mine], [r["bytes"] / 2**20 for r in mine], marker=".", label=name)
    axes.set(xlabel="N", ylabel="MiB above the inputs", title="forward + backward, 16 heads of 64, causal")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.legend()


def main() -> None:
    bench, rows, lost = Bench("memory", __doc__, 60), [], False
    gpu = bench.device.type == "cuda"
    for n in LENGTHS[:3] if bench.quick else LENGTHS:
        if bench.left < 0:
            bench.say("the budget is spent")
            break
        awaited = expected(bench, n)
        found, error = bench.attempt(lambda: peak(bench, OURS, n)) if gpu else (awaited, None)  # noqa: B023  run at once
        ours = {"bytes": found} if error is None else {"error": error}
        rows.append({"N": n, "contender": OURS, "measured": gpu, "expected": awaited, **ours})
        if gpu:
            found, error = (None, "out of memory at a shorter length") if lost else bench.attempt(lambda: peak(bench, STANDARD, n))  # noqa: B023
            lost = error is not None
            rows.append({"N": n, "contender": STANDARD, "measured": True, **({"error": error} if error else {"bytes": found})})
        bench.say(f"N = {n}")
    mine = [r for r in rows if r["contender"] == OURS and "bytes" in r]
    fit = linear_fit([r["N"] for r in mine], [r["bytes"] for r in mine]) if len(mine) > 2 else None
    lines = [[r["contender"], str(r["N"]), f"{r['bytes'] / 2**20:.1f}" if "bytes" in r else r["error"]] for r in rows]
    show("peak above the inputs", ("", "N", "MiB"), lines)
    if fit:
        bench.say(f"ours: {fit['slope']:.0f} bytes a token, R² = {fit['r2']:.6f}")
    bench.finish(rows, draw, (7, 4.2), fit=fit)


if __name__ == "__main__":
    main()
