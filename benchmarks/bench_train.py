"""Training with sequence parallelism on this machine's GPUs: a long sequence, and the loss curve beside one GPU's.

    python -m benchmarks.bench_train [--long 131072] [--short 32768] [--kernel NAME] [--out FOLDER]

--long 0 leaves the long run out.

The text is this Python's standard library as one document, so that attention spans the whole sequence.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.record import RESULTS, write


def text(folder: Path) -> Path:
    """One long document."""
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    path = folder / "stdlib.txt"
    path.write_text("\n".join(source.read_text(errors="replace") for source in sources))
    return path


def train(data: Path, folder: Path, ranks: int, length: int, dtype: str, steps: int, kernel: str) -> list[dict]:
    """The metrics of a run, a step each. One rank runs FSDP2 too, so that parameters are rounded alike."""
    out = folder / f"{ranks}x{length}{dtype}"
    options = ["--model", "small", "--data", str(data), "--batch", "1", "--seq-len", str(length), "--steps", str(steps), "--dtype", dtype]
    options += ["--checkpoint-every", "0", "--validate", "0", "--sample", "0", "--warmup", "5", "--kernel", kernel, "--out", str(out)]
    start = [sys.executable, "-m", "distflash", "run", "-n", str(ranks), "-m", "distflash", "train", *options]
    done = subprocess.run(start, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"training on {ranks} ranks failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def main() -> None:
    """Train, print and write the curves."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--long", type=int, default=131072)
    parser.add_argument("--short", type=int, default=32768)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--kernel", default="auto")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    ranks, rows = torch.cuda.device_count(), []
    table = Table("GPUs", "dtype", "tokens a sequence", "first loss", "last loss", "largest difference", "ms a step", "peak GB")
    runs = [
        (ranks, options.long, "bf16"),
        (ranks, options.short, "bf16"),
        (1, options.short, "bf16"),
        (ranks, 8192, "fp32"),
        (1, 8192, "fp32"),
    ]
    runs = [run for run in runs if run[1]]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = text(folder)
        curves = {}
        for gpus, length, dtype in runs:
            curves[gpus, length, dtype] = metrics = train(data, folder, gpus, length, dtype, options.steps, options.kernel)
            other = curves[ranks, length, dtype]
            apart = max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(metrics, other, strict=True))
            rows.append(
                {
                    "gpus": gpus,
                    "length": length,
                    "dtype": dtype,
                    "kernel": options.kernel,
                    "model": "small",
                    "metrics": metrics,
                    "difference": apart,
                }
            )
            middle = sorted(m["ms"] for m in metrics)[len(metrics) // 2]
            ends = f"{metrics[0]['loss']:.4f}", f"{metrics[-1]['loss']:.4f}", f"{apart:.1e}" if gpus < ranks else ""
            table.add_row(str(gpus), dtype, str(length), *ends, f"{middle:.0f}", f"{max(m['peak_memory_gb'] for m in metrics):.1f}")
    Console(width=110).print(table)
    write(f"train_{ranks}x{torch.cuda.get_device_name().split()[1].lower()}", rows, options.out)


if __name__ == "__main__":
    main()
