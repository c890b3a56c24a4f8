"""The folder of a run: what may be moved aside, and who may write."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import typer

from distflash.train import command, folder
from distflash.train.folder import RunFolder
from distflash.train.loop import run
from distflash.train.report import read_metrics

SHORT = {"steps": 2, "checkpoint_every": 1, "validate": 0, "sample": 0}


def test_a_folder_that_holds_no_run_is_left_as_it_is(small_run, world, tmp_path):
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter1.tex").write_text("years of work")
    for resume in (False, True):
        with pytest.raises(ValueError, match=r"must be new, empty, or hold a run, but holds chapter1\.tex: name another folder"):
            run(small_run(out=str(out), resume=resume, **SHORT), world)
    assert [*tmp_path.rglob("*.tex")] == [out / "chapter1.tex"] and not (tmp_path / "thesis.1").exists()


def test_a_file_the_current_directory_and_a_mount_point_are_refused_before_anything_is_computed(small_run, world, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for out in ("file", "file/below"):
        with pytest.raises(ValueError, match=r"must be a folder, but .*file is a file: name another"):
            folder.check(str(tmp_path / out), False)
    out = Path(small_run().out)
    run(small_run(**SHORT), world)
    monkeypatch.chdir(out)
    with pytest.raises(ValueError, match=r"holds an older run and cannot be moved aside .the current directory is in it"):
        folder.check(".", False)
    folder.check(".", True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "is_mount", lambda path: path == out)
    with pytest.raises(ValueError, match=r"cannot be moved aside .it is a mount point"):
        folder.check(str(out), False)
    folder.check(str(out), True)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(ValueError, match=r"must be writable, but .* is not"):
        folder.check(str(tmp_path / "new" / "run"), False)


def test_a_second_job_is_refused_with_the_pid_of_the_first(tmp_path, small_run, world, monkeypatch):
    monkeypatch.setattr(folder, "PATIENCE", 0.1)
    config = small_run(**SHORT)
    first = RunFolder(config.out, "")
    first.claim(False)
    for resume in (False, True):
        with pytest.raises(RuntimeError, match=rf"is written to by pid {os.getpid()} on \S+: wait for it"):
            run(small_run(resume=resume, **SHORT), world)
    with pytest.raises(typer.BadParameter, match="is written to by pid"):
        command.start(small_run(model="tiny", **SHORT), 2)
    first.release()
    assert run(config, world) == 0
    assert run(config, world) == 0, "it was not released"


def test_the_lock_is_that_of_the_new_folder_after_an_older_run_was_moved_aside(tmp_path, small_run, world, monkeypatch):
    monkeypatch.setattr(folder, "PATIENCE", 0.1)
    run(small_run(**SHORT), world)
    first = RunFolder(small_run().out, "")
    first.claim(False)
    assert first.begin(False) == Path(small_run().out + ".1")
    with pytest.raises(RuntimeError, match="is written to by pid"):
        RunFolder(small_run().out, "").claim(False)
    RunFolder(small_run().out + ".1", "").claim(True)


@pytest.mark.parametrize("job", ["", "torchrun/another"])
def test_a_job_that_is_started_again_goes_on_with_its_own_run_only(small_run, world, capsys, job):
    config = small_run(**SHORT)
    run(config, world, job=job)
    before = [row["ms"] for row in read_metrics(Path(config.out) / "metrics.jsonl")]
    run(config, world, job="torchrun/mine", restarted=True)  # died before it had begun
    assert "it is now" in capsys.readouterr().out
    assert [row["ms"] for row in read_metrics(Path(config.out + ".1") / "metrics.jsonl")] == before
    (Path(config.out) / "step-00000002").rename(Path(config.out) / ".tmp-step-00000002")
    run(config, world, job="torchrun/mine", restarted=True)
    assert "resuming after step 1" in capsys.readouterr().out and not Path(config.out + ".2").exists()


def test_a_run_without_a_checkpoint_is_moved_aside_and_not_overwritten_by_resume(small_run, world, capsys):
    config = small_run(**SHORT | {"checkpoint_every": 0})
    run(config, world)
    before = (Path(config.out) / "metrics.jsonl").read_bytes()
    run(small_run(**SHORT, resume=True), world)
    said = capsys.readouterr().out
    assert re.search(r"no checkpoint in .*: starting from step 0\n.* held an older run: it is now .*\.1\n", said), said
    assert (Path(config.out + ".1") / "metrics.jsonl").read_bytes() == before
