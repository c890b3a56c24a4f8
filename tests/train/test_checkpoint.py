"""Checkpoints are whole or not there: every way to damage one is found, and the one before is used."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distflash.train import checkpoint as ckpt

TENSORS = {
    "model": {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(2.5), "empty": torch.zeros(0, 4)},
    "optimizer": {"bytes": torch.arange(9, dtype=torch.uint8), "low": torch.ones(3).bfloat16(), "t": torch.arange(6.0).view(2, 3).T},
}


def save(root: Path, step: int, **changes) -> None:
    settings = {"gather": lambda t: t, "is_main": True, "world_size": 1, "agree": lambda good: good} | changes
    ckpt.save(root, {"step": step, "position": 10 * step}, TENSORS, **settings)


def names(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir())


def test_what_is_saved_is_what_safetensors_reads(tmp_path):
    save(tmp_path, 3, world_size=4)
    found = ckpt.newest(tmp_path, pytest.fail)
    assert found and found.step == 3 and found.state["position"] == 30
    for file, tensors in TENSORS.items():
        loaded = load_file(found.path / f"{file}.safetensors")
        assert loaded.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)
    manifest = json.loads((found.path / "manifest.json").read_text())
    assert manifest["world_size"] == 4
    assert sorted(manifest["files"]) == ["model.safetensors", "optimizer.safetensors", "state.json"]
    assert (tmp_path / "latest").read_text() == "step-00000003\n"


def test_two_are_kept_and_nothing_else(tmp_path):
    for step in (1, 2, 10, 11):
        save(tmp_path, step)
    assert names(tmp_path) == ["latest", "step-00000010", "step-00000011"]


def damage_truncated(path: Path) -> None:
    os.truncate(path / "model.safetensors", 40)


def damage_bit_flipped(path: Path) -> None:
    content = bytearray((path / "optimizer.safetensors").read_bytes())
    content[-3] ^= 16
    (path / "optimizer.safetensors").write_bytes(content)


def damage_missing(path: Path) -> None:
    (path / "state.json").unlink()


def damage_no_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def damage_torn_manifest(path: Path) -> None:
    os.truncate(path / "manifest.json", 30)


def damage_empty_manifest(path: Path) -> None:
    (path / "manifest.json").write_text('{"format": 1, "files": {}}')


def damage_manifest_is_a_folder(path: Path) -> None:
    (path / "manifest.json").unlink()
    (path / "manifest.json").mkdir()


def damage_nested_manifest(path: Path) -> None:
    (path / "manifest.json").write_text("[" * 100_000)


def damage_files_are_numbers(path: Path) -> None:
    (path / "manifest.json").write_text('{"format": 1, "files": {"state.json": 3}}')


def damage_of_another_step(path: Path) -> None:
    shutil.rmtree(path)
    shutil.copytree(path.with_name("step-00000001"), path)


def damage_emptied(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (damage_truncated, r"model.safetensors has 40 bytes, expected \d+"),
        (damage_bit_flipped, "optimizer.safetensors differs from its SHA-256"),
        (damage_missing, "state.json is missing"),
        (damage_no_manifest, "manifest.json is missing"),
        (damage_torn_manifest, "manifest.json cannot be read"),
        (damage_empty_manifest, "does not list state.json"),
        (damage_emptied, "manifest.json is missing"),
        (damage_manifest_is_a_folder, r"manifest.json cannot be read \(Is a directory\)"),
        (damage_nested_manifest, "manifest.json cannot be read"),
        (damage_files_are_numbers, "manifest.json cannot be read"),
        (damage_of_another_step, "it is of step 1"),
    ],
)
def test_a_damaged_checkpoint_is_named_put_aside_and_the_one_before_is_used(tmp_path, damage, reason):
    save(tmp_path, 1)
    save(tmp_path, 2)
    damage(tmp_path / "step-00000002")
    said: list[str] = []
    found = ckpt.newest(tmp_path, said.append)
    assert found and found.step == 1
    assert len(said) == 1 and re.search(reason, said[0]) and "step-00000002 is damaged" in said[0]
    assert "damaged-step-00000002" in names(tmp_path)
    save(tmp_path, 2)  # the run goes on: the same step again, and the good one before it stays
    assert {"step-00000001", "step-00000002"} <= set(names(tmp_path))
    assert ckpt.newest(tmp_path, pytest.fail).step == 2  # type: ignore[union-attr]


def test_a_disk_that_cannot_be_read_is_a_reason_like_any_other(tmp_path, monkeypatch):
    save(tmp_path, 1)
    save(tmp_path, 2)
    real = ckpt._sha256

    def broken(file):
        if file.parent.name == "step-00000002":
            raise OSError(errno.EIO, "Input/output error", str(file))
        return real(file)

    monkeypatch.setattr(ckpt, "_sha256", broken)
    said: list[str] = []
    assert ckpt.newest(tmp_path, said.append).step == 1  # type: ignore[union-attr]
    assert "model.safetensors cannot be read (Input/output error)" in said[0]


def test_folders_of_other_names_are_left_alone(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "step-by-step").mkdir()
    assert ckpt.newest(tmp_path, pytest.fail).step == 1  # type: ignore[union-attr]
    save(tmp_path, 2)
    save(tmp_path, 3)
    assert names(tmp_path) == ["latest", "step-00000002", "step-00000003", "step-by-step"]


def test_if_all_are_damaged_there_is_none(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    for step in ("1", "2"):
        damage_truncated(tmp_path / f"step-0000000{step}")
    said: list[str] = []
    assert ckpt.newest(tmp_path, said.append) is None
    assert len(said) == 2
    assert ckpt.newest(tmp_path / "nowhere", pytest.fail) is None


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the writer runs after it."""


@pytest.mark.parametrize("call", range(12))
def test_a_kill_at_any_fsync_or_rename_leaves_a_whole_checkpoint(tmp_path, monkeypatch, call):
    save(tmp_path, 1)
    count = 0

    def maybe_die(real):
        def wrapped(*args, **kwargs):
            nonlocal count
            count += 1
            if count == call + 1:
                raise Killed
            return real(*args, **kwargs)

        return wrapped

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", maybe_die(os.fsync))
        patch.setattr(Path, "rename", maybe_die(Path.rename))
        with contextlib.suppress(Killed):
            save(tmp_path, 2)
    found = ckpt.newest(tmp_path, pytest.fail)  # never a torn one, so nothing is said
    assert found is not None
    assert found.step == (1 if call < 6 else 2)  # 4 files and the folder are synced, then the rename publishes
    save(tmp_path, 3)
    assert not [n for n in names(tmp_path) if n.startswith(".tmp")]
    assert (tmp_path / "latest").read_text() == "step-00000003\n"


def test_a_kill_while_an_old_one_is_deleted_leaves_whole_checkpoints_only(tmp_path, monkeypatch):
    save(tmp_path, 1)
    save(tmp_path, 2)

    def half(path, **options):
        (path / "optimizer.safetensors").unlink()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", half)
        with contextlib.suppress(Killed):
            save(tmp_path, 3)
    left = [*tmp_path.glob("step-*")]
    assert {path.name for path in left} >= {"step-00000002", "step-00000003"} and not any(map(ckpt.verify, left))
    save(tmp_path, 4)
    assert names(tmp_path) == ["latest", "step-00000003", "step-00000004"]


@pytest.mark.parametrize("call", range(6))
def test_a_full_disk_is_said_clearly_and_keeps_the_older_checkpoint(tmp_path, monkeypatch, call):
    save(tmp_path, 1)
    calls = iter(range(100))
    real = os.fsync

    def full(descriptor):
        if next(calls) == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        if call < 5:
            with pytest.raises(ckpt.CheckpointError, match=r"step 2 could not be written .*still step-00000001.*disk is full: free space"):
                save(tmp_path, 2)
            assert names(tmp_path) == ["latest", "step-00000001"]
    found = ckpt.newest(tmp_path, pytest.fail)
    assert found and found.step == 1


def test_the_other_ranks_raise_too_when_the_main_rank_cannot_write(tmp_path):
    gathered = []
    with pytest.raises(ckpt.CheckpointError, match="main rank could not write the checkpoint of step 2"):
        save(tmp_path, 2, is_main=False, agree=lambda good: False, gather=lambda t: gathered.append(t) or t)
    assert len(gathered) == 6  # it took part in every gather
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_an_error_with_a_cure(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ckpt.CheckpointError, match="check the folder, then continue with --resume"):
        save(tmp_path / "file" / "run", 1)
    with pytest.raises(ckpt.CheckpointError, match="every rank must see the same --out folder"):
        ckpt.read(tmp_path / "step-00000001")
