"""What a training run is asked to do: one frozen value, checked where it is made.

S sequence length   dp data-parallel ranks   cp ranks that share one sequence   P = dp x cp
"""

from __future__ import annotations

import math
from dataclasses import dataclass

DTYPES = ("auto", "fp32", "bf16")
LEARNING_RATES = {"tiny": 3e-3, "mini": 1.5e-3, "small": 6e-4, "1b": 3e-4, "3b": 3e-4, "8b": 1.5e-4}  # peaks that train well


@dataclass(frozen=True)
class TrainConfig:
    """Options of `distflash train`; their help texts are in command.py."""

    out: str
    model: str = "tiny"
    data: tuple[str, ...] = ()
    field: str = "text"
    steps: int = 400
    seq_len: int = 1024
    batch: int = 2  # sequences a dp rank and pass
    accumulate: int = 1  # passes a step
    lr: float | None = None  # None: LEARNING_RATES of the model
    warmup: int = 20
    weight_decay: float = 0.1
    clip: float = 1.0
    cp: int = 0  # 0: all ranks
    layout: str = "auto"
    order: str = "auto"
    ulysses: int | str = "auto"
    wire: str = "auto"
    staging: str | None = None  # memory for others' K and V on their way; None: as the order says
    kernel: str = "auto"
    dtype: str = "auto"  # auto: bf16 on GPUs, fp32 on CPU
    shard: bool | None = None  # None: FSDP2 on several GPUs, replicas on CPU
    recompute: bool | None = None  # None: on GPUs
    seed: int = 0
    resume: bool = False
    checkpoint_every: int = 100  # 0: never
    compare_steps: int | None = None  # None: 2 with several CPU ranks, else 0
    validate: int = 16  # held-out sequences; 0: none
    sample: int = 200  # bytes of text written at the end; 0: none

    def __post_init__(self) -> None:
        at_least = {"steps": 1, "seq_len": 2, "batch": 1, "accumulate": 1, "warmup": 0, "cp": 0, "checkpoint_every": 0}
        at_least |= {"compare_steps": 0, "validate": 0, "sample": 0, "seed": 0}
        for name, least in at_least.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
        for name in ("lr", "clip"):
            if (value := getattr(self, name)) is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"--{name} must be above 0, got {value}: pass a finite number")
        if not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            raise ValueError(f"--weight-decay must not be negative, got {self.weight_decay}: pass a finite number")
        if self.seed >= 2**31:
            raise ValueError(f"--seed must be below 2**31, got {self.seed}")
        if self.dtype not in DTYPES:
            raise ValueError(f"there is no dtype {self.dtype!r}: choose one of {', '.join(DTYPES)}")

    def cp_size(self, world_size: int) -> int:
        """Ranks that share one sequence. Raises ValueError if they do not divide the world."""
        cp = self.cp or world_size
        if world_size % cp:
            raise ValueError(f"--cp must divide the {world_size} ranks, got {cp}: choose a divisor, or 0 for all ranks")
        return cp

    @property
    def peak_lr(self) -> float:
        """The learning rate after warm-up."""
        return LEARNING_RATES.get(self.model, 3e-4) if self.lr is None else self.lr

    def steps_to_compare(self, world_size: int, device_type: str) -> int:
        """How many of the first steps are repeated in one process."""
        if self.compare_steps is not None:
            return min(self.compare_steps, self.steps)
        return min(2, self.steps) if world_size > 1 and device_type == "cpu" else 0

    def identity(self) -> dict[str, object]:
        """What a run must share with the checkpoint it resumes: world size, schemes and the optimizer's settings may change."""
        names = ("model", "seq_len", "seed", "batch", "accumulate")
        return {name: getattr(self, name) for name in names}
