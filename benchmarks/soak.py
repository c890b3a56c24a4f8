"""Does a process grow? Attention forward and backward of random shapes on end, over gloo, while memory, files and threads are counted.

    python -m benchmarks.soak --minutes 60 [--ranks 2] [--record]

A call is one of PROBLEMS, each with its own length, documents, heads, dtype, mask, layout and order: it makes a plan, tables and messages
of its own every time. What is kept on purpose (the kinds of calls that were agreed on, the last 256 masks) fills up in the first half;
lines are fitted to the second.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import distflash
from benchmarks.record import write
from distflash.parallel.layout import LAYOUTS
from distflash.parallel.plan import ORDERS
from distflash.testing import spmd_processes

PROBLEMS = 1000
COUNTED = ("resident_mb", "files", "threads")


def counts() -> tuple[float, ...]:
    """What this process holds, in the order of COUNTED."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def call(draw: random.Random) -> None:
    """Attention of a random problem, forward and backward; the same on every rank, which must draw alike."""
    draw = random.Random(draw.randrange(PROBLEMS))
    length = draw.randrange(1, 400)
    cu = (0, *sorted(draw.choices(range(length + 1), k=draw.randrange(4))), length)
    kv_heads, dim, dtype = draw.choice((1, 2)), draw.choice((8, 16, 59)), draw.choice((torch.float32, torch.bfloat16))
    causal, order = draw.random() < 0.5, draw.choice([*ORDERS])
    seq = distflash.SequenceParallel(layout=draw.choice([*LAYOUTS]), order=order, ulysses=draw.choice((1, 2))).sequence(cu_seqlens=cu)
    q, k, v = (torch.randn(1, seq.local_length, h, dim, dtype=dtype, requires_grad=True) for h in (2 * kv_heads, kv_heads, kv_heads))
    softcap, dropout = draw.choice((0.0, 0.0, 20.0)), draw.choice((0.0, 0.0, 0.1))
    out = distflash.attention(q, k, v, seq, causal=causal, softcap=softcap, dropout_p=dropout)
    seq.unshard(out).float().square().mean().backward()
    assert q.grad is not None and q.grad.isfinite().all()


def soak(seconds: float, every: float) -> torch.Tensor:
    """Rows of (seconds, calls, *COUNTED) of this rank, one each `every` seconds."""
    rank, draw, start = dist.get_rank(), random.Random(0), time.monotonic()
    rows, calls, over = [], 0, torch.zeros(1)
    while not over:
        call(draw)
        calls += 1
        now = time.monotonic() - start
        if now >= every * len(rows):
            rows.append((now, calls, *counts()))
        if calls % 10 == 0:  # rank 0 ends it for all
            over += float(rank == 0 and now >= seconds)
            dist.all_reduce(over)
    return torch.tensor(rows, dtype=torch.float64)


def fit(seconds: np.ndarray, values: np.ndarray) -> dict[str, float]:
    """A line through the samples: its slope an hour and the standard error of that; first, last and largest value."""
    hours = (seconds - seconds.mean()) / 3600
    slope = float(hours @ values / (hours @ hours))
    rest = values - values.mean() - slope * hours
    error = float(np.sqrt(rest @ rest / max(1, len(values) - 2) / (hours @ hours)))
    ends = {"first": float(values[0]), "last": float(values[-1]), "max": float(values.max())}
    return {name: round(value, 2) for name, value in (ends | {"slope_an_hour": slope, "error": error}).items()}


def row(rank: int, samples: np.ndarray) -> dict[str, Any]:
    """One rank's result: fits to the second half, and the samples of all."""
    half = samples[samples[:, 0] >= samples[-1, 0] / 2]
    about = {"rank": rank, "minutes": round(samples[-1, 0] / 60, 1), "calls": int(samples[-1, 1])}
    about |= {name: fit(half[:, 0], half[:, 2 + n]) for n, name in enumerate(COUNTED)}
    return about | {"samples": [[round(x, 1) for x in sample] for sample in samples.tolist()]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--every", type=float, default=15.0, help="seconds between samples")
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/soak.json")
    asked = parser.parse_args()
    seconds = 60 * asked.minutes
    found = spmd_processes(asked.ranks, lambda: soak(seconds, asked.every), timeout=2 * seconds + 120)
    rows = [row(rank, samples.numpy()) for rank, samples in enumerate(found)]
    for r in rows:
        print(f"rank {r['rank']}, {r['minutes']} minutes, {r['calls']} calls; second half:")
        for name in COUNTED:
            print(f"  {name}: {r[name]}")
    if asked.record:
        write("soak", rows)


if __name__ == "__main__":
    main()
