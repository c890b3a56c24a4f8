"""Predicted beside measured: seconds of attention, forward and backward, by scheme, and what choosing by prediction would cost.

    distflash run -n 4 -m benchmarks.bench_model          P = 1, 2 and 4 in one run, each among the first P ranks
    distflash run -n 2 -m benchmarks.bench_model --wire symmetric       by copies between memories: model_2xh200_symmetric.json
    python -m benchmarks.bench_model --again FILE         what the model says now of the seconds that stand there

Causal, bf16 on GPUs and fp32 on CPUs, one document. A time is the median over repeats of the slowest rank's. For each cell of length and
heads, what "auto" stands for is measured too, and `regret` is how much longer it takes than the fastest one measured.
Legend: S global tokens, H query heads, Hk key/value heads, D head dim, P ranks.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

import distflash
from benchmarks.record import RESULTS, write
from benchmarks.timing import in_a_row
from distflash.cost import auto
from distflash.cost.choose import Candidate, judge
from distflash.cost.devices import Device, find, network
from distflash.cost.time import Cluster
from distflash.cost.traffic import PASSES, Scheme, Shape
from distflash.parallel.mask import Mask

LENGTHS = (16384, 32768, 65536, 131072)
HEADS = ((32, 32), (32, 8))
D = 128


def schemes(ranks: int) -> Iterator[Scheme]:
    """Ring, all-gather, Ulysses, and both together; the first is the usual one."""
    yield Scheme("zigzag", "ring", 1, ranks, ranks)
    if ranks > 1:
        yield Scheme("zigzag", "all_gather", 1, ranks, ranks)
        yield Scheme("zigzag", "ring", ranks, ranks, ranks)
    if ranks > 2:
        yield Scheme("zigzag", "ring", 2, ranks, ranks)


def measure(group: dist.ProcessGroup | None, scheme: Scheme, length: int, shape: Shape, repeats: int, wire: str) -> dict[str, float]:
    """Seconds by pass, of the slowest rank. A collective."""
    options: dict[str, Any] = {"layout": scheme.layout, "order": scheme.order, "ulysses": scheme.ulysses, "wire": wire}
    sp = distflash.SequenceParallel(group, **options) if group is not None else distflash.SequenceParallel.single()
    seq, device = sp.sequence(length), sp.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    heads = (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    q, k, v, dout = (torch.randn(1, seq.local_length, h, shape.head_dim, device=device, dtype=dtype) for h in heads)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def slowest(mine: float) -> float:
        slots = torch.zeros(sp.size, dtype=torch.float64, device=device)
        slots[sp.rank] = mine
        return float(sp.wire.all_reduce(slots).amax())

    out = distflash.attention(q, k, v, seq, causal=True)
    runs = (
        lambda: distflash.attention(q, k, v, seq, causal=True),
        lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True),
    )
    together = (lambda: dist.barrier(group)) if group is not None else (lambda: None)
    return {pass_: in_a_row(run, device, repeats, together, slowest) for pass_, run in zip(PASSES, runs, strict=True)}


def predict(device: Device, scheme: Scheme, length: int, shape: Shape, wire: str) -> Candidate:
    """What `distflash plan` says of it; NICs are not used on one host."""
    cu = (0, length)
    return judge(scheme, wire, cu, Mask(None, 0, cu), shape, Cluster(device, scheme.ranks, scheme.ranks, network(400)), ("layout", "order"))


def chosen(device: Device, ranks: int, length: int, shape: Shape, wire: str) -> Scheme:
    """What "auto" stands for."""
    usual = next(schemes(ranks))
    heads = shape.heads, shape.kv_heads, shape.head_dim
    layout, order, ulysses, _ = auto.choice(usual, ("layout", "order", "ulysses"), (0, length), heads, device, wire)
    return Scheme(layout, order, ulysses, ranks, ranks)


def rows_of(
    device: Device, group: dist.ProcessGroup | None, ranks: int, lengths: Sequence[int], heads: Sequence[tuple[int, int]], repeats: int,
    wire: str = "p2p",
) -> list[dict[str, Any]]:  # fmt: skip
    """Every scheme of every cell. A collective."""
    rows = []
    for length in lengths:
        for h, kv in heads:
            shape = Shape(h, kv, D, D, itemsize=device.itemsize)
            best = chosen(device, ranks, length, shape, wire)
            for scheme in dict.fromkeys([*schemes(ranks), best]):
                found, awaited = measure(group, scheme, length, shape, repeats, wire), predict(device, scheme, length, shape, wire)
                how = {"layout": scheme.layout, "order": scheme.order, "ulysses": scheme.ulysses, "wire": wire, "auto": scheme == best}
                about = {"ranks": ranks, "S": length, "H": h, "Hk": kv, **how}
                rows += [{**about, "pass": p, "seconds": found[p], "predicted": awaited.passes[p].seconds} for p in PASSES]
    return rows


def told_again(rows: list[dict[str, Any]], device: Device) -> list[dict[str, Any]]:
    """Measured rows with what is predicted and chosen now.

    Raises:
        ValueError: another scheme is chosen now than any that was measured.
    """
    found = []
    for (ranks, length, h, kv), cell in groupby(rows, key=_cell):
        shape, held = Shape(h, kv, D, D, itemsize=device.itemsize), list(cell)
        schemes_of = [Scheme(r["layout"], r["order"], r["ulysses"], ranks, ranks) for r in held]
        best = chosen(device, ranks, length, shape, held[0]["wire"])
        if best not in schemes_of:
            raise ValueError(f"{ranks} ranks, S={length}, H={h}/{kv}: {best} is chosen and was not measured: measure again")
        for r, scheme in zip(held, schemes_of, strict=True):
            seconds = predict(device, scheme, length, shape, r["wire"]).passes[r["pass"]].seconds
            found.append({**r, "auto": scheme == best, "predicted": seconds})
    return found


def _cell(row: dict[str, Any]) -> tuple[int, int, int, int]:
    return row["ranks"], row["S"], row["H"], row["Hk"]


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Relative errors of the predictions, and the largest regret of a choice by prediction."""
    errors = [abs(r["predicted"] / r["seconds"] - 1) for r in rows]
    regrets = []
    for _, cell in groupby(rows, key=_cell):
        took: dict[tuple[str, str, int, bool], float] = {}
        for r in cell:
            key = r["layout"], r["order"], r["ulysses"], r["auto"]
            took[key] = took.get(key, 0.0) + r["seconds"]
        regrets.append(next(seconds for (*_, auto), seconds in took.items() if auto) / min(took.values()) - 1)
    return {"median_error": median(errors), "worst_error": max(errors), "worst_regret": max(regrets)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="as `distflash plan --device` takes it; default: the one that is here")
    parser.add_argument("--wire", choices=("p2p", "symmetric"), default="p2p")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--again", type=Path, metavar="FILE", help="predict anew what a file holds, measure nothing")
    options = parser.parse_args()
    if options.again:
        held = json.loads(options.again.read_text())
        device = find(options.device or held["versions"]["device"])
        rows = told_again(held["rows"], device)
        options.again.write_text(json.dumps(held | {"basis": device.basis, **summary(rows), "rows": rows}, indent=1) + "\n")
        return
    world = distflash.init()
    name = torch.cuda.get_device_name() if world.device.type == "cuda" else "cpu"
    device, rows = find(options.device or name), []
    for ranks in (p for p in (1, 2, 4, 8) if p <= world.size):
        group = dist.new_group(list(range(ranks))) if world.size > 1 else None
        if world.rank < ranks:
            rows += rows_of(device, group if ranks > 1 else None, ranks, LENGTHS, HEADS, options.repeats, options.wire)
        if world.size > 1:
            dist.barrier()
    if world.is_main:
        table = Table("P", "S", "H", "layout", "order", "ulysses", "pass", "measured ms", "predicted ms", "error")
        for r in rows:
            cells = f"{1e3 * r['seconds']:.2f}", f"{1e3 * r['predicted']:.2f}", f"{r['predicted'] / r['seconds'] - 1:+.0%}"
            how = r["layout"], r["order"] + ", auto" * r["auto"], str(r["ulysses"]), r["pass"]
            table.add_row(str(r["ranks"]), str(r["S"]), f"{r['H']}/{r['Hk']}", *how, *cells)
        found = summary(rows)
        Console(width=120).print(table, found)
        write(f"model_{world.size}x{device.name.lower()}_{options.wire}", rows, options.out, basis=device.basis, **found)


if __name__ == "__main__":
    main()
