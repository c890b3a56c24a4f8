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
    """
    lse = torch.logaddexp(a.lse, b.lse)  # [B, H, T]; -inf with -inf gives -inf
    return Partial(_weighted(a, lse) + _weighted(b, lse), lse)


def _weighted(x: Partial, lse: Tensor) -> Tensor:
    # where, not a product with 0: what a row that saw nothing holds in `out` must not leak
    weight = torch.exp(x.lse - lse).transpose(1, 2).unsqueeze(-1)  # [B, T, H, 1]
    return torch.where((x.lse > float("-inf")).transpose(1, 2).unsqueeze(-1), weight * x.out, 0.0)
