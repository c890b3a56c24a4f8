"""The arguments of distflash.init(), checked, and what NCCL is told of them."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING

from distflash.launch.heartbeat import LIMIT

if TYPE_CHECKING:
    from torch.distributed import ProcessGroupNCCL

LONGEST = 1e9  # seconds: clocks count nanoseconds in 64 bits


def checked(backend: object, timeout: float, heartbeat: float | None, nccl_ctas: object) -> float:
    """The limit of the heartbeat, see `limit_of`. Raises ValueError on an argument that no job could be given."""
    if backend not in (None, "nccl", "gloo"):
        raise ValueError(f'backend must be "nccl", "gloo" or None, got {backend!r}: pass one of these')
    if not 0 < timeout <= LONGEST:
        raise ValueError(f"timeout must be positive seconds, at most {LONGEST:.0e}, got {timeout}: pass e.g. 600.0")
    limit = limit_of(heartbeat)
    if nccl_ctas is not None and (isinstance(nccl_ctas, bool) or not isinstance(nccl_ctas, int) or nccl_ctas < 1):
        raise ValueError(f"nccl_ctas must be a positive integer or None (NCCL chooses), got {nccl_ctas!r}: pass e.g. 8")
    return limit


def limit_of(heartbeat: float | None) -> float:
    """Seconds of silence after which a rank is lost, 0 for never: the argument, else DISTFLASH_HEARTBEAT, else LIMIT."""
    given = os.environ.get("DISTFLASH_HEARTBEAT", LIMIT) if heartbeat is None else heartbeat
    try:
        limit = float(given)
    except ValueError:
        limit = -1.0
    if not (limit == 0 or 0.5 <= limit < float("inf")):
        raise ValueError(f"heartbeat must be 0 (off) or at least 0.5 seconds, got {given!r}: pass e.g. 10.0")
    return limit


def nccl_options(timeout: timedelta, ctas: int | None) -> ProcessGroupNCCL.Options:
    """What NCCL's kernels may take of a GPU beside ours: they start before ours that wait, and have no more blocks than asked for."""
    import torch.distributed as dist

    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options._timeout = timeout  # the group's own; torch warns where they differ
    if ctas is not None:
        options.config.min_ctas, options.config.max_ctas = 1, ctas
    return options
