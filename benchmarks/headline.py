"""The README's figures: the kernels and the rings in a few lines each, from the results whose whole tables docs/benchmarks.md shows."""

from __future__ import annotations

from typing import Any

from benchmarks import kernel_table
from benchmarks.record import load, source, table

KERNELS, RINGS, PORTABLE = "kernels_h100_80gb_hbm3", "ring_2xh200", "portable_h100_80gb_hbm3"
PARTS = {
    "d64": "head dim 64",
    "d128": "head dim 128",
    "gqa": "head dim 128, 32 over 8 heads",
    "d256": "head dim 256",
    "ragged": "64 documents, head dim 128",
}
PEERS = kernel_table.NAMES
COMPILED_ONLY = ("sm_80", "sm_100", "gfx942")
AUTO = "zigzag, ring, symmetric"  # what "auto" takes for these cells
# behind flash-attn's names in ring-flash-attn and yunchang, by what the benchmark calls it
BEHIND = {" [fa2]": ", FlashAttention-2 (as shipped)", " [cudnn]": ", cuDNN put in its place"}


def kernels() -> str:
    """Speed over that of the fastest peer in each cell, by head size and pass; who the peers are, and how often one is faster."""
    result = load(KERNELS)
    shown: dict[str, dict[str, str]] = {}
    for s in result["summary"]:
        if "geomean" in s:
            least = f" (least {s['min']:.2f})" if s["cells"] > 1 else ""
            shown.setdefault(s["part"], {})[s["pass"]] = f"{s['geomean']:.2f}{least}"
    rows = [[name, shown[part]["forward"], shown[part]["backward"]] for part, name in PARTS.items() if part in shown]
    cells = max(s["cells"] for s in result["summary"])
    told = "Ratio of this library's TFLOP/s to the fastest peer's in the same cell: geometric mean and least of "
    told += f"{cells} cells (2,048 to 32,768 tokens, causal and full, bf16), of one cell for documents. "
    told += f"A peer is faster in {_faster_peers(result)}.\n\nPeers with a figure:\n\n{_peers(result['rows'])}\n{versions(result)}"
    return table(("", "forward", "backward"), rows) + f"\n{told}" + source(result)


def _peers(rows: kernel_table.Rows) -> str:
    """By pass, the peers that were measured, dense cells and documents apart."""
    told = ""
    for direction in kernel_table.DIRECTIONS:
        for documents, where in ((False, "dense"), (True, "documents")):
            measured = {r["kernel"] for r in rows if r["pass"] == direction and (r["part"] == "ragged") == documents and "tflops" in r}
            told += f"- {direction}, {where}: {', '.join(PEERS[name] for name in PEERS if name in measured)}\n"
    return told


def _faster_peers(result: dict[str, Any]) -> str:
    ratios = [cell["ratio"] for cell in result["cells"] if cell["ratio"]]
    return f"{sum(r < 1 for r in ratios)} of {len(ratios)} cells"


def versions(result: dict[str, Any]) -> str:
    """The versions of the peers, as far as the result holds them."""
    packages = [f"{name} {version}" for name, version in result["peers"].items()]
    major, minor = divmod(result["versions"]["cudnn"], 10000)
    return f"Versions: {', '.join(packages)}; cuDNN {major}.{minor // 100}.{minor % 100}, FlashAttention-2 and FlexAttention as in torch.\n"


def slower_kernels() -> str:
    """The cells of the kernels' grid in which a peer was faster, worst first within a part."""
    result = load(KERNELS)
    rows = []
    for part, name in PARTS.items():
        for direction in kernel_table.DIRECTIONS:
            cells = [c for c in result["cells"] if (c["part"], c["pass"]) == (part, direction) and c["ratio"]]
            behind = sorted((c for c in cells if c["ratio"] < 1), key=lambda c: c["ratio"])
            told = (f"{c['S']:,} {'causal' if c['causal'] else 'full'} {c['ratio']:.2f} ({PEERS[c['best_peer']]})" for c in behind)
            rows.append([name, direction, f"{len(behind)} of {len(cells)}", "; ".join(told)])
    head = ("", "pass", "cells where a peer is faster", "tokens, mask, ratio, fastest peer")
    return table(head, rows) + f"\nTogether {_faster_peers(result)}." + source(result)


def fallback() -> str:
    """What it costs that softcap, ALiBi and dropout are computed by the portable kernel: its rate over that of the Hopper kernels."""
    portable, hopper = load(PORTABLE), load(KERNELS)
    ours = {(r["D"], r["S"], r["causal"], r["pass"]): r["tflops"] for r in portable["rows"] if r["kernel"] == "triton"}
    theirs = {
        (r["D"], r["S"], r["causal"], r["pass"]): r["tflops"]
        for r in hopper["rows"]
        if r["part"] in ("d64", "d128") and r["kernel"] == "distflash" and "tflops" in r
    }
    told = []
    for direction in kernel_table.DIRECTIONS:
        found = sorted(ours[cell] / theirs[cell] for cell in ours if cell in theirs and cell[3] == direction)
        told.append(f"{found[0]:.0%} to {found[-1]:.0%} {direction}")
    return (
        "The Hopper kernels compute neither softcap, ALiBi nor dropout, and only bf16 and fp16. On an H100, such calls and fp32 take the"
        " portable Triton kernel, and fp64 takes tiled PyTorch. At 8,192 tokens and head dims 64 and 128, the portable kernel reaches"
        f" {' and '.join(told)} of the Hopper kernels' rate, in bf16 and without these options; their own cost has not been measured.\n"
    )


def status() -> str:
    """What has run where. Compiled targets and fuzzed problems are those of the code and of the results, the rest is kept by hand."""
    fuzzed = sum(run["equal"] for run in load("fuzz_gpu")["runs"])
    rows = [
        [
            "Hopper kernels (sm_90)",
            "compiled with Triton 3.6 and 3.9; emulated",
            "H100, H200, Triton 3.6; H100, Triton 3.9",
            "H100; H200, up to 2 of one host",
        ],
        ["portable Triton kernels on sm_90", "compiled; interpreted", "H100, H200", "H100; training on 2 and 4 H200"],
        [f"portable Triton kernels on {', '.join(COMPILED_ONLY)}", "compiled; interpreted", "no", "no"],
        ["ring, all-gather, Ulysses over NCCL", "threads and gloo processes", "2 H200; training on 4 H200", "2 H200; training on 4 H200"],
        ["the same by copies between GPUs (`symmetric`)", "threads", "2 H200", "2 H200"],
        ["Ulysses inside a ring", "threads and gloo processes", "threads of one GPU only", "no"],
        ["several hosts", "network namespaces with gloo", "no", "no"],
    ]
    told = f"Results on GPUs are compared with fp64 dense attention; {fuzzed:,} random problems on an H100 were within the error budget."
    told += " No job has run NCCL between hosts. Predicted times have been compared with measured ones on 1 and 2 GPUs only.\n"
    return table(("", "without a GPU", "run on", "timed on"), rows) + f"\n{told}"


def ring_cells(suffix: str = " D=128") -> dict[str, list[dict[str, Any]]]:
    """Rows of the ring's result by cell, packed documents left out."""
    cells: dict[str, list[dict[str, Any]]] = {}
    for r in load(RINGS)["rows"]:
        if "documents" not in r["cell"]:
            cells.setdefault(r["cell"].removesuffix(suffix), []).append(r)
    return cells


def rings() -> str:
    """Both passes across GPUs, in the scheme that "auto" takes: rate per GPU, share of one GPU's own, and over the fastest peers."""
    rows = []
    for cell, found in ring_cells().items():
        (ours,) = (r for r in found if r["how"] == AUTO)
        tokens, heads = (part.partition("=")[2] for part in cell.split())
        peers = [r for r in found if not is_ours(r)]
        over = [_over(ours, [r for r in peers if "[fa2]" not in r["how"]]), _over(ours, [r for r in peers if "[cudnn]" not in r["how"]])]
        rows.append([f"{int(tokens):,}", heads, f"{ours['both'][0]:.0f}", f"{ours['both_share']:.0%}", *over])
    head = ("tokens", "heads", "TFLOP/s per GPU", "of one GPU's kernel", "over the best peer with cuDNN", "over the best peer as shipped")
    return table(head, rows) + f"\nForward and backward together, head dim 128, causal, bf16. {_auto_behind()}\n" + source(load(RINGS))


def _auto_behind() -> str:
    found = {words: len(where) for (how, words), where in _behind().items() if how == AUTO}
    counts = " and ".join(f"{found.get(words, 0)} of {len(ring_cells())} cells ({words})" for words in ("forward", "both passes"))
    return f'The scheme is {AUTO}, which "auto" takes here; a peer is faster in {counts}.'


def _over(ours: dict[str, Any], peers: list[dict[str, Any]]) -> str:
    best = max(peers, key=lambda r: r["both"][0])
    return f"{ours['both'][0] / best['both'][0]:.2f}, {best['how'].partition(' [')[0].removesuffix(', all-gather, cuDNN')}"


def slower_rings() -> str:
    """In which cells a peer is faster than a scheme of this library that "auto" does not take."""
    rows = [
        [how, words, str(len(where)), "; ".join(f"{cell} {ratio:.2f}" for ratio, cell in where)]
        for (how, words), where in _behind().items()
        if how != AUTO
    ]
    head = ("scheme", "pass", f"cells of {len(ring_cells())}", "tokens, heads, ratio to the fastest peer")
    told = "With other schemes a peer is faster in these:"
    return f"{_auto_behind()} {told}\n\n{table(head, rows)}{source(load(RINGS))}"


def _behind() -> dict[tuple[str, str], list[tuple[float, str]]]:
    """By scheme and pass: the cells in which a peer is faster, worst first."""
    behind: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for cell, found in ring_cells().items():
        tokens, heads = (part.partition("=")[2] for part in cell.split())
        for name, words in (("forward", "forward"), ("both", "both passes")):
            best = max(r[name][0] for r in found if not is_ours(r))
            for r in found:
                if is_ours(r) and "bound" not in r["how"] and r[name][0] < best:
                    behind.setdefault((r["how"], words), []).append((r[name][0] / best, f"{int(tokens):,} {heads}"))
    return {key: sorted(where) for key, where in behind.items()}


def is_ours(row: dict[str, Any]) -> bool:
    """Whether a row of the ring's table is this library's."""
    return row["how"].startswith(("bound", "zigzag, ", "contiguous, "))


def peer_name(how: str) -> str:
    """A row's scheme, with what stands behind flash-attn's names in words."""
    for mode, words in BEHIND.items():
        how = how.replace(mode, words)
    return how
