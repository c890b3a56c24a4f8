"""`distflash bench ring`: attention across ranks beside what one GPU does with one rank's share as a dense block.

    distflash run -n 4 -m distflash bench ring --lengths 32768,131072

Causal, one sequence. Rates are TFLOP/s a GPU, 4 B H S² D / 2 forward and 2.5 times that backward, over the slowest rank's time.
Legend: B batch, S global tokens, H query heads, Hk key/value heads, D head dim, P ranks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distflash.launch.early import check_scheme
from distflash.launch.measure import seconds

if TYPE_CHECKING:
    import torch

    from distflash.launch.world import World

LEAST = 0.15  # seconds that are timed at once: calls follow each other, as layers do, so that the host can be ahead
SHARES = {"forward": 1.0, "both": 3.5}  # FLOPs over the forward's


@dataclass(frozen=True)
class Cell:
    """One problem, the same for all that are compared."""

    length: int
    heads: int
    kv_heads: int
    head_dim: int = 128
    documents: tuple[int, ...] | None = None  # borders of packed documents

    def flops(self, ranks: int) -> float:
        """Of the forward, a rank."""
        borders = self.documents or (0, self.length)
        pairs = sum((b - a) ** 2 for a, b in pairwise(borders)) / 2
        return 4 * self.heads * pairs * self.head_dim / ranks

    def __str__(self) -> str:
        kind = f", {len(self.documents) - 1} documents" if self.documents else ""
        return f"S={self.length} H={self.heads}/{self.kv_heads} D={self.head_dim}{kind}"


@dataclass(frozen=True)
class Found:
    """Rates of one way to compute a cell, TFLOP/s a GPU: medians, the lowest and the highest."""

    how: str
    cell: str
    forward: tuple[float, float, float]
    both: tuple[float, float, float]


def rates(world: World, cell: Cell, how: str, forward: Callable[[], Any], leaves: Sequence[torch.Tensor], repeats: int) -> Found:
    """Time `forward`, whose gradient goes to `leaves`; the slowest rank's time counts. A collective."""
    import torch

    dout = torch.randn_like(forward())

    def quiet() -> None:
        with torch.no_grad():
            forward()

    def both() -> None:
        torch.autograd.grad(forward(), leaves, dout)

    found: dict[str, tuple[float, float, float]] = {}
    for (name, share), run in zip(SHARES.items(), (quiet, both), strict=True):
        times, calls = [], 1
        for n in range(repeats + 2):  # two to warm up
            _together(world)
            took = _slowest(world, seconds(lambda: [run() for _ in range(calls)], world.device)) / calls  # noqa: B023  run at once
            if n >= 2:
                times.append(took)
            else:
                calls = max(1, min(20, round(LEAST / took)))
        tflops = [share * cell.flops(world.size) / t / 1e12 for t in times]
        found[name] = median(tflops), min(tflops), max(tflops)
    return Found(how, str(cell), found["forward"], found["both"])


def ours(world: World, cell: Cell, repeats: int, **scheme: Any) -> Found:
    """DistFlash, under a scheme as `SequenceParallel` takes it. A collective."""
    import distflash

    sp = distflash.SequenceParallel(**scheme)
    seq = sp.sequence(cell.length) if cell.documents is None else sp.sequence(cu_seqlens=cell.documents)
    q, k, v = leaves = _inputs(world, seq.local_length, cell)
    how = f"{sp.layout}, {sp.order}{f', ulysses {sp.ulysses}' if sp.ulysses > 1 else ''}, {sp.wire_name}"
    return rates(world, cell, how, lambda: distflash.attention(q, k, v, seq, causal=True), leaves, repeats)


def bound(world: World, cell: Cell, repeats: int) -> Found:
    """The same kernel with a rank's share as one dense block: S / P queries and S / 2 keys, no mask, no communication."""
    import distflash

    q, k, v = leaves = _inputs(world, cell.length // world.size, cell, cell.length // 2)
    return rates(world, cell, "bound: a dense block", lambda: distflash.attention(q, k, v), leaves, repeats)


def _inputs(world: World, tokens: int, cell: Cell, k_tokens: int | None = None) -> list[torch.Tensor]:
    import torch

    dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    shapes = ((tokens, cell.heads), (k_tokens or tokens, cell.kv_heads), (k_tokens or tokens, cell.kv_heads))
    return [torch.randn(1, t, h, cell.head_dim, device=world.device, dtype=dtype, requires_grad=True) for t, h in shapes]


def _together(world: World) -> None:
    import torch.distributed as dist

    if world.size > 1:
        dist.barrier()


def _slowest(world: World, took: float) -> float:
    import torch
    import torch.distributed as dist

    if world.size == 1:
        return took
    slowest = torch.tensor([took], dtype=torch.float64, device=world.device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return slowest.item()


def bench(
    what: Annotated[str, typer.Argument(help="What to time: ring.")],
    lengths: Annotated[str, typer.Option(help="Global tokens, with commas between.")] = "16384,32768,65536,131072",
    heads: Annotated[str, typer.Option(help="Query heads / key and value heads, with commas between.")] = "32/32,32/8",
    wires: Annotated[str, typer.Option(help="What moves blocks, with commas between.")] = "auto,p2p",
    orders: Annotated[str, typer.Option(help="When blocks move, with commas between.")] = "auto",
    repeats: Annotated[int, typer.Option(min=1)] = 10,
    trace: Annotated[Path | None, typer.Option(help="Write a Chrome trace of one step of each, a file a rank, into this folder.")] = None,
) -> None:
    """Time attention across the ranks that were started, beside the bound of one GPU."""
    if what != "ring":
        raise typer.BadParameter(f"{what!r} is not known: ring is what can be timed")
    from rich.console import Console
    from rich.table import Table

    import distflash

    cells = _cells(lengths, heads)
    try:
        for wire in wires.split(","):
            for order in orders.split(","):
                check_scheme(wire=wire, order=order)
        if trace is not None:
            trace.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from None
    world = distflash.init()
    table = Table(title=f"TFLOP/s a GPU on causal FLOPs, {world.size} ranks: median (lowest to highest)")
    for title in ("problem", "scheme", "forward", "of the bound", "forward and backward", "of the bound"):
        table.add_column(title)
    for cell in cells:
        if cell.length < 2 * world.size:
            raise typer.BadParameter(f"--lengths must be at least 2 tokens a rank, {2 * world.size}, got {cell.length}")
    for cell in cells:
        best = bound(world, cell, repeats)
        found = [ours(world, cell, repeats, wire=wire, order=order) for wire in wires.split(",") for order in orders.split(",")]
        for one in [best, *found]:
            table.add_row(*_row(one, best))
        if trace is not None:
            for wire in wires.split(","):
                for order in orders.split(","):
                    _traced(world, trace, cell, wire=wire, order=order)
    if world.is_main:
        Console(width=None if Console().is_terminal else 160).print(table)


def _cells(lengths: str, heads: str) -> list[Cell]:
    """Every length with every pair of heads."""
    if not all(re.fullmatch("[0-9]{1,12}", word) and int(word) for word in lengths.split(",")):
        raise typer.BadParameter(f"--lengths must be positive integers with commas between, as in 4096,8192, got {lengths!r}")
    if not all(re.fullmatch("[0-9]{1,5}/[0-9]{1,5}", pair) for pair in heads.split(",")):
        raise typer.BadParameter(f"--heads must be query heads / key and value heads, with commas between, as in 32/32,32/8, got {heads!r}")
    pairs = [tuple(map(int, pair.split("/"))) for pair in heads.split(",")]
    for query, kv in pairs:
        if not kv or not query or query % kv:
            raise typer.BadParameter(f"--heads: query heads must be a multiple of key and value heads, got {query}/{kv}")
    return [Cell(int(word), query, kv) for word in lengths.split(",") for query, kv in pairs]


def _row(one: Found, best: Found) -> list[str]:
    row = [one.cell, one.how]
    for name in SHARES:
        mid, low, high = getattr(one, name)
        row += [f"{_rate(mid)} ({_rate(low)} to {_rate(high)})", f"{mid / getattr(best, name)[0]:.1%}"]
    return row


def _rate(tflops: float) -> str:
    """Three digits at least: a CPU's rates are below 1."""
    return f"{tflops:.0f}" if tflops >= 100 else f"{tflops:.3g}"


def _traced(world: World, folder: Path, cell: Cell, **scheme: Any) -> None:
    """One forward and backward under torch's profiler: what each stream did, when."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    import distflash

    seq = distflash.SequenceParallel(**scheme).sequence(cell.length)
    q, k, v = leaves = _inputs(world, seq.local_length, cell)

    def step() -> None:
        out: Any = distflash.attention(q, k, v, seq, causal=True)
        torch.autograd.grad(out, leaves, torch.ones_like(out))

    step()
    _together(world)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        step()
        if world.device.type == "cuda":
            torch.cuda.synchronize()
    name = f"S{cell.length}_H{cell.heads}_{cell.kv_heads}_{'_'.join(scheme.values())}_rank{world.rank}.json"
    found.export_chrome_trace(str(folder / name))


def as_rows(found: Sequence[Found], best: Found) -> list[dict[str, Any]]:
    """For JSON: each with its share of the bound."""
    return [asdict(one) | {f"{name}_share": getattr(one, name)[0] / getattr(best, name)[0] for name in SHARES} for one in found]
