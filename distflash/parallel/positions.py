"""Where tokens are, as kernels ask for it: ALiBi is a function of positions, dropout is keyed by them.

A position counts tokens of the whole sequence, packed documents one after the other: pairs that meet lie in one document, where
the distance is the same whether it is counted from the document's start or from the sequence's.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from distflash.parallel.layout import Layout, Span
from distflash.parallel.plan import Part


class Positions:
    """Positions of the local queries, and of the keys of each rank of the ring, as int32 tensors that are made when first asked for."""

    def __init__(self, queries: Sequence[Span], keys: Layout):
        self._queries, self._keys = queries, keys
        self._made: dict[tuple[int | None, torch.device], Tensor] = {}

    def queries(self, device: torch.device) -> Tensor:
        """[Tq]"""
        return self._tensor(None, self._queries, device)

    def keys(self, parts: Sequence[Part], device: torch.device) -> Tensor:
        """[Tk] of the keys of a visit, one part after the other."""
        found = [self._tensor(part.owner, self._keys[part.owner], device)[part.keys.start : part.keys.stop] for part in parts]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _tensor(self, key: int | None, spans: Sequence[Span], device: torch.device) -> Tensor:
        if (key, device) not in self._made:
            parts = [torch.arange(s.start, s.stop, s.step, dtype=torch.int32, device="cpu") for s in spans]
            self._made[key, device] = torch.cat([torch.empty(0, dtype=torch.int32, device="cpu"), *parts]).to(device)
        return self._made[key, device]


def aligned(cu_q: tuple[int, ...], cu_k: tuple[int, ...]) -> Positions:
    """Of one device: query i of a document is at position i + Sk - Sq, aligned with its last key, as flash-attn's varlen ALiBi is.

    Also where that is negative, or in another document's keys, a pair of one document is told from every other pair.
    """
    queries = [range(k1 - (q1 - q0), k1) for (q0, q1), (_, k1) in zip(pairwise(cu_q), pairwise(cu_k), strict=True)]
    return Positions(queries, ((range(cu_k[-1]),),))
