"""Ranks that do not outlive the process that started them: not even if that is killed, and can tell nobody."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

HOOK = str(Path(__file__).parent / "hook")
LAUNCHER = "DISTFLASH_LAUNCHER"  # the pid of `distflash run`, in its ranks' environment
PR_SET_PDEATHSIG = 1


def end_with_launcher(*, early: bool = False) -> None:
    """Tie a rank of `distflash run` to it; any other process, a rank's own children too, is left as it is.

    early: this is a rank, which has started nothing yet; if the launcher has ended already, the rank ends, too.
    """
    if os.environ.get(LAUNCHER) == str(os.getppid()):
        end_with(os.getppid())
    elif early and not _runs(int(os.environ[LAUNCHER])):
        os.kill(os.getpid(), signal.SIGKILL)


def end_with(parent: int) -> None:
    """Have the kernel kill this process when its parent, with that pid, has ended. On Linux; elsewhere nothing happens."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before that
        os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def tied() -> Iterator[None]:
    """Python programs that this process starts meanwhile are its ranks: on Linux each ties itself before its first line runs.

    A program that calls init() ties itself there, but may never do so, or may import for a minute first. torch's agent does the forking
    and takes no preexec_fn, so the environment carries a hook that Python imports first (hook/sitecustomize.py) and that removes itself
    from what the program sees. It is not there for a Python that is told to ignore PYTHONPATH (-E, -I), for which init() remains.
    SIGKILL leaves a rank no time to clean up, as it left the launcher none; what a rank has started itself is its own affair. The
    kernel watches the thread that forked: the agent forks in the main one.
    """
    before = os.environ.get("PYTHONPATH")
    os.environ[LAUNCHER] = str(os.getpid())
    if sys.platform == "linux":
        os.environ["PYTHONPATH"] = os.pathsep.join([HOOK, before] if before else [HOOK])
    try:
        yield
    finally:
        del os.environ[LAUNCHER]
        os.environ.pop("PYTHONPATH", None)
        if before is not None:
            os.environ["PYTHONPATH"] = before


def _runs(pid: int) -> bool:
    with suppress(PermissionError):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
    return True
