"""launch/run.py: `distflash run` and torchrun with real processes. Each launch costs some 5 to 10 s, so they are few."""

import os
import re
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.distributed.launcher.api import LaunchConfig

from distflash.launch import run as runner
from distflash.launch.heartbeat import EXIT_PEER_LOST
from distflash.launch.temporary import folder
from tests.launch.programs import ROOT, distflash, ranks_of, start


def test_ranks_meet_on_loopback_only_and_leave_quietly(tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    done = start(distflash("run", "-n", "2", "rank.py"), tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = ranks_of(done)
    assert first.startswith("RANK 0/2 local 0/2 cpu gloo torchrun sum 3 threads ")
    assert second.startswith("RANK 1/2 local 1/2 cpu gloo torchrun sum 3 threads ")
    for line in (first, second):
        assert "threads None" not in line
        assert line.endswith("listens ['0100007F']")  # 127.0.0.1
    assert done.stderr == ""
    assert not [*(tmp_path / "temporary").iterdir()]


def test_the_launcher_itself_listens_on_loopback_only(tmp_path):
    (tmp_path / "spy.py").write_text(SPY)
    done = start(distflash("run", "-n", "1", "spy.py"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert ranks_of(done) == ["RANK ['0100007F']"]


SPY = """
import os
from pathlib import Path
parent = os.getppid()
inodes = {os.readlink(link)[8:-1] for link in Path(f"/proc/{parent}/fd").iterdir()}
rows = [fields for table in ("/proc/net/tcp", "/proc/net/tcp6") for fields in map(str.split, Path(table).read_text().splitlines()[1:])]
print("RANK", sorted({fields[1].split(":")[0] for fields in rows if fields[3] == "0A" and fields[9] in inodes}))
"""


@pytest.mark.parametrize("pace", [[], ["slowly"]])
def test_the_failing_ranks_traceback_and_exit_code_are_passed_on(tmp_path, pace):
    done = start(distflash("run", "-n", "2", "rank.py", "raise", *pace), tmp_path)
    assert done.returncode == 1 and "distflash run: " in done.stderr, done.stderr
    told = done.stderr[done.stderr.index("distflash run: ") :]
    assert told.startswith("distflash run: rank 1 (pid ")
    assert "the bug of rank 1" in told and "Traceback" in told and "rank.py" in told
    assert done.stderr.index("the bug of rank 1") < done.stderr.index("distflash run: ")


@pytest.mark.parametrize("pace", [[], ["slowly"]])
def test_a_rank_that_exits_with_a_code_of_its_own_is_the_one_named(tmp_path, pace):
    done = start(distflash("run", "-n", "2", "rank.py", "exit", *pace), tmp_path)
    assert done.returncode == 7, done.stderr
    assert "rank 1 (pid " in done.stderr and "failed first, with exit code 7" in done.stderr


def test_a_rank_that_is_stopped_is_named_and_does_not_outlive_the_job(tmp_path):
    done = start(distflash("run", "-n", "2", "rank.py", "stop"), tmp_path)
    assert done.returncode == EXIT_PEER_LOST, done.stderr
    assert "DistFlashPeerLost: rank 1 (host " in done.stderr and "; rank 0 was in no call of distflash" in done.stderr
    pid = re.search(r"DistFlashPeerLost: rank 1 .host .*, pid ([0-9]+)", done.stderr)[1]
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize(("name", "number"), [("SIGHUP", None), ("SIGTERM", 143)])
def test_what_nohup_ignores_ends_no_job_and_what_ends_one_leaves_nothing_behind(tmp_path, name, number):
    if name == "SIGHUP" and "signals_to_handle" not in LaunchConfig.__dataclass_fields__:
        pytest.skip("torch 2.9 ends on every signal")
    (tmp_path / "alone.py").write_text(ALONE)
    (tmp_path / "temporary").mkdir()
    environ = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "TMPDIR": str(tmp_path / "temporary")}
    command = ["nohup", *distflash("run", "-n", "1", "alone.py", "alone", "4")]
    launcher = subprocess.Popen(
        command, cwd=tmp_path, env=environ, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), 60)
    time.sleep(0.5)  # the agent looks at its ranks
    launcher.send_signal(getattr(signal, name))
    assert launcher.wait(timeout=60) == (number or 0)
    assert gone(int((tmp_path / "pid").read_text())) and not [*(tmp_path / "temporary").iterdir()]


ALONE = """
import os, sys, time
from pathlib import Path
if sys.argv[1] == "joins":
    from distflash.launch import init
    init()
Path("pid").write_text(str(os.getpid()))
time.sleep(float(sys.argv[2]))
"""


@pytest.mark.parametrize("joins", ["joins", "alone"])
def test_a_launcher_that_is_killed_leaves_no_rank_behind_and_no_file_beyond_the_next_one(tmp_path, monkeypatch, joins):
    (tmp_path / "alone.py").write_text(ALONE)
    (tmp_path / "temporary").mkdir()
    environ = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "TMPDIR": str(tmp_path / "temporary")}
    launcher = subprocess.Popen(distflash("run", "-n", "1", "alone.py", joins, "60"), cwd=tmp_path, env=environ, start_new_session=True)
    wait(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), 60)
    launcher.kill()
    launcher.wait()
    wait(lambda: gone(int((tmp_path / "pid").read_text())), 5)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    with folder() as mine:  # the next launcher's
        assert [*(tmp_path / "temporary").iterdir()] == [mine]


def gone(pid):
    path = Path(f"/proc/{pid}/cmdline")
    return not path.exists() or not path.read_text()  # empty: a zombie


FORKS = """
import os, sys
import torch, torch.distributed as dist
from distflash.launch import init

rank = init(timeout=60).rank
dist.all_reduce(torch.ones(1))
for how in ("ends", "fails"):
    if (child := os.fork()) == 0:
        if how == "fails":
            raise ValueError("the bug of a child")
        sys.exit(3)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == {"ends": 3, "fails": 1}[how], f"a child that {how} left with {code}"
dist.all_reduce(torch.ones(1))
if rank == 1:
    raise ValueError("the bug of rank 1")
dist.all_reduce(torch.ones(1))
"""


def test_what_a_rank_has_forked_ends_nothing_of_the_ranks_and_reports_nothing_in_its_name(tmp_path):
    (tmp_path / "forks.py").write_text(FORKS)
    done = start(distflash("run", "-n", "2", "forks.py"), tmp_path)
    assert done.returncode == 1, done.stderr
    told = done.stderr[done.stderr.index("distflash run: ") :]
    assert told.startswith("distflash run: rank 1 (pid ") and "the bug of rank 1" in told and "child" not in told.splitlines()[-1]


def wait(until, seconds):
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def failure(exitcode, time_ns=None, lost_connection=False):
    extra = {"extraInfo": {"time_ns": time_ns, "lost_connection": lost_connection, "py_callstack": "Traceback\nRuntimeError: why"}}
    return SimpleNamespace(
        exitcode=exitcode, pid=1, error_file_data={"message": extra if time_ns else "<NONE>"}, signal_name=lambda: "SIGKILL"
    )


@pytest.mark.parametrize(
    ("failures", "first"),
    [
        ({0: failure(1, 20), 1: failure(1, 10)}, 1),  # the earlier exception
        ({0: failure(1, 10), 1: failure(-9)}, 1),  # killed; the exception is "connection closed"
        ({0: failure(1, 10), 1: failure(7)}, 1),  # left by itself
        ({0: failure(75), 1: failure(1, 10)}, 1),  # lost its peer
        ({0: failure(-6), 1: failure(1, 10)}, 1),  # aborted by NCCL's watchdog
        ({0: failure(-15), 1: failure(-11)}, 1),  # ended by the agent
        ({0: failure(-15, 10, lost_connection=True), 1: failure(75)}, 1),  # stopped, and woken when the other had given it up
        ({0: failure(75, 10, lost_connection=True), 1: failure(1, 20)}, 1),  # the connection broke before the error was noted
        ({0: failure(1, 20, lost_connection=True), 1: failure(1, 10, lost_connection=True), 2: failure(-15)}, 1),
        ({0: failure(1), 1: failure(1)}, 0),
    ],
)
def test_the_cause_is_told_from_its_consequences(failures, first):
    assert runner.first_failure(failures)[0] == first


def test_the_story_names_rank_manner_and_traceback():
    assert runner.story(3, failure(-9), 2) == (
        "distflash run: rank 3 (pid 1) failed first, with signal SIGKILL; 1 more failed after it:\n  (it left no traceback)"
    )
    assert runner.story(0, failure(1, 5), 1).endswith("exit code 1:\n  Traceback\n  RuntimeError: why")
    assert runner.story(0, failure(1), 1).endswith("exit code 1:\n  (it noted no traceback: what it printed is above)")  # without init()


def test_of_ranks_that_were_all_told_to_end_none_is_said_to_be_the_first():
    ended = SimpleNamespace(exitcode=-15, pid=7, error_file_data={}, signal_name=lambda: "SIGTERM")
    told = runner.story(0, ended, 3)
    assert told.startswith("distflash run: 3 ranks failed, rank 0 (pid 7) with signal SIGTERM, which the launcher sends to the others")
    assert told.endswith(": who was the first is not known")
    assert "failed first" in runner.story(0, failure(-15, 10, lost_connection=True), 2)  # it left a traceback
    assert runner.story(2, ended, 1).startswith("distflash run: rank 2 (pid 7) failed first, with signal SIGTERM:")


def test_cores_are_shared_out():
    assert runner.threads(1) >= runner.threads(2) >= 1
    assert runner.threads(100_000) == 1
