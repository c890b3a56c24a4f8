"""check.py itself, on the forward of each head size with the installed Triton. `make compile-check` has every shipped configuration,
with the oldest Triton and the newest. Whether they compute the right thing, tests/gpu shows.
"""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from distflash.kernels.hopper import configs


def check(*arguments: str) -> subprocess.CompletedProcess:
    """In a process of its own: interpreted and compiled kernels cannot share one."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "distflash.kernels.hopper.check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env)


@pytest.mark.timeout(600)  # 20 s alone
def test_shipped_configurations_neither_serialise_nor_spill_more_than_is_known():
    run = check("--quick", "--only", "forward D")
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]
    assert "all pass" in run.stdout
    assert sum(line.startswith("forward D") for line in run.stdout.splitlines()) == len(configs.FORWARD), run.stdout


def test_every_shipped_configuration_is_checked():
    from distflash.kernels.hopper.check import _jobs

    names = list(_jobs(quick=True, variants_too=False))
    for name, table in (("forward", configs.FORWARD), ("dkv", configs.BACKWARD), ("dq", configs.BACKWARD)):
        assert sum(n.startswith(name) for n in names) == len(table)
    assert sum(n.startswith("backward") for n in names) == sum(c.one_pass is not None for c in configs.BACKWARD.values())


def test_with_the_triton_that_torch_brings_nothing_spills():
    from distflash.kernels.hopper.check import KNOWN_GAPS

    assert "3.6" not in KNOWN_GAPS
