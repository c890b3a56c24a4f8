"""The portable Triton kernel beside FlexAttention and FlashAttention-2 (torch's own SDPA backend), on one GPU in one run.

    python benchmarks/bench_portable.py [--out FILE] [--sweep [PASS ...]] [--dtype bf16] [--head-dim 64 128] [--length 8192] [--heads-first]

B·S = 32768 tokens, H·D = 2048. FLOPs: forward 4·B·H·S²·D, halved if causal; backward 2.5 times that. Each figure is the median of many
runs with the 20th and 80th percentile beside it. The kernel is first compared with fp64 on a small case. --sweep times the candidate
configurations of each pass instead of the peers; a candidate that does not launch is listed with its error.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from triton.testing import do_bench

from benchmarks.record import RESULTS, slug, versions, write
from distflash.kernels.triton import TritonKernel
from distflash.kernels.triton.configs import EVERY, WHOLE, Config, config, family
from distflash.tile import Band, Tile, Tiles

TOKENS, WIDTH = 32768, 2048
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
CANDIDATES = {  # (rows, columns, warps, stages, boxes, overlap)
    "forward": [(128, 64, 8, 3), (128, 64, 8, 3, WHOLE), (128, 64, 8, 3, WHOLE, True), (64, 64, 4, 2, WHOLE, True), (128, 64, 4, 3, WHOLE)],
    "dkv": [(64, 32, 4, 3), (64, 64, 4, 2, WHOLE), (64, 64, 4, 2, EVERY), (64, 64, 4, 3, WHOLE), (64, 64, 4, 3, EVERY)],
    "dq": [(128, 64, 8, 3), (64, 64, 4, 2, WHOLE), (64, 64, 4, 3, EVERY), (128, 64, 4, 3, WHOLE)],
}  # fmt: skip


def tiles_of(length: int, causal: bool) -> Tiles:
    whole = slice(0, length)
    return Tiles((Tile(whole, whole, Band(1 - length, 0)) if causal else Tile.whole(whole, whole),), length, length)


def verify(head_dim: int, causal: bool, dtype: torch.dtype) -> dict[str, float]:
    """Relative errors against fp64 on a small case, checked against the library's budgets (bf16 3.5e-3 and 7e-3)."""
    kernel, length, scale = TritonKernel(), 300, head_dim**-0.5
    q, k, v, dout = (torch.randn(2, length, 2, head_dim, device="cuda").to(dtype) for _ in range(4))
    tiles = tiles_of(length, causal)
    out, lse = kernel.forward(q, k, v, tiles, scale)
    found = (out, *kernel.backward(dout, q, k, v, lse, kernel.delta(out, dout), tiles, scale))
    leaves = [t.double().transpose(1, 2).requires_grad_() for t in (q, k, v)]
    with sdpa_kernel([SDPBackend.MATH]):
        true_out = F.scaled_dot_product_attention(*leaves, is_causal=causal)
    true = (true_out, *torch.autograd.grad(true_out, leaves, dout.double().transpose(1, 2)))
    errors = {}
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, true, strict=True):
        errors[name] = ((a.double() - b.transpose(1, 2)).norm() / b.norm()).item()
        budget = 3.5e-3 if name == "out" else 7e-3
        if not errors[name] <= budget:
            raise SystemExit(f"D={head_dim} causal={causal}: {name} errs by {errors[name]:.2e}, budget {budget:.1e}")
    return errors


def measure(run: Callable[[], object], flops: float) -> dict[str, float]:
    """TFLOP/s: median, and the slow and fast 20 %."""
    median, fast, slow = do_bench(run, warmup=50, rep=300, quantiles=[0.5, 0.2, 0.8])
    return {"ms": median, "tflops": flops / median / 1e9, "tflops_low": flops / slow / 1e9, "tflops_high": flops / fast / 1e9}


def inputs(B: int, S: int, H: int, D: int, dtype: torch.dtype, heads_first: bool) -> list[torch.Tensor]:
    """q, k, v, dout as [B, S, H, D]; in memory too, or as [B, H, S, D] there."""
    if heads_first:
        return [torch.randn(B, H, S, D, device="cuda", dtype=dtype).transpose(1, 2) for _ in range(4)]
    return [torch.randn(B, S, H, D, device="cuda", dtype=dtype) for _ in range(4)]


def ours(B: int, S: int, H: int, D: int, causal: bool, dtype: torch.dtype, heads_first: bool) -> tuple[Callable, Callable]:
    """(forward, backward with delta) of the portable kernel; outputs in the inputs' dtype, as the peers'."""
    kernel, tiles, scale = TritonKernel(), tiles_of(S, causal), D**-0.5
    q, k, v, dout = inputs(B, S, H, D, dtype, heads_first)
    out, lse = kernel.forward(q, k, v, tiles, scale, dtype=dtype)

    def backward():
        delta = kernel.delta(out, dout)
        return kernel.backward(dout, q, k, v, lse, delta, tiles, scale, dq_dtype=dtype, dkv_dtype=dtype)

    return lambda: kernel.forward(q, k, v, tiles, scale, dtype=dtype), backward


def peer(attend: Callable, B: int, S: int, H: int, D: int, dtype: torch.dtype) -> tuple[Callable, Callable]:
    """(forward, backward) of a function of [B, H, S, D] tensors with autograd."""
    q, k, v = (torch.randn(B, H, S, D, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3))
    out = attend(q, k, v)
    dout = torch.randn_like(out)
    return lambda: attend(q, k, v), lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)


def peers(S: int, causal: bool) -> dict[str, Callable]:
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, S, S, device="cuda") if causal else None
    compiled = torch.compile(flex_attention, dynamic=False)

    def fa2(q, k, v):
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    return {"flex": lambda q, k, v: compiled(q, k, v, block_mask=mask), "fa2": fa2}


def compare(S: int, D: int, causal: bool, dtype: torch.dtype, heads_first: bool) -> Iterator[dict]:
    B, H = TOKENS // S, WIDTH // D
    flops = 4 * B * H * S * S * D * (0.5 if causal else 1.0)
    runs = {"triton": lambda: ours(B, S, H, D, causal, dtype, heads_first)}
    runs |= {name: lambda attend=attend: peer(attend, B, S, H, D, dtype) for name, attend in peers(S, causal).items()}
    for name, prepare in runs.items():
        forward, backward = prepare()
        yield {"kernel": name, "pass": "forward", **measure(forward, flops)}
        yield {"kernel": name, "pass": "backward", **measure(backward, 2.5 * flops)}


def sweep(passes: list[str], S: int, D: int, causal: bool, dtype: torch.dtype, heads_first: bool) -> Iterator[dict]:
    """Each candidate of each pass, timed alone. TFLOP/s of dkv and dq count their own matmuls: 4 and 3 of the forward's 2."""
    B, H, scale = TOKENS // S, WIDTH // D, D**-0.5
    tiles, flops = tiles_of(S, causal), 4 * B * H * S * S * D * (0.5 if causal else 1.0)
    q, k, v, dout = inputs(B, S, H, D, dtype, heads_first)
    out, lse = TritonKernel().forward(q, k, v, tiles, scale, dtype=dtype)
    stats = TritonKernel()._stats(lse, TritonKernel().delta(out, dout))
    dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
    for pass_ in passes:
        shipped = config(pass_, family(q.device), 2, D)
        for tile in dict.fromkeys([shipped, *(Config(*c) for c in CANDIDATES[pass_])]):
            kernel = TritonKernel({pass_: tile})
            run, matmuls = {
                "forward": (partial(kernel.forward, q, k, v, tiles, scale, dtype=dtype), 2),
                "dkv": (partial(kernel._dkv, dout, q, k, v, stats, tiles, scale, dk, dv), 4),
                "dq": (partial(kernel._dq, dout, q, k, v, stats, tiles, scale, dq, None, False), 3),
            }[pass_]
            name = f"{tile.rows}x{tile.columns}/{tile.warps}/{tile.stages}/{('pointers', 'whole', 'every')[tile.boxes]}"
            name += "/overlap" * tile.overlap + "*" * (tile == shipped)
            try:
                yield {"kernel": name, "pass": pass_, **measure(run, flops * matmuls / 2)}
            except Exception as error:  # too much shared memory, or a compiler that gives up: part of the answer
                yield {"kernel": name, "pass": pass_, "failed": str(error).splitlines()[0][:100]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sweep", nargs="*", choices=list(CANDIDATES), help="the passes to sweep, all if none is named")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--head-dim", nargs="+", type=int, default=[128, 64])
    parser.add_argument("--length", nargs="+", type=int, default=[8192])
    parser.add_argument("--heads-first", action="store_true", help="our tensors as [B, H, S, D] in memory, like the peers'")
    args = parser.parse_args()
    dtype = DTYPES[args.dtype]
    about = {"dtype": args.dtype, "tokens": TOKENS, "width": WIDTH}
    print(versions() | about)
    rows, measure_all = [], compare if args.sweep is None else partial(sweep, args.sweep or list(CANDIDATES))
    for D in args.head_dim:
        errors = {causal: verify(D, causal, dtype) for causal in (True, False)}
        print(f"D={D} against fp64, causal:", {name: f"{error:.1e}" for name, error in errors[True].items()})
        for S in args.length:
            for causal in (True, False):
                for row in measure_all(S, D, causal, dtype, args.heads_first):
                    rows.append({"D": D, "S": S, "causal": causal, **row})
                    print(line(rows[-1]), flush=True)
    out = args.out or RESULTS / f"portable_{slug(torch.device('cuda'))}{'' if args.sweep is None else '_sweep'}.json"
    print("wrote", write(out.stem, rows, out.parent, **about))


def line(row: dict) -> str:
    where = f"D={row['D']:<4} S={row['S']:<6} {'causal' if row['causal'] else 'full':6} {row['kernel']:>26} {row['pass']:8}"
    if "failed" in row:
        return f"{where} failed: {row['failed']}"
    return f"{where} {row['tflops']:6.0f} TFLOP/s ({row['tflops_low']:.0f}..{row['tflops_high']:.0f}) {row['ms']:8.3f} ms"


if __name__ == "__main__":
    main()
