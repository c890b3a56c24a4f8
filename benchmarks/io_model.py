"""The tables of docs/io-model.md: `python -m benchmarks.io_model`. All follow from distflash/cost and benchmarks/results.

Legend: N tokens, d head dim, M on-chip memory in elements, P ranks, T = N / P tokens a rank, g = H / Hk query heads a key/value head.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np

from benchmarks.bench_kernel import documents
from benchmarks.figures import MARK, ROOT
from benchmarks.kernel_table import RUNS
from benchmarks.paper.tables import TABLES, paper
from benchmarks.record import load, table
from distflash.cost import hbm
from distflash.cost.devices import DEVICES, Device, Link, network
from distflash.cost.hbm import Blocks
from distflash.cost.time import compute_seconds
from distflash.cost.traffic import PASSES, Shape, steps
from distflash.parallel.mask import Mask, packed
from distflash.parallel.plan import alone

PAGE = "docs/io-model.md"
KEYS = 16  # that stream past at a time: the fewest that a tensor core takes


def hbm_bytes() -> str:
    """MB a head of standard attention and of the tiled loops, by the block of queries."""
    n, rows = 8192, []
    for d in (64, 128):
        tiles, one = packed((0, n), (0, n), Mask()), Shape(1, 1, d, d)
        rows.append([str(d), "standard", "", f"{2 * hbm.standard(n, n, d) / 1e6:.0f}", ""])
        for m in (16 << 10, 32 << 10, 64 << 10, 128 << 10):
            blocks = hbm.largest(m, d, keys=KEYS)
            found, bound = hbm.forward(tiles, one, blocks) / 1e6, lower_bound(n, d, m) * 2e-6
            rows.append([str(d), f"tiled, M = {m // 1024} Ki", str(blocks.queries), f"{found:.1f}", f"{bound:.1f}" if m >= d * d else ""])
        h100 = DEVICES["h100"]
        wave = Blocks(h100.processors * 128, 128)
        found = hbm.forward(tiles, one, wave) / 1e6
        rows.append([str(d), f"tiled, {h100.processors} programs abreast", f"{wave.queries:,}", f"{found:.1f}", ""])
    return table(("d", f"N = 8192, 16 bit, c = {KEYS}", "queries a block", "MB a head, forward", "lower bound, MB"), rows)


def lower_bound(n: int, d: int, m: int) -> float:
    """Elements that any schedule of the two matmuls moves, for d² <= m: docs/io-model.md, 1.3."""
    return n * n * d * d / (3 * m) - m


def threshold(device: Device, link: Link, shape: Shape, pass_: str, causal: bool) -> int | None:
    """The fewest tokens a GPU (in steps of 128) from which on a hop takes no longer than the kernel beside it; None beyond 1M.

    Causal: half of a zigzag's pairs are kept. In the backward dK and dV travel too.
    """
    hidden = None
    for tokens in (t for k in range(7, 21) for t in range(1 << k, 2 << k, max(128, 1 << k - 4))):
        keys = tokens // 2 if causal else tokens
        step = steps(alone(packed((0, tokens), (0, keys), Mask())), shape)[0]
        hop = link.seconds(shape.message(tokens, shape.itemsize))
        hop += link.seconds(shape.message(tokens, shape.wide)) if pass_ == "backward" else 0.0
        if hop > compute_seconds(step, shape, device, pass_, False, False):
            hidden = None
        elif hidden is None:
            hidden = tokens
    return hidden


def thresholds() -> str:
    """Tokens a GPU that hide a hop."""
    rows = []
    for name in ("a100", "h100", "h200", "b200", "mi300x"):
        device = DEVICES[name]
        for wire, link in (*device.wires.items(), ("network, 400 Gbit/s", network(400))):
            cells = [
                "over 1M" if (found := threshold(device, link, Shape(32, kv, 128, 128), pass_, True)) is None else f"{found:,}"
                for kv in (32, 8)
                for pass_ in PASSES
            ]
            rows.append([device.name, wire, *cells])
    return table(("device", "link", "32/32 forward", "32/32 backward", "32/8 forward", "32/8 backward"), rows)


def grids(ranks: int, group: int) -> Iterator[tuple[int, float]]:
    """(Pk, what a rank receives and sends on in units of 2 T d Hk): Pq x Pk ranks, queries and out move in groups of Pk, keys of Pq."""
    for k in (k for k in range(1, ranks + 1) if ranks % k == 0):
        yield k, group * (k - 1) + (ranks // k - 1)


def least_moved(ranks: int, group: int) -> float:
    """What no rank can do without, in the same units: the least of g (a - 1) + (P / a - 1) over a >= 1. docs/io-model.md, 2.3."""
    a = max(1.0, (ranks / group) ** 0.5)
    return group * (a - 1) + (ranks / a - 1)


def movement() -> str:
    """What a ring moves beside the best grid, and beside what nothing beats."""
    rows = []
    for group in (1, 4, 8):
        for ranks in (2, 4, 8, 16, 32, 64, 256):
            k, best = min(grids(ranks, group), key=lambda found: found[1])
            shape = f"{ranks // k} x {k}"
            where = next((f"P <= {name}" for name, n in (("g", 1), ("2g", 2), ("4g", 4)) if ranks <= n * group), "")
            volumes = str(ranks - 1), shape, f"{best:.0f}", f"{least_moved(ranks, group):.1f}"
            rows.append([str(group), str(ranks), *volumes, f"{(ranks - 1) / best:.2f}", where])
    return table(("g", "P", "ring", "best grid Pq x Pk", "its volume", "lower bound", "ring over best", ""), rows)


def ring_bytes(ranks: int, kv_heads: int, pass_: str, itemsize: int = 2) -> float:
    """What a rank of a ring sends in a pass, of a token that it holds and an element of the head dim: docs/io-model.md, 2.1."""
    there = 2 * itemsize * (ranks - 1) * kv_heads
    return there if pass_ == "forward" else there + 2 * 4 * ranks * kv_heads


def ulysses_bytes(ranks: int, heads: int, kv_heads: int, pass_: str, itemsize: int = 2) -> float:
    """The same of Ulysses, lse and delta left out: 2.5. For heads that are dealt out evenly."""
    wide = 4 if pass_ == "backward" and ranks > kv_heads else itemsize  # dK and dV of a head that ranks share
    return 2 * (ranks - 1) / ranks * (itemsize * heads + wide * max(kv_heads, ranks))


def head_sharing() -> str:
    """What a ring moves beside Ulysses."""
    cells = [(kv, pass_) for kv in (32, 8, 4) for pass_ in PASSES]
    found = {p: [f"{ring_bytes(p, kv, pass_) / ulysses_bytes(p, 32, kv, pass_):.2f}" for kv, pass_ in cells] for p in (2, 4, 8, 16, 32)}
    return table(("P", *(f"32/{kv}, {pass_}" for kv, pass_ in cells)), [[str(p), *row] for p, row in found.items()])


Timed = list[tuple[float, float, float]]  # FLOPs, those of one tile for each block of 128 rows, FLOP/s


def of_grid(rows: list[dict[str, Any]], head_dim: int, pass_: str) -> Timed:
    """What bench_kernel found."""
    cells = [r for r in rows if (r["part"], r["pass"], r["kernel"]) == (f"d{head_dim}", pass_, "distflash")]
    shapes = [Shape(r["H"], r["Hk"], r["D"], r["D"], 32768 // r["S"]).flops(pass_) for r in cells]
    pairs = [r["S"] ** 2 / (2 if r["causal"] else 1) for r in cells]
    return [(flops * n, flops * r["S"] * 128, r["tflops"] * 1e12) for flops, n, r in zip(shapes, pairs, cells, strict=True)]


def of_dense_blocks(result: dict[str, Any], pass_: str) -> Timed:
    """What bench_ring found of a rank's share as a dense block of S / P queries and S / 2 keys, every rank at once, calls in a row."""
    found = []
    for r in (r for r in result["rows"] if r["how"].startswith("bound")):
        length, heads, kv_heads, dim = (int(n) for n in re.findall(r"\d+", r["cell"]))
        queries, flops = length // result["versions"]["devices"], Shape(heads, kv_heads, dim, dim).flops(pass_)
        forward, both = r["forward"][0], r["both"][0]
        rate = forward if pass_ == "forward" else 2.5 / (3.5 / both - 1 / forward)
        found.append((flops * queries * length / 2, flops * queries * 128, rate * 1e12))
    return found


def fit(timed: Timed) -> tuple[float, float, float]:
    """(FLOP/s of long rows, tiles an item costs besides its own, worst relative error) of a kernel that was measured.

    The line of least absolute relative errors, which goes through two cells: one that met a slow or a fast clock does not bend it.
    """
    work, start, rate = np.array(timed).T
    matrix = np.stack([rate, rate * start / work], 1)
    lines = [np.linalg.lstsq(matrix[list(pair)], np.ones(2), rcond=None)[0] for pair in combinations(range(len(matrix)), 2)]
    a, b = min(lines, key=lambda line: float(np.abs(matrix @ line - 1).sum()))
    return 1 / a, b / a, float(np.abs(matrix @ (a, b) - 1).max())


def packed_documents() -> dict[str, tuple[float, float]]:
    """By pass: TFLOP/s predicted and measured for documents of random lengths, which no number here is fitted to."""
    cu, shape = documents(), Shape(16, 16, 128, 128)
    step = steps(alone(packed(cu, cu, Mask(None, 0))), shape)[0]
    found = [r for r in load("kernels_h100_80gb_hbm3")["rows"] if (r["part"], r["kernel"]) == ("ragged", "distflash")]
    seconds = {pass_: compute_seconds(step, shape, DEVICES["h100"], pass_, True, True) for pass_ in PASSES}
    return {r["pass"]: (shape.flops(r["pass"]) * step.pairs / seconds[r["pass"]] / 1e12, r["tflops"]) for r in found}


def rates() -> str:
    """The two numbers of each kernel, and what they say of a problem they are not fitted to."""
    grid = [row for name in RUNS for row in load(name)["rows"]]
    ring = load("ring_2xh200")
    timed = {("H100", pass_, d): of_grid(grid, d, pass_) for pass_ in PASSES for d in (64, 128, 256)}
    timed |= {("H200, in a row", pass_, 128): of_dense_blocks(ring, pass_) for pass_ in PASSES}
    rows = []
    for (device, pass_, d), cells in timed.items():
        flops, start, error = fit(cells)
        rows.append([device, pass_, str(d), f"{flops / 1e12:.0f}", f"{start:.1f}", f"{error:.1%}"])
    known = (
        f"{pass_} {predicted:.0f} predicted, {measured:.0f} measured, so {abs(predicted / measured - 1):.0%} too "
        f"{'fast' if predicted > measured else 'slow'}"
        for pass_, (predicted, measured) in packed_documents().items()
    )
    return (
        table(("device", "pass", "D", "TFLOP/s of long rows", "tiles an item", "worst error"), rows)
        + f"\nNot fitted: 64 packed documents of random lengths, D = 128, TFLOP/s: {'; '.join(known)}.\n"
    )


FIGURES: dict[str, Callable[[], str]] = {
    "io_hbm": hbm_bytes, "io_thresholds": thresholds, "io_movement": movement, "io_ulysses": head_sharing, "io_rates": rates,
    **{f"paper_{name}": partial(paper, name) for name in TABLES},
}  # fmt: skip


def rendered(text: str) -> str:
    """The page with every marked place filled."""
    return MARK.sub(lambda found: found[1] + FIGURES[found[2]]() + found[3], text)


def main() -> None:
    path = ROOT / PAGE
    path.write_text(rendered(path.read_text()))


if __name__ == "__main__":
    main()
