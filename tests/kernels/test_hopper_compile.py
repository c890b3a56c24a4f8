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
def test_shipped_configurations_neither_serialise_nor_spill():
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


@pytest.mark.parametrize("fault", [{}, {"spilled": 4}, {"serialised": ["C7512"]}, {"shared": 232_449}])
def test_what_a_shipped_configuration_may_not_do_fails_the_check(monkeypatch, capsys, fault):
    from distflash.kernels.hopper import check

    seen = {"registers": 168, "spilled": 0, "hot": 0, "shared": 232_448, "wgmma": 1, "serialised": []} | fault
    monkeypatch.setattr(check, "inspect", lambda *_, **__: seen)
    monkeypatch.setattr(sys, "argv", ["check", "--quick", "--variants", "--only", "forward D256", "--jobs", "1"])
    assert check.main() == (1 if fault else 0)
    assert capsys.readouterr().out.count("FAIL") == (1 + len(configs.FORWARD_VARIANTS[256, 256]) if fault else 0)
