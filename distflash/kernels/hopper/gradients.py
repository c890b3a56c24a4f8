"""Backward, host side: one pass of five matmuls that adds up dQ as programs finish, or two passes of seven, bit-equal from run to run.

Legend: B batch, Tq / Tk local queries / keys, H query heads, Hk key/value heads, D, Dv head dims, padded to a pair of tiles.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distflash.kernels.hopper.backward import backward_kernel
from distflash.kernels.hopper.configs import NONE, BackwardConfig, KeysConfig, RolesConfig, RowsConfig
from distflash.kernels.hopper.dkv import dkv_kernel
from distflash.kernels.hopper.dq import dq_kernel
from distflash.kernels.hopper.last_round import LastRound, last_round
from distflash.kernels.hopper.schedule import schedule
from distflash.kernels.hopper.stats import stats_kernel
from distflash.kernels.hopper.tma import descriptor, heads_at_once, launch, legal, sms, vector
from distflash.tile import Tiles

_LOG2E = 1.4426950408889634
_TILE = 128  # rows of the largest tile of queries, in any configuration


@dataclass(frozen=True)
class _Inputs:
    """What every pass reads: tensors as TMA can read them, and the statistics of stats.py."""

    q: Tensor  # [B, Tq, H, D]
    k: Tensor  # [B, Tk, Hk, D]
    v: Tensor  # [B, Tk, Hk, Dv]
    dout: Tensor  # [B, Tq, H, Dv]
    nlse: Tensor  # [B * H, _padded(Tq)] fp32, as ndelta
    ndelta: Tensor
    tiles: Tiles
    sides: tuple[int, int]  # of the tiles that hold D and Dv
    scales: tuple[float, float, float]  # in base 2, as it is, and folded into dS: 1 in fp16, which would lose the small dS


def backward(
    config: BackwardConfig,
    sides: tuple[int, int],
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    tiles: Tiles,
    scale: float,
    *,
    dq: Tensor | None = None,
    dq_dtype: torch.dtype | None = None,
    dkv_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv as Kernel.backward; dq in place where it is contiguous and stays fp32. `config` is that of tiles of `sides`."""
    dq_dtype, dkv_dtype = dq_dtype or torch.float32, dkv_dtype or torch.float32
    if q.numel() == 0 or k.numel() == 0 or len(tiles) == 0:
        dk, dv = (torch.zeros(t.shape, dtype=dkv_dtype, device=t.device) for t in (k, v))
        return (torch.zeros(q.shape, dtype=torch.float32, device=q.device) if dq is None else dq.contiguous()).to(dq_dtype), dk, dv
    if scale <= 0:  # as in forward: a negated or zero query with a positive scale, and dq the other way round
        side, positive = (q.neg(), -scale) if scale < 0 else (torch.zeros_like(q), 1.0)
        step, dk, dv = backward(config, sides, dout, side, k, v, lse, delta, tiles, positive, dkv_dtype=dkv_dtype)
        step = step.neg_() if scale < 0 else step.zero_()
        return (step if dq is None else step.add_(dq)).to(dq_dtype), dk, dv
    scale = float(scale)  # an int of 1 would be compiled in
    fold = scale if q.dtype == torch.bfloat16 else 1.0
    x = _Inputs(
        legal(q), legal(k), legal(v), legal(dout.to(q.dtype)), *_stats(lse, delta, fold), tiles, sides, (scale * _LOG2E, scale, fold)
    )  # fmt: skip
    if config.one_pass:
        dq = torch.zeros(q.shape, dtype=torch.float32, device=q.device) if dq is None else dq.contiguous()
        into = legal(dq)
        dk, dv = _keys(config.one_pass, x, dkv_dtype, into)
        return into.to(dq_dtype).contiguous(), dk, dv
    dk, dv = _roles(config.dkv, x, dkv_dtype) if isinstance(config.dkv, RolesConfig) else _keys(config.dkv, x, dkv_dtype)
    return _rows(config.dq, x, dq, dq_dtype), dk, dv


def _keys(config: KeysConfig, x: _Inputs, dtype: torch.dtype, dq: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """dk and dv, 128 keys a program; adds to dq where it is given."""
    (B, Tq, H, D), (_, Tk, Hk, Dv), m, side = x.q.shape, x.v.shape, config.block_m, x.sides[0]
    work = schedule(x.tiles, config.keys, m, x.q.device, transposed=True)
    items, per = work.busy * B * Hk, heads_at_once(B * Hk, 8 * Tq * D * H // Hk)
    dk, dv = _fresh(x, dtype, work.idle or items == 0)
    staged = config.staged and dtype == x.q.dtype and all(n % 8 == 0 for n in (D, Dv))  # lines of 16 bytes, as TMA writes them
    # without dq, bits do not depend on how a mask is cut into visits: there every program is whole
    rest = None if dq is None or items == 0 else last_round(x.tiles, config.keys, work.busy, per, B, Hk, H // Hk, sms(x.q.device))
    if items:
        launch(
            backward_kernel, (items - (rest.programs if rest else 0),), *_key_descriptors(config, x, work.reach),
            vector(x.ndelta, m) if dq is None else descriptor(dq, work.reach, 64, 64),
            *((descriptor(t, Tk, 64, side) if staged else None) for t in (dk, dv)),
            dk, dv, work.blocks, work.segments, *x.scales,
            work.busy, per, Hk, H // Hk, x.nlse.shape[1], Tk,
            m, side, D, Dv, config.stages, config.overlap, config.late, x.q.dtype == torch.bfloat16,
            NONE if dq is None else config.dq, config.kv_regs, config.prompt, config.named, config.hide,
            *config.regs,
            num_warps=4, maxnreg=config.max_regs,
        )  # fmt: skip
    if rest and dq is not None:
        parts = _keys(config, _part(x, rest), torch.float32, rest.queries(dq, H // Hk))
        for whole, part in zip((dk, dv), parts, strict=True):
            rest.here(whole).copy_(part.sum(0))
    return dk, dv


def _part(x: _Inputs, rest: LastRound) -> _Inputs:
    """What a last round reads, [P, R or its keys, heads, D or Dv]."""
    B, group = x.q.shape[0], x.q.shape[2] // x.k.shape[2]
    q, dout = (rest.queries(t, group) for t in (x.q, x.dout))
    k, v = (legal(rest.repeated(t)) for t in (x.k, x.v))
    nlse, ndelta = (rest.stats(t, B, group) for t in (x.nlse, x.ndelta))
    return replace(x, q=q, k=k, v=v, dout=dout, nlse=nlse, ndelta=ndelta, tiles=rest.tiles)


def _roles(config: RolesConfig, x: _Inputs, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """dk and dv, 64 keys a program."""
    (B, Tq, H, D), (_, Tk, Hk, Dv) = x.q.shape, x.v.shape
    work = schedule(x.tiles, config.keys, config.block_m, x.q.device, transposed=True)
    items = work.busy * B * Hk
    dk, dv = _fresh(x, dtype, work.idle or items == 0)
    if items:
        launch(
            dkv_kernel, (items,), *_key_descriptors(config, x, work.reach), dk, dv, work.blocks, work.segments, *x.scales,
            work.busy, heads_at_once(B * Hk, 2 * Tq * (D + Dv) * H // Hk), Hk, H // Hk, x.nlse.shape[1], Tk,
            config.block_m, *x.sides, D, Dv, config.stages, x.q.dtype == torch.bfloat16, *config.regs,
            num_warps=4, maxnreg=config.max_regs,
        )  # fmt: skip
    return dk, dv


def _rows(config: RowsConfig, x: _Inputs, dq: Tensor | None, dtype: torch.dtype) -> Tensor:
    """dq in `dtype`; the running one, where it is given, is added to in place and converted after."""
    (B, Tq, H, D), (_, _, Hk, Dv), (side, side_v) = x.q.shape, x.v.shape, x.sides
    work = schedule(x.tiles, 128, config.block_n, x.q.device)
    items = work.busy * B * H
    if dq is None:
        out = (torch.zeros if work.idle or items == 0 else torch.empty)(x.q.shape, dtype=dtype, device=x.q.device)
    else:
        out = dq.contiguous()
    if items:
        programs = min(items, sms(x.q.device))
        order = work.order(B * H, heads_at_once(B * H, 2 * x.tiles.kv_len * (D + Dv) * Hk // H), programs)
        launch(
            dq_kernel, (programs,), descriptor(x.q, Tq, 64, side), descriptor(x.k, work.reach, config.block_n, side),
            descriptor(x.v, work.reach, config.block_n, side_v), descriptor(x.dout, Tq, 64, side_v),
            out, x.nlse, x.ndelta, work.blocks, work.segments, order, *x.scales[:2],
            order.shape[1], H, H // Hk, Tq,
            config.block_n, side, side_v, D, config.stages, config.v_stages, dq is not None, x.q.dtype == torch.bfloat16, *config.regs,
            num_warps=4, maxnreg=config.max_regs,
        )  # fmt: skip
    return out.to(dtype)


def _key_descriptors(config: KeysConfig | RolesConfig, x: _Inputs, reach: int) -> tuple:
    """q, k, v, dout, nlse and ndelta as the kernels with stationary keys read them."""
    (side, side_v), m, Tk = x.sides, config.block_m, x.k.shape[1]
    return (
        descriptor(x.q, reach, m, side), descriptor(x.k, Tk, config.keys, side), descriptor(x.v, Tk, config.keys, side_v),
        descriptor(x.dout, reach, m, side_v), vector(x.nlse, m), vector(x.ndelta, m),
    )  # fmt: skip


def _fresh(x: _Inputs, dtype: torch.dtype, zeros: bool) -> tuple[Tensor, Tensor]:
    """dk and dv, contiguous: zeros where no program writes some of them."""
    dk, dv = ((torch.zeros if zeros else torch.empty)(t.shape, dtype=dtype, device=t.device) for t in (x.k, x.v))
    return dk, dv


def scratch(config: BackwardConfig, lines: int, tokens: int, head_dim: int, alone: bool) -> int:
    """As `Counted.scratch`: the statistics, and where dq is added up in one pass, the fp32 of which the result is a cast. Not counted is
    what a split last round takes for a moment: at most 6 * 128 * (D + Dv) bytes a multiprocessor, 26 MB on an H100 at D = 128."""
    return 4 * lines * (2 * _padded(tokens) + tokens * head_dim * (alone and config.one_pass is not None))


def _padded(tokens: int) -> int:
    """Elements from a line of statistics to the next: a multiple of 16 bytes, as TMA reads nothing that starts elsewhere, and the last
    tile's rows past `tokens` are not the next line's: P is 0 there, but 0 times the NaN of another head is NaN."""
    return -(-(tokens + _TILE - 1) // 4) * 4  # dq.py computes it, too


def _stats(lse: Tensor, delta: Tensor, fold: float) -> tuple[Tensor, Tensor]:
    """-lse in base 2 and -delta * fold, [B * H, _padded(T)]."""
    B, H, T = lse.shape
    pad = _padded(T)
    assert B * H * pad < 1 << 31, "the kernels read the lines as one vector, with 32-bit coordinates"
    nlse, ndelta = (torch.empty((B * H, pad), dtype=torch.float32, device=lse.device) for _ in range(2))
    launch(stats_kernel, (B * H, -(-pad // 1024)), lse.contiguous(), delta.contiguous(), nlse, ndelta, fold, T, pad, 1024)
    return nlse, ndelta
