"""The training job: a (dp x cp) mesh, one step after the other, and what surrounds them.

    P = dp x cp ranks   A passes a step   N tokens of one pass (a dp rank's windows, packed)   T local tokens of N

The dp axis reads different windows, the cp axis shares one pack of windows token by token. Gradients are averaged over all P
ranks flattened and nothing else: token_mean over all P and adjoint collectives make that the gradient of the global mean.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import distflash
from distflash.train import checkpoint as ckpt
from distflash.train.compare import Comparison
from distflash.train.config import TrainConfig
from distflash.train.data import IGNORE, Batch, Windows, load_corpus
from distflash.train.folder import RunFolder
from distflash.train.model import attention_flops, model_config
from distflash.train.optimize import (
    MOMENTS,
    clip_gradients,
    learning_rate,
    make_optimizer,
    optimizer_tensors,
    restore_optimizer,
    set_learning_rate,
)
from distflash.train.placement import Placement, build, local, place, whole
from distflash.train.report import Report, generate

HELD_OUT = 0.02  # of the bytes


class WorldLike(Protocol):
    """What the job needs to know of distflash.World."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def is_main(self) -> bool: ...


@dataclass(frozen=True)
class Mesh:
    """This rank's place on the (dp x cp) mesh; the groups are None in a process without a process group."""

    dp: int
    dp_rank: int
    cp_mesh: DeviceMesh | None = None
    dp_group: dist.ProcessGroup | None = None
    all_mesh: DeviceMesh | None = None  # all P ranks, flattened

    @classmethod
    def make(cls, world: WorldLike, cp: int) -> Mesh:
        if not dist.is_initialized():
            return cls(1, 0)
        kind, dp = world.device.type, world.size // cp
        mesh = init_device_mesh(kind, (dp, cp), mesh_dim_names=("dp", "cp"))
        flat = init_device_mesh(kind, (world.size,), mesh_dim_names=("all",))
        return cls(dp, mesh.get_local_rank("dp"), mesh["cp"], mesh["dp"].get_group(), flat)

    @property
    def group(self) -> dist.ProcessGroup | None:
        return self.all_mesh.get_group() if self.all_mesh is not None else None


class Trainer:
    """Everything that changes while training, and one method for each thing that is done with it."""

    def __init__(self, config: TrainConfig, world: WorldLike, say: Callable[[str], None]) -> None:
        self.config, self.world, self.say = config, world, say
        torch.manual_seed(config.seed)
        self.mesh = Mesh.make(world, config.cp_size(world.size))
        schemes: dict[str, Any] = {name: getattr(config, name) for name in ("layout", "order", "ulysses", "wire", "staging")}
        self.parallel = distflash.SequenceParallel(self.mesh.cp_mesh, **schemes)
        corpus = load_corpus(config.data, config.field, config.out)
        self.digest = corpus.digest()
        require_same(self.digest, self.mesh.group, world.device)
        train, held_out = corpus.split(HELD_OUT, config.seed)
        self.windows, self.held_out = (Windows(c, config.seq_len, config.seed) for c in (train, held_out))
        self.placement = build_placement(config, world, self.mesh)
        self.optimizer = make_optimizer(self.placement.model, config.peak_lr, config.weight_decay)
        self.step_done, self.position = 0, 0  # steps taken; the next window of the endless stream

    @property
    def windows_a_step(self) -> int:
        return self.mesh.dp * self.config.batch * self.config.accumulate

    def batches(self, dp_rank: int) -> list[Batch]:
        """The passes of the next step on a dp rank: a pure function of the position, so any rank can ask for any rank's."""
        size = self.config.batch
        firsts = [self.position + (a * self.mesh.dp + dp_rank) * size for a in range(self.config.accumulate)]
        return [self.windows.batch(first, size) for first in firsts]

    def backward(self) -> tuple[float, int, int]:
        """Leaves averaged gradients; returns (global loss, global tokens, global attention FLOPs) of the step."""
        passes = self.batches(self.mesh.dp_rank)
        flops = [attention_flops(self.placement.model.config, b.cu_seqlens) for b in passes]
        counts = [*(b.valid for b in passes), sum(len(b.tokens) for b in passes), sum(flops)]
        *valid, tokens, attention = global_sums(counts, self.mesh.dp_group, self.world.device)
        loss = accumulate(self.placement, self.parallel, passes, valid, self.mesh.group, self.world.device)
        self.placement.average_gradients()
        return loss, tokens, attention

    def update(self) -> tuple[float, float]:
        """Clips, steps, clears; returns (gradient norm, learning rate)."""
        config = self.config
        norm = clip_gradients(self.placement, config.clip)
        self.require_finite("norm of the gradient", norm, self.step_done + 1)
        lr = learning_rate(self.step_done, steps=config.steps, warmup=config.warmup, peak=config.peak_lr)
        set_learning_rate(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step_done += 1
        self.position += self.windows_a_step
        return norm, lr

    def require_finite(self, what: str, value: float, step: int) -> None:
        """Raises RuntimeError for a number, the same on every rank, that would make parameters NaN."""
        if not math.isfinite(value):
            settings = f"--lr (now {self.config.peak_lr}) or --clip (now {self.config.clip}), or lengthen --warmup"
            raise RuntimeError(f"the {what} is {value} at step {step}: lower {settings}, and continue with --resume")

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Nats a byte over the first held-out windows; every rank must take part."""
        dp, count, total = self.mesh.dp, min(self.config.validate, self.held_out.per_epoch), [0.0, 0]
        for first in range(0, count, dp):
            mine = first + self.mesh.dp_rank
            batch = self.held_out.batch(min(mine, count - 1), 1)
            batch = batch if mine < count else batch.without_labels()
            (valid,) = global_sums([batch.valid], self.mesh.dp_group, self.world.device)
            loss = batch_loss(self.placement, self.parallel, batch, self.mesh.group, self.world.device)
            total = [total[0] + loss.item() * valid, total[1] + valid]
        return total[0] / max(1, total[1])

    def save(self, root: Path) -> None:
        """Writes a checkpoint; every rank must take part. Raises RuntimeError if a parameter is not finite: the older one stays."""
        state = {
            "step": self.step_done,
            "position": self.position,
            "run": self.config.identity(),
            "options": dataclasses.asdict(self.config),
            "model": dataclasses.asdict(self.placement.model.config),
            "data": self.digest,
        }
        rest = optimizer_tensors(self.optimizer, self.placement.model) | {"random.cpu": torch.get_rng_state()}
        files = {"model": dict(self.placement.model.named_parameters()), "optimizer": rest}
        odd = sum(not local(tensor).isfinite().all() for tensors in files.values() for tensor in tensors.values())
        (odd,) = global_sums([int(odd)], self.mesh.group, self.world.device)
        self.require_finite("value of a parameter or a moment", math.nan if odd else 0.0, self.step_done)
        agree = lambda good: not global_sums([int(not good)], self.mesh.group, self.world.device)[0]  # noqa: E731
        ckpt.save(root, state, files, gather=whole, is_main=self.world.is_main, world_size=self.world.size, agree=agree)

    def restore(self, root: Path) -> bool:
        """Continues from the newest whole checkpoint under `root`; False if there is none. Every rank must take part."""
        found = ckpt.newest(root, self.say) if self.world.is_main else None
        (step,) = global_sums([found.step + 1 if found else 0], self.mesh.group, self.world.device)
        if step == 0:
            return False
        saved = ckpt.read(root / ckpt.folder_name(step - 1))
        self._require_same_run(saved)
        named = dict(self.placement.model.named_parameters())
        with saved.tensors("model") as model, saved.tensors("optimizer") as rest:
            for name, parameter in named.items():
                place(parameter, model.get_tensor(name))
                moments = {m: rest.get_tensor(f"{m}.{name}") for m in MOMENTS}
                restore_optimizer(self.optimizer, parameter, moments, saved.step)
            torch.set_rng_state(rest.get_tensor("random.cpu"))
        self.step_done, self.position = saved.step, int(saved.state["position"])
        for name in ("lr", "warmup", "weight_decay", "clip"):
            if (was := saved.state["options"][name]) != (now := getattr(self.config, name)):
                self.say(f"--{name.replace('_', '-')} was {was} until step {saved.step}, and is {now} from here on")
        return True

    def _require_same_run(self, saved: ckpt.Checkpoint) -> None:
        here = self.config.identity()
        there = saved.state["run"]
        other = {k: (there.get(k), v) for k, v in here.items() if v != there.get(k)}
        if saved.state["data"] != self.digest:
            other["data (SHA-256)"] = (saved.state["data"][:12], self.digest[:12])
        if other:
            text = ", ".join(f"{k} {was!r} there and {now!r} here" for k, (was, now) in other.items())
            raise ValueError(f"{saved.path} is of another run: {text}. Give the same options and data, or another --out")


def build_placement(config: TrainConfig, world: WorldLike, mesh: Mesh) -> Placement:
    """The model on its mesh, as the options and the devices say."""
    on_gpu = world.device.type == "cuda"
    sharded = on_gpu if config.shard is None else config.shard
    return build(
        model_config(config.model),
        world.device,
        seed=config.seed,
        dtype=compute_dtype(config, world.device),
        kernel=config.kernel,
        recompute=on_gpu if config.recompute is None else config.recompute,
        mesh=mesh.all_mesh if sharded else None,
        group=mesh.group,
    )


def compute_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """What matrices are multiplied in; parameters and optimizer state are fp32."""
    name = ("bf16" if device.type == "cuda" else "fp32") if config.dtype == "auto" else config.dtype
    return torch.bfloat16 if name == "bf16" else torch.float32


def batch_loss(placement: Placement, parallel: Any, batch: Batch, group: dist.ProcessGroup | None, device: torch.device) -> Tensor:
    """The mean over all valid tokens of all ranks of `group`, on every rank, differentiable."""
    seq = parallel.sequence(cu_seqlens=batch.cu_seqlens)
    tokens = seq.shard(batch.tokens.to(device)[None], dim=1)  # [1, T]
    labels = seq.shard(batch.labels.to(device)[None], dim=1)  # [1, T], shifted before it was sharded
    logits = placement.forward(tokens, seq)  # [1, T, V] fp32
    per_token = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none").view_as(labels)
    return distflash.token_mean(per_token, seq, ignore=labels == IGNORE, group=group)


def accumulate(
    placement: Placement,
    parallel: Any,
    passes: Sequence[Batch],
    valid: Sequence[int],
    group: dist.ProcessGroup | None,
    device: torch.device,
) -> float:
    """Backward of the mean over all tokens of all passes; `valid` counts each pass' tokens on all ranks. Returns the loss."""
    total, everything = 0.0, max(1, sum(valid))
    for batch, count in zip(passes, valid, strict=True):
        loss = batch_loss(placement, parallel, batch, group, device) * (count / everything)
        loss.backward()
        total += loss.item()
    return total


def global_sums(values: Sequence[int], group: dist.ProcessGroup | None, device: torch.device) -> list[int]:
    """The sum of each integer over the ranks of a group."""
    if group is None:
        return list(values)
    sums = torch.tensor(values, dtype=torch.int64, device=device)
    dist.all_reduce(sums, group=group)
    return sums.tolist()


def require_same(digest: str, group: dist.ProcessGroup | None, device: torch.device) -> None:
    """Raises ValueError on every rank if the ranks have read different data."""
    if group is None:
        return
    mine = torch.tensor(list(bytes.fromhex(digest)), dtype=torch.int64, device=device)
    extremes = torch.cat([mine, -mine])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    if not torch.equal(*(extremes * torch.tensor([1, -1], device=device).repeat_interleave(len(mine))).chunk(2)):
        raise ValueError(f"ranks have read different data (SHA-256 {digest[:12]} here): give every host the same files for --data")


def run(config: TrainConfig, world: WorldLike, *, job: str = "", restarted: bool = False) -> int:
    """The whole job on this rank; the exit code: 0, or 1 if P ranks and one process differ too much.

    job: its name, which it keeps when it is started again. restarted: on this host it was; then it goes on with the run that --out
    holds if that is its own. All ranks resume if one is told to: a host that joins a job does not know that the others were started again.
    """
    torch.backends.cuda.matmul.allow_tf32 = False  # fp32 means fp32
    folder = RunFolder(config.out, job)
    try:
        config = dataclasses.replace(config, resume=claim(folder, config.resume, restarted, world))
        report = Report(config, world.is_main)
        trainer = Trainer(config, world, report.say)
        resumed = config.resume and trainer.restore(Path(config.out))
        try:
            report.start(trainer.step_done, resumed, folder, describe(trainer))
            compared = 0 if resumed else config.steps_to_compare(world.size, world.device.type)
            code = train_steps(trainer, report, Comparison(trainer, compared) if compared else None)
            if code == 0:
                report.finish(trainer.validation_loss() if config.validate else None, generate(trainer) if config.sample else None)
            return code
        finally:
            report.close()
    finally:
        folder.release()


def claim(folder: RunFolder, resume: bool, restarted: bool, world: WorldLike) -> bool:
    """The main rank locks the folder; returns whether the run in it is to go on, the same on every rank."""
    everyone = dist.group.WORLD if dist.is_initialized() else None
    told, again = global_sums([int(resume), int(restarted)], everyone, world.device)
    goes_on = told > 0
    if world.is_main:
        goes_on = goes_on or (again > 0 and folder.is_ours())
        folder.claim(goes_on)
    return global_sums([int(goes_on and world.is_main)], everyone, world.device)[0] > 0


def train_steps(trainer: Trainer, report: Report, comparison: Comparison | None) -> int:
    """From where the trainer stands to the last step."""
    config, root = trainer.config, Path(trainer.config.out)
    while trainer.step_done < config.steps:
        clock = time.perf_counter()
        loss, tokens, attention = trainer.backward()
        seconds = time.perf_counter() - clock
        trainer.require_finite("loss", loss, trainer.step_done + 1)
        if comparison:
            comparison.step(loss)
            if comparison.left == 0:
                difference, comparison = comparison.verdict(), None
                report.compared(difference)
                if not difference.small:
                    return 1
        clock = time.perf_counter()
        norm, lr = trainer.update()
        seconds += time.perf_counter() - clock
        report.step(trainer.step_done, loss, norm, lr, tokens, attention / trainer.world.size, seconds, trainer.position)
        if config.checkpoint_every and (trainer.step_done % config.checkpoint_every == 0 or trainer.step_done == config.steps):
            trainer.save(root)
    return 0


def describe(trainer: Trainer) -> str:
    """One line of what is about to run."""
    config, model, mesh = trainer.config, trainer.placement.model, trainer.mesh
    size = sum(p.numel() for p in model.parameters())
    text = f"{config.model}: {size / 1e6:.1f} M parameters; {trainer.windows.tokens / 1e6:.1f} M tokens of text; "
    text += f"{mesh.dp} dp x {trainer.world.size // mesh.dp} cp ranks on {trainer.world.device.type}, "
    return text + f"{trainer.windows_a_step} x {config.seq_len} tokens a step"
