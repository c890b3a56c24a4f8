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


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Let one more logit a head join each row's softmax, with a value of 0: a merge with Partial(0, sink). Differentiable.

    out [B, T, H, Dv] shrinks by exp(lse) / (exp(lse) + exp(sink)), which is a sigmoid; lse [B, H, T] becomes that of the whole
    denominator. It acts on finished rows, so it is the same under every scheme (attention sinks, arXiv:2309.17453).
    """
    sink = sinks.to(lse.dtype).unsqueeze(-1)  # [H, 1]
    seen = lse > float("-inf")
    finite = torch.where(seen, lse, 0.0)  # of rows that saw a key; for the others no gradient may pass through -inf - -inf
    # not sigmoid(...), whose gradient share * (1 - share) loses all digits of a small sink
    share = torch.where(seen, torch.exp(torch.nn.functional.logsigmoid(finite - sink)), 0.0)  # [B, H, T]
    shrunk = out.to(lse.dtype) * share.transpose(1, 2).unsqueeze(-1)
    return shrunk.to(out.dtype), torch.where(seen, torch.logaddexp(finite, sink), sink)


def _weighted(out: Tensor, weight: Tensor, total: Tensor) -> Tensor:
    # where, not a product with 0: what a row that saw nothing holds in `out` must not leak
    share, seen = ((x.transpose(1, 2).unsqueeze(-1)) for x in (weight / total, weight > 0))  # [B, T, H, 1]
    return torch.where(seen, share * out, 0.0)
