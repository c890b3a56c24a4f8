"""What multi-rank tests share: attention carried out by P ranks, put together again and laid beside the oracle.

Legend: B batch, S global tokens, H query heads, Hk key/value heads, D head dim, Dv value head dim, P ranks.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import distflash
from distflash.parallel.slices import Slices
from distflash.testing import Attention, Variants, keep_mask, oracle, spmd

START = 20
SEED = random.Random(START).getrandbits(63)  # of the first call after seed_dropout(START)


class Inputs(NamedTuple):
    """What attention forward and backward is fed with; dlse is the gradient of lse."""

    q: Tensor  # [B, S, H, D]
    k: Tensor  # [B, S, Hk, D]
    v: Tensor  # [B, S, Hk, Dv]
    dout: Tensor  # [B, S, H, Dv]
    dlse: Tensor  # [B, H, S]


class Call(NamedTuple):
    """How attention is called, and what the ranks share."""

    layout: str = "zigzag"
    order: str = "ring"
    ulysses: int = 1
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    documents: tuple[int, ...] | None = None
    kernel: str = "auto"
    scale: float | None = None
    mask: Slices | None = None
    softcap: float = 0.0
    slopes: Tensor | None = None  # [H] or [B, H]
    dropout_p: float = 0.0
    deterministic: bool = False

    @property
    def options(self) -> dict[str, Any]:
        window = {"causal": self.causal, "window_size": self.window_size}
        variants = {"softcap": self.softcap, "alibi_slopes": self.slopes, "dropout_p": self.dropout_p, "deterministic": self.deterministic}
        return window | variants | {"kernel": self.kernel, "softmax_scale": self.scale, "mask": self.mask}


def inputs(
    tokens: int, *, batch: int = 2, heads: int = 4, kv_heads: int = 2, dim: int = 8, v_dim: int | None = None, dtype=torch.float64
) -> Inputs:
    """Normal random numbers, made in `dtype`."""
    shapes = ((heads, dim), (kv_heads, dim), (kv_heads, v_dim or dim), (heads, v_dim or dim))
    made = [torch.randn(batch, tokens, *shape, dtype=torch.float64).to(dtype) for shape in shapes]
    return Inputs(*made, torch.randn(batch, heads, tokens, dtype=torch.float64))


def keep_of(call: Call, tokens: int) -> Tensor:
    return keep_mask(tokens, tokens, causal=call.causal, window_size=call.window_size, cu_seqlens_q=call.documents, mask=call.mask)


def truth_of(call: Call, x: Inputs, dtype: torch.dtype = torch.float64) -> Attention:
    keep = keep_of(call, x.q.shape[1])
    variants = Variants(call.softcap, call.slopes, call.dropout_p, SEED, call.documents and (call.documents, call.documents))
    return oracle(x.q, x.k, x.v, x.dout, keep, scale=call.scale, dlse=x.dlse, dtype=dtype, variants=variants)


def run_rank(call: Call, x: Inputs, group: Any = None) -> tuple[Tensor, Attention]:
    """One rank's part: (global indices of its tokens, its results). A collective."""
    sp = distflash.SequenceParallel(group, layout=call.layout, order=call.order, ulysses=call.ulysses)
    return run_sequence(call, x, sp.sequence(cu_seqlens=call.documents) if call.documents else sp.sequence(x.q.shape[1]))


def run_sequence(call: Call, x: Inputs, seq: distflash.ShardedSequence) -> tuple[Tensor, Attention]:
    seq.sp.seed_dropout(START)
    leaves = [seq.shard(t).detach().requires_grad_() for t in (x.q, x.k, x.v)]
    out, lse = distflash.attention(*leaves, seq, return_lse=True, **call.options)
    finite = torch.where(lse > float("-inf"), lse, 0.0)
    ((out * seq.shard(x.dout)).sum() + (finite * seq.shard(x.dlse, dim=2)).sum()).backward()
    return seq.indices, Attention(out.detach(), lse.detach(), *(leaf.grad for leaf in leaves))


def whole(results: Sequence[tuple[Tensor, Attention]]) -> Attention:
    """The results of all ranks in global order; asserts that every token is held by exactly one rank."""
    index = torch.cat([indices for indices, _ in results])
    assert sorted(index.tolist()) == list(range(len(index))), "a token is held twice, or by nobody"
    back = torch.argsort(index)
    columns = (torch.cat([getattr(found, name) for _, found in results], dim=_dim(name)) for name in Attention._fields)
    return Attention(*(column.index_select(_dim(name), back) for name, column in zip(Attention._fields, columns, strict=True)))


def on_ranks(ranks: int, call: Call, x: Inputs, per_node: int | None = None) -> Attention:
    """Attention by `ranks` threads."""
    return whole(spmd(ranks, lambda group: run_rank(call, x, group), per_node=per_node))


def _dim(name: str) -> int:
    return 2 if name == "lse" else 1
