"""One step of (data x sequence) parallel ranks, and what one process makes of it: for test_ddp.py, test_fsdp2.py and tests/gpu."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import distflash
from distflash.train.model import Llama, ModelConfig
from distflash.train.placement import whole

MODEL = ModelConfig(dim=32, layers=2, heads=4, kv_heads=2, hidden=48, vocab=61)
LENGTH, SEQUENCES, LR = 37, 4, 0.5  # no number of ranks divides the length
MESHES = [(1, 2), (2, 1), (2, 2)]  # (dp, sp)

Wrap = Callable[[Llama, DeviceMesh], nn.Module]


@dataclass(frozen=True)
class Setting:
    """Where a step is taken, and in what: bf16 is autocast's, of parameters in fp32."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float64
    model: ModelConfig = MODEL


CPU = Setting()


def make_model(on: Setting = CPU) -> Llama:
    torch.manual_seed(0)
    return Llama(on.model).to(on.device, torch.promote_types(on.dtype, torch.float32))


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, labels, ignore), (SEQUENCES, LENGTH) each; most labels of the first sequences do not count."""
    generator = torch.Generator().manual_seed(1)
    tokens, labels = torch.randint(0, MODEL.vocab, (2, SEQUENCES, LENGTH), generator=generator)
    ignore = torch.rand(SEQUENCES, LENGTH, generator=generator) < 0.3
    ignore[: SEQUENCES // 2, 4:-4] = True
    return tokens, labels, ignore


def backward(model: nn.Module, rows: slice, seq: distflash.ShardedSequence, group: dist.ProcessGroup | None, on: Setting) -> float:
    """The mean loss of all ranks; its gradients are left in the parameters."""
    tokens, labels, ignore = (seq.shard(x[rows].to(on.device)) for x in batch())
    with torch.autocast(on.device, torch.bfloat16, enabled=on.dtype == torch.bfloat16):
        logits = model(tokens, seq)  # [B, T, V]
    per_token = F.cross_entropy(logits.double().flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    loss = distflash.token_mean(per_token, seq, ignore=ignore, group=group)
    loss.backward()
    return loss.item()


def update(model: nn.Module) -> list[Tensor]:
    """The whole parameters after one step, in order: with SGD, because Adam forgets the size of a gradient."""
    torch.optim.SGD(model.parameters(), lr=LR).step()
    return [whole(p) for p in model.parameters()]


def alone(on: Setting = CPU) -> tuple[float, list[Tensor]]:
    """(loss, parameters after a step) of one process, which has all sequences."""
    model = make_model(on)
    loss = backward(model, slice(None), distflash.SequenceParallel.single(on.device).sequence(LENGTH), None, on)
    return loss, update(model)


def step(dp: int, sp: int, wrap: Wrap, ulysses: int = 1, on: Setting = CPU) -> tuple[float, list[Tensor]]:
    """What `alone` returns, with this rank's share of the work."""
    mesh = init_device_mesh(on.device, (dp, sp), mesh_dim_names=("dp", "sp"))
    model = wrap(make_model(on), mesh)
    mine = mesh.get_local_rank("dp")
    share = SEQUENCES // dp
    seq = distflash.SequenceParallel(mesh["sp"], ulysses=ulysses).sequence(LENGTH)
    loss = backward(model, slice(mine * share, (mine + 1) * share), seq, dist.group.WORLD, on)
    return loss, update(model)


def assert_same(results: list[tuple[float, list[Tensor]]], on: Setting = CPU) -> None:
    """Every rank's loss and parameters are those of one process, and a step was taken at all.

    In less than fp64 the truth is one process in fp64, and ranks may be off by twice what one process in their dtype is, and besides by a
    quarter of the dtype's epsilon: each rank rounds its own part of a gradient, and the parts may be larger than their sum.
    """
    truth = Setting(on.device, torch.float64, on.model)
    loss, parameters = alone(truth)
    low_loss, low = alone(on)
    quarter = torch.finfo(on.dtype).eps / 4
    names = [name for name, _ in make_model(truth).named_parameters()]
    for rank, (found, mine) in enumerate(results):
        assert abs(found - loss) < 1e-6 + 2 * abs(low_loss - loss) + quarter * loss, f"rank {rank}: loss {found}, alone {loss}"
        for name, a, b, c, start in zip(names, mine, parameters, low, make_model(truth).parameters(), strict=True):
            moved, off = (b - start).norm(), (a - b).norm()
            assert moved > 0, f"{name} did not move"
            assert off < max(1e-5, quarter) * moved + 2 * (c - b).norm(), f"rank {rank}: {name} is off by {off / moved:.1e} of its step"
