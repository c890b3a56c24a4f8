"""What ranks run in test_ddp.py and test_fsdp2.py: one step of (data x sequence) parallel ranks, and what one process makes of it."""

from __future__ import annotations

from collections.abc import Callable

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


def make_model() -> Llama:
    torch.manual_seed(0)
    return Llama(MODEL).double()


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, labels, ignore), (SEQUENCES, LENGTH) each; most labels of the first sequences do not count."""
    generator = torch.Generator().manual_seed(1)
    tokens, labels = torch.randint(0, MODEL.vocab, (2, SEQUENCES, LENGTH), generator=generator)
    ignore = torch.rand(SEQUENCES, LENGTH, generator=generator) < 0.3
    ignore[: SEQUENCES // 2, 4:-4] = True
    return tokens, labels, ignore


def backward(model: nn.Module, rows: slice, seq: distflash.ShardedSequence, group: dist.ProcessGroup | None) -> float:
    """The mean loss of all ranks; its gradients are left in the parameters."""
    tokens, labels, ignore = (seq.shard(x[rows]) for x in batch())
    logits = model(tokens, seq)  # [B, T, V]
    per_token = F.cross_entropy(logits.double().flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    loss = distflash.token_mean(per_token, seq, ignore=ignore, group=group)
    loss.backward()
    return loss.item()


def update(model: nn.Module) -> list[Tensor]:
    """The whole parameters after one step, in order: with SGD, because Adam forgets the size of a gradient."""
    torch.optim.SGD(model.parameters(), lr=LR).step()
    return [whole(p) for p in model.parameters()]


def alone() -> tuple[float, list[Tensor]]:
    """(loss, parameters after a step) of one process, which has all sequences."""
    model = make_model()
    loss = backward(model, slice(None), distflash.SequenceParallel.single("cpu").sequence(LENGTH), None)
    return loss, update(model)


def step(dp: int, sp: int, wrap: Wrap, ulysses: int = 1) -> tuple[float, list[Tensor]]:
    """What `alone` returns, with this rank's share of the work."""
    mesh = init_device_mesh("cpu", (dp, sp), mesh_dim_names=("dp", "sp"))
    model = wrap(make_model(), mesh)
    mine = mesh.get_local_rank("dp")
    share = SEQUENCES // dp
    seq = distflash.SequenceParallel(mesh["sp"], ulysses=ulysses).sequence(LENGTH)
    loss = backward(model, slice(mine * share, (mine + 1) * share), seq, dist.group.WORLD)
    return loss, update(model)


def assert_same(results: list[tuple[float, list[Tensor]]]) -> None:
    """Every rank's loss and parameters are those of one process, and a step was taken at all."""
    loss, parameters = alone()
    names = [name for name, _ in make_model().named_parameters()]
    for rank, (found, mine) in enumerate(results):
        assert abs(found - loss) < 1e-6, f"rank {rank}: loss {found}, alone {loss}"
        for name, a, b, start in zip(names, mine, parameters, make_model().parameters(), strict=True):
            moved = (b - start).norm()
            assert moved > 0, f"{name} did not move"
            assert (a - b).norm() < 1e-5 * moved, f"rank {rank}: {name} is off by {(a - b).norm() / moved:.1e} of its step"
