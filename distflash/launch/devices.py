"""Which device is this rank's: the CPU for gloo, else a GPU of its own among those of the host."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from distflash.launch.environment import Place

if TYPE_CHECKING:
    import torch


def claim(place: Place, backend: str | None) -> torch.device:
    """This rank's device, made current if it is a GPU."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if backend == "gloo" or (backend is None and gpus == 0):
        return torch.device("cpu")
    index = gpu_index(place, gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def gpu_index(place: Place, gpus: int, visible: str | None) -> int:
    """Which of the `gpus` visible GPUs is this rank's. `visible` is CUDA_VISIBLE_DEVICES.

    mpirun and srun can show each task a GPU of its own (`srun --gpus-per-task=1`); then it is the first, whatever the local rank.
    """
    assert place.local_rank is not None and place.local_size is not None
    if gpus == 0:
        raise ValueError('backend "nccl" needs a GPU that torch can use, got none: run `distflash doctor`, or pass backend="gloo"')
    if gpus == 1 and visible and "," not in visible and place.launcher in ("mpi", "slurm"):
        return 0
    if place.local_size > gpus:
        raise ValueError(
            f"{place.local_size} ranks on this host need as many GPUs, got {gpus}: start {gpus} ranks a host, "
            'check CUDA_VISIBLE_DEVICES, or pass backend="gloo" to run on the CPU'
        )
    return place.local_rank
