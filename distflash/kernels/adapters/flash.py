"""FlashAttention-2, -3 and -4: modules that are imported when they are first used."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from distflash.kernels.adapters.adapter import Adapter
from distflash.kernels.adapters.pieces import Window

_ATEN = torch.ops.aten


class Fa2Kernel(Adapter):
    """FlashAttention-2: the flash_attn package (2.7 or newer) where it is installed, else the one inside PyTorch."""

    name = "fa2"

    def _missing(self) -> str | None:
        try:
            found = version("flash_attn") if _package() else "2.7"
        except PackageNotFoundError:
            return "there is a module flash_attn that is no installed package: which version it stands for is not known"
        if tuple(map(int, found.split(".")[:2])) < (2, 7):
            return f"flash_attn {found} is installed, 2.7 or newer is needed: upgrade it, or remove it to use PyTorch's own"
        return None

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, keep: Window) -> tuple[Tensor, Tensor]:
        if package := _package():
            out, lse, *_ = package._flash_attn_forward(q, k, v, 0.0, scale, keep.causal, *_minus(keep), 0.0, None, False)
            return out, lse
        left, right = _minus(keep)
        out, lse, *_ = _ATEN._flash_attention_forward(
            q, k, v, None, None, q.shape[1], k.shape[1], 0.0, keep.causal, False,
            scale=scale, window_size_left=left, window_size_right=right,
        )  # fmt: skip
        return out, lse

    def _gradients(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, keep: Window
    ) -> tuple[Tensor, Tensor, Tensor]:
        if package := _package():
            dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
            package._flash_attn_backward(dout, q, k, v, out, lse, dq, dk, dv, 0.0, scale, keep.causal, *_minus(keep), 0.0, None, False)
            return dq, dk, dv
        left, right = _minus(keep)
        rng, unused = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)  # of dropout
        return _ATEN._flash_attention_backward(
            dout, q, k, v, out, lse, None, None, q.shape[1], k.shape[1], 0.0, keep.causal, rng, unused,
            scale=scale, window_size_left=left, window_size_right=right,
        )  # fmt: skip


def _package() -> Any:
    return import_module("flash_attn.flash_attn_interface") if _installed("flash_attn.flash_attn_interface") else None


class Fa3Kernel(Adapter):
    """FlashAttention-3, from its module flash_attn_interface (built from source, or a wheel that holds the same names)."""

    name = "fa3"
    capability = (9, 0)

    def _missing(self) -> str | None:
        if not _installed("flash_attn_interface"):
            return "FlashAttention-3 is not installed: there is no module flash_attn_interface"
        flags = import_module("flash_attn_config").CONFIG["build_flags"] if _installed("flash_attn_config") else {}
        if flags.get("FLASHATTENTION_DISABLE_BACKWARD"):
            return "this build of FlashAttention-3 has no backward: build it with one"
        return None

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, keep: Window) -> tuple[Tensor, Tensor]:
        left, right = _minus(keep)
        attend = import_module("flash_attn_interface")._flash_attn_forward
        out, lse, *_ = attend(q, k, v, softmax_scale=scale, causal=keep.causal, window_size_left=left, window_size_right=right)
        return out, lse

    def _gradients(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, keep: Window
    ) -> tuple[Tensor, Tensor, Tensor]:
        left, right = _minus(keep)
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        import_module("flash_attn_interface")._flash_attn_backward(
            dout, q, k, v, out, lse, dq=dq, dk=dk, dv=dv, softmax_scale=scale, is_causal=keep.causal,
            window_size_left=left, window_size_right=right,
        )  # fmt: skip
        return dq, dk, dv


class Fa4Kernel(Adapter):
    """FlashAttention-4 (flash_attn.cute, CuTe DSL): compiled at the first call of each kind."""

    name = "fa4"
    capability = (9, 0)

    def _missing(self) -> str | None:
        return None if _installed("flash_attn.cute.interface") else "FlashAttention-4 is not installed: there is no module flash_attn.cute"

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, keep: Window) -> tuple[Tensor, Tensor]:
        attend = import_module("flash_attn.cute.interface")._flash_attn_fwd
        out, lse, *_ = attend(q, k, v, softmax_scale=scale, causal=keep.causal, return_lse=True, **_named(keep))
        return out, lse

    def _gradients(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, keep: Window
    ) -> tuple[Tensor, Tensor, Tensor]:
        gradients = import_module("flash_attn.cute.interface")._flash_attn_bwd
        dq, dk, dv, *_ = gradients(q, k, v, out, dout, lse, softmax_scale=scale, causal=keep.causal, **_named(keep))
        return dq, dk, dv


def _minus(keep: Window) -> tuple[int, int]:
    """(left, right) with -1 for unlimited; a causal piece says so by its flag."""
    left, right = (-1 if w is None or keep.causal else w for w in keep)
    return left, right


def _named(keep: Window) -> dict[str, int | None]:
    return {} if keep.causal else {"window_size_left": keep.left, "window_size_right": keep.right}


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package
        return False
