"""What PyTorch and GPU kernels read alike: the threshold of dropout. The rest is held against the oracle where it is used."""

from __future__ import annotations

import math

import pytest

from distflash.kernels.base import Dropout
from distflash.kernels.scores import threshold


@pytest.mark.parametrize("p", [1 - 2.0**-32, 1 - 2.0**-33, 1 - 2.0**-40, math.nextafter(1.0, 0.0)])
def test_the_largest_threshold_is_a_word_so_that_nearly_all_is_dropped_and_not_nothing(p):
    assert threshold(Dropout(p, 0, 0)) == 2**32 - 1


def test_a_threshold_is_p_of_all_words():
    assert [threshold(Dropout(p, 0, 0)) for p in (2.0**-40, 0.25, 0.5)] == [0, 2**30, 2**31]
