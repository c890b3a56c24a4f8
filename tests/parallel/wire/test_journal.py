"""What a rank remembers of its calls, and what another rank's last one says beside it."""

from __future__ import annotations

import torch

from distflash.parallel.agreement import agree, refuse
from distflash.parallel.wire.journal import KEPT, Journal, Made
from distflash.parallel.wire.local import LocalGroup


def after(*kinds):
    """A journal of calls of these kinds; None is one that was refused."""
    journal = Journal("")
    for kind in kinds:
        journal.enter(f"call {kind}", "")
        if kind is not None:
            journal.make(kind)
    return journal


def test_ranks_that_make_the_same_calls_have_the_same_counterparts_however_far_one_is_ahead():
    kinds = [n % 3 for n in range(40)] + [None, 1]
    far = after(*kinds)
    for n in range(1, len(kinds)):
        near = after(*kinds[:n])
        assert far.counterpart(near.made) == near.made
        assert near.counterpart(far.made) is None, "it will be looked at when we get there"


def test_whatever_was_left_out_added_or_swapped_shows_in_every_later_call():
    kinds, tail = [0, 1, 2, 1], [0, 1] * 50
    for others in ([0, 1, 2], [0, 1, 2, 1, 1], [0, 2, 1, 1], [0, 1, 2, 0], [0, 1, 2, None], [1, 2, 1]):
        ours = after(*kinds, *tail)
        for n in range(len(tail)):
            theirs = after(*others, *tail[:n]).made
            assert theirs.call < 4 or ours.counterpart(theirs) != theirs, (others, n)


def test_a_call_that_one_rank_refused_is_none_of_its_own():
    assert after(0, None, 2).counterpart(after(0, 1).made) == Made()
    assert str(Made()) == "no call" and str(after(0, 1).made) == "call 1, seq 2"


def test_what_is_forgotten_says_nothing():
    ours = after(*[0] * (KEPT + 3))
    assert ours.counterpart(after(0, 0, 0).made) is None and ours.counterpart(Made()) is None
    assert ours.counterpart(after(0, 0, 0, 0).made) == after(0, 0, 0, 0).made
    assert after(0).counterpart(Made()) == Made()


def test_kinds_that_are_never_compared_are_told_apart_by_name_and_a_refused_call_is_not_made():
    paths = []
    for names in (["attention", "unshard"], ["attention", "attention"]):
        wire = LocalGroup(2).wire(0)
        for name in names:
            agree(wire, "never", name, {"scale": len(paths)})
        paths.append(wire.journal.made.path)
        refuse(wire, "never", "attention", ValueError())
        assert wire.journal.now.call == 3 and wire.journal.made.call == 2
    assert len({*paths}) == 2


def test_a_rank_that_captures_a_cuda_graph_does_not_count_any_more(monkeypatch):
    """A replay makes calls of which no rank takes a note, and ranks may replay where others still run."""
    wire = LocalGroup(2, "cuda").wire(0)
    for captures in (False, True, False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda captures=captures: captures)
        agree(wire, "never", "attention", {})
        counted = wire.journal.counterpart(wire.journal.made) == wire.journal.made
        assert counted == (wire.journal.now.call == 1)
