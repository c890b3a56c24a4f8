"""distflash.init() under a real mpirun, if there is one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.programs import ranks_of, start

MPIRUN = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")


def mpirun(*arguments):
    if MPIRUN is None:
        pytest.skip("no mpirun on PATH (the package openmpi brings one)")
    version = subprocess.run([MPIRUN, "--version"], capture_output=True, text=True, timeout=20, check=False).stdout
    options = ["--oversubscribe"] if "Open MPI" in version else []
    if options and os.geteuid() == 0:
        options.append("--allow-run-as-root")
    return [MPIRUN, *options, "-n", "2", sys.executable, *arguments]


def test_mpi_introduces_the_ranks_and_nothing_listens_beyond_loopback(tmp_path):
    done = start(mpirun("rank.py"), tmp_path)
    assert done.returncode == 0, done.stderr
    lines = ranks_of(done)
    assert [line.split(" sum ")[0] for line in lines] == [f"RANK {r}/2 local {r}/2 cpu gloo mpi" for r in range(2)]
    assert all("sum 3 " in line and line.endswith("listens ['0100007F']") for line in lines)


def test_a_rank_that_fails_under_mpirun_does_not_hang_the_others(tmp_path):
    done = start(mpirun("rank.py", "raise"), tmp_path, timeout=45)
    assert done.returncode != 0
    assert "the bug of rank 1" in done.stderr
