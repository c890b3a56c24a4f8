"""The folder of a run, --out: what may stand there, who writes to it, and whose run it holds. Only the main rank is here.

DIR/.lock   locked (flock) by the main rank that writes to DIR; its text says who that is
DIR/.job    the job that began or resumed the run: one that is started again by its launcher goes on with its own run only
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from pathlib import Path
from typing import IO, NoReturn

PATIENCE = 5.0  # seconds that the main rank of an earlier attempt has to end
POLL = 0.05


def check(out: str, resume: bool) -> None:
    """Raises ValueError unless a run can begin in this folder, or with `resume` go on; changes nothing."""
    path = Path(out).absolute()
    there = next(p for p in (path, *path.parents) if p.exists())
    if not there.is_dir():
        raise ValueError(f"--out {out} must be a folder, but {there} is a file: name another")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"--out {out} must be writable, but {there} is not: name another, or change its permissions")
    if holds_run(path):
        if not resume and (why := _immovable(path)):
            raise ValueError(f"--out {out} holds an older run and cannot be moved aside ({why}): --resume continues it, or name another")
    elif path.exists() and (others := [p.name for p in path.iterdir() if not p.name.startswith(".")]):
        raise ValueError(f"--out {out} must be new, empty, or hold a run, but holds {', '.join(sorted(others)[:3])}: name another folder")


def check_free(out: str) -> None:
    """Raises RuntimeError if another process writes to this folder just now."""
    file = Path(out) / ".lock"
    if file.is_file() and os.access(file, os.W_OK):
        with file.open("a+") as lock:
            if not _flock(lock):
                _refuse(out, lock)


def holds_run(path: Path) -> bool:
    """Whether a folder has what a run leaves."""
    return any((path / name).exists() for name in ("metrics.jsonl", "latest")) or any(path.glob("step-*"))


def _immovable(path: Path) -> str | None:
    if path.is_mount():
        return "it is a mount point"
    if Path.cwd().is_relative_to(path.resolve()):
        return "the current directory is in it"
    return None if os.access(path.parent, os.W_OK | os.X_OK) else f"{path.parent} is not writable"


class RunFolder:
    """The folder of a run while this process may write to it."""

    def __init__(self, out: str, job: str) -> None:
        self.out, self.path, self.job = out, Path(out).absolute(), job
        self._lock: IO[str] | None = None

    def is_ours(self) -> bool:
        """Whether the run that it holds is of this very job, started before."""
        file = self.path / ".job"
        return bool(self.job) and file.is_file() and file.read_text(errors="replace") == self.job

    def claim(self, resume: bool) -> None:
        """Makes the folder and locks it. Raises ValueError if no run can begin here, RuntimeError if another process writes to it."""
        check(self.out, resume)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = self._locked()
        except OSError as error:
            raise ValueError(f"--out {self.out} must be a folder that can be written ({error.strerror}): name another") from None

    def begin(self, resumed: bool) -> Path | None:
        """The run goes on here, or a new one begins: then an older one is moved aside. Returns where to, if there was one."""
        aside = None
        if not resumed and holds_run(self.path):
            if why := _immovable(self.path):
                raise ValueError(f"--out {self.out} holds a run without a checkpoint and cannot be moved aside ({why}): name another")
            aside = next(p for n in range(1, 100_000) if not (p := self.path.with_name(f"{self.path.name}.{n}")).exists())
            older = self._lock
            self.path.rename(aside)
            self.path.mkdir()
            self._lock = self._locked()
            if older:
                older.close()
        (self.path / ".job").write_text(self.job)
        return aside

    def release(self) -> None:
        """Another process may write from here on; harmless when done already."""
        if self._lock:
            self._lock.close()
            self._lock = None

    def _locked(self) -> IO[str]:
        """The lock, held until it is closed, or this process and its forks end. OSError if the folder cannot be written."""
        file, deadline = self.path / ".lock", time.monotonic() + PATIENCE
        while True:
            lock = file.open("a+")
            if not _flock(lock):
                if time.monotonic() > deadline:
                    _refuse(self.out, lock)
                time.sleep(POLL)
            elif file.exists() and os.path.samestat(os.fstat(lock.fileno()), file.stat()):
                lock.truncate(0)
                lock.write(f"pid {os.getpid()} on {socket.gethostname()}")
                lock.flush()
                return lock
            lock.close()  # taken, or moved aside between open and flock


def _refuse(out: str, lock: IO[str]) -> NoReturn:
    lock.seek(0)
    raise RuntimeError(f"--out {out} is written to by {lock.read()}: wait for it, end it, or name another folder")


def _flock(lock: IO[str]) -> bool:
    """False if another process has it; a file system without locks guards nothing."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        return error.errno in (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK)
    return True
