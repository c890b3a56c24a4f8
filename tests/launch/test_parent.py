"""launch/parent.py: whoever starts processes takes them along, however it ends."""

import os
import signal
import subprocess
import sys
import time

import pytest

from distflash.launch.parent import LAUNCHER, end_with, end_with_launcher, tied


def forked(body):
    """The pid of a child that runs body() and then waits for a minute."""
    pid = os.fork()
    if pid == 0:
        try:
            body()
            time.sleep(60)
        finally:
            os._exit(1)
    return pid


@pytest.mark.parametrize("tie", ["itself", "by the variable"])
def test_a_child_ends_with_its_parent_that_is_killed(tie):
    there, here = os.pipe()  # at its end when nobody is left

    def grandchild():
        end_with(os.getppid()) if tie == "itself" else end_with_launcher()
        os.write(here, b"x")

    def child():
        os.environ[LAUNCHER] = str(os.getpid())
        forked(grandchild)

    pid = forked(child)
    os.close(here)
    assert os.read(there, 1) == b"x"
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    signal.alarm(5)  # a test that waits for ever says nothing
    assert os.read(there, 1) == b""
    signal.alarm(0)
    os.close(there)


def test_a_child_whose_parent_has_ended_already_ends():
    pid = forked(lambda: end_with(1 << 22))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def test_only_ranks_themselves_are_tied(monkeypatch):
    monkeypatch.setattr("distflash.launch.parent.end_with", lambda pid: pytest.fail("tied"))
    monkeypatch.delenv(LAUNCHER, raising=False)
    end_with_launcher()
    monkeypatch.setenv(LAUNCHER, str(os.getpid()))  # a child of a rank
    end_with_launcher()


def test_a_tied_command_has_its_arguments_its_pid_and_no_trace_of_the_tie(tmp_path):
    (tmp_path / "ctypes.py").write_text("raise SystemExit('a file of the current directory was imported')")
    code = "import os, sys; print(os.getpid(), os.getppid(), sys.argv, sys.flags.isolated, sys.flags.no_site)"
    command = tied([sys.executable, "-P", "-c", code, "-I", "two words", ""])
    done = subprocess.Popen(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}, stdout=subprocess.PIPE, text=True)
    assert done.communicate(timeout=30)[0] == f"{done.pid} {os.getpid()} ['-c', '-I', 'two words', ''] 0 0\n"


def test_where_the_kernel_ties_nobody_a_command_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert tied(["python", "x.py"]) == ["python", "x.py"]
