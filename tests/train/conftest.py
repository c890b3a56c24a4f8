"""Shared by the tests of the training job: a text, small runs, ranks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from distflash.train.config import TrainConfig
from distflash.train.model import MODELS, ModelConfig


@dataclass(frozen=True)
class FakeWorld:
    """What the job asks of distflash.World, on the CPU."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009  immutable

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> str:
    """A small folder of text with documents of very different lengths."""
    folder = tmp_path_factory.mktemp("text")
    for n in range(12):
        (folder / f"{n:02d}.txt").write_text(f"Document {n}: " + "all work and no play makes a dull rank; " * (n * n % 17 + 1))
    return str(folder)


@pytest.fixture
def small_run(text: str, tmp_path: Path, monkeypatch):
    """A TrainConfig that trains in a second, with fields changed."""
    monkeypatch.setitem(MODELS, "test", ModelConfig(dim=32, layers=2, heads=4, kv_heads=2, hidden=48))

    def make(**changes) -> TrainConfig:
        settings = {"out": str(tmp_path / "run"), "model": "test", "data": (text,), "steps": 6, "seq_len": 48, "batch": 2}
        settings |= {"warmup": 2, "lr": 3e-3, "checkpoint_every": 3, "compare_steps": 0, "validate": 3, "sample": 5}
        return TrainConfig(**(settings | changes))  # type: ignore[arg-type]

    return make


@pytest.fixture(autouse=True)
def one_thread():
    """The same sums in the same order, whatever the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def world() -> FakeWorld:
    return FakeWorld()


@pytest.fixture
def world_of():
    """The world of this process inside spmd_processes."""

    def make() -> FakeWorld:
        import torch.distributed as dist

        return FakeWorld(dist.get_rank(), dist.get_world_size())

    return make
