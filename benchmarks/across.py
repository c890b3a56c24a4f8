"""Figures of what ran across GPUs: rates, predictions, memory, long sequences, training."""

from __future__ import annotations

from typing import Any

from benchmarks.headline import is_ours, peer_name
from benchmarks.record import RESULTS, load, source, table


def memory() -> str:
    """Peak memory of attention at the same number of tokens per GPU."""
    result = load("memory")
    rows = [
        [f"{r['heads']}/{r['kv_heads']}", str(r["ranks"]), r["pass"], f"{r['bytes'] / 2**20:.0f}", f"{r['expected'] / 2**20:.0f}"]
        for r in result["rows"]
    ]
    return table(("heads", "GPUs", "pass", "peak above the inputs, MiB", "formula, MiB"), rows) + source(result)


def model() -> str:
    """Predicted beside measured times of attention, by scheme, over each wire that was measured."""
    found = [name for name in ("model_2xh200_p2p", "model_2xh200_symmetric") if (RESULTS / f"{name}.json").exists()]
    return "\n".join(_model(name) for name in found)


def _model(name: str) -> str:
    result = load(name)
    cells: dict[tuple, dict[str, dict[str, Any]]] = {}
    for r in result["rows"]:
        how = f"{r['layout']}, {r['order']}" if r["ranks"] > 1 else "one GPU"
        how += f", Ulysses {r['ulysses']}" * (r["ulysses"] > 1) + " (auto)" * (r["auto"] and r["ranks"] > 1)
        cells.setdefault((r["ranks"], r["S"], f"{r['H']}/{r['Hk']}", how), {})[r["pass"]] = r
    rows = []
    for (ranks, length, heads, how), both in cells.items():
        told = [f"{1e3 * r['seconds']:.2f}, {1e3 * r['predicted']:.2f} ({r['predicted'] / r['seconds'] - 1:+.0%})" for r in both.values()]
        rows.append([str(ranks), f"{length:,}", heads, how, *told])
    head = ("GPUs", "S", "heads", "scheme", *(f"{name}, ms: measured, predicted" for name in ("forward", "backward")))
    wire = "over NCCL" if name.endswith("p2p") else "by copies between memories"
    told = f"\nErrors of the predictions {wire}: median {result['median_error']:.1%}, worst {result['worst_error']:.1%}."
    told += f" What auto takes is at most {result['worst_regret']:.1%} slower than the fastest measured.\n"
    return table(head, rows) + told + source(result)


def train() -> str:
    """Training runs, and the loss curve beside one GPU's, of every machine that was measured."""
    head = (
        *("GPUs", "kernel", "dtype", "tokens per sequence", "steps", "first loss", "last loss", "largest relative difference"),
        *("ms per step", "attention's share", "peak GB"),
    )
    results = map(load, sorted(p.stem for p in RESULTS.glob("train_*")))
    return "\n".join(table(head, _training(result)) + source(result) for result in results)


def _training(result: dict[str, Any]) -> list[list[str]]:
    rows = []
    for r in result["rows"]:
        metrics = r["metrics"]
        middle = sorted(metrics, key=lambda m: m["ms"])[len(metrics) // 2]
        apart = f"{r['difference']:.1e}" if r["gpus"] == 1 else ""
        ends = f"{metrics[0]['loss']:.3f}", f"{metrics[-1]['loss']:.3f}"
        peak = max(m["peak_memory_gb"] for m in metrics)
        share = f"{middle['attention_tflops'] / _portable_rate():.0%}" if r["dtype"] == "bf16" else ""
        shown = str(r["gpus"]), r["kernel"], r["dtype"], f"{r['length']:,}", str(len(metrics)), *ends, apart
        rows.append([*shown, f"{middle['ms']:.0f}", share, f"{peak:.1f}"])
    return rows


def _portable_rate() -> float:
    """TFLOP/s of the portable kernel over both passes: causal, D = 128, 8,192 tokens, an H100."""
    rows = load("portable_h100_80gb_hbm3")["rows"]
    rates = {r["pass"]: r["tflops"] for r in rows if (r["kernel"], r["D"], r["causal"]) == ("triton", 128, True)}
    return 3.5 / (1 / rates["forward"] + 2.5 / rates["backward"])


def ring() -> str:
    """Attention across GPUs: rates, shares of the bound, and what is above the best peer."""
    result = load("ring_2xh200")
    cells: dict[str, list[dict[str, Any]]] = {}
    for r in result["rows"]:
        cells.setdefault(r["cell"], []).append(r)
    rows = []
    for cell, found in cells.items():
        best = {name: max((r[name][0] for r in found if not is_ours(r)), default=None) for name in ("forward", "both")}
        for r in found:
            row = [cell.removesuffix(" D=128"), peer_name(r["how"])]
            for name in ("forward", "both"):
                mid, low, high = r[name]
                over = f"{mid / best[name]:.2f}" if best[name] and is_ours(r) and "bound" not in r["how"] else ""
                row += [f"{mid:.0f} ({low:.0f} to {high:.0f})", f"{r[f'{name}_share']:.1%}", over]
            rows.append(row)
    head = ("problem", "scheme", "forward", "of the bound", "over the best peer", "both passes", "of the bound", "over the best peer")
    checked = "; ".join(f"{c['cell']}: wires {c['wires_apart']:.1e} apart, bit-equal {c['bit_equal']}" for c in result["checked"])
    return table(head, rows) + f"\n{checked}. Documents: seed {result['seed']}.\n" + source(result)


def long() -> str:
    """Windows, and the longest sequence with its memory, of every machine that was measured."""
    return "\n".join(_long(load(path.stem)) for path in sorted(RESULTS.glob("long_*.json")))


def _long(result: dict[str, Any]) -> str:
    windows = [r for r in result["rows"] if r["part"] == "window"]
    shown = []
    for r in windows:
        full = next(f for f in windows if f["window"] is None and f["layout"] == r["layout"])
        share = [f"{r[name] / full[name]:.3f}" for name in ("forward", "both")]
        kept = f"{r['pairs_kept'] / full['pairs_kept']:.3f}"
        name = "all" if r["window"] is None else f"{r['window']:,}"
        times = f"{1e3 * r['forward']:.2f}, {1e3 * r['both']:.2f}"
        shown.append([f"{r['tokens']:,}", name, r["scheme"], f"{r['busy_visits']} of {r['visits']}", kept, times, ", ".join(share)])
    head = ("tokens", "window", "scheme", "visits with work", "pairs, of the full mask's", "ms: forward, both", "of the full mask's")
    text = table(head, shown) + "\n" if shown else ""
    whole = [
        [f"{r['tokens']:,}", f"{r['heads']}/{r['kv_heads']}", f"{r['forward']:.2f}, {r['backward']:.2f}", f"{r['both_tflops']:.0f}",
         *(f"{r[name] / 2**30:.2f}" for name in ("peak_bytes", "explained_bytes", "window_bytes"))]
        for r in result["rows"] if r["part"] == "whole"
    ]  # fmt: skip
    head = ("tokens", "heads", "s: forward, backward", "TFLOP/s per GPU", "peak above the inputs, GiB", "`explain`, GiB", "windows, GiB")
    return text + (table(head, whole) if whole else "") + source(result)
