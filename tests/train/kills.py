"""Ranks that are killed while they save a checkpoint, over and over: what tests/train/test_kills.py stands on.

`python -m tests.train.kills --count 200 [--ranks 2] [--seed 0] [--record]` trains, with a checkpoint at every step, and sends SIGKILL to a
random rank at a random moment of a random save. Each time it lays what is on the disk beside what an undisturbed run has written there,
and resumes; at the end of a job it compares the loss curves. `--record` writes what came of it to benchmarks/results.
"""

import argparse
import dataclasses
import os
import random
import signal
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from distflash.launch import world
from distflash.train import checkpoint as ckpt
from distflash.train.config import TrainConfig
from distflash.train.loop import run
from distflash.train.model import MODELS, ModelConfig
from distflash.train.report import read_metrics
from tests.launch.faults import Ended, launch

STEPS = 24
SMALL = ModelConfig(dim=32, layers=2, heads=4, kv_heads=2, hidden=48)
CURVE = ("step", "loss", "grad_norm", "lr", "windows")


class Strike(NamedTuple):
    """SIGKILL for a rank, so many seconds after its n-th save began."""

    victim: int
    save: int
    seconds: float


def job(folder: Path, steps: int, shard: bool) -> TrainConfig:
    """A run of small steps in folder/run, each with a checkpoint."""
    text = folder / "text"
    text.mkdir(parents=True)
    (text / "text.txt").write_text("".join(f"line {n} of a text that is learned by heart\n" for n in range(200)))
    about = {"seq_len": 48, "batch": 2, "warmup": 2, "lr": 3e-3, "checkpoint_every": 1, "compare_steps": 0, "validate": 0, "sample": 0}
    return TrainConfig(out=str(folder / "run"), model="small for kills", data=(str(text),), steps=steps, shard=shard, **about)


def start(config: TrainConfig, ranks: int, strike: Strike | None, **patch: Any) -> list[Ended]:
    """Train in forked ranks until the end or the strike; how each rank ended. `patch` are names of checkpoint.py."""
    with tempfile.TemporaryDirectory() as folder:
        return launch(Path(folder), partial(_rank, config=config, strike=strike, patch=patch), limit=0.0, ranks=ranks, deadline=120.0)


def _rank(rank: int, config: TrainConfig, strike: Strike | None, patch: dict[str, Any]) -> None:
    MODELS.setdefault(config.model, SMALL)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    save, count, spent = ckpt.save, 0, []

    def struck(*args: Any, **more: Any) -> None:
        nonlocal count
        count += 1
        if strike and (rank, count) == strike[:2]:
            kill_soon(strike.seconds)
        begin = time.monotonic()
        save(*args, **more)
        spent.append(time.monotonic() - begin)

    for name, value in (patch | {"save": struck}).items():
        setattr(ckpt, name, value)
    assert run(config, world.init()) == 0
    if rank == 0 and spent:
        Path(config.out, "save_seconds").write_text(str(min(spent)))


def kill_soon(seconds: float) -> None:
    """Have another process kill this one, wherever it then is."""
    victim = os.getpid()
    if os.fork() == 0:
        time.sleep(seconds)
        if os.getppid() == victim:
            os.kill(victim, signal.SIGKILL)
        os._exit(0)


def curve(config: TrainConfig) -> list[tuple]:
    """What each step was: of a resumed run the same as of one that was never disturbed."""
    return [tuple(row[name] for name in CURVE) for row in read_metrics(Path(config.out) / "metrics.jsonl")]


class Truth:
    """An undisturbed run of which every checkpoint is kept."""

    def __init__(self, folder: Path, steps: int, ranks: int, shard: bool):
        self.config = job(folder, steps, shard)
        ended = start(self.config, ranks, None, KEEP=10**9)
        assert [end.code for end in ended] == [0] * ranks, ended
        self.curve = curve(self.config)
        self.save_seconds = float(Path(self.config.out, "save_seconds").read_text())

    def found(self, config: TrainConfig) -> int:
        """The step of the newest checkpoint that a struck run has left, 0 for none; AssertionError unless all are the true ones."""
        root, steps = Path(config.out), [0]
        assert not [*root.glob("damaged-*")], "a damaged checkpoint was published"
        for path in root.glob("step-*"):
            assert ckpt.verify(path) is None, f"{path.name}: {ckpt.verify(path)}"
            for file in ("model.safetensors", "optimizer.safetensors"):
                assert (path / file).read_bytes() == Path(self.config.out, path.name, file).read_bytes(), f"{path.name}/{file}"
            steps.append(int(path.name.removeprefix("step-")))
        known = [row["step"] for row in read_metrics(root / "metrics.jsonl")]
        assert max(steps) >= max(known, default=1) - 1, "a checkpoint whose save had returned is gone"
        return max(steps)


def strikes(folder: Path, count: int, ranks: int, shard: bool, draw: random.Random, steps: int = STEPS) -> dict[str, Any]:
    """Kill `count` times, in as many jobs as that takes; how each kill left the disk. AssertionError if anything was lost."""
    truth = Truth(folder / "truth", steps, ranks, shard)
    left, jobs, victims = Counter[str](), 0, Counter[str]()
    while left.total() < count:
        config, jobs, done = job(folder / f"job{jobs}", steps, shard), jobs + 1, False
        while not done:
            at, save = truth.found(config), draw.randint(1, 3)
            strike = Strike(draw.randrange(ranks), save, truth.save_seconds * 2 ** draw.uniform(-4, 1.5))  # as saves take 1 to 3 times that
            ended = start(config, ranks, strike if left.total() < count and at + save <= steps else None)
            done = all(end.code == 0 for end in ended)
            if not done:
                assert ended[strike.victim].code == -signal.SIGKILL, [end.said for end in ended]
                left[_left(Path(config.out), at + save)] += 1
                victims["rank 0, which writes" if strike.victim == 0 else "another rank"] += 1
            config = dataclasses.replace(config, resume=True)
        assert truth.found(config) == steps and curve(config) == truth.curve, "the loss curve is another one"
    about = {"sharded": shard, "ranks": ranks, "kills": left.total(), "jobs": jobs, "steps": steps}
    return about | {"save_ms": round(1e3 * truth.save_seconds, 1), "left": dict(left), "victims": dict(victims)}


def _left(root: Path, step: int) -> str:
    """What the disk holds of the save that was struck."""
    if (root / ckpt.folder_name(step)).exists():
        return "the new checkpoint"
    if not (hidden := root / f".tmp-{ckpt.folder_name(step)}").exists():
        return "nothing of it yet"
    return "a hidden folder, all files written" if (hidden / "manifest.json").exists() else "a hidden folder, files missing or cut short"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=50, help="kills, half of them with sharded parameters")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true")
    asked = parser.parse_args()
    rows = []
    for shard in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(strikes(Path(folder), asked.count // 2, asked.ranks, shard, random.Random(f"{asked.seed} {shard}")))
        print(f"seed {asked.seed}: {rows[-1]}", flush=True)
    if asked.record:
        from benchmarks.record import write

        write("kills", rows, seed=asked.seed)


if __name__ == "__main__":
    main()
