"""Attention, forward and backward, beside standard PyTorch attention: at GPT-2's shape, and across lengths (FlashAttention, figures 1, 3).

    python -m benchmarks.paper.attention            writes results/paper_attention.json and .png, about a minute

Standard attention is matmul, mask, softmax, dropout, matmul in the same dtype. GPT-2's shape: N = 1024, 16 heads of 64, batch 64. Lengths:
8 heads of 64, batch 16, until a contender runs out of memory. Times are medians of CUDA events, caches warm, calls queued. With dropout
0 the outputs of both are compared first. Calls of less than 5 ms are timed once more as CUDA graphs: the shortest take as long as the host
needs to launch them. Legend: B batch, N tokens, H heads, D head dim.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch

import distflash
from benchmarks.paper.common import OURS, STANDARD, Bench, Rows, both, contender, show

D = 64
RATIOS = (("speedup", "ms"), ("captured", "graph_ms"))
LENGTHS = tuple(128 << n for n in range(10))  # 128 ... 64k


def cells(quick: bool) -> list[dict[str, Any]]:
    """What is timed, GPT-2's shape first."""
    batch, heads, tokens = (2, 2, 128) if quick else (64, 16, 1024)
    gpt2 = [
        {"part": "gpt2", "B": batch, "H": heads, "N": tokens, "causal": causal, "dropout": p}
        for causal, p in product((True, False), (0.0, 0.1))
    ]
    batch, heads, lengths = (1, 2, (64, 128)) if quick else (16, 8, LENGTHS)
    return gpt2 + [{"part": "lengths", "B": batch, "H": heads, "N": n, "causal": True, "dropout": p} for n in lengths for p in (0.0, 0.1)]


def time_cell(bench: Bench, cell: dict[str, Any], lost: set[str]) -> Rows:
    """Rows of both contenders, forward alone and with backward; `lost` gains who ran out of memory."""
    rows = []
    shape = (cell["B"], cell["N"], cell["H"], D)
    how = {"causal": cell["causal"], "dropout_p": cell["dropout"]}
    kernel = distflash.explain(shape, shape, dtype=bench.dtype, device=bench.device, **how).kernel
    for name in (OURS, STANDARD):
        about = {**cell, "D": D, "contender": name, **({"kernel": kernel} if name == OURS else {})}
        if name in lost:
            rows += [{**about, "pass": direction, "error": "out of memory at a shorter length"} for direction in ("forward", "both")]
            continue
        for direction in ("forward", "both"):

            def work(name: str = name, direction: str = direction) -> dict[str, float]:
                torch.manual_seed(0)
                attend, heads_first = contender(name, bench, cell["N"], **how)
                leaves, dout = bench.inputs(cell["B"], cell["N"], cell["H"], D, heads_first)
                run = (lambda: attend(*leaves)) if direction == "forward" else (lambda: both(attend, leaves, dout))
                found = bench.milliseconds(run, worth=0.15)
                if bench.device.type == "cuda" and found["ms"] < 5:
                    found["graph_ms"] = bench.captured(run, worth=0.05)
                return found

            found, error = bench.attempt(work)
            rows.append({**about, "pass": direction, **(found if error is None else {"error": error})})
            if error and cell["part"] == "lengths":
                lost.add(name)
    return rows


def difference(bench: Bench, tokens: int = 128) -> float:
    """The largest difference of the outputs on the same q, k, v, causal, without dropout."""
    (q, k, v), _ = bench.inputs(2, tokens, 4, D, heads_first=False)
    ours, theirs = (contender(name, bench, tokens, causal=True)[0] for name in (OURS, STANDARD))
    turned = theirs(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    return float((ours(q, k, v) - turned).detach().abs().max())


def speedups(rows: Rows) -> Rows:
    """Standard over ours, of the cells that both could do."""
    found = []
    for ours in (r for r in rows if r["contender"] == OURS and "ms" in r):
        same = ("part", "B", "H", "N", "causal", "dropout", "pass")
        other = next(r for r in rows if r["contender"] == STANDARD and all(r[word] == ours[word] for word in same))
        faster = {name: other[ms] / ours[ms] if ms in other and ms in ours else None for name, ms in RATIOS}
        found.append({**{word: ours[word] for word in same}, **faster})
    return found


def draw(rows: Rows, figure: Any) -> None:
    """Left: bars at GPT-2's shape; right: milliseconds against N, forward and backward."""
    left, right = figure.subplots(1, 2)
    gpt2 = [r for r in rows if (r["part"], r["pass"]) == ("gpt2", "both") and "ms" in r]
    for at, name in enumerate((STANDARD, OURS)):
        mine = [r for r in gpt2 if r["contender"] == name]
        left.bar([n + 0.4 * at for n in range(len(mine))], [r["ms"] for r in mine], 0.38, label=name)
    kinds = [f"{'causal' if r['causal'] else 'full'}\ndropout {r['dropout']:g}" for r in gpt2 if r["contender"] == OURS]
    left.set(xticks=[n + 0.2 for n in range(len(kinds))], xticklabels=kinds, ylabel="ms, forward + backward", title="GPT-2's shape")
    for name, colour in ((STANDARD, "C0"), (OURS, "C1")):
        for p, style in ((0.0, "-"), (0.1, "--")):
            mine = [
                r for r in rows
                if (r["part"], r["pass"], r["contender"], r["dropout"]) == ("lengths", "both", name, p) and "ms" in r
            ]  # fmt: skip
            right.plot([r["N"] for r in mine], [r["ms"] for r in mine], style, color=colour, marker=".", label=f"{name}, dropout {p:g}")
    right.set(xlabel="N", ylabel="ms, forward + backward", title="causal, to the last length that fits")
    right.set_xscale("log", base=2)
    right.set_yscale("log")
    for axes in (left, right):
        axes.legend(fontsize=8)


def main() -> None:
    bench = Bench("attention", __doc__, 60)
    apart, rows, lost = difference(bench), [], set[str]()
    bench.say(f"outputs differ by {apart:.1e} at most")
    for cell in cells(bench.quick):
        if bench.left < 0:
            bench.say("the budget is spent")
            break
        rows += time_cell(bench, cell, lost)
        bench.say(f"{cell['part']}, N = {cell['N']}, {'causal' if cell['causal'] else 'full'}, dropout {cell['dropout']:g}")
    found = speedups(rows)
    lines = [
        [r["part"], str(r["N"]), "causal" if r["causal"] else "full", f"{r['dropout']:g}", r["pass"], f"{r['speedup']:.2f}",
         f"{r['captured']:.2f}" if r["captured"] else ""]
        for r in found if r["speedup"]
    ]  # fmt: skip
    show("standard over ours", ("part", "N", "mask", "dropout", "pass", "speed-up", "as graphs"), lines)
    known = [r["speedup"] for r in found if r["speedup"]]
    without_host = [r["captured"] or r["speedup"] for r in found if r["speedup"]]
    bench.finish(
        rows, draw, mask="added", difference=apart, speedups=found, best=max(known, default=None), least=min(known, default=None),
        least_without_host=min(without_host, default=None),
    )  # fmt: skip


if __name__ == "__main__":
    main()
