"""What a call would do, and why: kernel, wire, layout, order, work and traffic, counted from the plan's integers; predicted time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from distflash.cost.auto import NIC
from distflash.cost.copied import Copying, carried
from distflash.cost.devices import find, network
from distflash.cost.memory import Copies, head_windows, least, peak, staging, windows
from distflash.cost.time import Cluster, Rank
from distflash.cost.traffic import PASSES, Scheme, Shape, Share
from distflash.kernels.base import Counted, Problem
from distflash.kernels.select import candidates, select
from distflash.parallel.layout import gathered, lengths
from distflash.parallel.mask import packed
from distflash.parallel.plan import alone
from distflash.parallel.planning import Plans
from distflash.parallel.sequence import ShardedSequence
from distflash.parallel.slices import Slices
from distflash.validate import check_flags, check_shards, check_tensors, check_variants, sees


@dataclass(frozen=True)
class Explanation:
    """One attention call of this rank. FLOPs and bytes sent are exact counts, seconds and the peak are the model of docs/io-model.md.

    Print it for a summary."""

    kernel: str
    passed_over: tuple[tuple[str, str], ...]  # (kernel, reason), in the order in which they were tried
    scheme: str
    why: str  # this scheme
    visits: int  # steps at which this rank computes or exchanges something
    busy_visits: int  # of those, steps at which it computes: blocks of which some pair is kept
    tiles: int
    pairs_kept: int  # (query, key) pairs that the mask keeps of this rank's queries (its ring's, under Ulysses) and all keys
    pairs: int  # and how many there are
    forward_flops: int
    backward_flops: int
    forward_bytes: int  # sent by this rank; where blocks are copied, what it copies: K and V of others, their gradients, heads of Ulysses
    backward_bytes: int
    peak_bytes: int  # of memory above q, k, v and dout, at the peak of forward and backward
    window_bytes: int  # of memory that the others reach, where blocks are copied: beside that, and kept between calls
    staging_bytes: int  # that K and V of others take at most while they are on their way, in the peak
    staging_limit: int | None  # and how many they may, by `SequenceParallel(staging=...)`; None is any number
    forward_seconds: float | None  # None: nothing is known of this device
    backward_seconds: float | None
    exposed_seconds: float | None  # of both, those in which only communication goes on
    basis: str  # what the seconds rest on, or why there are none

    def __str__(self) -> str:
        rows = [f"kernel    {self.kernel}", *(f"          not {name}: {reason}" for name, reason in self.passed_over)]
        rows += [
            f"scheme    {self.scheme}",
            f"          why: {self.why}",
            f"plan      {self.visits} visits, {self.busy_visits} of them with work, {self.tiles} tiles",
            f"mask      keeps {self.pairs_kept} of {self.pairs} pairs of a query and a key, {self.pairs_kept / max(self.pairs, 1):.2%}",
            f"work      {self.forward_flops:.3e} FLOPs forward, {self.backward_flops:.3e} backward",
            f"traffic   {self.forward_bytes / 2**20:.1f} MiB {'copied' if self.window_bytes else 'sent'} forward, "
            f"{self.backward_bytes / 2**20:.1f} MiB backward",
            f"memory    {self.peak_bytes / 2**20:.1f} MiB above the inputs at the peak, {self.window_bytes / 2**20:.1f} MiB of windows",
            f"staging   {self.staging_bytes / 2**20:.1f} MiB of that for blocks of other ranks, limit "
            + ("none" if self.staging_limit is None else f"{self.staging_limit / 2**20:.1f} MiB"),
        ]
        if self.forward_seconds is None or self.backward_seconds is None or self.exposed_seconds is None:
            rows.append(f"time      no prediction: {self.basis}")
        else:
            both = f"{1e3 * self.forward_seconds:.3f} ms forward, {1e3 * self.backward_seconds:.3f} ms backward"
            rows.append(f"time      {both}, {1e3 * self.exposed_seconds:.3f} ms of them exposed communication ({self.basis})")
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
    check_flags(causal=causal, deterministic=deterministic)
    batch, q_len, heads, head_dim = q_shape
    k_len, kv_heads = k_shape[1:3]
    device = torch.device(device) if device else seq.sp.device if seq else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    slopes = None if alibi_slopes is None else alibi_slopes.detach().to("meta")
    asked = check_variants(softcap, slopes, dropout_p, q)
    problem = Problem(device, dtype, heads, kv_heads, head_dim, head_dim, deterministic, asked)
    found = select(kernel, problem)
    chosen, scratch = found.name, partial(found.scratch, problem) if isinstance(found, Counted) else least
    tried = [] if kernel != "auto" else candidates(problem)
    passed_over = tuple((name, reason) for name, reason in tried[: [name for name, _ in tried].index(chosen) if tried else 0] if reason)
    shape = Shape(heads, kv_heads, head_dim, head_dim, batch, dtype.itemsize)
    if seq is None:
        cu = (0, q_len), (0, k_len)
        visits, scheme, spans = alone(packed(*cu, sees(mask, causal, window_size, *cu))), Scheme("contiguous", "ring", 1, 1, 1), ()
        plans, wire = Plans(visits, visits, visits, None), "p2p"
        rank, all_keys, how, why = 0, k_len, "one device, nothing is sent", "no sequence was given"
    else:
        sp, rank, all_keys, why = seq.sp, seq.sp.rank, seq.length, seq.why
        visible, spans = sees(mask, causal, window_size, seq.cu_seqlens, seq.cu_seqlens), gathered(seq.layout, sp.ulysses)
        plans, wire = seq.plans(visible, shape, deterministic), sp.wire_name
        scheme = Scheme(sp.layout, sp.order, sp.ulysses, sp.size, sp.wire.per_node)
        how = f"{sp.layout}, {sp.order} of {sp.ring_wire.size}, ulysses {sp.ulysses}, over {sp.wire_name}"
    mine, visits = Share(scheme, spans, shape, rank, plans.sent), plans.forward
    reach = wire == "symmetric"
    kept_for_others = windows(mine.shape, max(lengths(spans)), scheme.ring) + head_windows(mine) if reach else 0
    sent = _carried(mine, plans.copies)
    kept = sum(visit.tiles.area for visit in visits)
    forward, backward, exposed, basis = _predicted(mine, device, wire, plans.copies)
    return Explanation(
        chosen, passed_over, how, why, len(visits), sum(bool(visit.tiles) for visit in visits), sum(len(visit.tiles) for visit in visits),
        kept, visits[0].tiles.q_len * all_keys, mine.shape.flops("forward") * kept, mine.shape.flops("backward") * kept,
        sent["forward"], sent["backward"], max(peak(mine, plans.copies, reach, scratch).values()), kept_for_others,
        staging(mine, plans.copies), plans.limit, forward, backward, exposed, basis,
    )  # fmt: skip


def _carried(mine: Share, copies: Copies | None) -> dict[str, int]:
    """By pass: bytes that a rank sends, or copies."""
    if copies is None:
        return {pass_: both.sent.total() for pass_, both in mine.traffic().items()}
    ring = {pass_: carried(visits, mine.shape, pass_) for pass_, visits in zip(PASSES, copies, strict=True)}
    return {pass_: nbytes + sum(out for out, _ in mine.swapped(pass_).values()) for pass_, nbytes in ring.items()}


def _predicted(
    mine: Share, device: torch.device, wire: str, copies: Copies | None = None
) -> tuple[float | None, float | None, float | None, str]:
    """(seconds forward, backward, of these exposed; what they rest on), or None three times and why."""
    scheme = mine.scheme
    if device.type != "cuda":
        return None, None, None, f"rates of this {device.type} are not known, `distflash doctor --measure` tells them"
    try:
        known = find(torch.cuda.get_device_name(device))
    except ValueError as error:
        return None, None, None, str(error)
    link = next((name for name in known.wires if wire.startswith(name)), None)
    if link is None or mine.shape.itemsize != known.itemsize:
        rates = f"{known.name}'s rates are of {8 * known.itemsize}-bit inputs over {', '.join(known.wires)}"
        return None, None, None, f"{rates}, this is {8 * mine.shape.itemsize} over {wire}"
    cluster = Cluster(known, scheme.ranks, scheme.per_node, network(NIC), link)
    passes = (Rank(mine, cluster) if copies is None else Copying(mine, cluster, copies)).passes()
    basis = known.basis + (f"; {NIC} Gbit/s between hosts assumed" if scheme.ranks > scheme.per_node else "")
    return passes["forward"].seconds, passes["backward"].seconds, sum(one.exposed for one in passes.values()), basis
