"""What multi-rank tests share: `distflash.launch.trial` and ranks as threads."""

from __future__ import annotations

from distflash.launch import trial
from distflash.launch.trial import (
    SEED,
    START,
    Call,
    Inputs,
    inputs,
    keep_of,
    run_rank,
    run_sequence,
    truth_of,
    whole,
)
from distflash.testing import Attention

__all__ = ["SEED", "START", "Call", "Inputs", "inputs", "keep_of", "on_ranks", "run_rank", "run_sequence", "truth_of", "whole"]


def on_ranks(ranks: int, call: Call, x: Inputs, per_node: int | None = None) -> Attention:
    """Attention by `ranks` threads."""
    return trial.on_ranks(1, ranks, call, x, per_node)
