"""How a result is written, JSON with what was measured, on what, with which versions and commit, when; and how it is read and shown."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from distflash.launch.checkout import commit
from distflash.train.report import finite

RESULTS = Path(__file__).parent / "results"
# when this program began, and with what: neither changes while it measures for an hour, whatever is committed meanwhile
RUN = {"commit": commit(12), "date": datetime.now(UTC).isoformat(timespec="seconds")}
_added_to: dict[Path, dict[str, Any]] = {}  # what files held that this program adds to


def versions() -> dict[str, Any]:
    """The device and the versions that a figure belongs to."""
    import triton

    gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine(),
        "devices": torch.cuda.device_count() if gpu else 0,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        **({"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()} if gpu else {}),
    }


def slug(device: torch.device) -> str:
    """A device in the name of a file: h200 for an NVIDIA H200, cpu."""
    return torch.cuda.get_device_name(device).lower().removeprefix("nvidia ").replace(" ", "_") if device.type == "cuda" else device.type


def write(name: str, rows: list[dict[str, Any]], folder: Path = RESULTS, **about: Any) -> Path:
    """Write `rows` to folder/name.json, under what they were measured with and when.

    "commit" (null if it is not known) and "date" are of this program; if it has kept rows of others, theirs are in "earlier". Older
    files have none of these.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, before = folder / f"{name}.json", _added_to.get(folder / f"{name}.json", {"rows": []})
    kept = any(row in rows for row in before["rows"])
    earlier = {"earlier": [*before.get("earlier", ()), {word: before.get(word) for word in RUN}]} if kept else {}
    result = finite({"versions": versions(), **RUN, **earlier, **about, "rows": rows})
    path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    return path


def load(name: str) -> dict[str, Any]:
    """The committed result of this name."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def held(path: Path) -> dict[str, Any]:
    """A result that is to be added to, without rows if there is no file.

    Raises:
        ValueError: it was measured on another device or with other versions.
    """
    if not path.exists():
        return {"rows": []}
    found = json.loads(path.read_text())
    if any(found["versions"][word] != value for word, value in versions().items()):
        raise ValueError(f"{path} was measured with {found['versions']}, this is {versions()}: write to another place with --out")
    _added_to[path] = found
    return found


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def source(result: dict[str, Any]) -> str:
    """The line under a table: what it was measured on."""
    about = result.get("versions", result)
    count = about.get("devices", 1)
    return f"\n{f'{count} x ' if count > 1 else ''}{about['device']}, torch {about['torch']}, Triton {about['triton']}.\n"
