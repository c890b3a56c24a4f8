"""A job that is killed while it saves goes on from a whole checkpoint to the same curve; tests/train/kills.py does it more often."""

import random

import pytest

from tests.train import kills


def test_whoever_is_killed_whenever_in_a_save_the_resumed_run_is_the_undisturbed_one(tmp_path):
    done = kills.strikes(tmp_path, 3, ranks=2, shard=False, draw=random.Random(4), steps=4)
    assert done["kills"] == sum(done["left"].values()) == 3


def test_a_checkpoint_that_is_not_the_true_one_is_found(tmp_path):
    truth = kills.Truth(tmp_path / "truth", 1, 1, False)
    assert truth.found(truth.config) == 1
    file = tmp_path / "truth" / "run" / "step-00000001" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(AssertionError, match=r"model\.safetensors has"):
        truth.found(truth.config)
