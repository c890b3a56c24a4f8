"""Block-sparse attention: time against the fraction of blocks that is kept (FlashAttention, figure 2 right).

    python -m benchmarks.paper.sparse               writes results/paper_sparse.json and .png, under a minute

A random part of the blocks of queries x keys is kept, those of the diagonal always, `Slices.from_block_mask`; N = 16384, 16 heads of 64,
batch 2, blocks of 256, forward and backward, no dropout. Beside it a straight line through the points, and dense attention without a
mask. Legend: N tokens.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

import distflash
from benchmarks.paper.common import Bench, Rows, both, linear_fit, show

H, D = 16, 64
FRACTIONS = (1.0, 0.75, 0.5, 0.375, 0.25, 0.125, 0.0625, 0.03125)


def blocks(side: int, fraction: float) -> torch.Tensor:
    """A matrix of side x side blocks of which `fraction` is kept, rounded; the diagonal always, the rest at random."""
    order = torch.randperm(side * side, generator=torch.Generator().manual_seed(0))
    order = order[order % (side + 1) != 0]  # without the diagonal
    kept = torch.eye(side, dtype=torch.int64).flatten()
    kept[order[: max(0, round(fraction * side * side) - side)]] = 1
    return kept.view(side, side)


def draw(rows: Rows, figure: Any) -> None:
    axes = figure.subplots()
    sparse = [r for r in rows if r["kind"] == "sparse"]
    for direction in ("forward", "both"):
        mine = [r for r in sparse if r["pass"] == direction]
        axes.plot([r["kept"] for r in mine], [r["ms"] for r in mine], marker=".", label=f"block mask, {direction}")
        for r in (r for r in rows if (r["kind"], r["pass"]) == ("dense", direction)):
            axes.axhline(r["ms"], color="gray", linestyle=":", label=f"no mask, {direction}")
    axes.set(xlabel="fraction of blocks kept", ylabel="ms", xlim=(0, None), ylim=(0, None))
    axes.legend(fontsize=8)


def main() -> None:
    bench, rows = Bench("sparse", __doc__, 60), []
    batch, tokens, heads, size = (1, 128, 2, 16) if bench.quick else (2, 16384, H, 256)
    side = tokens // size
    leaves, dout = bench.inputs(batch, tokens, heads, D, heads_first=False)
    for fraction in (None, *(FRACTIONS[::3] if bench.quick else FRACTIONS)):
        if bench.left < 0:
            bench.say("the budget is spent")
            break
        mask = None if fraction is None else distflash.Slices.from_block_mask(blocks(side, fraction), size)
        attend: Any = partial(distflash.attention, mask=mask)
        kind = {"kind": "dense", "kept": 1.0} if mask is None else {"kind": "sparse", "kept": mask.area / tokens**2, "slices": len(mask)}
        for direction, run in (("forward", lambda: attend(*leaves)), ("both", lambda: both(attend, leaves, dout))):  # noqa: B023  run at once
            rows.append({**kind, "N": tokens, "pass": direction, **bench.milliseconds(run, worth=0.4)})
        bench.say(f"{kind['kind']}, {kind['kept']:.1%} kept: {rows[-1]['ms']:.3f} ms")
    fits = {}
    for direction in ("forward", "both"):
        mine = [r for r in rows if (r["kind"], r["pass"]) == ("sparse", direction)]
        fits[direction] = linear_fit([r["kept"] for r in mine], [r["ms"] for r in mine]) if len(mine) > 2 else None
    show("block-sparse", ("", "kept", "pass", "ms"), [[r["kind"], f"{r['kept']:.3f}", r["pass"], f"{r['ms']:.3f}"] for r in rows])
    bench.finish(rows, draw, (7, 4.2), fits=fits, block=size, batch=batch, heads=heads, head_dim=D)


if __name__ == "__main__":
    main()
