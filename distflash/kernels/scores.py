"""Softcap, ALiBi and dropout in PyTorch, on a block of scores: what the PyTorch kernels compute, and the others are compared with.

Legend: B batch, H query heads, R x C a block of queries x keys. `rows` and `columns` are its places in the local tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distflash.kernels.base import Dropout, Scores

_WORD = 0xFFFFFFFF
_MULTIPLIERS, _KEY_STEPS, _ROUNDS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85), 10


def shaped(s: Tensor, scores: Scores, rows: slice, columns: slice) -> tuple[Tensor, Tensor | None]:
    """(what the softmax is taken of, its derivative by s or None where that is 1) of scaled scores s [B, H, R, C]."""
    derivative = None
    if scores.softcap:
        ratio = s / scores.softcap
        s, derivative = scores.softcap * torch.tanh(ratio), torch.cosh(ratio).reciprocal().square()  # 1 - tanh² without its cancellation
    if scores.slopes is not None:
        distance = (scores.q_positions[rows, None] - scores.k_positions[columns]).abs()
        s = s - scores.slopes.to(s.dtype)[:, :, None, None] * distance
    return s, derivative


def weights(s: Tensor, scores: Scores, rows: slice, columns: slice) -> Tensor | None:
    """What dropout multiplies probabilities [B, H, R, C] with, 0 or 1 / (1 - p), in the dtype of s; None without dropout."""
    if scores.dropout is None:
        return None
    batch, heads = s.shape[:2]
    first = scores.dropout.head
    word = philox(
        scores.dropout.seed,
        scores.q_positions[rows, None],
        scores.k_positions[columns],
        torch.arange(first, first + heads, device=s.device)[:, None, None],
        torch.arange(batch, device=s.device)[:, None, None, None],
    )
    return (word >= threshold(scores.dropout)).to(s.dtype) / (1 - scores.dropout.p)


def threshold(dropout: Dropout) -> int:
    """The smallest Philox word that is kept."""
    return round(dropout.p * (_WORD + 1))


def philox(seed: int, *counter: Tensor) -> Tensor:
    """Word 0 of Philox 4x32-10 (Salmon et al., SC 2011) as int64, for a 64-bit key and a counter of four integer tensors."""
    c0, c1, c2, c3 = (c.to(torch.int64) & _WORD for c in torch.broadcast_tensors(*counter))
    k0, k1 = seed & _WORD, seed >> 32
    for _ in range(_ROUNDS):
        a, b = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # 64 bits each; int64 wraps, and the bits are those of uint64
        c0, c1, c2, c3 = (b >> 32 & _WORD) ^ c1 ^ k0, b & _WORD, (a >> 32 & _WORD) ^ c3 ^ k1, a & _WORD
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0
