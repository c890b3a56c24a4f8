"""Longer context, better quality: the same model, bytes and steps at contexts of 1k to 32k (FlashAttention, tables 4 to 6).

    python -m benchmarks.paper.context                          writes results/paper_context.json and .png, four minutes
    distflash run -n 2 -m benchmarks.paper.context              the same with every sequence shared by two GPUs

A document is a module of sympy and, after it, the module's tests; those longer than the longest context are used, some are held out.

1. One byte-level language model is trained at the shortest context, on shorter documents too. All runs start from it and from its
   optimizer's state.
2. Each run trains it on for the same number of steps, over the same bytes in the same order: only how far back attention sees differs.
   The learning rate is constant in 1 and falls to zero in 2, at every context alike. How many steps there are follows from measured times.
3. Every held-out byte is predicted once, with the `context` / 2 to `context` bytes before it (fewer where a document begins). Loss: nats
   a byte of all, and by how many bytes of the document come before.
4. Classification: which part of sympy is a crop from? A linear classifier reads the mean of the run's last hidden states over the first
   `context` bytes of a crop that is as long as the longest context. Crops, classes (balanced) and regularisation are the same in all runs.

Legend: N tokens of a row, T local tokens, C model width, L bytes of the longest context.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import distflash
from benchmarks.paper.common import Bench, Rows, show
from benchmarks.paper.learner import Learner, Size
from benchmarks.paper.texts import CLASSES, crops, documents, parts_of, split, windows
from distflash.train.model import ModelConfig

FULL = Size(
    tuple(1024 << n for n in range(6)), ModelConfig(512, 4, 4, 2, 1408, vocab=256, rope_theta=500_000.0), 1.5e-3, 65536, (1024, 256),
    131072, (0, 1024, 4096, 16384, 32768),
)  # fmt: skip
QUICK = Size((64, 128), ModelConfig(32, 1, 2, 1, 64, vocab=256), 3e-3, 512, (16, 8), 512, (0, 64, 128), (4, 3), 2)


class Spent(Exception):
    """The budget is."""


def classify(train: Tensor, labels: Tensor, test: Tensor, answers: Tensor) -> int:
    """How many of the test features [crops, C] a linear classifier names right.

    Multinomial logistic regression on standardised features, 0.01 |W|² / 2 added to its loss.
    """
    mean, spread = train.mean(0), train.std(0) + 1e-6
    weight = torch.zeros(train.shape[1] + 1, CLASSES, dtype=torch.float64, requires_grad=True)
    inputs, tested = (F.pad((x - mean) / spread, (0, 1), value=1.0) for x in (train, test))
    optimizer = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(inputs @ weight, labels) + 0.005 * weight[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    return int(((tested @ weight).argmax(1) == answers).sum())


def wilson(right: int, of: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share, E. B. Wilson 1927."""
    share, n = right / of, of
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def paired(nats: np.ndarray, base: np.ndarray, bucket: int | None = None) -> dict[str, float]:
    """Loss minus that of `base` on the same bytes, nats a byte, and its standard error over documents; [documents, buckets, 2] each."""
    ours, theirs = (x.sum(1) if bucket is None else x[:, bucket] for x in (nats, base))
    away, count = ours[:, 0] - theirs[:, 0], ours[:, 1]
    mean = away.sum() / count.sum()
    n = max(2, int((count > 0).sum()))
    return {"mean": float(mean), "error": float(np.sqrt(n / (n - 1) * np.square(away - mean * count).sum()) / count.sum())}


def draw(rows: Rows, figure: Any) -> None:
    left, middle, right = figure.subplots(1, 3)
    x = [r["context"] for r in rows]
    left.plot(x, [r["loss"] for r in rows], marker="o")
    left.set(ylabel="nats a byte", title="held-out loss")
    for n, bucket in enumerate(rows[0]["buckets"]):
        middle.plot(x, [r["buckets"][n]["loss"] for r in rows], marker="o", label=f"from {bucket['from']:,}")
    middle.set(title="by bytes of the document before")
    middle.legend()
    bars = np.array([[r["accuracy"] - r["low"], r["high"] - r["accuracy"]] for r in rows]).T
    right.errorbar(x, [r["accuracy"] for r in rows], yerr=bars, marker="o", capsize=3)
    right.axhline(1 / CLASSES, linestyle=":", color="gray")
    right.set(title="accuracy: which part a text is from")
    for axes in (left, middle, right):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("context, tokens")


def run(bench: Bench, size: Size, world: Any, say: Callable[[str], None]) -> None:
    """All phases; writes what it has when the budget is spent."""
    longest, shortest = max(size.contexts), min(size.contexts)
    shares = split(documents())
    parts = parts_of(shares, longest)
    train, common = ([text for _, text in shares[0] if len(text) > least] for least in (longest, shortest))
    held = [text[: size.most] for _, text in shares[1] if len(text) > longest][: size.held]
    classes = [torch.arange(count) % CLASSES for count in size.crops]
    asked = [crops([one[n] for one in parts.values()], classes[n].tolist(), longest, (2, n)) for n in (0, 1)]
    learner = Learner(size, world, bench.dtype)
    spent: dict[str, float] = {}
    steps, rows, sums = (0, 0), [], {}

    def alive() -> None:
        if learner.agreed(bench.left) < 0:
            raise Spent

    def learn(count: int, context: int, draw_at: Callable[[int], Tensor], rate: Callable[[int], float]) -> float:
        last = []
        for n in range(count):
            last.append(learner.step(draw_at(n), context, rate(n)))
            if n % 8 == 0:
                alive()
        return float(np.mean(last[-10:]))

    def rehearse(context: int) -> float:
        """Seconds a step; the first compile kernels."""
        times = []
        for n in range(2 if size.steps else 7):
            begin = time.perf_counter()
            learner.step(crops(train, size.row // longest, longest, (3, n)), context, 0.0)  # waits for the loss
            times.append(time.perf_counter() - begin)
        alive()
        return learner.agreed(float(np.median(times[len(times) // 2 :])))

    def tested(context: int) -> float:
        """Steps that the tests of a run are worth; a pass without a backward takes less than half a step."""
        return 0.5 * (sum(len(windows(len(text), context)) for text in held) + sum(size.crops)) * context / size.row + 4

    try:
        fresh = learner.state()
        seconds = {context: rehearse(context) for context in reversed(size.contexts)}
        learner.restore(fresh)
        spent["rehearsal"] = bench.budget - bench.left
        told = ", ".join(f"{1e3 * s:.0f} at {c}" for c, s in seconds.items())
        say(f"{len(train)} documents, {len(held)} held out of {sum(map(len, held)):,} bytes; ms a step: {told}")

        def room(a_step: float) -> int:
            """Steps of each run that there is time for, `a_step` seconds for one of each."""
            rest = learner.agreed(bench.left) - sum(s * tested(c) for c, s in seconds.items()) - 2 * len(seconds) - 3
            return max(20, int(0.93 * rest / a_step))

        each, begin = sum(seconds.values()), bench.left
        n = room(each + size.before * seconds[shortest])
        steps = size.steps or (size.before * n, n)
        loss = learn(
            steps[0], shortest, lambda n: crops(common, size.row // shortest, shortest, (0, n)),
            lambda n: size.rate * min(1.0, (n + 1) / (0.03 * steps[0] + 1)),
        )  # fmt: skip
        spent["common"] = begin - bench.left
        steps = size.steps or (steps[0], min(2 * n, room(each)))
        say(f"{steps[0]} steps at {shortest}: {loss:.4f} nats a byte; then {steps[1]} at each context")
        start = learner.state()
        inward = [c for pair in zip(size.contexts, reversed(size.contexts), strict=True) for c in pair][: len(size.contexts)]
        for context in inward:  # 1k, 32k, 2k, 16k, ...: what the budget has no room for is the least telling
            begin = bench.left
            learner.restore(start)
            last = learn(
                steps[1], context, lambda n: crops(train, size.row // longest, longest, (1, n)),
                lambda n: size.rate * min(1.0, (n + 1) / 10) * (1 - n / steps[1]),
            )  # fmt: skip
            trained = bench.left
            sums[context] = learner.held_out(held, context, alive)
            right = classify(*(x for k in (0, 1) for x in (learner.features(asked[k], context, alive), classes[k])))
            low, high = wilson(right, len(classes[1]))
            nats, counted = sums[context].sum((0, 1))
            accuracy = right / len(classes[1])
            rows.append({
                "context": context, "loss": nats / counted, "bytes": int(counted), "accuracy": accuracy, "low": low, "high": high,
                "training_loss": last, "steps": sum(steps), "own_steps": steps[1], "tokens": sum(steps) * size.row,
                "buckets": [
                    {"from": edge, "loss": one[0] / max(1, one[1]), "bytes": int(one[1])}
                    for edge, one in zip(size.edges, sums[context].sum(0).tolist(), strict=True)
                ],
                "above_shortest": paired(sums[context], sums[shortest]),
                "above_shortest_far": paired(sums[context], sums[shortest], len(size.edges) - 1),
                "seconds": {"training": begin - trained, "tests": trained - bench.left},
            })  # fmt: skip
            say(f"context {context}: {nats / counted:.4f} nats a byte, {right} of {len(classes[1])} crops named right")
    except Spent:
        say("the budget is spent")
    rows.sort(key=lambda row: row["context"])
    if world.is_main:
        head = ("context", "nats a byte", *(f"from {edge:,}" for edge in size.edges), "accuracy")
        lines = [
            [f"{r['context']:,}", f"{r['loss']:.4f}", *(f"{b['loss']:.4f}" for b in r["buckets"]), f"{r['accuracy']:.1%}"] for r in rows
        ]
        show("held-out documents", head, lines)
        parameters = sum(p.numel() for p in learner.model.parameters())
        bench.finish(
            rows, draw, (15, 4.2), model=asdict(size.model), parameters=parameters, parts=list(parts), gpus=world.size, chance=1 / CLASSES,
            seed=0, rate=size.rate, tokens_a_step=size.row, steps={"common": steps[0], "own": steps[1]}, crops=size.crops, phases=spent,
            budget=bench.budget, complete=len(rows) == len(size.contexts),
            documents={"common": len(common), "own": len(train), "held_out": len(held)},
            bytes={"common": sum(map(len, common)), "own": sum(map(len, train)), "held_out": sum(map(len, held))},
        )  # fmt: skip


def main() -> None:
    bench, world = Bench("context", __doc__, 240), distflash.init()
    run(bench, QUICK if bench.quick else FULL, world, bench.say if world.is_main else lambda _: None)


if __name__ == "__main__":
    main()
