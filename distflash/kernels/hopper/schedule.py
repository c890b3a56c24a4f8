"""A tile table as the work list of a Hopper kernel: everything a block can know before the launch, so that no program computes it.

    blocks    [n, 4] int32: (start, stop, first segment, segments)    a run of at most `rows` rows, all of them busy
    segments  [m, 8] int32: (first, limit, lo, hi, left, inner, total, start)    `total` tiles of `width` columns from column `first`;
              (i, j) is kept iff lo <= j - i <= hi and start <= j < limit; tiles left .. left + inner - 1 need no mask
    order     [programs, rounds, 16] int32: each program's items in turn, all that a kernel must know of one in one place: (block, head; its
              block's start, stop, first segment, segments; items of the program; bits: c, if the c-th 64 rows keep nothing of the tile
              that is worked on first, 8 + c, if they keep all of the last masked one; its first segment), block -1 where it has none left

Row blocks of queries against columns of keys, or transposed (blocks of keys against queries, bands on i - j, `first` a multiple of 4:
TMA reads an innermost coordinate on 16 bytes only, and stops the kernel with an illegal instruction elsewhere). Own table beside
kernels/table.py: a block's tile counts differ from entry to entry here, and a tile starts at the first column that the block reaches.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from distflash.kernels.table import span
from distflash.tile import Tiles

_EXTRA = 2.0  # what an item costs beside its tiles, in tiles: its first Q Kᵀ and softmax, its last P V and its way out


@dataclass(frozen=True)
class Schedule:
    """Blocks sorted longest first; `idle` if some row is in none; no entry reaches past column `reach`."""

    blocks: Tensor
    segments: Tensor
    busy: int
    idle: bool
    reach: int
    work: np.ndarray  # [busy] tiles of each block
    lines: np.ndarray  # [busy, 13] of each block what `order` says of it: start, stop, first segment, segments; bits; its first segment
    left: bool  # whether some row's columns begin later than its segment does
    _orders: dict[tuple[int, int, int], Tensor] = field(default_factory=dict, repr=False)

    def order(self, heads: int, at_once: int, programs: int) -> Tensor:
        """Every block of `heads` heads dealt out to `programs` programs: at_once heads at a time, for L2; of these the longest blocks
        first, each to the program with the least work so far.

        What a grid of one program an item gets from the hardware, without its start and end an item. Dealing out in fixed rounds
        instead leaves one program with half as much again as the mean, where the heads of a group do not fill the rounds.
        """
        key = (heads, at_once, programs)
        if key not in self._orders:
            dealt = _deal(self.work, *key)  # [programs, rounds, 2]
            items = np.broadcast_to((dealt[..., :1] >= 0).sum(1, keepdims=True), (*dealt.shape[:2], 1))
            lines = self.lines[np.maximum(dealt[..., 0], 0)]
            order = np.concatenate([dealt, lines[..., :4], items, lines[..., 4:]], 2)
            self._orders[key] = _uploaded(order, self.blocks.device)
        return self._orders[key]


_HELD: WeakKeyDictionary[Tiles, dict[tuple, Schedule]] = WeakKeyDictionary()


def schedule(tiles: Tiles, rows: int, width: int, device: torch.device, transposed: bool = False) -> Schedule:
    """The schedule of `tiles`, kept as long as they live."""
    held = _HELD.setdefault(tiles, {})
    key = (rows, width, device, transposed)
    if key not in held:
        held[key] = _build(tiles, rows, width, device, transposed)
    return held[key]


def _deal(work: np.ndarray, heads: int, at_once: int, programs: int) -> np.ndarray:
    """[programs, rounds, 2] int32, (block, head) of Schedule.order. Every program has an item, if there are as many."""
    if programs >= heads * len(work):  # an item each, in the order of a group of heads
        turns = [[n] for n in range(heads * len(work))]
    else:
        turns, load = [[] for _ in range(programs)], [(0.0, p) for p in range(programs)]
        cost = np.tile(np.repeat(work + _EXTRA, at_once), heads // at_once).tolist()
        for n, c in enumerate(cost):
            least, p = load[0]
            turns[p].append(n)
            heapq.heapreplace(load, (least + c, p))
    order = np.full((programs, max(map(len, turns)), 2), -1, dtype=np.int32)
    for p, items in enumerate(turns):
        group, rest = np.divmod(np.array(items), at_once * len(work))
        order[p, : len(items), 0] = rest // at_once
        order[p, : len(items), 1] = group * at_once + rest % at_once
    return order


def _build(tiles: Tiles, rows: int, width: int, device: torch.device, transposed: bool) -> Schedule:
    spans = [span(t, transposed) for t in tiles if t.rows > 0 and t.columns > 0]
    length = tiles.kv_len if transposed else tiles.q_len
    cuts = np.unique([edge for s in spans for edge in s[:2]]).tolist()
    at = {edge: n for n, edge in enumerate(cuts)}
    covering: list[list[tuple[int, int, int, int]]] = [[] for _ in cuts]
    for start, stop, *entry in spans:
        for n in range(at[start], at[stop]):
            covering[n].append(tuple(entry))  # type: ignore[arg-type]
    starts, stops, ids, segments = [], [], [], []  # of blocks; (block, segment fields)
    n_blocks = 0
    for start, stop, entries in zip(cuts, cuts[1:], covering, strict=False):
        if not entries:
            continue
        r0 = np.arange(start, stop, rows)
        r1 = np.minimum(r0 + rows, stop)
        for entry in sorted(entries):
            fields = _segments(r0, r1, entry, width, 4 if transposed else 1)
            if transposed:  # dQ sums over the rows of a block: a short block masks the rows past its end in every tile
                fields[r1 - r0 < rows, 4:6] = 0
            some = fields[:, 6] > 0
            ids.append(n_blocks + np.flatnonzero(some))
            segments.append(fields[some])
        starts.append(r0)
        stops.append(r1)
        n_blocks += len(r0)
    if not n_blocks:
        none = torch.zeros((1, 8), dtype=torch.int32, device=device)
        return Schedule(none[:, :4], none, 0, length > 0, 0, np.zeros(0), np.zeros((0, 13)), False)
    start, stop, owner, table = np.concatenate(starts), np.concatenate(stops), np.concatenate(ids), np.concatenate(segments)
    by_owner = np.argsort(owner, kind="stable")
    owner, table = owner[by_owner], table[by_owner]
    count = np.bincount(owner, minlength=n_blocks)
    work = np.bincount(owner, weights=table[:, 6], minlength=n_blocks)
    blocks = np.stack([start, stop, np.cumsum(count) - count, count], 1)
    order = np.lexsort((start, -work))[: int((count > 0).sum())]
    blocks, work = blocks[order], work[order]
    firsts = table[blocks[:, 2]]
    lines = np.concatenate([blocks, _spared(blocks, firsts, rows, width), firsts], 1)
    covered = int((blocks[:, 1] - blocks[:, 0]).sum())
    reach, left = (int(table[:, 1].max()), bool(table[:, 4].any())) if len(table) else (0, False)
    table = table if len(table) else np.zeros((1, 8))
    return Schedule(_uploaded(blocks, device), _uploaded(table, device), len(blocks), covered < length, reach, work, lines, left)


def _uploaded(table: np.ndarray, device: torch.device) -> Tensor:
    """int32 on the device, by a copy that is done on return: whoever finds it in a cache may be on another stream."""
    return torch.from_numpy(np.ascontiguousarray(table, dtype=np.int32)).to(device)


def _spared(blocks: np.ndarray, segments: np.ndarray, rows: int, width: int) -> np.ndarray:
    """[n, 1] bits as in `order`; the tile that is worked on first is its segment's last, the last one with masks follows the inner ones."""
    first, limit, hi, left, inner, total = (x[:, None] for x in segments[:, [0, 1, 3, 4, 5, 6]].T.astype(np.int64))
    upper = blocks[:, :1] + np.arange(0, rows - 63, 64)  # the first row of each consumer
    right = total - inner - left
    late = (total > 1) & (right > 0) & (first + (total - 1) * width > upper + 63 + hi)
    plain = (left == 0) & (right > 0) & (first + (inner + 1) * width <= np.minimum(limit, upper + hi + 1))
    return (late + 256 * plain) @ (1 << np.arange(rows // 64))[:, None]


def _segments(r0: np.ndarray, r1: np.ndarray, entry: tuple[int, int, int, int], width: int, align: int) -> np.ndarray:
    """One entry as a segment of each block r0 .. r1 - 1; total 0 where the block reaches nothing of it."""
    start, stop, lo, hi = entry
    first = np.maximum(start, r0 + lo)
    last = np.minimum(stop, r1 + hi)
    reached = last > first
    first -= first % align
    total = np.where(reached, -(-(last - first) // width), 0)
    left = np.clip(-(-(np.maximum(start, r1 - 1 + lo) - first) // width), 0, total)  # tiles that begin before the last row's first column
    whole = np.clip((np.minimum(stop, r0 + hi + 1) - first) // width, 0, total)  # tiles that end by the first row's last column
    inner = np.maximum(0, whole - left)
    same = np.ones_like(r0)
    return np.stack([first, stop * same, lo * same, hi * same, left, inner, total, start * same], 1)
