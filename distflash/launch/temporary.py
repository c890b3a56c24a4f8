"""The temporary folder of a launcher: it goes with it, and if the launcher is killed, with the next one of its user on its host.

TMP/distflash-run-*/launcher   names the host; locked (flock) until the launcher has ended, however that comes about
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

PREFIX, LOCK = "distflash-run-", "launcher"


@contextmanager
def folder() -> Iterator[Path]:
    """A folder for this user alone, with what was left beside it removed."""
    with TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True) as name:
        mine = Path(name)
        with (mine / "new").open("w") as lock:
            with suppress(OSError):  # no locks on this file system: nobody can tell that it was left
                lock.write(socket.gethostname())
                lock.flush()
                fcntl.flock(lock, fcntl.LOCK_EX)
                (mine / "new").rename(mine / LOCK)  # locked before it can be found
            for other in mine.parent.glob(f"{PREFIX}*"):
                _remove_if_left(other)
            yield mine


def _remove_if_left(path: Path) -> None:
    """Remove a folder that this user's launcher left on this host; whatever is another's, in use or not sure stays."""
    with suppress(OSError):
        found = path.lstat()
        private = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
        if private:
            with (path / LOCK).open("r+", errors="replace") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # OSError while the launcher runs
                if lock.read() == socket.gethostname():
                    shutil.rmtree(path)
