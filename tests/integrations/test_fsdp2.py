"""FSDP2 over all ranks, and HSDP: one step is that of one process; the example trains."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from torch.distributed.fsdp import fully_shard

from distflash.testing import spmd_processes
from tests.integrations.data_parallel import MESHES, assert_same, step

ROOT = Path(__file__).resolve().parents[2]


def sharded(model, mesh):
    """Every parameter in pieces over all ranks."""
    flat = mesh["dp", "sp"]._flatten("all")
    for block in model.blocks:
        fully_shard(block, mesh=flat)
    return fully_shard(model, mesh=flat)


def hybrid(model, mesh):
    """In pieces over the ranks that share a sequence, whole once a dp rank."""
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def compiled(model, mesh, backend="aot_eager"):
    """FSDP2, each block one graph."""
    for block in model.blocks:
        block.compile(fullgraph=True, backend=backend)
    return sharded(model, mesh)


@pytest.mark.parametrize(("dp", "sp"), MESHES)
def test_one_step_moves_every_parameter_as_one_process_does(dp, sp):
    assert_same(spmd_processes(dp * sp, partial(step, dp, sp, sharded)))


def test_hybrid_sharding_too():
    assert_same(spmd_processes(4, partial(step, 2, 2, hybrid)))


def test_compiled_blocks_too():
    assert_same(spmd_processes(2, partial(step, 1, 2, compiled)))


def test_the_example_trains_on_two_ranks():
    command = [sys.executable, "-m", "distflash", "run", "-n", "2", str(ROOT / "examples" / "fsdp2.py"), "--steps", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines() if "loss" in line]
    assert len(losses) == 4 and losses[-1] < losses[0], done.stdout
