"""What a user asked for, looked at before anything is started or computed: an error then is one line and costs nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def check_scheme(**asked: Any) -> None:
    """Raises ValueError for a layout, order, wire or staging that no `SequenceParallel` takes, whatever its ranks."""
    from distflash import SequenceParallel
    from distflash.parallel.wire.local import LocalGroup

    SequenceParallel(LocalGroup(1, "cpu").wire(0), **asked)


def check_kernel(name: str) -> None:
    """Raises ValueError for a kernel that there is not."""
    from distflash.kernels.select import KERNELS
    from distflash.parallel.group import one_of

    one_of("kernel", name, ("auto", *KERNELS))


def check_file(option: str, path: Path) -> None:
    """Raises ValueError unless a file can be written at this path."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ValueError(f"{option} {path} must be in a folder that is there, but {folder} is none: create it")
    if path.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise ValueError(f"{option} {path} must be a file that can be written: name another")


def runs_of(record: Path) -> list[Any]:
    """What `verify --fuzz` has recorded in a file so far. Raises ValueError if nothing can be appended to it."""
    check_file("--record", record)
    if not record.exists():
        return []
    try:
        runs = json.loads(record.read_bytes())["runs"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        runs = None
    if not isinstance(runs, list):
        raise ValueError(f'--record {record} must be a JSON file with a list of "runs", or new: name another')
    return runs
