"""The simulation: it is the closed form where nothing contends, contention halves bandwidth, and what is sent arrives."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from distflash.cost.devices import DEVICES, Link, network
from distflash.cost.even import NoClosedForm, even
from distflash.cost.simulate import simulate, standing
from distflash.cost.time import Cluster, Rank
from distflash.cost.traffic import PASSES, Message, Scheme, Shape, Share
from distflash.parallel.layout import LAYOUTS
from distflash.parallel.mask import Mask
from distflash.parallel.plan import ORDERS
from distflash.parallel.slices import Slices
from tests.cost.test_time import IDEAL, SHAPE


def ranks_of(scheme, cluster, tokens=512, mask=(None, 0), cu=None, shape=SHAPE, closed=False):
    cu = cu or (0, tokens * scheme.ring)
    mask = Mask(*mask, cu)
    spans = scheme.spans(cu, mask)
    made = []
    for n in range(scheme.ring):
        visits = even(scheme, spans, mask, n) if closed else scheme.visits(spans, mask, n)
        made.append(Rank(Share(scheme, spans, shape, n * scheme.ulysses, visits), cluster))
    return made


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("device", ["ideal", "h200", "a100"])
def test_without_contention_it_is_the_closed_form(device, pass_):
    device = IDEAL if device == "ideal" else DEVICES[device]
    for ranks in (1, 2, 4, 8):
        for order in ("ring", "all_gather"):
            for ulysses in (u for u in (1, 2) if ranks % u == 0):
                for mask in ((None, None), (None, 0)):
                    scheme = Scheme("zigzag", order, ulysses, ranks, ranks)
                    made = ranks_of(scheme, Cluster(device, ranks, ranks, network(1)), mask=mask)
                    closed = max(rank.one(pass_).seconds for rank in made)
                    found = simulate(made, pass_).seconds
                    assert found == pytest.approx(closed, rel=0.02 if mask[1] == 0 else 1e-9), f"{scheme}, {mask}"


def test_who_waits_for_a_way_goes_before_the_one_that_had_it():
    """Ranks 0 and 1 share a NIC; 0 has three messages for 2, and 1 has one for 3."""
    made = ranks_of(Scheme("zigzag", "ring", 1, 4, 2), Cluster(IDEAL, 4, 2, Link.of(0.0, 1e9)))
    three, one = [tuple(Message(peer, 1 << 20, step) for step in steps) for peer, steps in ((0, (1, 2, 3)), (1, (1,)))]
    for rank, out, coming in zip(made, (three, one, (), ()), ((), (), three, one), strict=True):
        out = tuple(m._replace(peer=m.peer + 2) for m in out)
        rank.steps = [step._replace(hops_out=out * (n == 0), hops_in=coming * (n == 0)) for n, step in enumerate(rank.steps)]
    sent = sorted((start, who) for who, kind, start, _ in simulate(made, "forward", per_nic=2).events if kind == "send")
    assert [who for _, who in sent] == [0, 1, 0, 0]


@pytest.mark.parametrize("order, ulysses", [("ring", 1), ("double_ring", 1), ("ring", 4), ("all_gather", 1), ("all_gather", 2)])
def test_across_hosts_it_is_the_closed_form_of_the_slowest_rank(order, ulysses):
    for tokens in (2048, 16384):
        cluster = Cluster(DEVICES["h200"], 16, 4, network(400))
        made = ranks_of(Scheme("zigzag", order, ulysses, 16, 4), cluster, tokens * ulysses, shape=Shape(32, 8, 128, 128))
        for pass_ in PASSES:
            closed = max(rank.one(pass_).seconds for rank in made)
            assert simulate(made, pass_).seconds == pytest.approx(closed, rel=1e-3), f"{tokens}, {pass_}"


def test_two_messages_over_one_nic_take_twice_as_long():
    """All ranks of a host send over the network at once: with one NIC for all, the bytes take as many times longer."""
    slow = replace(IDEAL, kernels={p: {64: table[64]._replace(flops=1e30)} for p, table in IDEAL.kernels.items()})
    scheme = Scheme("zigzag", "double_ring", 1, 8, 4)
    cluster = Cluster(replace(slow, wires={"p2p": Link.of(0.0, 1e30)}), 8, 4, Link.of(0.0, 1e9))
    own, pair, shared = (simulate(ranks_of(scheme, cluster), "forward", per_nic=n).seconds for n in (1, 2, 4))
    assert own == pytest.approx(SHAPE.message(512, 2) / 1e9)
    assert (pair, shared) == (pytest.approx(2 * own), pytest.approx(4 * own))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("order", ORDERS)
def test_whatever_the_plan_all_that_is_sent_arrives_and_no_way_carries_two_at_once(layout, order):
    cu = (0, 700, 701, 701, 3000, 4100)
    scheme, cluster = Scheme(layout, order, 1, 8, 4), Cluster(DEVICES["h100"], 8, 4, network(200))
    for window in ((None, 0), (300, 0)):
        made = ranks_of(scheme, cluster, cu=cu, mask=window)
        for pass_ in PASSES:
            found = simulate(made, pass_)
            sent = [sum(len(s.hops_out) + (pass_ == "backward") * len(s.home_out) for s in rank.steps) for rank in made]
            for n, rank in enumerate(made):
                events = sorted((start, end) for who, kind, start, end in found.events if who == n and kind == "send")
                assert len(events) == sent[n] and all(a[1] <= b[0] + 1e-12 for a, b in pairwise(events))
                computing = sorted((start, end) for who, kind, start, end in found.events if who == n and kind == "compute")
                assert len(computing) == sum(bool(s.visit.tiles) for s in rank.steps)
                assert all(a[1] <= b[0] + 1e-12 for a, b in pairwise(computing))
            assert found.seconds >= max(end for *_, end in found.events) - 1e-12 and 0 < found.efficiency <= 1
            assert found.seconds >= max(rank.one(pass_).compute for rank in made)


@pytest.mark.parametrize("order", ["ring", "double_ring"])
@pytest.mark.parametrize("layout, mask", [("zigzag", (None, 0)), ("contiguous", (None, None)), ("striped", (None, 0))])
def test_the_closed_form_of_a_plan_is_the_plan(order, layout, mask):
    for ranks, length in ((16, 8192), (16, 8197), (8, 500), (4, 63)):
        scheme, cluster = Scheme(layout, order, 1, ranks, 4), Cluster(DEVICES["h200"], ranks, 4, network(400))
        by_plan, by_form = (ranks_of(scheme, cluster, mask=mask, cu=(0, length), closed=closed) for closed in (False, True))
        for a, b in zip(by_plan, by_form, strict=True):
            assert [(s.visit.step, s.visit.parts, s.visit.hops, s.visit.home, s.visit.tiles.tiles) for s in a.steps] == [
                (s.visit.step, s.visit.parts, s.visit.hops, s.visit.home, s.visit.tiles.tiles) for s in b.steps
            ]


@pytest.mark.parametrize("order, ulysses", [("ring", 1), ("double_ring", 1), ("ring", 4), ("all_gather", 1)])
@pytest.mark.parametrize("layout, mask", [("zigzag", (None, 0)), ("contiguous", (None, None)), ("striped", (None, 0))])
def test_the_first_and_the_last_hosts_stand_for_all(order, ulysses, layout, mask):
    """The first alone would not: the last rank of a zigzag has the most rows to begin, forward."""
    scheme = Scheme(layout, order, ulysses, 32 * ulysses, 4)
    for nic in (100, 400):
        whole = ranks_of(
            scheme, Cluster(DEVICES["h200"], scheme.ranks, 4, network(nic)), 2048, mask, shape=Shape(32, 8, 128, 128), closed=True
        )
        some = [whole[n] for n in standing(scheme)]
        assert len(some) == (16 if ulysses == 1 else 4)
        for pass_ in PASSES:
            assert simulate(some, pass_).seconds == pytest.approx(simulate(whole, pass_).seconds, rel=1e-6)


@pytest.mark.parametrize("ulysses", [1, 2])
def test_ranks_without_work_count_among_those_that_could_compute(ulysses):
    """Two tokens on four ranks, and on all of them a mask that keeps nothing: then all-to-alls are all that happens."""
    scheme, cluster = Scheme("contiguous", "ring", ulysses, 4, 4), Cluster(DEVICES["h200"], 4, 4, network(1))
    spans = scheme.spans((0, 2), Slices([]))
    for mask, busy in ((Mask(None, 0), 2), (Slices([]), 0)):
        made = [Rank(scheme.share(spans, mask, SHAPE, n * ulysses), cluster) for n in range(scheme.ring)]
        for pass_ in PASSES:
            found = simulate(made, pass_)
            assert sorted(found.busy) == [*range(scheme.ring)] and sum(map(bool, found.busy.values())) == busy
            assert found.efficiency <= busy / scheme.ring or not found.seconds


def test_what_has_no_closed_form_is_refused():
    cluster = Cluster(IDEAL, 4, 4, network(1))
    for order in ORDERS:
        with pytest.raises(NoClosedForm, match="needs nothing of another"):
            ranks_of(Scheme("contiguous", order, 1, 4, 4), cluster, closed=True)


def test_ranks_that_wait_in_vain_are_named():
    made = ranks_of(Scheme("zigzag", "ring", 1, 4, 4), Cluster(IDEAL, 4, 4, network(1)))
    made[1].steps = [step._replace(hops_out=()) for step in made[1].steps]
    with pytest.raises(ValueError, match=r"ranks \[0, 2, 3\] wait for messages that nobody sends"):
        simulate(made, "forward")
