"""Where parameters live: on every rank (replicas), or cut in pieces over the whole mesh (FSDP2).

    P = dp x cp ranks, flattened. Both average gradients over all P and nothing else: the library's gradient rule.

Only these two classes and `whole` / `place` know about the difference; the loop, the optimizer and checkpoints do not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from distflash.train.model import Llama, ModelConfig, initial_value

BUCKET = 1 << 23  # elements of one all-reduce: 32 MiB of fp32


class Placement(Protocol):
    """A model on a mesh."""

    model: Llama
    gathers: bool  # a forward needs every rank

    def forward(self, tokens: Tensor, seq: Any) -> Tensor:
        """Local tokens (B, T) -> logits (B, T, V) fp32."""
        ...

    def average_gradients(self) -> None:
        """After the last backward of a step: gradients become their mean over all P ranks."""
        ...

    def square_norm(self, tensors: Sequence[Tensor]) -> Tensor:
        """Sum of squares of whole tensors, fp32, the same on every rank."""
        ...


class Replicas:
    """Every rank holds the whole model; group=None is one process."""

    gathers = False

    def __init__(self, model: Llama, group: dist.ProcessGroup | None, dtype: torch.dtype) -> None:
        self.model, self.group, self.dtype = model, group, dtype
        self.device = next(model.parameters()).device.type

    def forward(self, tokens: Tensor, seq: Any) -> Tensor:
        # Autocast, not casted weights: recomputed layers see the same state (hazard 30).
        with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
            return self.model(tokens, seq)

    def average_gradients(self) -> None:
        if self.group is None:
            return
        for bucket in _buckets([p.grad for p in self.model.parameters() if p.grad is not None]):
            flat = torch.cat([g.flatten() for g in bucket])
            dist.all_reduce(flat, group=self.group)
            flat /= dist.get_world_size(self.group)
            for gradient, mean in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(mean.view_as(gradient))

    def square_norm(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.stack([t.float().square().sum() for t in tensors]).sum()


class Sharded:
    """FSDP2 over the flattened mesh: parameters and optimizer state fp32 in pieces, layers gathered in `dtype` when they run."""

    gathers = True

    def __init__(self, model: Llama, mesh: DeviceMesh, dtype: torch.dtype) -> None:
        # Inputs are not cast: the rope table stays fp32, and hidden states are `dtype` from the embedding on.
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        self.model, self.group = model, mesh.get_group()

    def forward(self, tokens: Tensor, seq: Any) -> Tensor:
        return self.model(tokens, seq)

    def average_gradients(self) -> None:
        """FSDP2 has averaged over its mesh in backward."""

    def square_norm(self, tensors: Sequence[Tensor]) -> Tensor:
        total = torch.stack([local(t).float().square().sum() for t in tensors]).sum()
        dist.all_reduce(total, group=self.group)
        return total


def build(
    config: ModelConfig,
    device: torch.device,
    *,
    seed: int,
    dtype: torch.dtype,
    kernel: str,
    recompute: bool,
    mesh: DeviceMesh | None = None,
    group: dist.ProcessGroup | None = None,
) -> Placement:
    """A freshly initialised model: FSDP2 over `mesh` if there is one, else replicas over `group` (None: one process).

    The values are the same whatever the mesh. They are made one parameter at a time, so no rank ever holds a whole model
    that it does not keep.
    """
    with torch.device("meta"):
        model = Llama(config, kernel=kernel, recompute=recompute)
    sharded = Sharded(model, mesh, dtype) if mesh is not None else None
    model.to_empty(device=device)
    for name, parameter in model.named_parameters():
        place(parameter, initial_value(name, parameter.shape, config, seed, device))
    return sharded if sharded is not None else Replicas(model, group, dtype)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a placed tensor; every rank must take part."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's piece."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def piece_of(whole_tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor placed as `like` is: no communication, every rank holds the whole and keeps its piece."""
    moved = whole_tensor.to(like.device)
    if not isinstance(like, DTensor):
        return moved
    return distribute_tensor(moved, like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def place(parameter: nn.Parameter | Tensor, value: Tensor) -> None:
    """Overwrites a placed tensor with a whole value. Raises ValueError for another shape."""
    if parameter.shape != value.shape:
        raise ValueError(f"a value of shape {tuple(value.shape)} was given for one of shape {tuple(parameter.shape)}")
    local(parameter).copy_(local(piece_of(value, parameter)))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and size + tensor.numel() > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket
