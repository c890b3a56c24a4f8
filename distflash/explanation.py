"""What a call would do, and why: kernel, wire, layout, order, work and traffic, counted from the plan's integers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distflash.kernels.base import Problem, accumulator
from distflash.kernels.select import candidates, select
from distflash.parallel.mask import packed
from distflash.parallel.plan import Visit, alone
from distflash.parallel.sequence import ShardedSequence
from distflash.parallel.slices import Slices
from distflash.parallel.ulysses import Ulysses
from distflash.validate import check_shards, check_tensors, check_variants, sees


@dataclass(frozen=True)
class Explanation:
    """One attention call of this rank. FLOPs and bytes are exact counts (without the padding inside messages).

    Print it for a summary."""

    kernel: str
    passed_over: tuple[tuple[str, str], ...]  # (kernel, reason), in the order in which they were tried
    scheme: str
    visits: int  # steps at which this rank computes or exchanges something
    busy_visits: int  # of those, steps at which it computes: blocks of which some pair is kept
    tiles: int
    pairs_kept: int  # (query, key) pairs that the mask keeps of this rank's queries (its ring's, under Ulysses) and all keys
    pairs: int  # and how many there are
    forward_flops: int
    backward_flops: int
    forward_bytes: int  # sent by this rank
    backward_bytes: int

    def __str__(self) -> str:
        rows = [f"kernel    {self.kernel}", *(f"          not {name}: {reason}" for name, reason in self.passed_over)]
        rows += [
            f"scheme    {self.scheme}",
            f"plan      {self.visits} visits, {self.busy_visits} of them with work, {self.tiles} tiles",
            f"mask      keeps {self.pairs_kept} of {self.pairs} pairs of a query and a key, {self.pairs_kept / max(self.pairs, 1):.2%}",
            f"work      {self.forward_flops:.3e} FLOPs forward, {self.backward_flops:.3e} backward",
            f"traffic   {self.forward_bytes / 2**20:.1f} MiB sent forward, {self.backward_bytes / 2**20:.1f} MiB backward",
        ]
        return "\n".join(rows)


def explain(
    q_shape: Sequence[int],
    k_shape: Sequence[int],
    seq: ShardedSequence | None = None,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    mask: Slices | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    deterministic: bool = False,
    kernel: str = "auto",
) -> Explanation:
    """What `distflash.attention` would do with local shards of these shapes, (B, T, H, D) and (B, T, Hk, D), and why.

    Nothing is computed or sent. Raises ValueError where the call would.
    """
    q, k = torch.empty(tuple(q_shape), dtype=dtype, device="meta"), torch.empty(tuple(k_shape), dtype=dtype, device="meta")
    if not check_tensors(q, k, k):
        raise ValueError(f"explain() takes shapes with a batch dimension, got {tuple(q_shape)} and {tuple(k_shape)}")
    if seq is not None:
        check_shards(q, k, seq, None, None)
    batch, q_len, heads, head_dim = q_shape
    k_len, kv_heads = k_shape[1:3]
    device = torch.device(device) if device else seq.sp.device if seq else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    slopes = None if alibi_slopes is None else alibi_slopes.detach().to("meta")
    asked = check_variants(softcap, slopes, dropout_p, q)
    problem = Problem(device, dtype, heads, kv_heads, head_dim, head_dim, deterministic, asked)
    chosen = select(kernel, problem).name
    tried = [] if kernel != "auto" else candidates(problem)
    passed_over = tuple((name, reason) for name, reason in tried[: [name for name, _ in tried].index(chosen) if tried else 0] if reason)
    if seq is None:
        cu = (0, q_len), (0, k_len)
        ulysses, visits, scheme = None, alone(packed(*cu, sees(mask, causal, window_size, *cu))), "one device, nothing is sent"
        all_keys = k_len
    else:
        sp, all_keys = seq.sp, seq.length
        visits = seq.visits(sees(mask, causal, window_size, seq.cu_seqlens, seq.cu_seqlens))
        ulysses = seq.head_exchange(heads, kv_heads)
        scheme = f"{sp.layout}, {sp.order} of {sp.ring_wire.size}, ulysses {sp.ulysses}, over {sp.wire.name}"
    mine, kv_mine = heads, kv_heads
    sent = sent_back = 0
    if ulysses is not None:
        me = ulysses.wire.rank
        mine, kv_mine = len(ulysses.heads[me]), len(ulysses.kv_heads[me])
        sent, sent_back = (batch * n for n in _ulysses_bytes(ulysses, head_dim, dtype))
    ring, ring_back = _ring_bytes(visits, batch * kv_mine * 2 * head_dim, dtype)
    sent, sent_back = sent + ring, sent_back + ring_back
    kept = sum(visit.tiles.area for visit in visits)
    forward = 4 * batch * mine * head_dim * kept
    busy = sum(bool(visit.tiles) for visit in visits)
    tiles = sum(len(visit.tiles) for visit in visits)
    pairs = visits[0].tiles.q_len * all_keys
    return Explanation(chosen, passed_over, scheme, len(visits), busy, tiles, kept, pairs, forward, forward * 5 // 2, sent, sent_back)


def _ring_bytes(visits: Sequence[Visit], numbers_a_token: int, dtype: torch.dtype) -> tuple[int, int]:
    """(forward, backward) bytes of the ring: K and V each way round; in the backward their gradients come along."""
    own = visits[0].tiles.kv_len
    moved = home = 0
    for visit in visits:
        block = visit.tiles.kv_len
        moved += sum(block * (hop.onward is not None) + own * (hop.own is not None) for hop in visit.hops) * numbers_a_token
        home += block * (visit.home.dest is not None) * numbers_a_token
    return moved * dtype.itemsize, moved * dtype.itemsize + home * accumulator(dtype).itemsize


def _ulysses_bytes(ulysses: Ulysses, head_dim: int, dtype: torch.dtype) -> tuple[int, int]:
    """(forward, backward) bytes of the all-to-alls: q, k, v there, out and lse back; dout and delta there, dq, dk, dv back."""
    me, wide = ulysses.wire.rank, accumulator(dtype).itemsize
    row, kv_row = head_dim * dtype.itemsize, 2 * head_dim * dtype.itemsize  # of one token and head
    home_row = 2 * head_dim * (wide if ulysses.shared else dtype.itemsize)  # dk and dv of a shared head travel unrounded
    forward = backward = 0
    for rank in range(ulysses.wire.size):
        if rank != me:
            here, there = ulysses.lengths[me], ulysses.lengths[rank]
            forward += here * (len(ulysses.heads[rank]) * row + len(ulysses.kv_heads[rank]) * kv_row)
            forward += there * len(ulysses.heads[me]) * (row + wide)
            backward += here * len(ulysses.heads[rank]) * (row + wide)
            backward += there * (len(ulysses.heads[me]) * row + len(ulysses.kv_heads[me]) * home_row)
    return forward, backward
