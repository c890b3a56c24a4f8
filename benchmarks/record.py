"""How a result is written: JSON with what was measured, on what, with which versions."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


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


def write(name: str, rows: list[dict[str, Any]], folder: Path = RESULTS, **about: Any) -> Path:
    """Write `rows` to folder/name.json, under what they were measured with."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"versions": versions(), **about, "rows": rows}, indent=1) + "\n")
    return path
