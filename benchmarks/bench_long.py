"""Long sequences across GPUs of one host: peak memory beside what `explain` says, and the time of a sliding window beside the full mask's.

    distflash run -n 2 -m benchmarks.bench_long                        both parts; writes results/long_2xDEVICE.json
    distflash run -n 4 -m benchmarks.bench_long --tokens 2097152 --part whole

whole     one call forward and backward, H = 32/8, after a short one that compiles: seconds, TFLOP/s a GPU on causal FLOPs, and the most
          memory that any rank took above q, k, v and dout, beside `peak_bytes` of `distflash.explain`
window    `window_size=(w, 0)` in one sequence, H = 32/32: seconds of forward and of both passes, the pairs that are kept, and how many
          of a rank's visits compute anything. Medians over repeats of the slowest rank's time

Causal, bf16 on GPUs and fp32 on CPUs, D = 128, the scheme and wire that "auto" takes; windows also contiguous, where neighbours suffice.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

import distflash
from benchmarks.record import RESULTS, slug, write
from benchmarks.timing import in_a_row
from distflash.launch.measure import seconds
from distflash.launch.world import World

D = 128


def dtype_of(world: World) -> torch.dtype:
    return torch.bfloat16 if world.device.type == "cuda" else torch.float32


def inputs(world: World, tokens: int, heads: int, kv_heads: int) -> list[torch.Tensor]:
    """q, k, v, which need gradients, and dout, of this rank's tokens."""
    shapes = ((1, tokens, h, D) for h in (heads, kv_heads, kv_heads, heads))
    q, k, v, dout = (torch.randn(shape, device=world.device, dtype=dtype_of(world)) for shape in shapes)
    return [*(x.requires_grad_() for x in (q, k, v)), dout]


def largest(world: World, *values: float) -> list[float]:
    """Over all ranks. A collective."""
    found = torch.tensor(values, dtype=torch.float64, device=world.device)
    if world.size > 1:
        dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.tolist()


def whole(world: World, tokens: int, heads: int = 32, kv_heads: int = 8) -> dict[str, Any]:
    """One call of one long sequence. A collective."""
    gpu, kept = world.device.type == "cuda", []
    seq = distflash.SequenceParallel().sequence(tokens)
    q, k, v, dout = inputs(world, seq.local_length, heads, kv_heads)
    before = torch.cuda.memory_allocated() if gpu else 0
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    forward = seconds(lambda: kept.append(distflash.attention(q, k, v, seq, causal=True)), world.device)
    backward = seconds(lambda: kept.extend(torch.autograd.grad(kept[0], (q, k, v), dout)), world.device)
    peak = torch.cuda.max_memory_allocated() - before if gpu else 0
    told = distflash.explain(q.shape, k.shape, seq, causal=True, dtype=q.dtype)
    forward, backward, peak, explained = largest(world, forward, backward, peak, told.peak_bytes)
    flops = 4 * heads * D * tokens**2 / 2 / world.size
    finite = largest(world, *(float(not x.isfinite().all()) for x in kept))
    return {
        "part": "whole", "tokens": tokens, "heads": heads, "kv_heads": kv_heads, "scheme": told.scheme,
        "forward": forward, "backward": backward,
        "forward_tflops": flops / forward / 1e12, "both_tflops": 3.5 * flops / (forward + backward) / 1e12, "peak_bytes": int(peak),
        "explained_bytes": int(explained), "window_bytes": told.window_bytes, "finite": not any(finite),
    }  # fmt: skip


def windowed(world: World, length: int, window: int | None, layout: str, repeats: int, heads: int = 32) -> dict[str, Any]:
    """A window of so many keys before each query, None for all of them. A collective."""
    seq = distflash.SequenceParallel(layout=layout).sequence(length)
    q, k, v, dout = inputs(world, seq.local_length, heads, heads)
    size = (-1 if window is None else window, 0)
    forward = lambda: distflash.attention(q, k, v, seq, causal=True, window_size=size)  # noqa: E731
    both = lambda: torch.autograd.grad(forward(), (q, k, v), dout)  # noqa: E731
    told = distflash.explain(q.shape, k.shape, seq, causal=True, window_size=size, dtype=q.dtype)
    visits, busy = largest(world, told.visits, told.busy_visits)
    about = {"part": "window", "tokens": length, "heads": heads, "kv_heads": heads, "window": window}
    about |= {"layout": layout, "scheme": told.scheme}
    counts = {"visits": int(visits), "busy_visits": int(busy), "pairs_kept": kept_pairs(length, window)}
    return about | counts | {"forward": timed(world, forward, repeats), "both": timed(world, both, repeats)}


def kept_pairs(length: int, window: int | None) -> int:
    """Pairs of a query and a key that a causal mask with this window keeps, of all ranks."""
    reach = min(length, length if window is None else window + 1)
    return length * reach - reach * (reach - 1) // 2


def timed(world: World, run: Callable[[], object], repeats: int) -> float:
    """Seconds of a call. A collective."""
    return in_a_row(run, world.device, repeats, lambda: largest(world, 0.0), lambda mine: largest(world, mine)[0])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=("whole", "window"), default=["whole", "window"])
    parser.add_argument("--tokens", type=int, default=1 << 20, help="of the whole sequence")
    parser.add_argument("--length", type=int, default=131072, help="of the sequence that windows slide over")
    parser.add_argument("--windows", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args(arguments)
    world = distflash.init()
    rows: list[dict[str, Any]] = []

    def found(row: dict[str, Any]) -> None:
        rows.append(row)
        if world.is_main:
            Console(width=200).print(row)

    if "window" in asked.part:
        for layout in ("contiguous", "auto"):
            for window in (*asked.windows, None):
                found(windowed(world, asked.length, window, layout, asked.repeats))
    if "whole" in asked.part:
        whole(world, min(asked.tokens, 8192))  # compiles, and leaves nothing behind
        found(whole(world, asked.tokens))
    if world.is_main:
        write(f"long_{world.size}x{slug(world.device)}", rows, asked.out)


if __name__ == "__main__":
    main()
