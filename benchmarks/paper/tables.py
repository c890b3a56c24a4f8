"""The tables of what benchmarks/paper measured, for docs/io-model.md: `python -m benchmarks.io_model` writes them there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.record import RESULTS, load, source, table
from distflash.cost.devices import DEVICES


def attention(result: dict[str, Any]) -> str:
    """Milliseconds of both, and how many times as fast."""
    cells: dict[tuple, dict[str, dict[str, Any]]] = {}
    for r in result["rows"]:
        key = r["part"], r["N"], r["causal"], r["dropout"], r["pass"]
        cells.setdefault(key, {})[r["contender"]] = r
    rows = []
    for (_, n, causal, dropout, direction), both in cells.items():
        ours, other = both["distflash"], both["standard"]
        shape = f"{ours['B']} x {ours['H']} x {ours['D']}"
        times = [f"{one['ms']:.3f}" if "ms" in one else one["error"] for one in (other, ours)]
        faster = f"{other['ms'] / ours['ms']:.2f}" if "ms" in other and "ms" in ours else ""
        graphs = f"{other['graph_ms'] / ours['graph_ms']:.2f}" if "graph_ms" in other and "graph_ms" in ours else ""
        passes = "forward" if direction == "forward" else "forward + backward"
        rows.append([f"{n:,}", shape, "causal" if causal else "full", f"{dropout:g}", passes, *times, faster, graphs, ours["kernel"]])
    head = "N", "batch x heads x head dim", "mask", "dropout", "passes", "standard, ms", "DistFlash, ms", "times as fast"
    return table((*head, "as graphs", "kernel"), rows) + (_filled(cells) if result.get("mask") != "added" else "")


def _filled(cells: dict[tuple, dict[str, dict[str, Any]]]) -> str:
    """What a mask by masked_fill may have cost standard attention, in a run from before the mask was added: an estimate."""
    took = {(causal, p): both["standard"]["ms"] for (part, _, causal, dropout, p), both in cells.items() if part == "gpt2" and not dropout}
    about = next(both["standard"] for (part, *_), both in cells.items() if part == "gpt2")
    once = 1e3 * 2 * 2 * about["B"] * about["H"] * about["N"] ** 2 / DEVICES["h100"].hbm  # 16-bit scores, read and written
    words = []
    for passes, name in (("forward", "forward"), ("both", "forward + backward")):
        masked, plain = took[True, passes], took[False, passes]
        factor = masked / (plain + once)
        words.append(f"{name} {masked - plain:.1f} of {masked:.1f} ms, and speed-ups are up to {factor:.1f} times too large")
    return (
        "\nStandard attention masked with `masked_fill` in this run, which is slower than adding a mask, as FlashAttention's own benchmark "
        "does; it is added now, and this has not been measured again. Estimate at the first shape, causal: the mask took "
        f"{'; '.join(words)}; if adding it takes {once:.1f} ms, the scores read and written once at HBM's full rate, and nothing "
        "backward.\n"
    )


def memory(result: dict[str, Any]) -> str:
    """Peaks of both by length, and the line through ours."""
    cells: dict[int, dict[str, dict[str, Any]]] = {}
    for r in result["rows"]:
        cells.setdefault(r["N"], {})[r["contender"]] = r
    rows = []
    for n, both in cells.items():
        found = [both.get(name, {"error": ""}) for name in ("standard", "distflash")]
        shown = [f"{one['bytes'] / 2**20:,.1f}" if "bytes" in one else one["error"] for one in found]
        rows.append([f"{n:,}", *shown, f"{both['distflash']['expected'] / 2**20:,.1f}"])
    fit = result["fit"]
    line = f"\nA line through DistFlash's: {fit['slope']:,.0f} bytes a token, R² = {fit['r2']:.6f}.\n" if fit else ""
    return table(("N", "standard, MiB", "DistFlash, MiB", "as `explain` says, MiB"), rows) + line


def hbm(result: dict[str, Any]) -> str:
    """What ncu counted beside the model."""
    words = ("hbm", "hbm_predicted", "l2", "l2_predicted")
    rows = [
        [r["name"], *(f"{r[word] / 1e6:,.0f}" if word in r else "" for word in words), f"{r['ms']:.3f}" if "ms" in r else ""]
        for r in result["rows"]
    ]
    refused = f"\nNot counted: {result['refused']}.\n" if result["refused"] else ""
    return table(("queries x keys of a tile", "HBM, MB", "model", "L2, MB", "model", "ms"), rows) + refused


def sparse(result: dict[str, Any]) -> str:
    """Milliseconds by the part of the blocks that is kept."""
    cells: dict[tuple[str, float], dict[str, float]] = {}
    for r in result["rows"]:
        cells.setdefault((r["kind"], r["kept"]), {})[r["pass"]] = r["ms"]
    rows = [
        ["no mask" if kind == "dense" else f"{kept:.1%}", f"{ms['forward']:.3f}", f"{ms['both']:.3f}"] for (kind, kept), ms in cells.items()
    ]
    known = {name: fit for name, fit in result["fits"].items() if fit}
    lines = [f"{name} {fit['intercept']:.3f} + {fit['slope']:.3f} x ms, R² = {fit['r2']:.4f}" for name, fit in known.items()]
    return table(("kept", "forward, ms", "forward + backward, ms"), rows) + (f"\nLines: {'; '.join(lines)}.\n" if lines else "")


def context(result: dict[str, Any]) -> str:
    """Quality by context: loss, also of the bytes that have the most before them, both against the shortest context, and accuracy."""
    rows = [
        [f"{r['context']:,}", f"{r['loss']:.4f}", _difference(r["above_shortest"]), f"{r['buckets'][-1]['loss']:.4f}",
         _difference(r["above_shortest_far"]), f"{r['accuracy']:.1%}", f"{r['low']:.1%} to {r['high']:.1%}", f"{r['steps']:,}"]
        for r in result["rows"]
    ]  # fmt: skip
    far = f"loss from byte {result['rows'][0]['buckets'][-1]['from']:,} on" if result["rows"] else "far"
    head = ("context", "held-out loss, nats a byte", "above the shortest", far, "above the shortest", "parts named right", "95 %", "steps")
    about = f"\n{result['gpus']} GPU, {result['parameters'] / 1e6:.1f} M parameters, "
    about += f"{result['steps']['own']:,} of the steps at its own context; {result['crops'][1]} crops, by chance "
    about += f"{result['chance']:.1%} would be named right. ± is a standard error over documents.\n"
    return table(head, rows) + about


def _difference(found: dict[str, float]) -> str:
    return f"{found['mean']:+.4f} ± {found['error']:.4f}"


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "attention": attention, "memory": memory, "hbm": hbm, "sparse": sparse, "context": context,
}  # fmt: skip


def paper(name: str) -> str:
    """What a program of benchmarks/paper measured: table, picture, device; or that it has not run yet."""
    if not (RESULTS / f"paper_{name}.json").exists():
        return f"Not measured yet: `python -m benchmarks.paper.{name}` on a GPU.\n"
    result = load(f"paper_{name}")
    picture = f"\n![{name}](../benchmarks/results/paper_{name}.png)\n"
    return TABLES[name](result) + picture + source(result)
