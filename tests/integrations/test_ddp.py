"""DistributedDataParallel over all ranks, data and sequence parallel alike: one step is that of one process."""

from functools import partial

import pytest
from torch.nn.parallel import DistributedDataParallel

from distflash.testing import spmd_processes
from tests.integrations.data_parallel import MESHES, assert_same, step


def wrapped(model, mesh):
    return DistributedDataParallel(model)


@pytest.mark.parametrize(("dp", "sp"), MESHES)
def test_one_step_moves_every_parameter_as_one_process_does(dp, sp):
    assert_same(spmd_processes(dp * sp, partial(step, dp, sp, wrapped)))


def test_ulysses_too():
    assert_same(spmd_processes(2, partial(step, 1, 2, wrapped, ulysses=2)))
