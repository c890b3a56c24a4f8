"""What the programs of benchmarks/paper share: standard attention, a clock, a budget, errors as results, figures.

Legend: B batch, N tokens, H heads, D head dim.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import quantiles
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

import distflash
from benchmarks.record import RESULTS, write
from distflash.launch.measure import seconds

Rows = list[dict[str, Any]]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
OURS, STANDARD = "distflash", "standard"


class Bench:
    """One program's options, device and clock. Not --quick, it ends the process where there is no GPU."""

    def __init__(self, name: str, about: str | None, budget: float):
        parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--quick", action="store_true", help="tiny sizes, on a CPU too: shows that it runs, measures nothing")
        parser.add_argument("--budget", type=float, default=budget, help="seconds, after which it writes what it has")
        parser.add_argument("--out", type=Path, help="default: benchmarks/results, a temporary folder if --quick")
        options = parser.parse_args()
        self.quick: bool = options.quick
        self.out: Path = options.out or (Path(tempfile.mkdtemp()) if self.quick else RESULTS)
        self.name = f"paper_{name}" + "_quick" * self.quick
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if not self.quick and self.device.type == "cpu":
            sys.exit("this needs a CUDA GPU: --quick runs on a CPU")
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.budget, self.begin = options.budget, time.monotonic()

    @property
    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.begin + self.budget - time.monotonic()

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.begin:6.1f} s  {text}", flush=True)

    def attempt(self, do: Callable[[], Any]) -> tuple[Any, str | None]:
        """(what it gives, None) or (None, "out of memory")."""
        try:
            return do(), None
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
                raise
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return None, "out of memory"

    def milliseconds(self, run: Callable[[], object], most: int = 30, worth: float = 0.5) -> dict[str, float]:
        """Median, 20th and 80th percentile of single calls, about `worth` seconds of them, after two that do not count."""
        once = [seconds(run, self.device) for _ in range(2)][-1]
        times = max(2, min(3 if self.quick else most, int(worth / once)))
        if self.device.type == "cuda":
            events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(times)]
            for start, end in events:
                start.record()
                run()
                end.record()
            torch.cuda.synchronize()
            found = [start.elapsed_time(end) for start, end in events]
        else:
            found = [1e3 * seconds(run, self.device) for _ in range(times)]
        low, *_, high = quantiles(found, n=5)
        return {"ms": float(np.median(found)), "low": low, "high": high, "calls": times}

    def captured(self, run: Callable[[], object], worth: float) -> float:
        """Median milliseconds of `run` replayed as a CUDA graph, which the host does not slow down; it has run before."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return self.milliseconds(graph.replay, worth=worth)["ms"]

    def inputs(self, batch: int, tokens: int, heads: int, dim: int, heads_first: bool) -> tuple[list[Tensor], Tensor]:
        """([q, k, v], dout), normal, contiguous as the contender wants them; q, k, v require gradients."""
        shape = (batch, heads, tokens, dim) if heads_first else (batch, tokens, heads, dim)
        *leaves, dout = (torch.randn(shape, device=self.device, dtype=self.dtype) for _ in range(4))
        return [x.requires_grad_() for x in leaves], dout

    def finish(self, rows: Rows, draw: Callable[[Rows, Any], None], size: tuple[float, float] = (11, 4.2), **about: Any) -> None:
        """Write JSON, and PNG if there are rows; `draw(rows, figure)`."""
        from matplotlib.figure import Figure

        path = write(self.name, rows, self.out, quick=self.quick, seconds=round(time.monotonic() - self.begin, 1), **about)
        if rows:
            figure = Figure(figsize=size, layout="constrained")
            draw(rows, figure)
            figure.savefig(path.with_suffix(".png"), dpi=120)
        self.say(f"wrote {path}{' and .png' * bool(rows)}")


def standard(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, dropout_p: float = 0.0) -> Tensor:
    """Attention as five operators of PyTorch, [B, H, N, D]: matmul, mask, softmax, dropout, matmul. bias: [N, N], 0 or -inf, is added."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # [B, H, N, N]
    if bias is not None:
        scores = scores + bias
    weights = scores.softmax(-1)
    return (F.dropout(weights, dropout_p) if dropout_p else weights) @ v


def contender(name: str, bench: Bench, tokens: int, causal: bool, dropout_p: float = 0.0) -> tuple[Attend, bool]:
    """(what attends, whether it wants heads before tokens). The mask of standard attention is made here, in the inputs' dtype."""
    if name == OURS:
        ours: Any = partial(distflash.attention, causal=causal, dropout_p=dropout_p)
        return ours, False
    bias = torch.full((tokens, tokens), -torch.inf, dtype=bench.dtype, device=bench.device).triu_(1) if causal else None
    return partial(standard, bias=bias, dropout_p=dropout_p), True


def both(attend: Attend, leaves: Sequence[Tensor], dout: Tensor) -> tuple[Tensor, ...]:
    """Forward and backward."""
    return torch.autograd.grad(attend(*leaves), list(leaves), dout)  # type: ignore[call-arg]


def linear_fit(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """y = intercept + slope x by least squares, and R², the share of the variance that it explains."""
    slope, intercept = np.polyfit(x, y, 1)
    away = np.asarray(y) - (intercept + slope * np.asarray(x))
    spread = np.asarray(y) - np.mean(y)
    return {"slope": float(slope), "intercept": float(intercept), "r2": float(1 - (away @ away) / (spread @ spread))}


def show(title: str, head: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    table = Table(*head, title=title)
    for line in lines:
        table.add_row(*line)
    Console(width=130).print(table)
