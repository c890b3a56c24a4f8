"""Settings of the whole suite: one thread a process, the same random numbers every run."""

import hypothesis
import pytest
import torch

torch.set_num_threads(1)  # before any fork: OpenMP's threads do not survive one

hypothesis.settings.register_profile("suite", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("suite")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
