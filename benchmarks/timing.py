"""How long a call takes among ranks: several in a row, as a model's layers follow each other, and the slowest rank's time counts."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import torch

from distflash.launch.measure import seconds

SAMPLE = 0.05  # seconds that the calls of a sample take on a GPU, which the host queues ahead, as training does


def in_a_row(
    run: Callable[[], object], device: torch.device, repeats: int, together: Callable[[], object], slowest: Callable[[float], float]
) -> float:
    """Median seconds of a call. `together` starts the ranks at one time, `slowest` makes of a rank's seconds the largest of all ranks'."""

    def sample(calls: int) -> float:
        together()
        return slowest(seconds(lambda: [run() for _ in range(calls)], device) / calls)

    once = [sample(1) for _ in range(3)][-1]  # the first ones compile kernels and make tables
    calls = max(1, round(SAMPLE / once)) if device.type == "cuda" else 1
    return median(sample(calls) for _ in range(repeats))
