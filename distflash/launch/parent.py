"""Ranks that do not outlive the process that started them: not even if that is killed, and can tell nobody.

Run as a program, `python -I -S parent.py PID COMMAND...`, this file ties itself to its parent and becomes the command. It needs nothing
but the standard library: importing the package would cost each rank seconds.
"""

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


def tied(command: list[str]) -> list[str]:
    """What to start in place of `command`, a Python program, so that it is tied to this process before its first line runs.

    torch's agent does the forking and takes no preexec_fn, so the tie is made by a process that becomes the command: exec keeps it,
    and the pid. That costs a bare interpreter's start, some 20 ms a rank. A program that calls init() would tie itself, but may never
    do so, or may import for a minute first. SIGKILL leaves it no time to clean up, as it left the launcher none; what it has started
    is its own affair. The kernel watches the thread that forked: the agent forks in the main one.
    """
    if sys.platform != "linux":
        return command
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command]


if __name__ == "__main__":
    end_with(int(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])
