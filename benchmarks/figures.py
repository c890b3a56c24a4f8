"""Every figure in the README and the docs, written from benchmarks/results: `python -m benchmarks.figures`.

A page marks the place with <!-- figures: NAME --> and <!-- end -->; what stands between is replaced. A test fails when a page is not what
the results say.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import across, headline, kernel_table
from benchmarks.record import RESULTS, load, source, table

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/benchmarks.md", "docs/features.md", "docs/reliability.md")
MARK = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def portable() -> str:
    """TFLOP/s of the portable kernel beside FlexAttention and FlashAttention-2."""
    result = load("portable_h100_80gb_hbm3")
    cells: dict[tuple, dict[str, str]] = {}
    for r in result["rows"]:
        key = (r["D"], r["S"], "causal" if r["causal"] else "full", r["pass"])
        cells.setdefault(key, {})[r["kernel"]] = f"{r['tflops']:.0f} ({r['tflops_low']:.0f} to {r['tflops_high']:.0f})"
    rows = [[str(D), str(S), mask, name, *(cell[k] for k in ("triton", "flex", "fa2"))] for (D, S, mask, name), cell in cells.items()]
    return table(("D", "S", "mask", "pass", "DistFlash, portable", "FlexAttention", "FlashAttention-2"), rows) + source(result)


def hopper() -> str:
    """TFLOP/s of the Hopper kernels over the grid of lengths, beside its peers."""
    result, *before = (load(name) for name in kernel_table.RUNS)
    rows, others = result["rows"], [run["rows"] for run in before]
    shares = [f"{direction} {share:.2f}" for direction, share in kernel_table.ragged(rows).items()]
    equal = [f"{r['pass']} D = {r['D']} {r['equal']} of {r['times']}" for r in rows if "equal" in r]
    means = [kernel_table.overall(run) for run in (rows, *others)]
    told = [f"{direction} {', '.join(f'{mean[direction]:.3f}' for mean in means)}" for direction in means[0]]
    return (
        kernel_table.markdown(rows, others)
        + f"\nGeometric mean of all dense cells in this run and in those before: {'; '.join(told)}.\n"
        + f"\n64 documents of random lengths, rate over that of dense causal S = 8192: {', '.join(shares)}.\n"
        + f"Repeats that were bit-equal, with deterministic gradients: {', '.join(equal)}.\n"
        + source(result)
    )


def faults() -> str:
    """Ranks that were killed and stopped: who was told, and when."""
    result = load("faults")
    rows = [
        [
            r["fault"],
            f"{r['told']} of {r['count'] - r['early']}",
            str(r["early"]),
            f"{r['named_median']:.2f}, {r['named_max']:.2f}",
            f"{r['gone_median']:.2f}, {r['gone_max']:.2f}",
        ]
        for r in result["rows"]
    ]
    head = (
        "fault",
        "named by every other rank",
        "jobs that ended before",
        "seconds until the last had named it, median and worst",
        "until every process had ended",
    )
    r = result["rows"][0]
    about = f"\n{r['ranks']} ranks, a limit of {r['limit']:g} s; {result['cores']} cores, load average {result['load']:g}"
    return table(head, rows) + f"{about}, torch {result['versions']['torch']}, gloo.\n"


def vigilance() -> str:
    """What agreement and heartbeats cost."""
    cost = load("faults")["cost"]
    rows = [
        ["a call of a kind that was agreed on", f"{cost['known_us']:.1f} us"],
        ["a call that is compared, two ranks of one host", f"{cost['compared_ms']:.2f} ms"],
        ["longest silence of another thread while Triton compiles a kernel", f"{cost['silence_s']:.2f} s"],
    ]
    return table(("", "on the machine above"), rows)


def hosts() -> str:
    """Two hosts whose cable was pulled."""
    (r,) = load("hosts")["rows"]
    seconds = [f"{r[f'{what}_median']:.2f}, {r[f'{what}_max']:.2f}" for what in ("named", "gone")]
    head = ("cables pulled", "both sides named the other", "seconds until both had, median and worst", "until both processes had ended")
    return table(head, [[str(r["count"]), f"{r['told']} of {r['count']}", *seconds]]) + f"\nA limit of {r['limit']:g} s.\n"


def kills() -> str:
    """Ranks killed while they saved, and what that left on the disk."""
    rows = load("kills")["rows"]
    left = ("nothing of it yet", "a hidden folder, files missing or cut short", "a hidden folder, all files written", "the new checkpoint")
    shown = [
        ["sharded" if r["sharded"] else "replicated", str(r["kills"]), str(r["victims"]["rank 0, which writes"]),
         *(str(r["left"].get(name, 0)) for name in left), f"{r['jobs']} of {r['jobs']}"]
        for r in rows
    ]  # fmt: skip
    head = ("parameters", "kills", "of them of rank 0, which writes", *(f"left {name}" for name in left), "curves equal, bit for bit")
    r = rows[0]
    return table(head, shown) + f"\n{r['ranks']} ranks, a checkpoint at each of {r['steps']} steps, 0 torn ones chosen or published.\n"


def elastic() -> str:
    """Ranks killed under torchrun, and agents that left and came."""
    result = load("elastic")
    rows, seconds = result["rows"], sorted(r["seconds_until_it_went_on"] for r in result["rows"])
    equal = f"{sum(r['equal'] for r in rows)} of {len(rows)}"
    killed = [f"one of {result['ranks']} killed", str(len(rows)), equal, "0", f"{statistics.median(seconds):.1f}, {seconds[-1]:.1f}"]
    resized = result["resizes"]
    sizes = {", then ".join(map(str, r["ranks"])) for r in resized}
    apart = f"{max(r['apart'] for r in resized):.1e}"
    shown = [killed, [f"{'; '.join(sizes)} ranks", str(len(resized)), "", apart, ""]]
    head = (
        "ranks",
        "runs",
        "curves equal, bit for bit",
        "largest relative difference of a loss",
        "seconds until training went on, median and worst",
    )
    return table(head, shown)


def soak() -> str:
    """Whether a process grows: lines fitted to the second half of a run."""
    return _soaked(load("soak")["rows"], ("resident_mb",))


def soak_gpu() -> str:
    """The same on GPUs, and whether their memory fills; nothing if that has not run."""
    if not (RESULTS / "soak_gpu.json").exists():
        return ""
    result = load("soak_gpu")
    return _soaked(result["rows"], ("resident_mb", "allocated_mb", "reserved_mb", "device_mb")) + source(result)


def _soaked(rows: Sequence[dict[str, Any]], memory: Sequence[str]) -> str:
    def ends(found: dict[str, float], form: str) -> str:
        return ", ".join(format(found[name], form) for name in ("first", "last", "max"))

    shown = [
        [str(r["rank"]), str(r["minutes"]), f"{r['calls']:,}",
         *(cell for name in memory for cell in (ends(r[name], ".0f"), f"{r[name]['slope_an_hour']:+.1f} ± {r[name]['error']:.1f}")),
         *(ends(r[name], "g") for name in ("files", "threads"))]
        for r in rows
    ]  # fmt: skip
    names = (name.removesuffix("_mb") for name in memory)
    grown = (cell for name in names for cell in (f"{name} MB: first, last, most", "MB an hour, of the line"))
    return table(("rank", "minutes", "calls", *grown, "open files", "threads"), shown)


def fuzz() -> str:
    """Random problems: how many, and what came of them."""
    rows: dict[tuple, list[dict[str, Any]]] = {}
    for path in sorted(RESULTS.glob("fuzz_*.json")):
        for run in load(path.stem)["runs"]:
            how = f"{run['processes']} processes" if run["processes"] > 1 else "threads"
            commit, _, dirty = (run["commit"] or "unknown").partition("-")
            place = run["device"], how, f"{commit[:8]}{' with changes' if dirty else ''}", run["versions"]["torch"]
            rows.setdefault(place, []).append(run)
    shown = [
        [device, how, f"{sum(r['cases'] for r in runs):,}", f"{sum(r['equal'] for r in runs):,}", f"{_refused(runs):,}",
         f"{sum(len(r['mismatches']) for r in runs):,}", f"{sum(r['seconds'] for r in runs) / 3600:.1f}", commit, torch]
        for (device, how, commit, torch), runs in rows.items()
    ]  # fmt: skip
    reasons = sorted({reason for runs in rows.values() for r in runs for reason in r["refused"]})
    head = ("device", "ranks are", "cases", "equal to the oracle", "refused", "mismatches", "hours", "commit", "torch")
    return table(head, shown) + f"\nRefused, as they must be, with: {'; '.join(reasons)}.\n"


def _refused(runs: Sequence[dict[str, Any]]) -> int:
    return sum(sum(run["refused"].values()) for run in runs)


def mutants() -> str:
    """Seeded bugs, by the file they are in."""
    result = load("mutants")
    found: dict[str, list[bool]] = {}
    for r in result["rows"]:
        found.setdefault(r["file"], []).append(r["verdict"].startswith("killed"))
    rows = [[file, str(len(killed)), str(sum(killed))] for file, killed in sorted(found.items())]
    return table(("file", "seeded bugs", "killed"), [*rows, ["together", str(result["of"]), str(result["killed"])]])


FIGURES: dict[str, Callable[[], str]] = {
    "long": across.long,
    "fast_kernels": headline.kernels,
    "fast_rings": headline.rings,
    "fallback": headline.fallback,
    "slower_kernels": headline.slower_kernels,
    "slower_rings": headline.slower_rings,
    "status": headline.status,
    "ring": across.ring,
    "portable": portable,
    "hopper": hopper,
    "memory": across.memory,
    "model": across.model,
    "train": across.train,
    "faults": faults,
    "vigilance": vigilance,
    "hosts": hosts,
    "kills": kills,
    "elastic": elastic,
    "soak": soak,
    "soak_gpu": soak_gpu,
    "fuzz": fuzz,
    "mutants": mutants,
}


def rendered(text: str) -> str:
    """A page with every marked place filled from the results."""
    return MARK.sub(lambda found: found[1] + FIGURES[found[2]]() + found[3], text)


def main() -> None:
    for page in PAGES:
        path = ROOT / page
        path.write_text(rendered(path.read_text()))


if __name__ == "__main__":
    main()
