"""launch/temporary.py: what a launcher that was killed leaves is removed by the next one, and nothing else is."""

import os
import signal
import tempfile
from pathlib import Path

import pytest

from distflash.launch import temporary


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Where temporary folders are made."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def launcher():
    """(pid, its folder) of a process that has one until it is killed."""
    there, here = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            with temporary.folder() as mine:
                os.write(here, str(mine).encode())
                signal.pause()
        finally:
            os._exit(1)
    os.close(here)
    with open(there, "rb", buffering=0) as told:
        return pid, Path(told.read(1000).decode())


def kill(pid):
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_folder_is_private_and_goes_with_its_launcher(place):
    with temporary.folder() as mine:
        assert mine.parent == place and mine.stat().st_mode & 0o777 == 0o700
        (mine / "rank0").mkdir()
        (mine / "rank0/error.json").write_text("{}")
    assert not [*place.iterdir()]


def test_what_a_killed_launcher_leaves_goes_with_the_next_one_and_what_a_living_one_has_stays(place):
    (dead, left), (alive, used) = launcher(), launcher()
    (left / "rank0").mkdir()
    (left / "rank0/error.json").write_text("{}")
    kill(dead)
    try:
        with temporary.folder() as mine:
            assert {*place.iterdir()} == {used, mine}
    finally:
        kill(alive)
    with temporary.folder() as mine:
        assert {*place.iterdir()} == {mine}


@pytest.mark.parametrize("change", ["another host", "another user", "open to others", "no lock", "a link", "another name"])
def test_what_is_not_provably_ours_stays(place, monkeypatch, change):
    dead, left = launcher()
    kill(dead)
    if change == "another host":
        monkeypatch.setattr(temporary.socket, "gethostname", lambda: "elsewhere")
    elif change == "another user":
        monkeypatch.setattr(temporary.os, "getuid", lambda: os.geteuid() + 1)
    elif change == "open to others":
        left.chmod(0o755)
    elif change == "no lock":
        (left / temporary.LOCK).unlink()
    elif change == "a link":
        left.rename(place / "kept")
        left.symlink_to(place / "kept")
    else:
        left = left.rename(place / "distflash-of-somebody")
    (left / "file").write_text("precious")
    with temporary.folder():
        assert (left / "file").read_text() == "precious"


def test_where_files_cannot_be_locked_the_folder_is_still_made_and_never_taken_for_left(place, monkeypatch):
    def refused(*_):
        raise OSError("no locks available")

    monkeypatch.setattr(temporary.fcntl, "flock", refused)
    with temporary.folder() as mine, temporary.folder() as other:
        assert {*place.iterdir()} == {mine, other}
