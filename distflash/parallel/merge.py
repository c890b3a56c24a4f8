"""The online-softmax monoid: partial results over disjoint keys, merged in any order.

Kernels merge inside themselves; this is the definition they are tested against, and what is used where no kernel runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distflash.kernels.base import Partial


def merge(a: Partial, b: Partial) -> Partial:
    """Combine attention over two disjoint sets of keys (FlashAttention, arXiv:2205.14135, §3.1, equation of the merge).

    lse = log(exp(lse_a) + exp(lse_b)), out = Σ exp(lse_x - lse) out_x. A row that saw no key on either side stays (0, -inf).
    The weights are normalised by their own sum, not by the rounded lse: they add up to 1 also where lse is 1e4.
    """
    top = torch.maximum(a.lse, b.lse)  # [B, H, T]
    top = torch.where(top > float("-inf"), top, 0.0)
    w_a, w_b = torch.exp(a.lse - top), torch.exp(b.lse - top)
    total = w_a + w_b
    return Partial(_weighted(a.out, w_a, total) + _weighted(b.out, w_b, total), top + torch.log(total))


def _weighted(out: Tensor, weight: Tensor, total: Tensor) -> Tensor:
    # where, not a product with 0: what a row that saw nothing holds in `out` must not leak
    share, seen = ((x.transpose(1, 2).unsqueeze(-1)) for x in (weight / total, weight > 0))  # [B, T, H, 1]
    return torch.where(seen, share * out, 0.0)
