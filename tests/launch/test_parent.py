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


def started(cwd, code, **environ):
    """What a Python program prints that is started as a rank."""
    for name, value in environ.items():
        os.environ[name] = value
    with tied():
        child = subprocess.Popen([sys.executable, "-c", code], cwd=cwd, stdout=subprocess.PIPE, text=True)
    return child.pid, child.communicate(timeout=30)[0].split()


@pytest.fixture
def clean(monkeypatch):
    """An environment that is put back."""
    for name in (LAUNCHER, "PYTHONPATH"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


DEATH = """
import ctypes
found = ctypes.c_int()
ctypes.CDLL(None).prctl(2, ctypes.byref(found))  # PR_GET_PDEATHSIG
"""


@pytest.mark.parametrize("path", [None, "there", "there:{}"])
def test_a_rank_is_tied_and_sees_nothing_of_the_hook(clean, tmp_path, path):
    given = {"PYTHONPATH": path.format(tmp_path)} if path else {}
    code = f"{DEATH}\nimport os, sys; print(found.value, os.environ.get('PYTHONPATH'), sum('hook' in p for p in sys.path), os.getpid())"
    pid, found = started(tmp_path, code, **given)
    assert found == ["9", str(given.get("PYTHONPATH")), "0", str(pid)]
    assert os.environ.get("PYTHONPATH") == given.get("PYTHONPATH") and LAUNCHER not in os.environ
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', {!r}])"
    assert started(tmp_path, child.format(DEATH + "print(found.value)"))[1] == ["0"]  # what a rank starts is not tied


def test_the_sitecustomize_of_the_environment_is_still_imported(clean, tmp_path):
    code = "import sys; print(sys.modules['sitecustomize'].__file__, getattr(sys, 'customized', 0))"
    _, without = started(tmp_path, "import sys; print('sitecustomize' in sys.modules)")
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.customized = getattr(sys, 'customized', 0) + 1")
    assert started(tmp_path, code, PYTHONPATH=str(tmp_path))[1] == [str(tmp_path / "sitecustomize.py"), "1"]
    assert without == ["True"]  # ours, or the environment's


def test_a_rank_whose_launcher_has_ended_already_ends_before_its_first_line(clean, tmp_path):
    gone = forked(lambda: os._exit(0))
    os.waitpid(gone, 0)
    with tied():
        os.environ[LAUNCHER] = str(gone)
        done = subprocess.run([sys.executable, "-c", "print('ran')"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "")


def test_where_the_kernel_ties_nobody_the_environment_is_left_as_it_is(clean, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with tied():
        assert "PYTHONPATH" not in os.environ and os.environ[LAUNCHER] == str(os.getpid())
