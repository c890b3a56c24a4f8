"""Softcap, ALiBi and dropout in PyTorch, on a block of scores: what the PyTorch kernels compute, and the others are compared with.

Legend: B batch, H query heads, R x C a block of queries x keys. `rows` and `columns` are its places in the local tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distflash.kernels.base import Dropout, Scores

_WORD = 0xFFFFFFFF
_MULTIPLIERS, _KEY_STEPS = {2: (0xD256D193,), 4: (0xD2511F53, 0xCD9E8D57)}, (0x9E3779B9, 0xBB67AE85)


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
    dropout, (batch, heads) = scores.dropout, s.shape[:2]
    head = torch.arange(dropout.head, dropout.head + heads, device=s.device)
    element = torch.arange(batch, device=s.device)[:, None]
    key = philox(10, (dropout.seed & _WORD, dropout.seed >> 32), (head, element, 0, 0))  # [B, H]
    word = philox(7, (key[:, :, None, None],), (scores.q_positions[rows, None], scores.k_positions[columns]))
    return (word >= threshold(dropout)).to(s.dtype) / (1 - dropout.p)


def threshold(dropout: Dropout) -> int:
    """The smallest Philox word that is kept: a word itself, which no p < 1 rounds beyond."""
    return min(round(dropout.p * (_WORD + 1)), _WORD)


def philox(rounds: int, key: Sequence[Tensor | int], counter: Sequence[Tensor | int]) -> Tensor:
    """Word 0, int64, of Philox 2x32 or 4x32 (Salmon et al., SC 2011): 2 or 4 words of a counter, half as many of a key, broadcast."""
    words = [torch.as_tensor(word, dtype=torch.int64) & _WORD for word in counter]
    for n in range(rounds):
        products = [even * factor for even, factor in zip(words[::2], _MULTIPLIERS[len(words)], strict=True)]  # int64 wraps: uint64's bits
        parts = zip(reversed(products), words[1::2], key, _KEY_STEPS[: len(key)], strict=True)
        words = [word for p, odd, k, step in parts for word in ((p >> 32 & _WORD) ^ odd ^ (k + n * step & _WORD), p & _WORD)]
    return words[0]
