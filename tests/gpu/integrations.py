"""A program for two ranks, a GPU each (or --device cpu): a step through every integration is that of one process.

distflash run -n 2 -m tests.gpu.integrations [--device cpu] [parts of names of checks ...]

A check that fails does not end it; what failed is told at the end, and in the exit code. In fp32 products are fp32: no TF32.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
import torch.distributed as dist

import distflash
from distflash.launch import shutdown
from tests.gpu import integration_checks as checks
from tests.gpu.integration_checks import RANKS

LIBRARIES = ("accelerate", "deepspeed", "hjson", "transformers")  # a check that lacks one is skipped, and says so
SHAPES = ((1, 2), (2, 1))  # (dp, sp)
SECTION = {"distflash": {"sequence_parallel_size": 2, "ulysses": 2, "layout": "striped", "wire": "p2p"}}
CHECKS: dict[str, Callable[[str], None]] = {
    "kernels": checks.kernels,
    **{f"ddp {dp} x {sp}": partial(checks.parallel, wrap=checks.replicated, dp=dp, sp=sp) for dp, sp in SHAPES},
    "ddp ulysses": partial(checks.parallel, wrap=checks.replicated, dp=1, sp=2, ulysses=2),
    "ddp bf16": partial(checks.parallel, wrap=checks.replicated, dp=1, sp=2, dtype=torch.bfloat16, model=checks.HOPPER),
    **{f"fsdp2 {dp} x {sp}": partial(checks.parallel, wrap=checks.sharded, dp=dp, sp=sp) for dp, sp in SHAPES},
    "fsdp2 bf16": partial(checks.parallel, wrap=checks.sharded, dp=1, sp=2, dtype=torch.bfloat16, model=checks.HOPPER),
    "fsdp2 compiled blocks": partial(checks.parallel, wrap=checks.sharded_graphs, dp=1, sp=2),
    "compile inductor": checks.inductor,
    "checkpoint ring": partial(checks.checkpoints, backend=None),
    "checkpoint ring p2p": partial(checks.checkpoints, backend=None, wire="p2p"),
    "checkpoint ulysses": partial(checks.checkpoints, backend=None, ulysses=2),
    "checkpoint compiled": partial(checks.checkpoints, backend="aot_eager"),
    "nn.Attention": checks.module,
    **{
        f"ring_flash_attn {family}": partial(checks.drop_in, family=family)
        for family in (
            "ring_flash_attn", "zigzag_ring_flash_attn", "stripe_flash_attn", "ring_flash_attn_varlen", "zigzag_ring_flash_attn_varlen",
            "llama3_flash_attn_varlen",
        )
    },
    "ring_flash_attn adapter": checks.adapter,
    **{f"transformers {name}": partial(checks.architecture, name=name) for name in ("Llama", "Qwen3", "Gemma2", "Gemma3", "GptOss")},
    "trainer": checks.trainer,
    **{f"deepspeed zero {stage}, {dp} x {sp}": partial(checks.zero, stage=stage, sp=sp) for stage in range(4) for dp, sp in SHAPES},
    "deepspeed section": partial(checks.zero, stage=2, sp=2, **SECTION),
    "deepspeed local_attn ring": lambda device: checks.local_attention(device, 2, 1, 4, 2, 0, "zigzag"),
    "deepspeed local_attn ulysses": lambda device: checks.local_attention(device, 2, 2, 4, 2, 1, "striped"),
    "deepspeed local_attn uneven heads": lambda device: checks.local_attention(device, 2, 2, 3, 3, 0, "contiguous"),
    "deepspeed ulysses llama, ulysses 2": partial(checks.beneath_ulysses, name="llama", sp=2, ulysses=2, stage=3),
    "deepspeed ulysses llama, ulysses 1": partial(checks.beneath_ulysses, name="llama", sp=2, ulysses=1, stage=1),
    "deepspeed ulysses gpt-oss, ulysses 2": partial(checks.beneath_ulysses, name="gpt-oss", sp=2, ulysses=2, stage=2),
}  # fmt: skip


@cache
def store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()


def outcomes(name: str, device: str) -> list[str]:
    """Run a check: "" of each rank if it passed, else why not. Over the store: a rank that failed may have left messages unanswered."""
    torch.manual_seed(0)
    rank, told = dist.get_rank(), ""
    try:
        CHECKS[name](device)
        if device == "cuda":
            torch.cuda.synchronize()
    except (Exception, pytest.fail.Exception) as error:
        if isinstance(error, ModuleNotFoundError) and error.name in LIBRARIES:
            told = f"skipped: {error.name} is not installed"
        else:
            told = traceback.format_exc()  # printed at once: another rank may wait for this one until its time is up
            print(f"rank {rank}, {name}:\n{told}", file=sys.stderr, flush=True)
    torch._dynamo.reset()
    store().set(f"{name}/{rank}", told)
    return [store().get(f"{name}/{other}").decode() for other in range(RANKS)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--alone", metavar="FILE", help="for itself: what one process makes of the trainer's epochs")
    parser.add_argument("names", nargs="*", help="parts of the names of checks; all unless given")
    asked = parser.parse_args()
    os.environ["DS_ACCELERATOR"] = asked.device
    torch.set_float32_matmul_precision("highest")
    if asked.alone:
        return checks.write_alone(asked.device, asked.alone)
    world = distflash.init(backend="nccl" if asked.device == "cuda" else "gloo", timeout=120, heartbeat=60)
    if world.size != RANKS:
        raise SystemExit(f"needs {RANKS} ranks, got {world.size}: distflash run -n {RANKS} -m tests.gpu.integrations")
    chosen = [name for name in CHECKS if not asked.names or any(part in name for part in asked.names)]
    if not chosen:
        raise SystemExit(f"no check is called {asked.names}: {', '.join(CHECKS)}")
    failed, skipped = [], []
    for name in chosen:
        start, found = time.perf_counter(), outcomes(name, asked.device)
        took = time.perf_counter() - start
        if any(found):
            (skipped if all(told.startswith("skipped") for told in found) else failed).append(name)
        if world.is_main:
            how = found[0] if name in skipped else f"FAILED on {sum(map(bool, found))} ranks" if any(found) else "passed"
            print(how if how == "passed" else f"{how}:", name, f"{took:.1f}", flush=True)
    if world.is_main:
        print(f"{len(chosen) - len(failed) - len(skipped)} passed, {len(skipped)} skipped, {len(failed)} failed", *failed, sep="\n  ")
        print("FAILED" if failed else "OK", flush=True)
    shutdown()
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
