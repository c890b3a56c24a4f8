"""Which tokens ranks hold, as tensors, and from shards back to the whole.

Legend: P ranks, T local tokens, S global tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from distflash.parallel.layout import Layout, lengths
from distflash.parallel.wire.base import Wire, swapped


class Tokens:
    """The tokens of each rank by their global indices, on any device: tensors that are made when first asked for, and kept."""

    def __init__(self, layout: Layout, cu_seqlens: tuple[int, ...]):
        self.length, self.lengths = cu_seqlens[-1], lengths(layout)  # S; T of each rank
        self._layout, self._borders = layout, cu_seqlens
        self._indices: dict[tuple[int, torch.device], Tensor] = {}
        self._positions: dict[tuple[int, torch.device], Tensor] = {}

    @torch.inference_mode(False)  # kept for later calls, also those that autograd sees
    def indices(self, rank: int, device: torch.device) -> Tensor:
        """Global index of each token that the rank holds, LongTensor (T,): not to be written to."""
        if (rank, device) not in self._indices:
            spans = [torch.arange(s.start, s.stop, s.step, device="cpu") for s in self._layout[rank]]
            self._indices[rank, device] = torch.cat([torch.empty(0, dtype=torch.long, device="cpu"), *spans]).to(device)
        return self._indices[rank, device]

    @torch.inference_mode(False)
    def positions(self, rank: int, device: torch.device) -> Tensor:
        """Position of each of them inside its document, LongTensor (T,): not to be written to."""
        if (rank, device) not in self._positions:
            indices, borders = self.indices(rank, device), torch.tensor(self._borders, device=device)
            self._positions[rank, device] = indices - borders[torch.searchsorted(borders, indices, right=True) - 1]
        return self._positions[rank, device]


class Unshard(torch.autograd.Function):
    """All S tokens along `dim` of the shards that the ranks hold; the gradient is the exact adjoint. A collective, backward too,
    which begins with a call of `begin`.
    """

    @staticmethod
    def forward(ctx, x: Tensor, wire: Wire, tokens: Tokens, dim: int, begin: Callable[[], None]) -> Tensor:
        ctx.call = wire, tokens, dim, begin
        shape = [*x.shape]

        def room(rank: int) -> Tensor:
            return x.new_empty([*shape[:dim], tokens.lengths[rank], *shape[dim + 1 :]])

        parts = swapped(wire, [x] * wire.size, room)
        whole = x.new_empty([*shape[:dim], tokens.length, *shape[dim + 1 :]])
        for rank, part in enumerate(parts):
            whole.index_copy_(dim, tokens.indices(rank, x.device), part)
        return whole

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        *_, begin = ctx.call
        begin()
        return SumOfShards.apply(grad, *ctx.call), None, None, None, None


class SumOfShards(torch.autograd.Function):
    """Of what each rank holds of all S tokens, the sum of this rank's T: the adjoint of `Unshard`, which is its own gradient in turn."""

    @staticmethod
    def forward(ctx, whole: Tensor, wire: Wire, tokens: Tokens, dim: int, begin: Callable[[], None]) -> Tensor:
        ctx.call = wire, tokens, dim, begin
        shares = [whole.index_select(dim, tokens.indices(rank, whole.device)) for rank in range(wire.size)]
        parts = swapped(wire, shares, lambda _: torch.empty_like(shares[wire.rank]))
        wide = torch.promote_types(whole.dtype, torch.float32)
        total = sum((part.to(wide) for part in parts[1:]), start=parts[0].to(wide))  # rank order: the same bits every run
        return total.to(whole.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        *_, begin = ctx.call
        begin()
        return Unshard.apply(grad, *ctx.call), None, None, None, None
