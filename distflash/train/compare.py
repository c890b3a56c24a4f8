"""Do P ranks compute what one process computes? The first losses and every gradient, side by side.

At each compared step the main rank alone repeats the forward and backward on all the windows of the step, with the
parameters of the P-rank run and a sequence-parallel group of one, while the others wait. The parameters are copied each time
because Adam divides a gradient by its own size: where that is near zero, rounding would come out as a difference of lr.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

import distflash
from distflash.train.model import model_config
from distflash.train.placement import Placement, build, place, whole

if TYPE_CHECKING:
    from distflash.train.loop import Trainer

LIMIT = {torch.float32: 1e-5, torch.bfloat16: 5e-2}  # bf16 has 8 bits: two right runs differ by a few of its roundings


@dataclass(frozen=True)
class Difference:
    """The largest relative difference, max |a - b| / max |b|, of the compared losses and gradients."""

    value: float
    where: str
    steps: int
    world_size: int
    limit: float

    @property
    def small(self) -> bool:
        return self.value <= self.limit  # nan is not

    def __str__(self) -> str:
        verdict = "within" if self.small else "ABOVE"
        return (
            f"{self.world_size} ranks against 1 process, {self.steps} steps: largest relative difference of losses and gradients "
            f"{self.value:.2e} ({self.where}), {verdict} the limit {self.limit:.0e}"
        )


class Comparison:
    """step() after each of the first `steps` backwards, then verdict(); every rank must call both."""

    def __init__(self, trainer: Trainer, steps: int) -> None:
        self.trainer, self.left, self.steps = trainer, steps, steps
        self.worst = (0.0, "nothing differs")  # on the main rank
        self._single = _one_process(trainer) if trainer.world.is_main else None

    def step(self, loss: float) -> None:
        """Compares the step's loss and averaged gradients, before clipping, with one process' at the same parameters."""
        self.left -= 1
        single = dict(self._single.model.named_parameters()) if self._single else {}
        for name, parameter in self.trainer.placement.model.named_parameters():
            value = whole(parameter)  # every rank takes part
            if single:
                place(single[name], value)
        if self._single:
            self._note(f"loss of step {self.trainer.step_done + 1}", torch.tensor(loss), torch.tensor(self._run(self._single)))
        for name, parameter in self.trainer.placement.model.named_parameters():
            assert parameter.grad is not None
            gradient = whole(parameter.grad)
            if single:
                self._note(f"gradient of {name}, step {self.trainer.step_done + 1}", gradient, single[name].grad)

    def _run(self, single: Placement) -> float:
        from distflash.train.loop import accumulate

        trainer, size = self.trainer, self.trainer.config.batch
        single.model.zero_grad(set_to_none=True)
        firsts = range(trainer.position, trainer.position + trainer.windows_a_step, size)
        passes = [trainer.windows.batch(first, size) for first in firsts]
        alone = distflash.SequenceParallel.single(trainer.world.device)
        return accumulate(single, alone, passes, [b.valid for b in passes], None, trainer.world.device)

    def _note(self, where: str, found: Tensor, true: Tensor | None) -> None:
        assert true is not None
        difference, size = (found.float() - true.float()).abs().max().item(), true.float().abs().max().item()
        relative = difference / size if size else (0.0 if difference == 0 else math.inf)
        if relative > self.worst[0] or math.isnan(relative):
            self.worst = (math.inf if math.isnan(relative) else relative, where)

    def verdict(self) -> Difference:
        """The same on every rank; `where` is known to the main rank."""
        trainer, (value, where) = self.trainer, self.worst
        if trainer.mesh.group is not None:
            shared = torch.tensor([value], dtype=torch.float64, device=trainer.world.device)
            dist.broadcast(shared, src=0, group=trainer.mesh.group)
            value = shared.item()
        return Difference(value, where, self.steps, trainer.world.size, LIMIT[_dtype(trainer)])


def _one_process(trainer: Trainer) -> Placement:
    config, device = trainer.config, trainer.world.device
    recompute = trainer.placement.model.blocks[0].recompute
    assert isinstance(recompute, bool)
    return build(model_config(config.model), device, seed=config.seed, dtype=_dtype(trainer), kernel=config.kernel, recompute=recompute)


def _dtype(trainer: Trainer) -> torch.dtype:
    from distflash.train.loop import compute_dtype

    return compute_dtype(trainer.config, trainer.world.device)
