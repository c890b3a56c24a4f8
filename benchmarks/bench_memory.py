"""Peak memory of attention, forward and backward, at the same number of tokens a GPU and P ranks.

    distflash run -n 4 -m benchmarks.bench_memory          P = 1, 2 and 4 in one run, each among the first P ranks

A ring holds two K/V blocks at a time, whatever P is, and the fp32 gradients of two; besides that only the running out and dq are
wider than on one GPU. `expected` is that sum; the plan's integers and the kernel's small tables are not in it.

Legend: B batch, T local tokens, H query heads, Hk key/value heads, D head dim, P ranks.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

import distflash
from benchmarks.record import RESULTS, write

B, D = 1, 128


def expected(tokens: int, heads: int, kv_heads: int, ranks: int) -> tuple[int, int]:
    """(forward, backward) bytes above the inputs q, k, v, dout (bf16) at the two peaks."""
    q, kv, rows = B * tokens * heads * D, 2 * B * tokens * kv_heads * D, B * tokens * heads
    out, lse, lse2 = 2 * q, 4 * rows, 4 * rows  # lse2 is the backward's copy of lse in base 2
    if ranks == 1:
        return out + lse, out + lse + lse2 + 4 * rows + 2 * q + 2 * kv  # delta, dq, dk and dv, the last three in bf16
    block = 2 * kv  # K and V in bf16
    running = 4 * q + lse  # out and lse in fp32
    forward = max(2 * block + running, block + running + out)  # while two blocks are alive; in the last visit, which stores out
    grads = 3 * 4 * kv  # dk, dv of this visit and two messages of them, in fp32
    held = out + lse + lse2 + 4 * rows + 4 * q + grads  # 4 q: dq in fp32
    return forward, max(held + 2 * block, held + block + 2 * q)  # again two blocks, or the last visit's dq in bf16


def measure(group: dist.ProcessGroup | None, tokens: int, heads: int, kv_heads: int, ranks: int) -> dict[str, int]:
    """Bytes above the inputs at the peak of the forward and of the backward, of this rank."""
    scheme: dict[str, Any] = {"layout": "zigzag", "order": "ring", "wire": "p2p"}  # what `expected` is of
    sp = distflash.SequenceParallel(group, **scheme) if group is not None else distflash.SequenceParallel.single()
    seq = sp.sequence(tokens * ranks)
    q, dout = (torch.randn(B, tokens, heads, D, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    k, v = (torch.randn(B, tokens, kv_heads, D, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for x in (q, k, v):
        x.requires_grad_()
    peaks = {}
    for _ in range(2):  # the first round compiles kernels and makes tables
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        out = distflash.attention(q, k, v, seq, causal=True)
        torch.cuda.synchronize()
        peaks["forward"] = torch.cuda.max_memory_allocated() - start
        torch.cuda.reset_peak_memory_stats()
        grads = torch.autograd.grad(out, (q, k, v), dout)
        torch.cuda.synchronize()
        peaks["backward"] = torch.cuda.max_memory_allocated() - start
        del out, grads
    return peaks


def main() -> None:
    """Measure, print a table and write JSON on rank 0."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=32768, help="a GPU")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    world = distflash.init()
    rows = []
    for heads, kv_heads in ((32, 32), (32, 8)):
        for ranks in (p for p in (1, 2, 4, 8) if p <= world.size):
            group = dist.new_group(list(range(ranks))) if world.size > 1 else None
            if world.rank < ranks:
                peaks = measure(group if ranks > 1 else None, options.tokens, heads, kv_heads, ranks)
                awaited = dict(zip(("forward", "backward"), expected(options.tokens, heads, kv_heads, ranks), strict=True))
                rows += [
                    {"heads": heads, "kv_heads": kv_heads, "ranks": ranks, "pass": name, "tokens_a_gpu": options.tokens,
                     "bytes": peaks[name], "expected": awaited[name]}
                    for name in peaks
                ]  # fmt: skip
            if world.size > 1:
                dist.barrier()
    if world.is_main:
        table = Table("heads", "P", "pass", "peak MiB", "expected MiB", "ratio")
        for r in rows:
            figures = f"{r['bytes'] / 2**20:.0f}", f"{r['expected'] / 2**20:.0f}", f"{r['bytes'] / r['expected']:.3f}"
            table.add_row(f"{r['heads']}/{r['kv_heads']}", str(r["ranks"]), r["pass"], *figures)
        Console(width=100).print(table)
        write("memory", rows, options.out)


if __name__ == "__main__":
    main()
