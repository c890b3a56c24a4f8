"""Checks of what users pass in: one clear error each, with value, expectation and cure. Nothing here communicates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from numbers import Integral, Real

import torch
from torch import Tensor
from torch._C import _functorch  # type: ignore[attr-defined]  # it is there, its stub is not
from torch.autograd import forward_ad

from distflash.parallel.documents import borders
from distflash.parallel.mask import AnyMask, Mask
from distflash.parallel.sequence import ShardedSequence
from distflash.parallel.slices import Slices

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """True if there is a batch dimension."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.layout is not torch.strided or x.is_nested:
            got = f"a {'nested ' if x.is_nested else ''}tensor of {x.layout}"
            raise TypeError(f"{name} must be a dense tensor, got {got}: of a nested one pass values(), and offsets() as cu_seqlens_q")
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in (q, k, v)):
        raise ValueError("q, k or v carries a tangent, but attention has no forward-mode derivative: use torch.autograd.grad or backward()")
    if torch._C._are_functorch_transforms_active() and any(_functorch.is_functorch_wrapped_tensor(x) for x in (q, k, v)):
        raise ValueError(
            "q, k or v is inside a transform of torch.func (grad, vjp, vmap, ...), which cannot look into attention: "
            "use torch.autograd.grad or backward(), and instead of vmap the batch dimension"
        )
    dim, qs, ks, vs = q.dim(), q.shape, k.shape, v.shape
    if dim not in (3, 4) or not dim == k.dim() == v.dim():
        raise ValueError(f"q, k, v must be (batch, tokens, heads, head_dim), or (tokens, heads, head_dim) each, got {_shapes(q, k, v)}")
    if q.dtype not in _DTYPES or not q.dtype == k.dtype == v.dtype:
        dtypes = f"q {q.dtype}, k {k.dtype}, v {v.dtype}"
        raise TypeError(f"q, k, v must share one dtype of fp16, bf16, fp32, fp64, got {dtypes}: cast them")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k, v must be on one device, got q on {q.device}, k on {k.device}, v on {v.device}: move them")
    if ks[:-1] != vs[:-1]:
        raise ValueError(f"k and v must agree in all but the last dimension, got {_shapes(q, k, v)}")
    if qs[-1] != ks[-1] or qs[:-3] != ks[:-3]:
        raise ValueError(f"q and k must agree in batch and head_dim, got {_shapes(q, k, v)}")
    if 0 in (qs[-1], qs[-2], ks[-2], vs[-1], *qs[:-3]):
        raise ValueError(f"batch, heads and head_dim must not be 0, got {_shapes(q, k, v)}")
    if qs[-2] % ks[-2]:
        raise ValueError(f"query heads must be a multiple of key/value heads, got {qs[-2]} and {ks[-2]} ({_shapes(q, k, v)})")
    return dim == 4


def _shapes(q: Tensor, k: Tensor, v: Tensor) -> str:
    """In words, for an error only: they take longer than all checks."""
    return f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"


def check_sinks(sinks: Tensor | None, q: Tensor) -> None:
    """Raise unless `sinks` is None or one logit a query head, on q's device."""
    if sinks is None:
        return
    if not isinstance(sinks, Tensor) or not sinks.is_floating_point():
        raise TypeError(f"sinks must be a floating-point tensor, got {sinks.dtype if isinstance(sinks, Tensor) else type(sinks).__name__}")
    if sinks.shape != q.shape[-2:-1] or sinks.device != q.device:
        got = f"{tuple(sinks.shape)} on {sinks.device}"
        raise ValueError(f"sinks must hold one logit for each of the {q.shape[-2]} query heads, on {q.device}, got {got}")


def check_variants(softcap: float, slopes: Tensor | None, dropout_p: float, q: Tensor) -> tuple[str, ...]:
    """Which of softcap, alibi_slopes and dropout_p are asked for; raises unless each is legal."""
    if not _is_number(softcap) or softcap < 0:
        raise ValueError(f"softcap={softcap!r} must be a finite number, 0 (off) or more")
    if not _is_number(dropout_p) or not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p={dropout_p!r} must be a number, at least 0 (off) and less than 1")
    if slopes is not None:
        if not isinstance(slopes, Tensor) or slopes.dtype != torch.float32:
            got = slopes.dtype if isinstance(slopes, Tensor) else type(slopes).__name__
            raise TypeError(f"alibi_slopes must be a tensor of torch.float32, got {got}")
        heads, batch = q.shape[-2], q.shape[0] if q.dim() == 4 else 1
        if tuple(slopes.shape) not in ((heads,), (batch, heads)) or slopes.device != q.device:
            got = f"{tuple(slopes.shape)} on {slopes.device}"
            raise ValueError(f"alibi_slopes must be ({heads},) or ({batch}, {heads}), one for each query head, on {q.device}, got {got}")
        if slopes.requires_grad:
            raise ValueError("alibi_slopes get no gradient, but these require one: pass alibi_slopes.detach()")
    asked = {"softcap": softcap > 0, "alibi_slopes": slopes is not None, "dropout_p": dropout_p > 0}
    return tuple(name for name, on in asked.items() if on)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, Real)) and not isinstance(value, bool) and math.isfinite(value)  # numpy's numbers, too


def check_flags(**flags: bool) -> None:
    """Raise TypeError unless each is True or False: "false" in a config is neither."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name}={value!r} must be True or False")


def _is_integer(value: object) -> bool:
    return type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))


def window(causal: bool, window_size: tuple[int, int]) -> tuple[int | None, int | None]:
    """(left, right) with None for unlimited; causal is right = 0."""
    if not (isinstance(window_size, Sequence) and len(window_size) == 2 and all(_is_integer(w) and w >= -1 for w in window_size)):
        raise ValueError(f"window_size={window_size!r} must be two integers (left, right), each -1 (unlimited) or more")
    left, right = map(int, window_size)
    return None if left == -1 else left, 0 if causal else None if right == -1 else right


def sees(mask: Slices | None, causal: bool, window_size: tuple[int, int], cu_q: tuple[int, ...], cu_k: tuple[int, ...]) -> AnyMask:
    """What each query sees, as one mask: `mask` as it is, or else a window inside each document."""
    if mask is None:
        return Mask(*window(causal, window_size), cu_q)
    check_mask(mask, causal, window_size)
    _check_slices(mask, cu_q, cu_k)
    return mask


def check_mask(mask: Slices | None, causal: bool, window_size: tuple[int, int]) -> None:
    """Raise unless the window is legal, and `mask` is None or Slices that stand alone."""
    unlimited = window(causal, window_size) == (None, None)
    if mask is None:
        return
    if not isinstance(mask, Slices):
        raise TypeError(f"mask must be distflash.Slices, got {type(mask).__name__}: for blocks of 0 and 1 there is Slices.from_block_mask")
    if not unlimited:
        raise ValueError(
            f"mask={mask} says what each query sees, and so would causal={causal}, window_size={window_size}: "
            "leave these out and use slices of kind 'causal' or 'band'"
        )


@lru_cache(maxsize=256)
def _check_slices(mask: Slices, cu_q: tuple[int, ...], cu_k: tuple[int, ...]) -> None:
    mask.check(cu_q, cu_k)  # once, not in every layer


def scale_of(softmax_scale: float | Tensor | None, head_dim: int) -> float:
    """The factor of q·k: D ** -0.5 unless a finite number is given, or a 0-d tensor of one, which is waited for and gets no gradient."""
    if softmax_scale is None:
        return head_dim**-0.5
    if isinstance(softmax_scale, Tensor) and softmax_scale.dim() == 0 and not softmax_scale.is_complex():
        if softmax_scale.requires_grad:
            raise ValueError("softmax_scale gets no gradient, but this tensor requires one: multiply q by it, or pass its detach()")
        softmax_scale = softmax_scale.item()
    if not _is_number(softmax_scale):
        raise TypeError(f"softmax_scale={softmax_scale!r} must be None, a finite number, or a 0-d tensor of one")
    return float(softmax_scale)


def documents(cu_q: Tensor | None, cu_k: Tensor | None, q_len: int, k_len: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Borders of the documents of queries and keys; one document where none are given."""
    if not (q_len and k_len):
        raise ValueError(f"there must be at least one query and one key, got {q_len} and {k_len}")
    if cu_q is None:
        if cu_k is not None:
            raise ValueError("cu_seqlens_k was given without cu_seqlens_q: give both, or the latter alone if they are equal")
        return (0, q_len), (0, k_len)
    documents = borders(cu_q), borders(cu_q if cu_k is None else cu_k)
    for name, cu, length in zip("qk", documents, (q_len, k_len), strict=True):
        if cu[-1] != length:
            raise ValueError(
                f"cu_seqlens_{name} must end at the number of tokens, {length}, got {cu[-1]}: rows past the end would be undefined"
            )
    if len(documents[0]) != len(documents[1]):
        raise ValueError(
            f"cu_seqlens_q and cu_seqlens_k must hold as many documents, got {len(documents[0]) - 1} and {len(documents[1]) - 1}"
        )
    return documents


def check_shards(q: Tensor, k: Tensor, seq: ShardedSequence, cu_q: Tensor | None, cu_k: Tensor | None) -> None:
    """Raise unless q and k are this rank's shards of `seq`."""
    if not isinstance(seq, ShardedSequence):
        raise TypeError(f"seq must come from SequenceParallel.sequence(), got {type(seq).__name__}")
    if cu_q is not None or cu_k is not None:
        raise ValueError(
            "cu_seqlens_q and cu_seqlens_k do not go with seq: give the documents to SequenceParallel.sequence(cu_seqlens=...)"
        )
    for name, x in (("q", q), ("k", k)):
        if x.shape[-3] != seq.local_length:
            held = f"rank {seq.sp.rank} holds {seq.local_length} of the sequence's {seq.length}"
            raise ValueError(f"{name} has {x.shape[-3]} tokens, but {held}: use seq.shard()")
