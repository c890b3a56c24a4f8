"""`python -m benchmarks`: every benchmark of docs/benchmarks.md that this machine can run, the paper's, and the figures in the docs."""

from __future__ import annotations

import subprocess
import sys

import torch


def programs(gpus: int, hopper: bool) -> list[list[str]]:
    """Commands in the order in which they run, for a machine with this many GPUs."""
    python = [sys.executable, "-m"]
    ranks = [*python, "distflash", "run", "-n", str(gpus), "-m"]
    across = [["ring", "--documents", "7"], ["model"], ["model", "--wire", "symmetric"], ["long"]] if gpus > 1 else []
    return [
        [*python, "benchmarks.bench_portable"],
        *([[*python, "benchmarks.bench_kernel"]] if hopper else []),
        [*ranks, "benchmarks.bench_memory"],
        *([*ranks, f"benchmarks.bench_{name}", *options] for name, *options in across),
        [*python, "benchmarks.bench_train"],
        *([*python, f"benchmarks.paper.{name}"] for name in ("attention", "memory", "hbm", "sparse", "context")),
        [*python, "benchmarks.figures"],
    ]


def main() -> int:
    """Run them; the exit code of the first that fails."""
    if not torch.cuda.is_available():
        print("the benchmarks need a CUDA GPU: this machine has none")
        return 1
    todo = programs(torch.cuda.device_count(), torch.cuda.get_device_capability() == (9, 0))
    return next((code for program in todo if (code := subprocess.run(program).returncode)), 0)


if __name__ == "__main__":
    raise SystemExit(main())
