"""Does a process grow? Attention forward and backward of random shapes on end, while memory, files and threads are counted.

    python -m benchmarks.soak --minutes 60 [--ranks 2] [--record]                 forked processes over gloo
    distflash run -n 2 -m benchmarks.soak --minutes 10 --every 5 [--record]       a GPU each: both wires in turn, GPU memory too

A call is one of several problems, each with its own length, documents, heads, dtype, mask, layout and order: it makes a plan, tables and
messages of its own every time. What is kept on purpose (the kinds of calls that were agreed on, the last 256 masks) fills up in the first
half; lines are fitted to the second. On GPUs every problem runs once before the clock starts, for that compiles its kernels, and each
scheme keeps its SequenceParallel, whose windows take a collective to make.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

import distflash
from benchmarks.record import write
from distflash.parallel.layout import LAYOUTS
from distflash.parallel.plan import ORDERS
from distflash.testing import spmd_processes


class Drawn(NamedTuple):
    """What problems are drawn from, and how many there are."""

    problems: int
    longest: int  # tokens
    kv_heads: tuple[int, ...]  # half as many as query heads
    dims: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    softcaps: tuple[float, ...]
    dropouts: tuple[float, ...]
    wires: tuple[str, ...]


DRAWN = {
    "cpu": Drawn(1000, 400, (1, 2), (8, 16, 59), (torch.float32, torch.bfloat16), (0.0, 0.0, 20.0), (0.0, 0.0, 0.1), ("auto",)),
    "cuda": Drawn(200, 8192, (2, 4), (64, 128), (torch.bfloat16,), (0.0,), (0.0, 0.0, 0.0, 0.1), ("p2p", "symmetric")),
}
COUNTED = ("resident_mb", "files", "threads", "allocated_mb", "reserved_mb", "device_mb")  # the last three on GPUs


def counts(device: torch.device) -> tuple[float, ...]:
    """What this process holds, and what is taken of its GPU, in the order of COUNTED."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    held = pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
    if device.type == "cpu":
        return held
    free, total = torch.cuda.mem_get_info()  # windows are no business of the allocator's
    return *held, *(n / 2**20 for n in (torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), total - free))


_kept = cache(distflash.SequenceParallel)


def call(problem: int, device: torch.device) -> None:
    """Attention of a random problem, forward and backward; the same on every rank, which must draw alike."""
    draw, among = random.Random(problem), DRAWN[device.type]
    length = draw.randrange(1, among.longest)
    cu = (0, *sorted(draw.choices(range(length + 1), k=draw.randrange(4))), length)
    kv_heads, dim, dtype = draw.choice(among.kv_heads), draw.choice(among.dims), draw.choice(among.dtypes)
    causal, order = draw.random() < 0.5, draw.choice([*ORDERS])
    scheme = {"layout": draw.choice([*LAYOUTS]), "order": order, "ulysses": draw.choice((1, 2)), "wire": draw.choice(among.wires)}
    seq = (_kept if device.type == "cuda" else distflash.SequenceParallel)(**scheme).sequence(cu_seqlens=cu)
    shapes = ((1, seq.local_length, h, dim) for h in (2 * kv_heads, kv_heads, kv_heads))
    q, k, v = (torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for shape in shapes)
    softcap, dropout = draw.choice(among.softcaps), draw.choice(among.dropouts)
    out = distflash.attention(q, k, v, seq, causal=causal, softcap=softcap, dropout_p=dropout)
    assert isinstance(out, torch.Tensor)
    seq.unshard(out).float().square().mean().backward()
    assert q.grad is not None and q.grad.isfinite().all()


def soak(seconds: float, every: float, device: torch.device) -> torch.Tensor:
    """Rows of (seconds, calls, *COUNTED) of this rank, one each `every` seconds of rank 0, which ends it for all."""
    rank, draw, problems = dist.get_rank(), random.Random(0), DRAWN[device.type].problems
    if device.type == "cuda":
        for problem in range(problems):
            call(problem, device)
    rows, calls, start = [], 0, time.monotonic()
    while True:
        now = time.monotonic() - start
        told = torch.tensor([now >= every * len(rows), now >= seconds], dtype=torch.float32, device=device) * (rank == 0)
        dist.all_reduce(told)
        due, over = told.tolist()
        if due or over:
            rows.append((now, calls, *counts(device)))
        if over:
            return torch.tensor(rows, dtype=torch.float64)
        for _ in range(10):
            call(draw.randrange(problems), device)
        calls += 10


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
    half, counted = samples[samples[:, 0] >= samples[-1, 0] / 2], COUNTED[: samples.shape[1] - 2]
    about = {"rank": rank, "minutes": round(samples[-1, 0] / 60, 1), "calls": int(samples[-1, 1])}
    about |= {name: fit(half[:, 0], half[:, 2 + n]) for n, name in enumerate(counted)}
    return about | {"samples": [[round(x, 1) for x in sample] for sample in samples.tolist()]}


def gathered(samples: torch.Tensor, device: torch.device) -> list[torch.Tensor]:
    """Those of every rank."""
    found = [torch.empty_like(samples, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(found, samples.to(device))
    return [part.cpu() for part in found]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--ranks", type=int, default=2, help="processes to fork, where no launcher has started any")
    parser.add_argument("--every", type=float, default=15.0, help="seconds between samples")
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/soak.json, soak_gpu.json on GPUs")
    asked = parser.parse_args()
    world, seconds = distflash.init(), 60 * asked.minutes
    if world.size > 1:
        found = gathered(soak(seconds, asked.every, world.device), world.device)
    elif world.device.type == "cpu":
        found = spmd_processes(asked.ranks, lambda: soak(seconds, asked.every, world.device), timeout=2 * seconds + 120)
    else:
        parser.error("one process has nobody to talk to: start it with distflash run -n 2 -m benchmarks.soak")
    if not world.is_main:
        return
    rows = [row(rank, samples.numpy()) for rank, samples in enumerate(found)]
    for r in rows:
        print(f"rank {r['rank']}, {r['minutes']} minutes, {r['calls']} calls; second half:")
        for name in (name for name in COUNTED if name in r):
            print(f"  {name}: {r[name]}")
    if asked.record:
        write("soak" if world.device.type == "cpu" else "soak_gpu", rows)


if __name__ == "__main__":
    main()
