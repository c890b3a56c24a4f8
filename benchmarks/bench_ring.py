"""Attention across GPUs of one host: DistFlash beside its peers and the bound of one GPU, causal, bf16, D = 128.

    distflash run -n 4 -m benchmarks.bench_ring

Rates are TFLOP/s a GPU on causal FLOPs, as `distflash.launch.bench` says. ring-flash-attn and yunchang call flash-attn's low-level
functions: what stands behind them is whatever module `flash_attn` is found; one with a `MODE` lets us choose ("cudnn" is the fastest).
In `checked`: how far the results of two wires are apart (out, dq, dk, dv), and whether deterministic repeats gave the same bits.
"""

from __future__ import annotations

import argparse
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import distflash
from benchmarks.record import RESULTS, held, slug, write
from distflash.launch.bench import Cell, Found, as_rows, bound, ours, rates
from distflash.launch.world import World

SCHEMES: tuple[dict[str, Any], ...] = (
    {"wire": "symmetric", "order": "ring"},
    {"wire": "symmetric", "order": "all_gather"},
    {"wire": "p2p", "order": "ring"},
    {"wire": "symmetric", "order": "ring", "ulysses": "all"},
    {"wire": "p2p", "order": "ring", "ulysses": "all"},
)


def log_normal_documents(tokens: int, seed: int) -> tuple[int, ...]:
    """Borders of packed documents, lengths log-normal between 512 and 32,768."""
    generator, borders = torch.Generator().manual_seed(seed), [0]
    while borders[-1] < tokens:
        drawn = torch.randn((), generator=generator).mul(1.2).add(8.3).exp()
        borders.append(min(tokens, borders[-1] + int(drawn.clamp(512, 32768))))
    return tuple(borders)


def ring_flash_attn(world: World, cell: Cell) -> Iterator[tuple[str, Callable, list[torch.Tensor]]]:
    """Its zigzag ring."""
    stub = types.ModuleType("ring_flash_attn.adapters")  # what it patches in transformers is not needed, and breaks with its versions
    stub.substitute_hf_flash_attn = stub.update_ring_flash_attn_params = None  # type: ignore[attr-defined]
    sys.modules.setdefault("ring_flash_attn.adapters", stub)
    from ring_flash_attn.zigzag_ring_flash_attn import zigzag_ring_flash_attn_func

    leaves = _leaves(world, cell, 1)
    for mode in _modes():
        yield f"ring-flash-attn zigzag{mode}", lambda: zigzag_ring_flash_attn_func(*leaves, causal=True), leaves


def yunchang(world: World, cell: Cell) -> Iterator[tuple[str, Callable, list[torch.Tensor]]]:
    """Ulysses over all ranks, and USP where there are ranks enough."""
    from yunchang import LongContextAttention, set_seq_parallel_pg
    from yunchang.kernels import AttnType

    leaves = _leaves(world, cell, 1)
    for ulysses in {world.size, max(1, world.size // 2)}:
        set_seq_parallel_pg(ulysses, world.size // ulysses, world.rank, world.size)
        attend = LongContextAttention(ring_impl_type="zigzag", attn_type=AttnType.FA)
        for mode in _modes():
            call = lambda attend=attend: attend(*leaves, causal=True, softmax_scale=cell.head_dim**-0.5)  # noqa: E731
            yield f"yunchang ulysses {ulysses} x ring {world.size // ulysses}{mode}", call, leaves


def context_parallel(world: World, cell: Cell) -> Iterator[tuple[str, Callable, list[torch.Tensor]]]:
    """PyTorch's, all-gather, with cuDNN; it takes no fewer key/value heads."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if cell.heads != cell.kv_heads:
        return
    mesh = init_device_mesh("cuda", (world.size,))
    shape = 1, cell.heads, cell.length, cell.head_dim
    whole = [torch.randn(shape, device=world.device, dtype=torch.bfloat16) for _ in range(3)]
    with context_parallel(mesh, buffers=whole, buffer_seq_dims=[2] * 3), sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
        leaves = [x.detach().clone().requires_grad_() for x in whole]
        call = lambda: torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True)  # noqa: E731
        yield "PyTorch context_parallel, all-gather, cuDNN", call, leaves


PEERS = {"ring-flash-attn": ring_flash_attn, "context_parallel": context_parallel, "yunchang": yunchang}


def _modes() -> Iterator[str]:
    """What stands behind flash-attn's names, one after the other where there is a choice."""
    import flash_attn.flash_attn_interface as behind

    if not hasattr(behind, "MODE"):
        yield ""
        return
    for mode in ("fa2", "cudnn"):
        behind.MODE = mode
        yield f" [{mode}]"


def _leaves(world: World, cell: Cell, batch: int) -> list[torch.Tensor]:
    heads = cell.heads, cell.kv_heads, cell.kv_heads
    options: dict[str, Any] = {"device": world.device, "dtype": torch.bfloat16, "requires_grad": True}
    return [torch.randn(batch, cell.length // world.size, h, cell.head_dim, **options) for h in heads]


def exact(world: World, cell: Cell) -> dict[str, Any]:
    """How far the wires' results are apart, and whether deterministic repeats over the symmetric one are bit-equal."""
    leaves, results = _leaves(world, cell, 1), []
    dout = torch.randn_like(leaves[0])
    for wire in ("p2p", "symmetric", "symmetric"):
        seq = distflash.SequenceParallel(wire=wire).sequence(cell.length)
        out = distflash.attention(*leaves, seq, causal=True, deterministic=True)
        results.append([out, *torch.autograd.grad(out, leaves, dout)])
    apart = [((a - b).float().norm() / a.float().norm()).item() for a, b in zip(results[0], results[1], strict=True)]
    same = all(torch.equal(a, b) for a, b in zip(results[1], results[2], strict=True))
    worst = torch.tensor([max(apart), float(not same)], device=world.device)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return {"cell": str(cell), "wires_apart": worst[0].item(), "bit_equal": not worst[1].item()}


def measure(world: World, cell: Cell, peers: list[str], repeats: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Every way to compute a cell. What a peer cannot do is said and left out."""
    best = bound(world, replace(cell, documents=None), repeats)
    found = [best]
    schemes = [scheme | ({"ulysses": world.size} if "ulysses" in scheme else {}) for scheme in SCHEMES]
    layouts = ("zigzag", "contiguous") if cell.documents else ("zigzag",)
    found += [ours(world, cell, repeats, layout=layout, **scheme) for layout in layouts for scheme in schemes]
    for peer in peers if cell.documents is None else []:
        try:
            found += [rates(world, cell, how, call, leaves, repeats) for how, call, leaves in PEERS[peer](world, cell)]
        except (ImportError, RuntimeError, ValueError, TypeError) as error:
            say(f"{peer}, {cell}: {type(error).__name__}: {str(error)[:300]}")
        torch.cuda.empty_cache()
    for one in found:
        say(_line(one, best))
    return as_rows(found, best)


def _line(one: Found, best: Found) -> str:
    parts = [f"{name} {getattr(one, name)[0]:6.0f} ({getattr(one, name)[0] / getattr(best, name)[0]:6.1%})" for name in ("forward", "both")]
    return f"{one.cell:36} {one.how:48} {'  '.join(parts)}"


def draw(path: Path) -> None:
    """The file's rates against the length, beside it as PNG."""
    import json

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [r for r in json.loads(path.read_text())["rows"] if "documents" not in r["cell"]]
    heads = list(dict.fromkeys(r["cell"].split()[1] for r in rows))
    figure, axes = pyplot.subplots(len(heads), 2, figsize=(12, 4.5 * len(heads)), sharey=True, squeeze=False)
    for row, head in zip(axes, heads, strict=True):
        for axis, name, title in zip(row, ("forward", "both"), ("forward", "forward and backward"), strict=True):
            for how in dict.fromkeys(r["how"] for r in rows if not r["how"].endswith("[fa2]")):
                found = [(int(r["cell"].split()[0][2:]), *r[name]) for r in rows if r["how"] == how and r["cell"].split()[1] == head]
                lengths, mid, low, high = zip(*found, strict=True) if found else ((), (), (), ())
                errors = [[m - l for m, l in zip(mid, low, strict=True)], [h - m for m, h in zip(mid, high, strict=True)]]
                axis.errorbar(lengths, mid, errors, label=how, capsize=2, linestyle="--" if "bound" in how else "-")
            axis.set(title=f"{head}, {title}", xscale="log", xlabel="tokens", ylabel="TFLOP/s a GPU, causal")
            axis.set_xticks(sorted({int(r["cell"].split()[0][2:]) for r in rows}), minor=False)
            axis.xaxis.set_major_formatter(lambda n, _: f"{n / 1024:.0f}k")
            axis.minorticks_off()
            axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[16384, 32768, 65536, 131072])
    parser.add_argument("--heads", nargs="+", default=["32/32", "32/8"])
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--documents", type=int, metavar="SEED", help="also 131,072 tokens of packed documents, drawn with this seed")
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--append", action="store_true", help="keep what the file holds of other cells")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a result file, measure nothing")
    options = parser.parse_args()
    if options.plot:
        draw(options.plot)
        return
    world = distflash.init()

    def say(text: str) -> None:
        if world.is_main:
            print(text, flush=True)

    heads = [tuple(map(int, pair.split("/"))) for pair in options.heads]
    cells = [Cell(length, *pair) for length in options.lengths for pair in heads]
    if options.documents is not None:
        cells += [Cell(131072, *pair, documents=log_normal_documents(131072, options.documents)) for pair in heads]
    name = f"ring_{world.size}x{slug(world.device)}"
    earlier, again = held(options.out / f"{name}.json") if options.append else {"rows": []}, {str(cell) for cell in cells}
    rows = [row for row in earlier["rows"] if row["cell"] not in again]
    seed = earlier.get("seed") if options.documents is None else options.documents
    checked = [exact(world, Cell(8192, *pair)) for pair in heads]
    say(str(checked))
    for cell in cells:
        rows += measure(world, cell, options.peers, options.repeats, say)
        if world.is_main:
            draw(write(name, rows, options.out, checked=checked, seed=seed))


if __name__ == "__main__":
    main()
