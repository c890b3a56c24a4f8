"""`python -m benchmarks`: every benchmark that this machine can run, one after the other, then the figures in the docs."""

from __future__ import annotations

import subprocess
import sys

import torch


def main() -> int:
    """Run them; the exit code of the first that fails."""
    if not torch.cuda.is_available():
        print("the benchmarks need a CUDA GPU: this machine has none")
        return 1
    python = [sys.executable, "-m"]
    ranks = str(torch.cuda.device_count())
    programs = [
        [*python, "benchmarks.bench_portable"],
        *([[*python, "benchmarks.bench_kernel"]] if torch.cuda.get_device_capability() == (9, 0) else []),
        [*python, "distflash", "run", "-n", ranks, "-m", "benchmarks.bench_memory"],
        *([[*python, "distflash", "run", "-n", ranks, "-m", "benchmarks.bench_ring"]] if ranks != "1" else []),
        [*python, "benchmarks.bench_train"],
        *([*python, f"benchmarks.paper.{name}"] for name in ("attention", "memory", "hbm", "sparse", "context")),
        [*python, "benchmarks.figures"],
    ]
    return next((code for program in programs if (code := subprocess.run(program).returncode)), 0)


if __name__ == "__main__":
    raise SystemExit(main())
