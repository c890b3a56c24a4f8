"""What a run shows and leaves behind: a progress line, metrics.jsonl, loss.png, sample.txt. Only the main rank writes.

metrics.jsonl holds one JSON object a step. `attention_tflops` is the attention of the step, forward and backward, over the
time of the whole step, a rank: a floor of what the kernels reach.
"""

from __future__ import annotations

import json
import math
import resource
import statistics
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch

import distflash
from distflash.train.config import TrainConfig
from distflash.train.data import BOS
from distflash.train.folder import RunFolder

if TYPE_CHECKING:
    from distflash.train.compare import Difference
    from distflash.train.loop import Trainer

LINES = 20  # of progress in a run whose output is not a terminal
LAST = 20  # steps whose mean is the final loss


class Report:
    """Silent on every rank but the main one."""

    def __init__(self, config: TrainConfig, is_main: bool) -> None:
        self.config, self.is_main = config, is_main
        self.folder = Path(config.out)
        self.metrics: IO[str] | None = None
        self.rows: list[dict[str, Any]] = []
        self.progress: Any = None
        self.task: Any = None
        self.verdict = ""  # of the comparison with one process

    def say(self, text: str) -> None:
        """A line on the main rank's standard output."""
        if self.is_main:
            if self.progress:
                self.progress.console.print(text, markup=False, highlight=False)
            else:
                print(text, flush=True)

    def start(self, step: int, resumed: bool, folder: RunFolder, description: str) -> None:
        """Opens the metrics file: an older run in the same folder is moved aside, a resumed one is continued after `step`."""
        if not self.is_main:
            return
        if self.config.resume:
            self.say(f"resuming after step {step}" if resumed else f"no checkpoint in {self.folder}: starting from step 0")
        if resumed and self.config.compare_steps:
            first = f"--compare-steps {self.config.compare_steps} is of the first steps of a run"
            self.say(f"{first}, and this one goes on after step {step}: nothing is compared")
        with _writing(self.folder):
            aside = folder.begin(resumed)
        if aside:
            cure = "" if self.config.resume else " (--resume would have continued it)"
            self.say(f"{self.folder} held an older run: it is now {aside}{cure}")
        self.say(description)
        path = self.folder / "metrics.jsonl"
        self.rows = [row for row in read_metrics(path) if row["step"] <= step]
        with _writing(self.folder):
            part = path.with_name(".metrics.jsonl")  # all rows or what was there: a run may be killed at any moment
            part.write_text("".join(json_line(row) for row in self.rows))
            part.replace(path)
            self.metrics = path.open("a", buffering=1)
        self._start_progress(step)

    def _start_progress(self, step: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        console = Console()
        if console.is_terminal:
            columns = BarColumn(10), MofNCompleteColumn(), TextColumn("{task.fields[facts]}")
            self.progress = Progress(*columns, console=console)
            self.task = self.progress.add_task("train", total=self.config.steps, completed=step, facts="")
            self.progress.start()

    def step(self, step: int, loss: float, norm: float, lr: float, tokens: int, attention: float, seconds: float, position: int) -> None:
        """One row. `attention` is FLOPs a rank, `tokens` and `position` (windows consumed) are global."""
        if not self.is_main:
            return
        row = {
            "step": step,
            "loss": loss,
            "grad_norm": norm,
            "lr": lr,
            "tokens": tokens,
            "tokens_per_s": tokens / seconds,
            "ms": seconds * 1e3,
            "attention_tflops": attention / seconds / 1e12,
            "peak_memory_gb": peak_memory_gb(),
            "windows": position,
        }
        assert self.metrics is not None
        with _writing(self.folder):
            self.metrics.write(json_line(row))
        self.rows.append(row)
        facts = f"loss {loss:.3f}  {row['tokens_per_s']:,.0f} tokens/s  {row['ms']:.0f} ms  "
        facts += f"attention {flops_text(attention / seconds)}  {row['peak_memory_gb']:.1f} GB"  # of one rank
        if self.progress:
            self.progress.update(self.task, completed=step, facts=facts)
        elif step % max(1, self.config.steps // LINES) == 0 or step == self.config.steps:
            self.say(f"step {step:>5}/{self.config.steps}  {facts}")

    def compared(self, difference: Difference) -> None:
        if self.is_main:
            self.verdict = str(difference)
            self.say(self.verdict)
            facts = {"value": difference.value, "where": difference.where, "steps": difference.steps, "ranks": difference.world_size}
            with _writing(self.folder):
                (self.folder / "compare.json").write_text(json_line(facts | {"limit": difference.limit, "small": difference.small}))

    def close(self) -> None:
        """Gives the terminal back and closes the metrics; harmless when done already."""
        if self.progress:
            self.progress.stop()
            self.progress = None
        if self.metrics:
            with suppress(OSError):  # what could not be written was told
                self.metrics.close()
            self.metrics = None

    def finish(self, validation: float | None, sample: bytes | None) -> None:
        """The curve, the sample and the summary."""
        if self.is_main:
            self.close()
            with _writing(self.folder):
                self._finish(validation, sample)

    def _finish(self, validation: float | None, sample: bytes | None) -> None:
        plot_losses(self.rows, validation, self.folder / "loss.png")
        if sample is not None:
            (self.folder / "sample.txt").write_bytes(sample)
            self.say("sample:\n" + "\n".join("    " + line for line in sample.decode(errors="replace").splitlines()))
        last = [row["loss"] for row in self.rows[-LAST:]]  # none if a finished run is resumed whose metrics are gone
        final = statistics.fmean(last) if last else None
        summary = {"final_loss": final, "validation_loss": validation, "steps": self.config.steps}
        (self.folder / "summary.json").write_text(json_line(summary))
        held_out = f", held-out loss {validation:.3f}" if validation is not None else ""
        told = "unknown" if final is None else f"{final:.3f} nats a byte (mean of the last {len(last)} steps)"
        self.say(f"final loss {told}{held_out}; see {self.folder}/")
        if self.verdict:  # pages ago by now
            self.say(self.verdict)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """An error of the disk in words, with the cure."""
    try:
        yield
    except OSError as error:
        raise RuntimeError(
            f"the report of the run could not be written to {folder} ({error.strerror}): free space, or check the folder, "
            "then continue with --resume"
        ) from error


def json_line(facts: dict[str, Any]) -> str:
    """A line of JSON."""
    return json.dumps(finite(facts), allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """The same for JSON, which has no infinity and no nan: null stands for them."""
    if isinstance(value, dict):
        return {name: finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a metrics file; a line that a crash cut short, or a disk spoilt, is passed over."""
    if path.exists():
        for line in path.read_bytes().splitlines():
            with suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict) and "step" in row:
                    yield row


def flops_text(a_second: float) -> str:
    """GFLOP/s for CPUs, TFLOP/s for GPUs."""
    return f"{a_second / 1e12:.1f} TFLOP/s" if a_second >= 1e12 else f"{a_second / 1e9:.1f} GFLOP/s"


def peak_memory_gb() -> float:
    """Of this rank: GPU memory where there is a GPU, else the process'."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def plot_losses(rows: list[dict[str, Any]], validation: float | None, path: Path) -> None:
    """Loss against step, with the mean of the last steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")  # no pyplot: no global state, no display
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    steps, losses = [r["step"] for r in rows], [r["loss"] for r in rows]
    mean = [statistics.fmean(losses[max(0, n - LAST) : n]) for n in range(1, len(losses) + 1)]
    axes.plot(steps, losses, color="tab:blue", alpha=0.35, linewidth=1, label="each step")
    axes.plot(steps, mean, color="tab:blue", linewidth=2, label=f"mean of {LAST}")
    if validation is not None:
        axes.axhline(validation, color="tab:orange", linestyle="--", label=f"held-out {validation:.3f}")
    axes.set(xlabel="step", ylabel="loss (nats a byte)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


@torch.no_grad()
def generate(trainer: Trainer, temperature: float = 0.8) -> bytes | None:
    """Text from an empty start, by the main rank; if parameters are sharded every rank runs the same whole forwards."""
    if not (trainer.placement.gathers or trainer.world.is_main):
        return None
    device, model = trainer.world.device, trainer.placement.model
    length = min(trainer.config.sample + 1, trainer.config.seq_len)
    seq = distflash.SequenceParallel.single().sequence(length=length)
    tokens = torch.full((1, length), BOS, dtype=torch.int64, device=device)  # causal: what is not written yet is not seen
    random = torch.Generator().manual_seed(trainer.config.seed)
    for at in range(1, length):
        logits = trainer.placement.forward(tokens, seq)[0, at - 1, : min(BOS, model.config.vocab)].float().cpu()
        chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=random)
        tokens[0, at] = chosen.item()
    return bytes(tokens[0, 1:].tolist())
