"""Weak and strong scaling past this machine, simulated: `python -m benchmarks.scaling` writes JSON and PNG.

One layer's attention, forward and backward, causal zigzag: 8 to 4,096 GPUs, 128k to 16M tokens. Everything is simulated
(distflash/cost/simulate.py), nothing measured; the JSON says so. Legend: P ranks, T tokens a rank, U ranks of a Ulysses group.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.record import RESULTS, write
from distflash.cost.devices import find, network
from distflash.cost.even import even
from distflash.cost.models import MODELS
from distflash.cost.simulate import simulate, standing
from distflash.cost.time import Cluster, Rank
from distflash.cost.traffic import PASSES, Scheme, Share
from distflash.parallel.mask import Mask

GPUS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
LENGTHS = tuple((128 << 10) << n for n in range(8))  # 128k ... 16M
SHARES = (8 << 10, 32 << 10)  # tokens a GPU, weak scaling
SCHEMES = {"ring": ("ring", 1), "double ring": ("double_ring", 1), "ulysses 8 x ring": ("ring", 8)}


def point(name: str, gpus: int, tokens: int, model: str, device: str, per_node: int, nic: float) -> dict[str, Any]:
    """One simulated run: seconds of both passes, and the share of the kernels' time in it."""
    order, ulysses = SCHEMES[name]
    cluster, shape = Cluster(find(device), gpus, min(per_node, gpus), network(nic)), MODELS[model].shape()
    scheme = Scheme("zigzag", order, ulysses, gpus, cluster.per_node)
    mask = Mask(None, 0, (0, tokens))
    spans = scheme.spans((0, tokens), mask)
    ranks = [Rank(Share(scheme, spans, shape, n * ulysses, even(scheme, spans, mask, n)), cluster) for n in standing(scheme)]
    made = {pass_: simulate(ranks, pass_) for pass_ in PASSES}
    seconds = sum(found.seconds for found in made.values())
    busy = sum(found.seconds * found.efficiency for found in made.values())
    flops = sum(shape.flops(pass_) for pass_ in PASSES) * tokens * (tokens + 1) // 2
    return {
        "scheme": name, "gpus": gpus, "tokens": tokens, **{pass_: found.seconds for pass_, found in made.items()},
        "efficiency": busy / seconds, "tflops_a_gpu": flops / gpus / seconds / 1e12,
    }  # fmt: skip


def points(gpus: tuple[int, ...], lengths: tuple[int, ...], shares: tuple[int, ...], **about: Any) -> list[dict[str, Any]]:
    """Strong scaling (a length, more GPUs) and weak scaling (tokens a GPU, more GPUs), where a GPU has at least 1,024 tokens."""
    rows = []
    for name in SCHEMES:
        for length in lengths:
            rows += [{"kind": "strong", **point(name, p, length, **about)} for p in gpus if length >= 1024 * p]
        for share in shares:
            rows += [{"kind": "weak", "share": share, **point(name, p, p * share, **about)} for p in gpus]
    return rows


def draw(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Left: share of the time that kernels run, at one length each; right: TFLOP/s a GPU at the same tokens a GPU."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), layout="constrained")
    strong, weak = figure.subplots(1, 2)
    lengths = sorted({r["tokens"] for r in rows if r["kind"] == "strong"})
    for name, style in zip(SCHEMES, ("-", "--", ":"), strict=True):
        for n, length in enumerate(lengths):
            found = [(r["gpus"], r["tflops_a_gpu"]) for r in rows if (r["kind"], r["scheme"], r["tokens"]) == ("strong", name, length)]
            strong.plot(*zip(*found, strict=True), style, color=f"C{n}", marker=".", label=f"{length >> 10}k" if style == "-" else None)
        for n, share in enumerate(sorted({r["share"] for r in rows if r["kind"] == "weak"})):
            found = [(r["gpus"], r["tflops_a_gpu"]) for r in rows if (r["kind"], r["scheme"], r.get("share")) == ("weak", name, share)]
            weak.plot(*zip(*found, strict=True), style, color=f"C{n}", marker=".", label=f"{name}, {share >> 10}k a GPU")
    for axes, kind in ((strong, "one length, more GPUs (-: ring, --: double ring, :: ulysses 8 x ring)"), (weak, "the same tokens a GPU")):
        axes.set(xscale="log", xlabel="GPUs", ylabel="TFLOP/s a GPU, forward + backward", title=kind, ylim=(0, None))
        axes.set_xscale("log", base=2)
        axes.legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3-8b", choices=MODELS)
    parser.add_argument("--device", default="h200")
    parser.add_argument("--per-node", type=int, default=8)
    parser.add_argument("--nic", type=float, default=400.0, help="Gbit/s of each GPU")
    parser.add_argument("--most", type=int, default=GPUS[-1], help="GPUs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    about = {"model": options.model, "device": options.device, "per_node": options.per_node, "nic": options.nic}
    rows = points(tuple(p for p in GPUS if p <= options.most), LENGTHS, SHARES, **about)
    path = write(f"scaling_{options.device}", rows, options.out, simulated=True, basis=find(options.device).basis, **about)
    draw(rows, path.with_suffix(".png"), f"{options.model}, {options.device}, {options.per_node} a host, {options.nic:g} Gbit/s: simulated")
    heads = ("kind", "scheme", "GPUs", "tokens", "forward ms", "backward ms", "kernels run", "TFLOP/s a GPU")
    table = Table(*heads, title="simulated, not measured")
    for r in rows:
        times = f"{1e3 * r['forward']:.1f}", f"{1e3 * r['backward']:.1f}", f"{r['efficiency']:.0%}", f"{r['tflops_a_gpu']:.0f}"
        table.add_row(r["kind"], r["scheme"], str(r["gpus"]), f"{r['tokens']:,}", *times)
    Console(width=120).print(table)
    print(f"wrote {path} and {path.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
