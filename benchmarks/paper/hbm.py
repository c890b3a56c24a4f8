"""HBM bytes counted by Nsight Compute beside the model: standard attention, and our portable kernel with several tiles (FlashAttention, 2).

    python -m benchmarks.paper.hbm                  writes results/paper_hbm.json and .png, about a minute

A child of this program runs under `ncu` and does each contender once, a marker kernel before each; what `ncu` counts between two markers
belongs to the first. `hbm` is what goes to and from HBM, `l2` what L2 hands to and takes from the processors: a tile's own traffic, of
which L2 takes most. The model (distflash/cost/hbm.py) says of ours: with the tiles' blocks, for `l2`; with those of all programs abreast,
for `hbm`. Forward, no mask, 16 bit, N = 4096, 512 heads of 64: q, k, v and out are 1.1 GB together, so that the 50 MB of an H100's L2,
which may keep what was written last, are 5 % of them. Times are taken without `ncu`. Without `ncu`, or without its permission to read
counters, the rows hold predictions and times, and `refused` says why. Legend: N tokens, D head dim.
"""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.figures import ROOT
from benchmarks.paper.common import OURS, STANDARD, Bench, Rows, show, standard
from distflash.cost import hbm
from distflash.cost.hbm import Blocks
from distflash.cost.traffic import Shape
from distflash.kernels.triton.configs import Config
from distflash.kernels.triton.kernel import INTERPRETED, TritonKernel
from distflash.parallel.mask import Mask, packed

D = 64
HBM, L2 = ("dram__bytes_read.sum", "dram__bytes_write.sum"), ("lts__t_bytes.sum",)
MARKER = "spin_kernel"  # torch.cuda._sleep launches one of this name
TILES = {  # rows, columns, warps, stages
    "128 x 64": Config(128, 64, 8, 3),
    "64 x 64": Config(64, 64, 4, 3),
    "64 x 32": Config(64, 32, 4, 3),
    "32 x 32": Config(32, 32, 4, 2),
    "16 x 32": Config(16, 32, 4, 2),
}


def runs(device: torch.device, dtype: torch.dtype, tokens: int, heads: int) -> dict[str, Callable[[], object]]:
    """By name: standard attention (matmul, softmax, matmul), and ours with each tile."""
    q, k, v = (torch.randn(1, tokens, heads, D, device=device, dtype=dtype) for _ in range(3))
    tiles, turned = packed((0, tokens), (0, tokens), Mask()), [x.transpose(1, 2).contiguous() for x in (q, k, v)]

    def ours(config: Config) -> Tensor:
        return TritonKernel({"forward": config}).forward(q, k, v, tiles, D**-0.5, dtype=dtype).out

    return {STANDARD: partial(standard, *turned), **{name: partial(ours, config) for name, config in TILES.items()}}


def predicted(name: str, tokens: int, heads: int, itemsize: int, processors: int) -> dict[str, float]:
    """Bytes of the forward by the model."""
    if name == STANDARD:
        return {"hbm_predicted": heads * itemsize * hbm.standard(tokens, tokens, D)}
    tiles, shape, tile = packed((0, tokens), (0, tokens), Mask()), Shape(heads, heads, D, D, itemsize=itemsize), TILES[name]
    abreast = Blocks(tile.rows * processors, tile.columns)
    return {
        "hbm_predicted": hbm.forward(tiles, shape, abreast),
        "l2_predicted": hbm.forward(tiles, shape, Blocks(tile.rows, tile.columns)),
    }


def child(tokens: int, heads: int) -> None:
    """What `ncu` watches: everything compiled, then a marker and a call of each."""
    found = runs(torch.device("cuda"), torch.bfloat16, tokens, heads)
    for run in found.values():
        run()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    for run in found.values():
        torch.cuda._sleep(1)
        run()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def counted(text: str, names: list[str]) -> dict[str, dict[str, float]]:
    """By contender: bytes of `hbm` and `l2`, from what `ncu --csv` prints. Raises ValueError unless there is a marker for each."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    found: list[dict[str, float]] = []
    last = None  # the kernel of the last marker; ncu prints a line for each metric of a kernel
    for row in csv.DictReader(lines):
        if MARKER in row["Kernel Name"]:
            found, last = [*found, {}] if row["ID"] != last else found, row["ID"]
        elif found and row["Metric Name"] in HBM + L2:
            where = "hbm" if row["Metric Name"] in HBM else "l2"
            found[-1][where] = found[-1].get(where, 0.0) + float(row["Metric Value"].replace(",", ""))
    if len(found) != len(names):
        raise ValueError(f"ncu saw {len(found)} markers of {len(names)}")
    return dict(zip(names, found, strict=True))


def watch(bench: Bench, tokens: int, heads: int) -> tuple[dict[str, dict[str, float]], str | None]:
    """(what ncu counted, None), or ({}, why not)."""
    if not (ncu := shutil.which("ncu")):
        return {}, "there is no ncu on the PATH"
    said = ""
    for metrics in (HBM + L2, HBM):  # not every device knows the second
        command = [ncu, "--csv", "--print-units", "base", "--metrics", ",".join(metrics), "--profile-from-start", "off"]
        command += ["--target-processes", "all", sys.executable, "-m", "benchmarks.paper.hbm", "--child", str(tokens), str(heads)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=max(5.0, bench.left), cwd=ROOT)
        except subprocess.TimeoutExpired:
            return {}, "ncu was not done within the budget"
        try:
            return counted(done.stdout, [STANDARD, *TILES]), None
        except ValueError as error:
            told = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("==ERROR==")]
            said = "; ".join(told[:2]) or f"{error}: {done.stderr[-200:]}"
    return {}, said


def lines(rows: Rows) -> Iterator[list[str]]:
    for r in rows:
        cells = (f"{r[word] / 1e6:,.1f}" if word in r else "" for word in ("hbm", "hbm_predicted", "l2", "l2_predicted"))
        yield [r["name"], *cells, f"{r['ms']:.3f}" if "ms" in r else ""]


def draw(rows: Rows, figure: Any) -> None:
    """Bars of bytes, and the time over them."""
    left, right = figure.subplots(1, 2)
    for at, (word, label) in enumerate(
        (("hbm", "HBM, ncu"), ("hbm_predicted", "HBM, model"), ("l2", "L2, ncu"), ("l2_predicted", "L2, model"))
    ):
        shown = [(n + 0.2 * at, r[word] / 1e9) for n, r in enumerate(rows) if word in r]
        if shown:
            left.bar(*zip(*shown, strict=True), 0.19, label=label)
    left.set(ylabel="GB, forward", xticks=[n + 0.3 for n in range(len(rows))], xticklabels=[r["name"] for r in rows])
    left.set_yscale("log")
    left.legend(fontsize=8)
    timed = [r for r in rows if "ms" in r]
    right.bar([r["name"] for r in timed], [r["ms"] for r in timed])
    right.set(ylabel="ms, forward")
    for axes in (left, right):
        axes.tick_params(axis="x", labelrotation=30)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(int(sys.argv[2]), int(sys.argv[3]))
        return
    bench = Bench("hbm", __doc__, 90)
    gpu = bench.device.type == "cuda"
    tokens, heads = (128, 1) if bench.quick else (4096, 512)
    processors = torch.cuda.get_device_properties(bench.device).multi_processor_count if gpu else 1
    found, refused = watch(bench, tokens, heads) if gpu else ({}, "there is no GPU")
    bench.say(f"ncu: {refused or 'done'}")
    rows = []
    for name, run in runs(bench.device, bench.dtype, tokens, heads).items():
        about = {"name": name, "contender": STANDARD if name == STANDARD else OURS, "N": tokens, "H": heads, "D": D}
        timed = bench.left > 0 and (gpu or INTERPRETED or name == STANDARD)  # the portable kernel needs a GPU, or Triton's interpreter
        rows.append({
            **about, **predicted(name, tokens, heads, bench.dtype.itemsize, processors), **found.get(name, {}),
            **(bench.milliseconds(run, worth=0.2) if timed else {}),
        })  # fmt: skip
    errors = {r["name"]: r["hbm"] / r["hbm_predicted"] - 1 for r in rows if "hbm" in r}
    show("MB of the forward", ("", "HBM, ncu", "HBM, model", "L2, ncu", "L2, model", "ms"), list(lines(rows)))
    print(json.dumps({"hbm measured over predicted, less 1": errors}))
    bench.finish(rows, draw, refused=refused, errors=errors, processors=processors)


if __name__ == "__main__":
    main()
