"""Kernels timed side by side: this library's on Hopper, and those that a user could take instead.

Each prepares a cell: (forward, backward) without arguments, on the same inputs. Forward gives out [B, S, H, D], backward (dq, dk, dv)
of those shapes; backward is None where a kernel has none. Everyone stores bf16 and writes lse, as training needs it, and gets its
tensors in the order that its own interface documents.

Legend: B batch, S tokens of a sequence, H query heads, Hk key/value heads, D head dim; B S = 32768, H D = 2048.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from distflash.parallel.mask import Mask, packed
from distflash.tile import Tiles

TOKENS, WIDTH = 32768, 2048
OURS = "distflash"
Runs = tuple[Callable[[], Tensor], Callable[[], tuple[Tensor, ...]] | None]
Prepare = Callable[["Cell", Tensor, Tensor, Tensor, Tensor], Runs]


@dataclass(frozen=True)
class Cell:
    """One problem: dense sequences, or documents packed into one (`documents` are their borders, cu_seqlens)."""

    D: int
    S: int
    causal: bool
    H: int
    Hk: int
    documents: tuple[int, ...] | None = None

    @property
    def B(self) -> int:
        return TOKENS // self.S

    @cached_property
    def tiles(self) -> Tiles:
        borders = self.documents or (0, self.S)
        return packed(borders, borders, Mask(None, 0 if self.causal else None))

    def flops(self, backward: bool) -> float:
        """Of the pairs that are kept: 4 D a pair and head forward (two matmuls), 10 D backward (five)."""
        return (10 if backward else 4) * self.B * self.H * self.D * self.tiles.area

    def inputs(self, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v, dout: normal, bf16, [B, S, heads, D]."""
        generator = torch.Generator("cuda").manual_seed(seed)
        heads = (self.H, self.Hk, self.Hk, self.H)
        q, k, v, dout = (torch.randn(self.B, self.S, h, self.D, device="cuda", generator=generator).bfloat16() for h in heads)
        return q, k, v, dout


def distflash(cell: Cell, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, *, variant: str = OURS) -> Runs:
    """This library's Hopper kernel; backward with delta, from the result of its own forward."""
    kernel, scale, dtype = hopper(variant, cell.D), cell.D**-0.5, q.dtype
    forward = lambda: kernel.forward(q, k, v, cell.tiles, scale, dtype=dtype)  # noqa: E731
    out, lse = forward()

    def backward() -> tuple[Tensor, ...]:
        delta = kernel.delta(out, dout)
        return kernel.backward(dout, q, k, v, lse, delta, cell.tiles, scale, dq_dtype=dtype, dkv_dtype=dtype)

    return lambda: forward().out, backward


def hopper(variant: str, D: int) -> Any:
    """The Hopper kernel with a named configuration for head dim D in the directions that have one of this name."""
    from distflash.kernels.hopper import HopperKernel, configs

    forward, backward = dict(configs.FORWARD), dict(configs.BACKWARD)
    if variant != OURS:
        for direction, chosen in variants(D)[variant].items():
            (forward if direction == "forward" else backward)[D, D] = chosen
    return HopperKernel(forward, backward)


def variants(D: int) -> dict[str, dict[str, Any]]:
    """Configurations for this head dim by name, then by direction; the shipped ones are called by the library's name."""
    from distflash.kernels.hopper import configs

    shelves = {"forward": (configs.FORWARD, configs.FORWARD_VARIANTS), "backward": (configs.BACKWARD, configs.BACKWARD_VARIANTS)}
    found: dict[str, dict[str, Any]] = {}
    for direction, (shipped, others) in shelves.items():
        for name, config in {OURS: shipped.get((D, D)), **others.get((D, D), {})}.items():
            if config is not None:
                found.setdefault(name, {})[direction] = config
    return found


def _differentiable(attend: Callable[..., Tensor], cell: Cell, tensors: tuple[Tensor, ...], *, heads_first: bool) -> Runs:
    """Runs of a function of (q, k, v) that autograd differentiates, [B, S, H, D] or [B, H, S, D] as it wishes."""
    turn = (lambda x: x.transpose(1, 2)) if heads_first else (lambda x: x)
    *leaves, dout = (turn(x).contiguous() for x in tensors)
    leaves = [x.detach().requires_grad_() for x in leaves]
    graph: list[Tensor] = []  # made once, by the first backward

    def backward() -> tuple[Tensor, ...]:
        if not graph:
            graph.append(attend(*leaves))
        return tuple(turn(x) for x in torch.autograd.grad(graph[0], leaves, dout, retain_graph=True))

    return lambda: turn(attend(*leaves)), backward


def _dense_only(cell: Cell) -> None:
    if cell.documents:
        raise NotImplementedError("no packed documents")


def cudnn(cell: Cell, *tensors: Tensor) -> Runs:
    """cuDNN, as PyTorch ships it; the operator itself, which groups heads."""
    _dense_only(cell)
    operator = torch.ops.aten._scaled_dot_product_cudnn_attention
    return _differentiable(lambda q, k, v: operator(q, k, v, None, True, 0.0, cell.causal)[0], cell, tensors, heads_first=True)


def fa2(cell: Cell, *tensors: Tensor) -> Runs:
    """FlashAttention-2, as PyTorch ships it."""
    operator = torch.ops.aten._flash_attention_forward
    if cell.documents is None:
        attend = lambda q, k, v: operator(q, k, v, None, None, cell.S, cell.S, 0.0, cell.causal, False)[0]  # noqa: E731
        return _differentiable(attend, cell, tensors, heads_first=False)
    cu, longest = _cu_seqlens(cell)
    attend = lambda q, k, v: operator(q[0], k[0], v[0], cu, cu, longest, longest, 0.0, cell.causal, False)[0].unsqueeze(0)  # noqa: E731
    return _differentiable(attend, cell, tensors, heads_first=False)


def fa3(cell: Cell, *tensors: Tensor) -> Runs:
    """FlashAttention-3 (module flash_attn_interface); the forward alone where the build has no backward."""
    import flash_attn_config
    import flash_attn_interface

    forward, backward = _flash(flash_attn_interface, cell, tensors)
    return forward, None if flash_attn_config.CONFIG["build_flags"]["FLASHATTENTION_DISABLE_BACKWARD"] else backward


def fa4(cell: Cell, *tensors: Tensor) -> Runs:
    """FlashAttention-4 (flash_attn.cute), compiled at the first call of each kind."""
    import flash_attn.cute

    return _flash(flash_attn.cute, cell, tensors)


def _flash(module: Any, cell: Cell, tensors: tuple[Tensor, ...]) -> Runs:
    """flash_attn_func, or flash_attn_varlen_func for documents, of either module; some versions return (out, lse)."""
    if cell.documents is None:
        attend = lambda q, k, v: _first(module.flash_attn_func(q, k, v, causal=cell.causal))  # noqa: E731
        return _differentiable(attend, cell, tensors, heads_first=False)
    cu, longest = _cu_seqlens(cell)
    lengths = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": longest, "max_seqlen_k": longest}
    packed_call = partial(module.flash_attn_varlen_func, causal=cell.causal, **lengths)
    return _differentiable(lambda q, k, v: _first(packed_call(q[0], k[0], v[0])).unsqueeze(0), cell, tensors, heads_first=False)


def _first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def _cu_seqlens(cell: Cell) -> tuple[Tensor, int]:
    assert cell.documents is not None
    cu = torch.tensor(cell.documents, dtype=torch.int32, device="cuda")
    return cu, int(cu.diff().max())


def flex(cell: Cell, *tensors: Tensor) -> Runs:
    """FlexAttention, compiled for this shape and mask. Dynamo gives up after some versions: torch._dynamo.reset() between cells."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    _dense_only(cell)
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, cell.S, cell.S, device="cuda") if cell.causal else None
    attend = partial(torch.compile(flex_attention, dynamic=False), block_mask=mask, enable_gqa=cell.Hk != cell.H)
    return _differentiable(attend, cell, tensors, heads_first=True)


PEERS: dict[str, Prepare] = {"fa3": fa3, "fa4": fa4, "cudnn": cudnn, "fa2": fa2, "flex": flex}


def contender(name: str) -> Prepare:
    """A peer by its name, or one of this library's configurations."""
    return PEERS[name] if name in PEERS else partial(distflash, variant=name)


def installed() -> dict[str, str]:
    """Versions of the packages that peers come from, of those that are there."""
    found = {}
    for name in ("tokenspeed-fa3", "flash-attn-4", "nvidia-cutlass-dsl"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
