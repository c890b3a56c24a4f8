"""The link between two hosts is cut in the middle of a ring: each names the other, in time."""

import pytest

from distflash.launch.heartbeat import EXIT_PEER_LOST
from tests.launch.faults import LIMIT, SLACK
from tests.launch.hosts import both_named, cut


def test_both_sides_of_a_cut_link_name_the_other(tmp_path):
    try:
        ended = cut(tmp_path, rank=0, call=5, hop=1)
    except OSError as error:
        pytest.skip(f"network namespaces are not to be had: {error}")
    assert both_named(ended), ended
    assert all(end.code == EXIT_PEER_LOST and end.named < LIMIT + SLACK for end in ended)
    assert "sent no heartbeat for" in ended[0].said and "which serves the store, has not answered for" in ended[1].said
