"""The README's figures: the kernels and the rings in a few lines each, from the results whose whole tables docs/benchmarks.md shows."""

from __future__ import annotations

from typing import Any

from benchmarks.record import load, source, table

PARTS = {
    "d64": "head dim 64",
    "d128": "head dim 128",
    "gqa": "head dim 128, 32 over 8 heads",
    "d256": "head dim 256",
    "ragged": "64 documents, head dim 128",
}
PEERS = {"fa3": "FlashAttention-3", "fa4": "FlashAttention-4", "cudnn": "cuDNN", "fa2": "FlashAttention-2", "flex": "FlexAttention"}


def kernels() -> str:
    """Speed over that of the fastest peer in each cell, by head size and pass."""
    result = load("kernels_h100_80gb_hbm3")
    shown: dict[str, dict[str, str]] = {}
    for s in result["summary"]:
        if "geomean" in s:
            cells = f" ({s['min']:.2f} in the slowest of {s['cells']} cells)" if s["cells"] > 1 else ""
            shown.setdefault(s["part"], {})[s["pass"]] = f"{s['geomean']:.2f}{cells}"
    rows = [[name, shown[part]["forward"], shown[part]["backward"]] for part, name in PARTS.items() if part in shown]
    others = [PEERS[name] for name in dict.fromkeys(r["kernel"] for r in result["rows"]) if name in PEERS]
    head = ("", "forward, of the fastest peer in each cell", "backward")
    return table(head, rows) + f"\nPeers: {', '.join(others)}. 2,048 to 32,768 tokens, causal and full, bf16." + source(result)


def rings() -> str:
    """Both passes across GPUs, in the scheme that "auto" takes: rate a GPU, share of one GPU's own, and over the fastest peer."""
    result = load("ring_2xh200")
    cells: dict[str, list[dict[str, Any]]] = {}
    for r in result["rows"]:
        if "documents" not in r["cell"]:
            cells.setdefault(r["cell"].removesuffix(" D=128"), []).append(r)
    rows = []
    for cell, found in cells.items():
        (ours,) = (r for r in found if r["how"] == "zigzag, ring, symmetric")
        best = max((r for r in found if not is_ours(r)), key=lambda r: r["both"][0])
        tokens, heads = (part.partition("=")[2] for part in cell.split())
        over = f"{ours['both'][0] / best['both'][0]:.2f}"
        rows.append(
            [f"{int(tokens):,}", heads, f"{ours['both'][0]:.0f}", f"{ours['both_share']:.0%}", f"{over}, {best['how'].partition(' [')[0]}"]
        )
    head = ("tokens", "heads", "TFLOP/s a GPU, both passes", "of one GPU's kernel", "over the fastest peer")
    return table(head, rows) + "\nHead dim 128, causal, bf16." + source(result)


def is_ours(row: dict[str, Any]) -> bool:
    """Whether a row of the ring's table is this library's."""
    return row["how"].startswith(("bound", "zigzag, ", "contiguous, "))
