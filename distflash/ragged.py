"""Sequences of different length in one padded batch, as packed documents: nothing is computed for padding.

Legend: B batch, S length to which sequences are padded, T tokens that are no padding.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Ragged:
    """A padded batch, from a mask (B, S) that is True (or 1) where there is a token: of queries, or of keys.

        batch = distflash.Ragged(mask)
        q, k, v = (batch.pack(x) for x in (q, k, v))                                   # (B, S, H, D) -> (T, H, D)
        out = batch.pad(distflash.attention(q, k, v, cu_seqlens_q=batch.cu_seqlens))   # (B, S, H, Dv), 0 at padding

    Over several ranks the packed tensors are sharded: `seq = sp.sequence(cu_seqlens=batch.cu_seqlens)`, `seq.shard(x, dim=0)`.
    Padding may be on either side; a row may be all padding. Making one reads the mask, which waits for its device. Raises
    ValueError or TypeError on what is no such mask, and where tokens of a row are not side by side: causal, windows and ALiBi
    count positions, which closing a gap would change.
    """

    def __init__(self, mask: Tensor):
        if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.is_floating_point() or mask.is_complex():
            got = f"{tuple(mask.shape)} of {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask must be a (batch, tokens) tensor of bool, or of 0 and 1, True at tokens, got {got}")
        here = mask.detach().cpu()
        if here.dtype != torch.bool and not ((here == 0) | (here == 1)).all():
            raise ValueError(f"mask must hold 0 and 1 only, got {here[(here != 0) & (here != 1)][0].item()}: True or 1 is a token")
        here = here.bool()
        begins = here.int().diff(dim=1, prepend=torch.zeros(len(here), 1, dtype=torch.int32)) == 1
        if (gaps := (begins.sum(1) > 1).nonzero()).numel():
            raise ValueError(f"row {gaps[0].item()} of mask has padding between its tokens: move it to one side")
        lengths = here.sum(1, dtype=torch.int32)
        if not lengths.any():
            raise ValueError(f"mask of shape {tuple(mask.shape)} holds no token: there is nothing to attend to")
        self.shape = mask.shape
        self.cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0, dtype=torch.int32)])  # [B + 1] on the CPU
        self._tokens = here.flatten().nonzero().squeeze(1).to(mask.device)  # [T] in the flattened batch

    def pack(self, x: Tensor) -> Tensor:
        """The tokens of x (B, S, ...) as (T, ...), row by row. Differentiable: the gradient of padding is 0."""
        if x.shape[:2] != self.shape:
            raise ValueError(f"pack() needs the mask's {tuple(self.shape)} as first dimensions, got shape {tuple(x.shape)}")
        return x.flatten(0, 1).index_select(0, self._tokens.to(x.device))

    def pad(self, x: Tensor) -> Tensor:
        """Tokens (T, ...) back in their places as (B, S, ...), padding 0. Differentiable."""
        if x.shape[:1] != self._tokens.shape:
            raise ValueError(f"pad() needs the {len(self._tokens)} tokens of the mask as first dimension, got shape {tuple(x.shape)}")
        whole = x.new_zeros(self.shape[0] * self.shape[1], *x.shape[1:])
        return whole.index_copy(0, self._tokens.to(x.device), x).unflatten(0, self.shape)
