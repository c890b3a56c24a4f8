"""Checkpoints that are whole or not there: safetensors and JSON, never pickle.

    ROOT/step-00000060/    model.safetensors  optimizer.safetensors  state.json  manifest.json
    ROOT/latest            the name of the newest one, for people and scripts; loading does not trust it

Save: write a hidden folder, fsync every file and the folder, rename it, fsync ROOT; only then move `latest` and delete all
but two. Load: the newest whose files have the sizes and SHA-256 of its manifest; a damaged one is put aside and named.
Tensors are gathered and written one at a time, so no rank holds the whole model for it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import safe_open
from torch import Tensor

FORMAT = 1
KEEP = 2
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.uint8: "U8", torch.int64: "I64"}

Gather = Callable[[Tensor], Tensor]  # a placed tensor -> the whole of it; every rank takes part
Agree = Callable[[bool], bool]  # True if every rank says True


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the text says what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on disk."""

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.state["step"])

    def tensors(self, file: str) -> Any:
        """The open safetensors file, used as `with checkpoint.tensors("model") as f: f.get_tensor(name)`."""
        return safe_open(self.path / f"{file}.safetensors", framework="pt")


def folder_name(step: int) -> str:
    """Names sort as steps do."""
    return f"step-{step:08d}"


def save(
    root: Path,
    state: Mapping[str, Any],
    files: Mapping[str, Mapping[str, Tensor]],
    *,
    gather: Gather,
    is_main: bool,
    world_size: int,
    agree: Agree,
) -> None:
    """Writes one checkpoint of step state["step"]; every rank must call it, the main rank writes.

    Raises CheckpointError on every rank if the main rank could not write; older checkpoints are then untouched.
    """
    writer = _Writer(root, dict(state), world_size) if is_main else None
    for file, tensors in files.items():
        if writer:
            writer.attempt(lambda w, file=file, tensors=tensors: w.open(file, tensors))
        for tensor in tensors.values():
            value = gather(tensor)  # also after a failure: the other ranks are in it
            if writer:
                writer.attempt(lambda w, value=value: w.append(value))
        if writer:
            writer.attempt(_Writer.close)
    if writer:
        writer.attempt(_Writer.publish)
    if not agree(writer is None or writer.error is None):
        if writer and writer.error:
            writer.discard()
            raise writer.explain() from writer.error
        raise CheckpointError(f"the main rank could not write the checkpoint of step {state['step']}: see its message")


class _Writer:
    """The main rank's side of save. After the first error it does nothing more."""

    def __init__(self, root: Path, state: dict[str, Any], world_size: int) -> None:
        self.root, self.state, self.world_size = root, state, world_size
        self.final = root / folder_name(state["step"])
        self.tmp = root / f".tmp-{self.final.name}"
        self.error: OSError | None = None
        self.sums: dict[str, dict[str, Any]] = {}
        self._file: IO[bytes] | None = None
        self._hash = hashlib.sha256()
        self.attempt(_Writer._start)

    def attempt(self, action: Callable[[_Writer], None]) -> None:
        if self.error is None:
            try:
                action(self)
            except OSError as error:
                self.error = error

    def _start(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        for left_over in self.root.glob(".tmp-*"):
            shutil.rmtree(left_over)
        self.tmp.mkdir()

    def open(self, file: str, tensors: Mapping[str, Tensor]) -> None:
        """Starts NAME.safetensors with the header of these tensors (format: 8 bytes of length, JSON, data)."""
        header: dict[str, Any] = {}
        at = 0
        for name, tensor in tensors.items():
            size = tensor.numel() * tensor.element_size()
            header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + size]}
            at += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._begin(f"{file}.safetensors")
        self._put(struct.pack("<Q", len(text)) + text)

    def append(self, tensor: Tensor) -> None:
        self._put(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)

    def close(self) -> None:
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())
        self.sums[Path(self._file.name).name] = {"sha256": self._hash.hexdigest(), "bytes": self._file.tell()}
        self._file.close()
        self._file = None

    def _begin(self, name: str) -> None:
        self._file = (self.tmp / name).open("wb")
        self._hash = hashlib.sha256()

    def _put(self, content: Any) -> None:
        assert self._file is not None
        self._file.write(content)
        self._hash.update(content)

    def _write(self, name: str, value: Any) -> None:
        self._begin(name)
        self._put(json.dumps(value, indent=1, sort_keys=True).encode())
        self.close()

    def publish(self) -> None:
        """Everything is written: the manifest, then the rename that makes it real, then what depends on it."""
        self._write("state.json", self.state)
        self._write("manifest.json", {"format": FORMAT, "world_size": self.world_size, "files": dict(self.sums)})
        _fsync_folder(self.tmp)
        if self.final.exists():  # the same step again, after falling back past it
            self.final.rename(_free_name(self.final, "replaced"))
        self.tmp.rename(self.final)
        _fsync_folder(self.root)
        self._move_latest()
        for old in (*_folders(self.root)[KEEP:], *self.root.glob("replaced-*")):
            hidden = old.with_name(f".tmp-{old.name}")  # first: a kill in the middle leaves nothing that looks like a checkpoint
            old.rename(hidden)
            shutil.rmtree(hidden, ignore_errors=True)

    def _move_latest(self) -> None:
        tmp = self.root / ".latest"
        with tmp.open("w") as file:
            file.write(self.final.name + "\n")
            file.flush()
            os.fsync(file.fileno())
        tmp.rename(self.root / "latest")
        _fsync_folder(self.root)

    def discard(self) -> None:
        if self._file:
            self._file = None  # closing would flush, and fail again
        shutil.rmtree(self.tmp, ignore_errors=True)

    def explain(self) -> CheckpointError:
        """The error in words, with what is still good and the cure."""
        assert self.error is not None
        kept = _folders(self.root) if self.root.exists() else []
        good = f"the newest checkpoint is still {kept[0].name}" if kept else "there is no older checkpoint"
        if self.error.errno in (errno.ENOSPC, errno.EDQUOT):
            cure = "the disk is full: free space, then continue with --resume"
        else:
            cure = f"{self.error.strerror or self.error}: check the folder, then continue with --resume"
        return CheckpointError(f"the checkpoint of step {self.state['step']} could not be written to {self.root}; {good}. {cure}")


def verify(path: Path) -> str | None:
    """None if the checkpoint is whole, or the reason it is not."""
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        if manifest["format"] != FORMAT:
            return f"manifest.json has format {manifest['format']}, expected {FORMAT}"
        for name, facts in manifest["files"].items():
            file = path / Path(name).name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != facts["bytes"]:
                return f"{name} has {file.stat().st_size} bytes, expected {facts['bytes']}"
            if _sha256(file) != facts["sha256"]:
                return f"{name} differs from its SHA-256"
        if "state.json" not in manifest["files"]:
            return "manifest.json does not list state.json"
    except FileNotFoundError:
        return "manifest.json is missing"
    except OSError as error:
        return f"{Path(error.filename or path).name} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"manifest.json cannot be read ({type(error).__name__})"
    return None


def newest(root: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that verifies; damaged ones are put aside as damaged-NAME and said. None if there is none."""
    for path in _folders(root) if root.exists() else []:
        reason = verify(path)
        if reason is None:
            found = read(path)
            if folder_name(found.step) == path.name:
                return found
            reason = f"it is of step {found.step}"
        aside = _free_name(path, "damaged")
        try:
            path.rename(aside)
        except OSError:
            aside = path  # a read-only folder: passed over where it is
        say(f"checkpoint {path.name} is damaged ({reason}): kept as {aside.name}, falling back to the one before")
    return None


def read(path: Path) -> Checkpoint:
    """A checkpoint that was verified, on this or another rank."""
    try:
        state = json.loads((path / "state.json").read_bytes())
        if not isinstance(state, dict) or type(state.get("step")) is not int:
            raise ValueError("state.json names no step")
        return Checkpoint(path, state)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read here ({error}): every rank must see the same --out folder") from None


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _folders(root: Path) -> list[Path]:
    """Published checkpoints, newest first."""
    return sorted(
        (p for p in root.glob("step-*") if p.is_dir() and re.fullmatch("step-[0-9]{8,}", p.name)), key=lambda p: p.name, reverse=True
    )


def _free_name(path: Path, prefix: str) -> Path:
    names = (path.with_name(f"{prefix}-{path.name}" + (f".{n}" if n else "")) for n in range(10_000))
    return next(p for p in names if not p.exists())


def _fsync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
