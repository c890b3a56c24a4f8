"""A Llama-style decoder over bytes, written for local tokens: every rank holds its shard of the sequence and nothing else.

    B batch (1: sequences are packed)   T local tokens   C model width   H query heads   G key/value heads   D head dim
    F feed-forward width                V vocabulary     L layers

RMSNorm, RoPE, SwiGLU and grouped-query attention as in Llama 3 (arXiv:2407.21783). Only attention() knows that there are
other ranks; positions come from the sequence, so a model never computes them.
"""

from __future__ import annotations

import functools
import zlib
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import distflash


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model; checked where it is made."""

    dim: int  # C
    layers: int  # L
    heads: int  # H
    kv_heads: int  # G
    hidden: int  # F
    vocab: int = 257  # 256 bytes and the token that opens a document
    rope_theta: float = 10_000.0
    tied: bool = True  # the embedding is the output head too
    eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.dim % self.heads or (self.dim // self.heads) % 2:
            raise ValueError(f"dim must be heads x an even head dim, got dim={self.dim} heads={self.heads}: change one of them")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads, got {self.heads} and {self.kv_heads}: change one of them")

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


MODELS: dict[str, ModelConfig] = {
    "tiny": ModelConfig(dim=128, layers=2, heads=4, kv_heads=2, hidden=384),
    "mini": ModelConfig(dim=384, layers=6, heads=6, kv_heads=2, hidden=1024),
    "small": ModelConfig(dim=1024, layers=12, heads=8, kv_heads=4, hidden=2816, rope_theta=500_000.0),
    "1b": ModelConfig(dim=2048, layers=16, heads=32, kv_heads=8, hidden=8192, rope_theta=500_000.0),
    "3b": ModelConfig(dim=3072, layers=28, heads=24, kv_heads=8, hidden=8192, rope_theta=500_000.0),
    "8b": ModelConfig(dim=4096, layers=32, heads=32, kv_heads=8, hidden=14336, rope_theta=500_000.0, tied=False),
}


def model_config(name: str, **changes: Any) -> ModelConfig:
    """The model called `name`, with fields changed. Raises ValueError for a name that is not in MODELS."""
    if name not in MODELS:
        raise ValueError(f"there is no model {name!r}: choose one of {', '.join(MODELS)}")
    return replace(MODELS[name], **changes)


def rope_table(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles, (T, D / 2) fp32 each; RoFormer, arXiv:2104.09864, eq. 34."""
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions.to(torch.float32)[:, None] * theta**-exponent  # [T, D/2] fp32
    return angles.cos(), angles.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE on x (B, T, H, D): dims d and d + D/2 are one pair, as in Llama; computed in fp32, returned in x's dtype."""
    cos, sin = (t[None, :, None, :] for t in table)  # [1, T, 1, D/2]
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in fp32 inside, x's dtype outside."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (y * self.weight.float()).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention over whatever ranks share the sequence."""

    def __init__(self, config: ModelConfig, kernel: str) -> None:
        super().__init__()
        c, d = config.dim, config.head_dim
        self.head_dim, self.kernel = d, kernel
        self.query = nn.Linear(c, config.heads * d, bias=False)
        self.key = nn.Linear(c, config.kv_heads * d, bias=False)
        self.value = nn.Linear(c, config.kv_heads * d, bias=False)
        self.out = nn.Linear(config.heads * d, c, bias=False)

    def forward(self, x: Tensor, seq: Any, rope: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, self.head_dim)) for f in (self.query, self.key, self.value))  # [B, T, H or G, D]
        out = distflash.attention(rotate(q, rope), rotate(k, rope), v, seq, causal=True, kernel=self.kernel)  # [B, T, H, D]
        assert not isinstance(out, tuple)  # no lse was asked for
        return self.out(out.flatten(-2))


class FeedForward(nn.Module):
    """SwiGLU, arXiv:2002.05202."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.dim, config.hidden, bias=False)
        self.up = nn.Linear(config.dim, config.hidden, bias=False)
        self.out = nn.Linear(config.hidden, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.silu(self.gate(x)) * self.up(x))


KEEP_ATTENTION = functools.partial(create_selective_checkpoint_contexts, distflash.save_attention)


class Block(nn.Module):
    """One layer, pre-norm; with `recompute` its activations are made again in backward, attention's excepted."""

    def __init__(self, config: ModelConfig, kernel: str, recompute: bool) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.eps)
        self.attention = Attention(config, kernel)
        self.feed_forward_norm = RMSNorm(config.dim, config.eps)
        self.feed_forward = FeedForward(config)
        self.recompute = recompute

    def forward(self, x: Tensor, seq: Any, rope: tuple[Tensor, Tensor]) -> Tensor:
        # The checkpoint lies inside the module that FSDP wraps: its parameters are gathered once for recompute and backward.
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._layer, x, seq, rope, use_reentrant=False, context_fn=KEEP_ATTENTION)  # type: ignore[no-any-return]
        return self._layer(x, seq, rope)

    def _layer(self, x: Tensor, seq: Any, rope: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attention(self.attention_norm(x), seq, rope)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Llama(nn.Module):
    """The decoder: tokens of this rank (B, T) and the sequence they belong to -> logits (B, T, V) fp32."""

    def __init__(self, config: ModelConfig, *, kernel: str = "auto", recompute: bool = False) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.dim)
        self.blocks = nn.ModuleList(Block(config, kernel, recompute) for _ in range(config.layers))
        self.norm = RMSNorm(config.dim, config.eps)
        self.head = None if config.tied else nn.Linear(config.dim, config.vocab, bias=False)

    def forward(self, tokens: Tensor, seq: Any) -> Tensor:
        x = self.embed(tokens)  # [B, T, C]
        rope = rope_table(seq.positions.to(x.device), self.config.head_dim, self.config.rope_theta)
        for block in self.blocks:
            x = block(x, seq, rope)
        weight = self.embed.weight if self.head is None else self.head.weight
        return F.linear(self.norm(x), weight).float()


def initial_value(name: str, shape: torch.Size, config: ModelConfig, seed: int, device: torch.device) -> Tensor:
    """The fp32 start of the parameter `name`: a function of the seed, the name and the shape, so it is the same on any mesh."""
    if len(shape) == 1:
        return torch.ones(shape, device=device)
    std = 0.02 if name == "embed.weight" else shape[1] ** -0.5
    if name.endswith("out.weight"):
        std /= (2 * config.layers) ** 0.5  # the residual stream keeps its size whatever the depth (GPT-2)
    generator = torch.Generator(device).manual_seed(zlib.crc32(f"{seed} {name}".encode()))  # on CPU only 32 bits of a seed count
    return torch.empty(shape, device=device).normal_(0.0, std, generator=generator)


def attention_flops(config: ModelConfig, cu_seqlens: Tensor) -> int:
    """FLOPs of causal attention, forward and backward, over the documents: 4 + 10 a kept pair, head and dim."""
    lengths = cu_seqlens.diff().tolist()
    return 14 * sum(n * (n + 1) // 2 for n in lengths) * config.head_dim * config.heads * config.layers
