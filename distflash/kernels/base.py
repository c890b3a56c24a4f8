"""What a kernel is. Kernels know tensors of one device and a tile table; they know no ranks.

Legend: B batch, Tq / Tk local queries / keys, H query heads, Hk key/value heads (H % Hk == 0), D head dim, Dv value head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from distflash.tile import Tiles


class Partial(NamedTuple):
    """Softmax attention over some of the keys. Partials over disjoint keys merge; (0, -inf) is the identity."""

    out: Tensor  # [B, Tq, H, Dv]
    lse: Tensor  # [B, H, Tq] natural log; -inf where a row saw no key, and out is 0 there


@dataclass(frozen=True)
class Problem:
    """What a kernel is asked to do, known before any tensor moves: `supports` answers from this alone."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    deterministic: bool = False
    variants: tuple[str, ...] = ()  # what of `Scores` is asked for, by the names of `distflash.attention`'s arguments


class Dropout(NamedTuple):
    """Which probabilities become 0, the others times 1 / (1 - p): those whose Philox 2x32-7 word is below p * 2^32.

    Its counter is (query, key), by their positions; its key, a head's own, is word 0 of Philox 4x32-10 under `seed`, of the counter
    (head, batch, 0, 0). So two heads of a call drop alike with a probability of 2^-32. `kernels.scores` has both.
    """

    p: float
    seed: int  # 0 <= seed < 2^63
    head: int  # number of the first query head here among those of all ranks


@dataclass(frozen=True, eq=False)
class Scores:
    """What is asked beyond a scale and a mask: the softmax is of softcap * tanh(scale * q·k / softcap) - slope * |position - position|.

    Positions count alike on every rank: those of queries are aligned to those of keys at the end of a document, and no two
    pairs (query, key) that a mask keeps have equal ones. lse is of the softmax before dropout.
    """

    q_positions: Tensor  # [Tq] int32
    k_positions: Tensor  # [Tk] int32
    softcap: float = 0.0  # 0 is none
    slopes: Tensor | None = None  # [B, H] fp32, contiguous
    dropout: Dropout | None = None


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which partial results of `dtype` inputs are kept: fp32, and fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Kernel(Protocol):
    """Attention over a tile table on one device; every method is one pass over all tiles of one visit.

    Arguments that all methods share: q [B, Tq, H, D], k [B, Tk, Hk, D], v [B, Tk, Hk, Dv], of any strides; `tiles` over
    (Tq, Tk); `scale` multiplies q·k. Query head h reads key/value head h // (H // Hk). Rows, columns and heads may be
    empty. `accumulator(q.dtype)` is called acc_dtype. `scores` is passed if some variant is asked for: a kernel whose
    `supports` refuses every `Problem.variants` need not take it.
    """

    name: str

    def supports(self, problem: Problem) -> str | None:
        """None, or the reason why this kernel cannot serve the problem."""
        ...

    def deterministic(self) -> Kernel:
        """This kernel with gradients that are bit-equal from run to run, itself if they always are: what `Problem.deterministic` gets."""
        ...

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, scale: float, *, acc: Partial | None = None, dtype: torch.dtype | None = None,
        scores: Scores | None = None,
    ) -> Partial:  # fmt: skip
        """Attend over `tiles` and merge with `acc`, the running (out, lse) of earlier visits.

        `acc` is (acc_dtype, acc_dtype) and may be overwritten. `dtype` is what `out` is stored in: acc_dtype (None) while
        more visits follow, q.dtype on the last. lse is always acc_dtype. Every row of the result is written: a row that has seen
        no key is (0, -inf).
        """
        ...

    def delta(self, out: Tensor, dout: Tensor) -> Tensor:
        """rowsum(out * dout) of [B, Tq, H, Dv] as [B, H, Tq] acc_dtype: D_i of FlashAttention-2 (arXiv:2307.08691), §3.1."""
        ...

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lse: Tensor,
        delta: Tensor,
        tiles: Tiles,
        scale: float,
        *,
        dq: Tensor | None = None,
        dq_dtype: torch.dtype | None = None,
        dkv_dtype: torch.dtype | None = None,
        scores: Scores | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients through `tiles`, probabilities recomputed from the *global* lse [B, H, Tq].

        `dq` is the running gradient (acc_dtype) of earlier visits, added to and possibly overwritten. Returns dq in
        `dq_dtype` and dk, dv in `dkv_dtype` (None: acc_dtype), each of the shape of its tensor, contiguous, every element
        written: what no tile touches is 0 (dq: what came in). Rows with lse = -inf contribute 0.
        """
        ...


@runtime_checkable
class Counted(Protocol):
    """A kernel that says what memory it takes for itself: any may, none must."""

    def scratch(self, problem: Problem, lines: int, tokens: int, alone: bool) -> int:
        """Bytes that a visit of a backward takes beside its arguments and results: of `lines` = B * H lines of Tq = `tokens` queries.

        alone: dq starts and ends in this visit. Copies of tensors that a kernel cannot read as they are come on top.
        """
        ...
