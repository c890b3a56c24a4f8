"""Arguments as flash-attn and ring-flash-attn take them, as this library takes them. Legend: T packed tokens, H heads, D head dim."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from operator import index

import torch
from torch import Tensor
from torch.nn.functional import pad

from distflash.parallel.documents import borders

Window = Sequence[int] | Tensor


def check_dims(dims: int, *stacked: str, **tensors: Tensor) -> None:
    """Raise unless all have that many dimensions, those of what is `stacked` among them."""
    for name, x in tensors.items():
        if x.dim() != dims:
            form = ", ".join(("batch", "tokens", *stacked, "heads", "head_dim")[-dims:])
            raise ValueError(f"{name} must be ({form}), got {tuple(x.shape)}")


def unpacked(dims: int, **tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors that are stacked in front of the heads of `qkv` or `kv`, which has that many dimensions."""
    ((name, x),) = tensors.items()
    check_dims(dims, str(len(name)), **tensors)
    if x.shape[-3] != len(name):
        raise ValueError(f"{name} must hold {len(name)} tensors along dim {dims - 3}, got {x.shape[-3]} (shape {tuple(x.shape)})")
    return x.unbind(-3)


def window_of(window_size: Window) -> tuple[int, int]:
    """(left, right); what is negative is unlimited."""
    if len(window_size) != 2:
        raise ValueError(f"window_size={window_size!r} must be two integers (left, right), negative for unlimited")
    left, right = (max(-1, index(w)) for w in window_size)
    return left, right


def cu_of(cu_seqlens: Tensor, max_seqlen: int, tokens: int, name: str = "") -> tuple[int, ...]:
    """Borders of documents as integers. Raises unless they lie in `tokens` and no document is longer than `max_seqlen`.

    Those on a GPU are waited for, at every call: not everything that writes a tensor counts as a new version of it (a broadcast does
    not), so that what was read before cannot be trusted. Borders may as well be on the CPU, where nothing waits.
    """
    cu = borders(cu_seqlens)
    if cu[-1] > tokens:
        raise ValueError(f"cu_seqlens{name} ends at {cu[-1]}, but there are {tokens} tokens: borders count tokens of the packed tensor")
    if (longest := _longest(cu)) > index(max_seqlen):
        raise ValueError(f"max_seqlen{name}={max_seqlen} must be at least the longest document's length, {longest}")
    return cu


@lru_cache(maxsize=256)
def _longest(cu: tuple[int, ...]) -> int:
    return max(end - start for start, end in pairwise(cu))


PADDING = 2  # documents that `with_padding` adds


@torch.library.custom_op("distflash::with_padding", mutates_args=())
def with_padding(cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, q_tokens: int, k_tokens: int) -> tuple[Tensor, Tensor]:
    """Borders of queries and keys on the CPU, followed by two more documents: the padding of queries, which sees no key, and that of keys.

    So padding is masked like everything else. An operator, because in a graph that is compiled borders are data. Raises as `cu_of`.
    """
    here = cu_q.cpu()  # once, where both are one tensor
    q, k = cu_of(here, max_q, q_tokens, "_q"), cu_of(here if cu_k is cu_q else cu_k, max_k, k_tokens, "_k")
    if len(q) != len(k):
        raise ValueError(f"cu_seqlens_q and cu_seqlens_k must hold as many documents, got {len(q) - 1} and {len(k) - 1}")
    first, second = (torch.tensor(cu, dtype=torch.int32, device="cpu") for cu in ((*q, q_tokens, q_tokens), (*k, k[-1], k_tokens)))
    return first, second


@with_padding.register_fake
def _(cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, q_tokens: int, k_tokens: int) -> tuple[Tensor, Tensor]:
    first, second = (cu.new_empty(cu.shape[0] + PADDING, dtype=torch.int32, device="cpu") for cu in (cu_q, cu_k))
    return first, second


def trimmed(x: Tensor, cu: tuple[int, ...]) -> Tensor:
    """x (T, ...) without the padding behind the last document."""
    return x if len(x) == cu[-1] else x[: cu[-1]]


def padded(out: Tensor, lse: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """out (T, ...) and lse (H, T) with as many rows that see no key behind them as make `rows`."""
    more = rows - len(out)
    return (out, lse) if not more else (pad(out, (0, 0, 0, 0, 0, more)), pad(lse, (0, more), value=float("-inf")))
