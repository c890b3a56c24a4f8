"""Ranks that do not outlive the process that started them: not even if that is killed, and can tell nobody."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

LAUNCHER = "DISTFLASH_LAUNCHER"  # the pid of `distflash run`, in its ranks' environment
PR_SET_PDEATHSIG = 1


def end_with_launcher() -> None:
    """Tie a rank of `distflash run` to it; any other process, a rank's own children too, is left as it is."""
    if os.environ.get(LAUNCHER) == str(os.getppid()):
        end_with(os.getppid())


def end_with(parent: int) -> None:
    """Have the kernel kill this process when its parent, with that pid, has ended. On Linux; elsewhere nothing happens."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before that
        os.kill(os.getpid(), signal.SIGKILL)
