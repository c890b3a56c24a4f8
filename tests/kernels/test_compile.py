"""The check itself, on a few kernels; `make compile-check` has all that is shipped, with the oldest Triton and the newest."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


def compile_check(*arguments: str) -> subprocess.CompletedProcess:
    """In a process of its own: interpreted and compiled kernels cannot share one."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "distflash.kernels.compile_check", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_a_configuration_that_the_speed_rests_on_compiles_with_the_installed_triton():
    done = compile_check("--target", "sm_90", "--head-dim", "64", "--dtype", "bf16", "--pass", "dq", "--variants", "none")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "all pass" in done.stdout


def test_a_configuration_that_spills_is_reported():
    done = compile_check(
        "--target",
        "sm_90",
        "--head-dim",
        "128",
        "--dtype",
        "bf16",
        "--pass",
        "forward",
        "--tile",
        "128",
        "64",
        "4",
        "3",
        "--variants",
        "none",
    )
    assert done.returncode == 1
    assert "spills" in done.stdout


@pytest.mark.timeout(600)
def test_a_kernel_that_does_not_fit_into_tensor_memory_is_reported():
    """Triton compiles it to a bare trap, without an error: 4 registers, no spills, nothing stored."""
    tile = ("--tile", "64", "32", "8", "2", "--variants", "none")
    done = compile_check("--target", "sm_100", "--head-dim", "256", "--dtype", "bf16", "--pass", "dkv", *tile)
    assert done.returncode == 1
    assert "columns of tensor memory" in done.stdout
