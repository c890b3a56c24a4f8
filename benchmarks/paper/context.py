"""Longer context, better quality: the same model and budget on long documents, at contexts of 1k to 32k (FlashAttention, tables 4 to 6).

    python -m benchmarks.paper.context                          writes results/paper_context.json and .png, four minutes
    distflash run -n 4 -m benchmarks.paper.context              the same with every sequence shared by four GPUs

Language model: `distflash train`'s model over the long documents of its default text (sympy's sources). In each run documents are cut to
the context; all runs see as many tokens a step and take as many steps. Loss: nats a byte over the same held-out documents. The number
of steps is what the budget has room for, by the time of some steps at the longest context.

Classification: the trained model then learns to tell which part of sympy a text comes from: crops of the longest context, cut to the
run's, end with one token that names the part, and only that one counts. Crops, steps and order are the same in all runs; held-out
documents are tested. One part is guessed right by chance once in as many as there are. Legend: N tokens of a crop.
"""

from __future__ import annotations

import tempfile
import time
from importlib.metadata import distribution
from itertools import accumulate as accumulated
from pathlib import Path
from typing import Any

import numpy as np
import torch

import distflash
from benchmarks.paper.common import Bench, Rows, show
from distflash.train.config import TrainConfig
from distflash.train.data import BOS, DEFAULT_TEXT, IGNORE, Batch, Corpus, Windows
from distflash.train.loop import Trainer, accumulate, batch_loss
from distflash.train.optimize import clip_gradients, set_learning_rate

CONTEXTS = tuple(1024 << n for n in range(6))  # 1k ... 32k
CLASSES, CROPS, HELD_OUT = 8, 8, 0.15  # parts of the text; crops a step; share of the bytes that is held out
TRAINING, TELLING = 0.6, 0.2  # shares of the budget: the language model, the classification
Parts = dict[str, tuple[bytes, bytes]]  # name -> (training text, held-out text)


def texts(least: int) -> tuple[list[bytes], list[bytes], Parts]:
    """Documents of at least `least` bytes: (training, held-out), and all documents of the largest parts in the same two shares."""
    files = [f for f in distribution(DEFAULT_TEXT).files or [] if f.suffix == ".py" and not {"tests", "benchmarks"} & set(f.parts)]
    documents = [(f.parts[1] if len(f.parts) > 2 else "", f.read_binary()) for f in sorted(files, key=str)]
    order = np.random.RandomState(0).permutation(len(documents))
    shares: tuple[list[bytes], list[bytes]] = [], []
    parts: dict[str, tuple[list[bytes], list[bytes]]] = {}
    for n in order:
        name, text = documents[n]
        mine = parts.setdefault(name, ([], []))
        total = sum(map(len, mine[0] + mine[1]))
        held = sum(map(len, mine[1])) < HELD_OUT * total  # the first document of a part trains
        mine[held].append(text)
        if len(text) >= least:
            shares[held].append(text)
    sizes = {name: min(len(b"".join(one)) for one in mine) for name, mine in parts.items() if name}
    largest = sorted(sizes, key=lambda name: (-sizes[name], name))[:CLASSES]
    return *shares, {name: (b"".join(parts[name][0]), b"".join(parts[name][1])) for name in largest}


def trainer_of(bench: Bench, world: Any, folder: Path, context: int, tokens: int, steps: int, train: Corpus, held: Corpus) -> Trainer:
    """A fresh one over these documents."""
    model = "tiny" if bench.quick else "mini"
    config = TrainConfig(
        str(folder), model=model, data=(str(folder / "text"),), steps=steps, seq_len=context, batch=tokens // context, warmup=steps // 10,
        validate=0, sample=0, checkpoint_every=0, recompute=False, compare_steps=0, cp=world.size,
    )  # fmt: skip
    made = Trainer(config, world, lambda _: None)
    made.windows, made.held_out = Windows(train, context, 0), Windows(held, context, 0)
    return made


def step(trainer: Trainer) -> float:
    loss, *_ = trainer.backward()
    trainer.update()
    return loss


@torch.no_grad()
def held_out_loss(trainer: Trainer, tokens: int) -> tuple[float, int]:
    """(nats a byte, bytes) over all held-out windows, as many at a time as `tokens` holds."""
    windows, total, count = trainer.held_out, 0.0, 0
    at_once = max(1, tokens // windows.seq_len)
    for first in range(0, windows.per_epoch, at_once):
        batch = windows.batch(first, min(at_once, windows.per_epoch - first))
        loss = batch_loss(trainer.placement, trainer.parallel, batch, trainer.mesh.group, trainer.world.device)
        total, count = total + loss.item() * batch.valid, count + batch.valid
    return total / max(1, count), count


def crops(parts: Parts, held: bool, count: int, longest: int, context: int, seed: int, room: int) -> list[Batch]:
    """The first `context` - 1 bytes of `count` crops of `longest`, each after a BOS, its part as the label of its last token.

    A batch has `room` tokens. What is cropped depends on neither `context` nor `room`.
    """
    random, texts = np.random.RandomState(seed), [one[held] for one in parts.values()]
    pieces: list[tuple[list[int], int]] = []
    for _ in range(count):
        answer = random.randint(len(texts))
        start = random.randint(max(1, len(texts[answer]) - longest))
        pieces.append(([BOS, *texts[answer][start : start + context - 1]], answer))
    found, at_once = [], max(1, room // context)
    for some in (pieces[n : n + at_once] for n in range(0, count, at_once)):
        tokens = torch.tensor([token for piece, _ in some for token in piece])
        borders = torch.tensor([0, *accumulated(len(piece) for piece, _ in some)], dtype=torch.int32)
        labels = torch.full_like(tokens, IGNORE)
        labels[borders[1:].long() - 1] = torch.tensor([answer for _, answer in some])
        found.append(Batch(tokens, labels, borders))
    return found


@torch.no_grad()
def right(trainer: Trainer, batch: Batch, classes: int) -> int:
    """Of how many crops the model names the part: the likeliest of the parts' tokens after the last one."""
    seq, device = trainer.parallel.sequence(cu_seqlens=batch.cu_seqlens), trainer.world.device
    logits = trainer.placement.forward(seq.shard(batch.tokens.to(device)[None]), seq)  # [1, T, V]
    labels = seq.shard(batch.labels.to(device)[None])
    return int(trainer.parallel.wire.all_reduce((logits[..., :classes].argmax(-1) == labels).sum().double().view(1)).item())


def tell(trainer: Trainer, parts: Parts, context: int, longest: int, room: int, steps: int, tested: int) -> float:
    """Learn for `steps` to name the part a crop is from; the share of `tested` held-out crops that are named right."""
    config, group, device = trainer.config, trainer.mesh.group, trainer.world.device
    for done in range(steps):
        batches = crops(parts, False, CROPS, longest, context, done, room)
        accumulate(trainer.placement, trainer.parallel, batches, [batch.valid for batch in batches], group, device)
        trainer.placement.average_gradients()
        clip_gradients(trainer.placement, config.clip)
        set_learning_rate(trainer.optimizer, config.peak_lr / 3 * min((done + 1) / 10, 1 - done / steps))
        trainer.optimizer.step()
        trainer.optimizer.zero_grad(set_to_none=True)
    return sum(right(trainer, batch, len(parts)) for batch in crops(parts, True, tested, longest, context, 10**6, room)) / tested


def agreed(trainer: Trainer, seconds: float) -> float:
    """The mean over ranks, so that all decide alike."""
    wire = trainer.parallel.wire
    return wire.all_reduce(torch.tensor([seconds], dtype=torch.float64, device=trainer.world.device)).item() / wire.size


def draw(rows: Rows, figure: Any) -> None:
    left, right_ = figure.subplots(1, 2)
    left.plot([r["context"] for r in rows], [r["loss"] for r in rows], marker="o")
    left.set(ylabel="held-out loss, nats a byte", xlabel="context, tokens", title="the same model, tokens and steps")
    right_.plot([r["context"] for r in rows], [r["accuracy"] for r in rows], marker="o")
    right_.set(ylabel="accuracy, held-out documents", xlabel="context, tokens", title="which part a text comes from")
    for axes in (left, right_):
        axes.set_xscale("log", base=2)


def main() -> None:
    bench, world = Bench("context", __doc__, 240), distflash.init()
    say = bench.say if world.is_main else lambda _: None
    contexts, tested, least = ((128, 256), 8, 3) if bench.quick else (CONTEXTS, 128, 20)
    longest = max(contexts)
    room, rows = 2 * longest, []  # tokens a step, and a pass
    training, held, parts = texts(longest)
    train, held_out = Corpus.of(training), Corpus.of([text[: 4 * longest] for text in held[:2]] if bench.quick else held)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text").write_bytes(training[0])  # what a Trainer reads by itself, before it is given all the documents
        rehearsal, times = trainer_of(bench, world, folder, longest, room, 100, train, held_out), []
        for _ in range(least if bench.quick else 10):
            begin = time.perf_counter()
            step(rehearsal)  # waits for the loss
            times.append(time.perf_counter() - begin)
        slowest = agreed(rehearsal, float(np.median(times[len(times) // 2 :])))
        share = bench.budget / len(contexts) / slowest
        wanted = TRAINING * share, TELLING * share * room / (CROPS * longest)
        steps, turns = (least, least) if bench.quick else (max(least, int(n)) for n in wanted)
        say(f"{len(train)} documents, {len(held_out)} held out; {1e3 * slowest:.0f} ms a step at {longest}: {steps} steps, then {turns}")
        for context in reversed(contexts):  # the slowest first: what the budget has no room for is the least telling
            if agreed(rehearsal, bench.left) < 0:
                say("the budget is spent")
                break
            trainer, last = trainer_of(bench, world, folder, context, room, steps, train, held_out), 0.0
            for _ in range(steps):
                last = step(trainer)
            loss, counted = held_out_loss(trainer, room)
            say(f"context {context}: {loss:.4f} nats a byte on {counted} held-out bytes")
            accuracy = tell(trainer, parts, context, longest, room, turns, tested)
            say(f"context {context}: {accuracy:.1%} of {tested} crops named right")
            about = {"training_loss": last, "steps": steps, "tokens_a_step": room, "turns": turns, "crops": tested}
            rows.append({"context": context, "loss": loss, "bytes": counted, "accuracy": accuracy, **about})
    rows.sort(key=lambda row: row["context"])
    if world.is_main:
        lines = [[f"{r['context']:,}", f"{r['loss']:.4f}", f"{r['accuracy']:.1%}"] for r in rows]
        show("held-out documents", ("context", "nats a byte", "accuracy"), lines)
        bench.finish(rows, draw, model="tiny" if bench.quick else "mini", parts=list(parts), gpus=world.size, chance=1 / len(parts))


if __name__ == "__main__":
    main()
