"""`distflash train`: options, their help, and the start of several ranks. torch is imported only when a run begins."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Annotated, Any

import typer

from distflash.train.config import TrainConfig

CPU_RANKS = 4  # enough for every scheme to show
_DEFAULT = TrainConfig(out="")


def _option(text: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, **more)


def train(  # a command's parameters are its options: as many as there are
    nproc: Annotated[
        int | None, _option("Ranks to start here; default: one a GPU, or 4 on CPU. A launcher that started this decides itself.", min=1)
    ] = None,
    model: Annotated[str, _option("Size: tiny, mini, small, 1b, 3b or 8b.")] = _DEFAULT.model,
    data: Annotated[list[str] | None, _option("Text file, folder, .jsonl or .parquet; may be repeated. Default: sympy's sources.")] = None,
    field: Annotated[str, _option("Field or column of .jsonl and .parquet that holds the text.")] = _DEFAULT.field,
    steps: Annotated[int, _option("Optimizer steps.")] = _DEFAULT.steps,
    seq_len: Annotated[int, _option("Tokens (bytes) of one sequence; shared by the cp ranks.")] = _DEFAULT.seq_len,
    batch: Annotated[int, _option("Sequences a dp rank and pass.")] = _DEFAULT.batch,
    accumulate: Annotated[int, _option("Passes a step whose gradients are accumulated.")] = _DEFAULT.accumulate,
    lr: Annotated[float | None, _option("Peak learning rate. Default: what suits the model.")] = _DEFAULT.lr,
    warmup: Annotated[int, _option("Steps of linear warm-up; a cosine follows.")] = _DEFAULT.warmup,
    weight_decay: Annotated[float, _option("AdamW's; not for norms and embeddings.")] = _DEFAULT.weight_decay,
    clip: Annotated[float, _option("Largest norm of the gradient.")] = _DEFAULT.clip,
    cp: Annotated[int, _option("Ranks that share one sequence; the others are data parallel. 0: all ranks.")] = _DEFAULT.cp,
    layout: Annotated[str, _option("Which tokens a rank holds: auto, contiguous, zigzag, striped, balanced.")] = _DEFAULT.layout,
    order: Annotated[str, _option("When blocks move: auto, ring, all_gather, double_ring.")] = _DEFAULT.order,
    ulysses: Annotated[str, _option("Ranks that share heads during attention: auto, or a number.")] = str(_DEFAULT.ulysses),
    wire: Annotated[str, _option("What carries blocks between ranks: auto, p2p, symmetric.")] = _DEFAULT.wire,
    staging: Annotated[str | None, _option("Memory for K and V on their way, as 512MiB. Default: no limit.")] = _DEFAULT.staging,
    kernel: Annotated[str, _option("Attention kernel: auto, or a name; a name runs or raises.")] = _DEFAULT.kernel,
    dtype: Annotated[str, _option("auto (bf16 on GPUs, fp32 on CPU), fp32, bf16.")] = _DEFAULT.dtype,
    shard: Annotated[bool | None, _option("Shard parameters with FSDP2. Default: on several GPUs.", "--shard/--no-shard")] = None,
    recompute: Annotated[
        bool | None,
        _option("Run layers, but not attention, again in backward. Default: on GPUs.", "--checkpoint/--no-checkpoint"),
    ] = None,
    seed: Annotated[int, _option("Of the parameters and the order of the data.")] = _DEFAULT.seed,
    out: Annotated[str, _option("Folder for checkpoints, metrics and the curve. Default: runs/MODEL.")] = "",
    resume: Annotated[bool, _option("Continue from the newest whole checkpoint in --out.", "--resume")] = False,
    checkpoint_every: Annotated[int, _option("Steps between checkpoints; the last step has one too. 0: none.")] = _DEFAULT.checkpoint_every,
    compare_steps: Annotated[int | None, _option("First steps to compare with one process. Default: 2 with several CPU ranks.")] = None,
    validate: Annotated[int, _option("Held-out sequences to evaluate at the end. 0: none.")] = _DEFAULT.validate,
    sample: Annotated[int, _option("Bytes of text to sample at the end. 0: none.")] = _DEFAULT.sample,
) -> None:
    """Train a small language model with attention spread over the ranks."""
    options = locals()
    nproc = options.pop("nproc")
    options |= {"data": tuple(data or ()), "out": out or f"runs/{model}", "ulysses": ulysses if ulysses == "auto" else _number(ulysses)}
    try:
        config = TrainConfig(**options)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    raise typer.Exit(start(config, nproc))


def start(config: TrainConfig, nproc: int | None) -> int:
    """Runs the job in this process if a launcher started it or one rank is enough, else on `nproc` new ranks of this host."""
    _check_extra()
    from distflash.launch.run import OURS, launch, threads
    from distflash.launch.world import job, launched, restarted

    if not launched():
        ranks = nproc or _default_ranks()
        _check_early(config, ranks)
        if ranks > 1:
            return launch(OURS, ["train", *arguments(config)], ranks)

    import torch

    import distflash
    from distflash.train.loop import run

    world = distflash.init()
    if world.device.type == "cpu" and world.size > 1:
        torch.set_num_threads(threads(world.local_size))
    return run(config, world, job=job(), restarted=restarted())


def arguments(config: TrainConfig) -> list[str]:
    """The command line that gives `config`: what new ranks are started with."""
    words: list[str] = []
    for name, value in dataclasses.asdict(config).items():
        flag = {"recompute": "checkpoint"}.get(name, name).replace("_", "-")
        if isinstance(value, tuple):
            words += [f"--{flag}={item}" for item in value]
        elif isinstance(value, bool):
            words += [f"--{flag}"] if value else [] if name == "resume" else [f"--no-{flag}"]
        elif value is not None:
            words.append(f"--{flag}={value}")
    return words


def _default_ranks() -> int:
    import torch

    return max(1, torch.cuda.device_count()) if torch.cuda.is_available() else CPU_RANKS


def _check_extra() -> None:
    """The last step of a run, its plot, fails before the first one where its package is missing."""
    for name in ("safetensors", "matplotlib"):
        if importlib.util.find_spec(name) is None:
            raise typer.BadParameter(f"training needs {name}, which is not installed: pip install 'distflash[train]'")


def _check_early(config: TrainConfig, ranks: int) -> None:
    """What any rank would refuse is refused once, before ranks are started."""
    from pathlib import Path

    from distflash.launch.early import check_kernel, check_scheme
    from distflash.train import folder
    from distflash.train.model import model_config

    try:
        folder.check(config.out, config.resume)
        folder.check_free(config.out)
        model_config(config.model)
        check_scheme(layout=config.layout, order=config.order, wire=config.wire, staging=config.staging)
        check_kernel(config.kernel)
        cp, ulysses = config.cp_size(ranks), config.ulysses
        if isinstance(ulysses, int) and (ulysses < 1 or cp % ulysses):
            raise ValueError(f"--ulysses must divide the {cp} ranks that share a sequence, got {ulysses}: choose a divisor, or auto")
    except (ValueError, RuntimeError) as error:
        raise typer.BadParameter(str(error)) from None
    for path in config.data:
        if not Path(path).exists():
            raise typer.BadParameter(f"--data {path!r} does not exist: check the path")


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"--ulysses must be auto or a number, got {text!r}") from None
