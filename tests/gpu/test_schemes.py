"""Every scheme on this machine's GPUs: threads that share one, and one process a GPU over NCCL."""

import subprocess
import sys

import pytest
import torch

import distflash
from distflash.parallel import staging
from distflash.testing import spmd

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]


def verify(*options):
    done = subprocess.run([sys.executable, "-m", "distflash", "verify", *options], capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert ", 0 out of budget" in done.stdout


def test_every_scheme_as_threads_of_one_gpu():
    verify()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_every_scheme_over_nccl():
    verify("--nproc", str(torch.cuda.device_count()))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_copies_between_gpus():
    command = [sys.executable, "-m", "distflash", "run", "-n", str(torch.cuda.device_count()), "-m", "tests.gpu.copies"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "OK" in done.stdout, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.parametrize("pace", [staging.PACE, 0])
def test_visits_of_several_blocks_give_what_visits_of_one_give(monkeypatch, pace):
    """Four ranks as threads of one GPU, which group blocks wherever there is room (pace 0)."""
    monkeypatch.setattr(staging, "PACE", pace)
    tokens, heads, kv_heads, dim = 16384, 8, 2, 128
    x = [torch.randn(1, tokens, h, dim, device="cuda", dtype=torch.bfloat16) for h in (heads, kv_heads, kv_heads, heads)]
    block = 2 * tokens // 4 * kv_heads * dim * 2

    def work(group, limit, deterministic):
        seq = distflash.SequenceParallel(group, layout="zigzag", order="ring", ulysses=1, wire="symmetric", staging=limit).sequence(tokens)
        leaves = [seq.shard(t).requires_grad_() for t in x[:3]]
        out = distflash.attention(*leaves, seq, causal=True, deterministic=deterministic)
        told = distflash.explain(leaves[0].shape, leaves[1].shape, seq, causal=True, deterministic=deterministic, device="cuda")
        return told.visits, [out.detach(), *torch.autograd.grad(out, leaves, seq.shard(x[3]))]

    wanted = spmd(4, lambda group: work(group, 2 * block, True), device="cuda")
    visits = []
    for limit, deterministic in ((3 * block, True), (3 * block, False), (2 * block, False), (None, False)):
        found = spmd(4, lambda group: work(group, limit, deterministic), device="cuda")  # noqa: B023
        visits.append(found[0][0])
        for (_, mine), (_, theirs) in zip(found, wanted, strict=True):
            for a, b in zip(mine, theirs, strict=True):
                assert torch.equal(a, b) if deterministic else (a.float() - b.float()).norm() < 4e-3 * b.float().norm()
    assert visits[0] == 4 and (pace or visits[-1] < 4)
