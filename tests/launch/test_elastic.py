"""torchrun starts the ranks again when one was killed, and training goes on by itself; tests/launch/elastic.py does it more often."""

import random

from tests.launch import elastic


def test_a_run_whose_rank_is_killed_goes_on_under_torchrun_to_the_same_curve(tmp_path):
    truth = elastic.undisturbed(tmp_path / "truth", ranks=2, steps=10)
    found, about = elastic.kill_a_rank(tmp_path / "struck", ranks=2, steps=10, draw=random.Random(5))
    assert about["struck_after_step"] > 3, about
    assert found == truth and len(truth) == 10
