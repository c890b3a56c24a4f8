"""What a call would do, and why: kernel, wire, layout, order, work and traffic, counted from the plan's integers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from distflash.kernels.base import Problem, accumulator
from distflash.kernels.select import candidates, select
from distflash.parallel.mask import Mask, packed
from distflash.parallel.plan import Visit, alone
from distflash.parallel.sequence import ShardedSequence
from distflash.validate import window


@dataclass(frozen=True)
class Explanation:
    """One attention call of this rank. FLOPs and bytes are exact counts; print it for a summary."""

    kernel: str
    passed_over: tuple[tuple[str, str], ...]  # (kernel, reason), in the order in which they were tried
    scheme: str
    visits: int  # blocks of K/V that come by
    busy_visits: int  # of those, blocks of which some pair is kept
    tiles: int
    forward_flops: int
    backward_flops: int
    forward_bytes: int  # sent by this rank
    backward_bytes: int

    def __str__(self) -> str:
        rows = [f"kernel    {self.kernel}", *(f"          not {name}: {reason}" for name, reason in self.passed_over)]
        rows += [
            f"scheme    {self.scheme}",
            f"plan      {self.visits} visits, {self.busy_visits} of them with work, {self.tiles} tiles",
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
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    deterministic: bool = False,
    kernel: str = "auto",
) -> Explanation:
    """What `distflash.attention` would do with local shards of these shapes, (B, T, H, D) and (B, T, Hk, D), and why.

    Nothing is computed or sent. Raises ValueError where the call would.
    """
    batch, q_len, heads, head_dim = q_shape
    k_len, kv_heads = k_shape[1:3]
    device = torch.device(device) if device else seq.sp.device if seq else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    problem = Problem(device, dtype, heads, kv_heads, head_dim, head_dim, deterministic)
    chosen = select(kernel, problem).name
    tried = [] if kernel != "auto" else candidates(problem)
    passed_over = tuple((name, reason) for name, reason in tried[: [name for name, _ in tried].index(chosen) if tried else 0] if reason)
    left, right = window(causal, window_size)
    if seq is None:
        visits, scheme, share = alone(packed((0, q_len), (0, k_len), Mask(left, right))), "one device, nothing is sent", 1.0
    else:
        visits, sp = seq.visits(Mask(left, right, seq.cu_seqlens)), seq.sp
        scheme = f"{sp.layout}, {sp.order} of {sp.ring_wire.size}, ulysses {sp.ulysses}, over {sp.wire.name}"
        share = 1 / sp.ulysses
    area = sum(visit.tiles.area for visit in visits)
    forward = int(4 * batch * heads * share * head_dim * area)
    sent, sent_back = _ring_bytes(visits, batch * kv_heads * 2 * head_dim * share, dtype)
    if seq is not None:
        away = (1 - share) * batch * seq.local_length * head_dim * dtype.itemsize  # one head's local tokens that leave
        sent += int(away * (2 * heads + 2 * kv_heads))  # q, k, v there, out back
        sent_back += int(away * (2 * heads + 2 * kv_heads))  # dout there, dq, dk, dv back
    busy = sum(bool(visit.tiles) for visit in visits)
    tiles = sum(len(visit.tiles) for visit in visits)
    return Explanation(chosen, passed_over, scheme, len(visits), busy, tiles, forward, forward * 5 // 2, sent, sent_back)


def _ring_bytes(visits: Sequence[Visit], numbers_a_token: float, dtype: torch.dtype) -> tuple[int, int]:
    """(forward, backward) bytes of the ring: K and V each way round; in the backward their gradients come along."""
    moved = sum(visit.tiles.kv_len * len(visit.hops) for visit in visits) * numbers_a_token
    home = sum(visit.tiles.kv_len for visit in visits) * numbers_a_token if len(visits) > 1 else 0
    return int(moved * dtype.itemsize), int(moved * dtype.itemsize + home * accumulator(dtype).itemsize)
