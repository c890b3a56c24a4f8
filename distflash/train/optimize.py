"""AdamW, its schedule, clipping, and its state as named tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from distflash.train.placement import Placement, piece_of

MOMENTS = ("exp_avg", "exp_avg_sq")


def make_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101); matrices decay, norms and embeddings do not."""
    named = list(model.named_parameters())
    decays = [p for n, p in named if p.ndim > 1 and not n.startswith("embed.")]
    rests = [p for n, p in named if p.ndim == 1 or n.startswith("embed.")]
    groups = [{"params": decays, "weight_decay": weight_decay}, {"params": rests, "weight_decay": 0.0}]
    fused = named[0][1].device.type == "cuda"
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=fused)


def learning_rate(step: int, *, steps: int, warmup: int, peak: float) -> float:
    """Of step 0, 1, ...: linear to `peak` over `warmup` steps, then a cosine to a tenth of it."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (0.55 + 0.45 * math.cos(math.pi * done))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Of the next step, for all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = lr


@torch.no_grad()
def clip_gradients(placement: Placement, limit: float) -> float:
    """Scales gradients so that their norm over the whole model is at most `limit`; returns the norm before."""
    gradients = [p.grad for p in placement.model.parameters() if p.grad is not None]
    norm = placement.square_norm(gradients).sqrt()
    scale = (limit / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(scale)
    return norm.item()


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Both moments of every parameter, placed as the parameters are: "exp_avg.blocks.0.attention.query.weight", ..."""
    return {f"{moment}.{name}": optimizer.state[p][moment] for name, p in model.named_parameters() for moment in MOMENTS}


def restore_optimizer(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, moments: dict[str, Tensor], steps: int) -> None:
    """Puts one parameter's whole moments back after `steps` steps."""
    state = optimizer.state[parameter]
    fused = optimizer.param_groups[0]["fused"]
    state["step"] = torch.tensor(float(steps), device=parameter.device if fused else "cpu")
    for moment in MOMENTS:
        state[moment] = piece_of(moments[moment].float(), parameter)
