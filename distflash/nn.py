"""Attention as a module, for models that are built of modules.

Legend: B batch, T local tokens, H query heads, Hk key/value heads, D head dim, Dv value head dim.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from distflash.api import attention
from distflash.parallel.sequence import ShardedSequence
from distflash.parallel.slices import Slices


class Attention(nn.Module):
    """`distflash.attention` with its options given once: `Attention(causal=True)(q, k, v, seq)`.

    Args:
        causal, window_size, softmax_scale, softcap, deterministic, kernel: as `distflash.attention` has them.
        dropout_p: as there, while the module is in training mode; 0 in eval mode.
        alibi_slopes: (H,) fp32, a buffer that is not saved. It moves with the module from device to device, and stays fp32.
        sinks: H for a learned attention sink a query head, the only parameter there can be (fp32, 0 at first); 0 is none. Its
            gradient on a rank is that of the rank's own tokens, as every parameter's.

    Raises where it is called what `distflash.attention` raises.
    """

    alibi_slopes: Tensor | None
    sinks: nn.Parameter | None

    def __init__(
        self,
        *,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softmax_scale: float | None = None,
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        sinks: int = 0,
        dropout_p: float = 0.0,
        deterministic: bool = False,
        kernel: str = "auto",
    ) -> None:
        super().__init__()
        self.causal, self.window_size, self.softmax_scale, self.softcap = causal, window_size, softmax_scale, softcap
        self.dropout_p, self.deterministic, self.kernel = dropout_p, deterministic, kernel
        self.register_buffer("alibi_slopes", alibi_slopes, persistent=False)
        self._slopes = alibi_slopes  # their numbers, for `_apply`
        self.register_parameter("sinks", nn.Parameter(torch.zeros(sinks)) if sinks else None)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        """Where to(), half() and to_empty() take the module, slopes go as they are: no cast rounds them, nothing leaves them unwritten."""
        super()._apply(*args, **kwargs)
        if self.alibi_slopes is not None and self._slopes is not None:
            self.alibi_slopes = self._slopes.to(self.alibi_slopes.device)
        return self

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        seq: ShardedSequence | None = None,
        *,
        mask: Slices | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(B, T, H, D), (B, T, Hk, D), (B, T, Hk, Dv) -> (B, T, H, Dv), with `return_lse` also lse (B, H, T)."""
        return attention(
            q, k, v, seq, causal=self.causal, window_size=self.window_size, softmax_scale=self.softmax_scale, softcap=self.softcap,
            alibi_slopes=self.alibi_slopes, sinks=self.sinks, dropout_p=self.dropout_p if self.training else 0.0, mask=mask,
            cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, deterministic=self.deterministic, return_lse=return_lse,
            kernel=self.kernel,
        )  # fmt: skip

    def extra_repr(self) -> str:
        given = {"causal": self.causal, "window_size": self.window_size, "softmax_scale": self.softmax_scale, "softcap": self.softcap}
        given |= {"sinks": 0 if self.sinks is None else len(self.sinks), "dropout_p": self.dropout_p, "kernel": self.kernel}
        return ", ".join(f"{name}={value}" for name, value in given.items())
