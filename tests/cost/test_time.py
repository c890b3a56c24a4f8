"""Predicted times: never below a tier, exactly the closed forms where these hold, and the measured rates of the kernels."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from distflash.cost.devices import DEVICES, Device, Link, Rate, find, network
from distflash.cost.time import Cluster, Rank, compute_seconds
from distflash.cost.traffic import PASSES, Scheme, Shape, steps
from distflash.parallel.mask import Mask, packed
from distflash.parallel.plan import alone

IDEAL = Device(  # one FLOP rate, no start, no launch, HBM that is never in the way
    "ideal", 1e12, 1e30, 1e12, 1 << 18, 1, 0.0, {"p2p": Link.of(0.0, 1e9)}, {p: {64: Rate(1e12, 0.0)} for p in PASSES}, "made up"
)
SHAPE = Shape(8, 2, 64, 64)


def rank_of(cluster, scheme=None, tokens=1024, mask=(None, 0), shape=SHAPE, rank=0):
    scheme = scheme or Scheme("zigzag", "ring", 1, cluster.ranks, cluster.per_node)
    cu = (0, tokens * cluster.ranks)
    spans = scheme.spans(cu, Mask(*mask, cu))
    return Rank(scheme.share(spans, Mask(*mask, cu), shape, rank), cluster)


def test_nothing_beats_a_tier_whatever_the_scheme():
    for ulysses in (1, 2, 4):
        for order in ("ring", "all_gather", "double_ring"):
            for tokens in (64, 4096):
                for name, device in DEVICES.items():
                    for wire in device.wires:
                        cluster = Cluster(device, 8, 8 if wire == "symmetric" else 4, network(400), wire)
                        for pass_, one in rank_of(cluster, Scheme("zigzag", order, ulysses, 8, 4), tokens).passes().items():
                            case = f"{name}, {wire}, {order}, ulysses {ulysses}, {tokens}, {pass_}: {one}"
                            assert one.seconds >= max(one.tiers.values()) > 0, case
                            assert one.seconds == pytest.approx(one.compute + one.exposed) and one.exposed >= 0, case
                            assert one.tiers["network"] > 0 if wire == "p2p" and ulysses < 8 else one.tiers["network"] == 0, case


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("bandwidth", [1e7, 1e9, 1e13])
def test_a_ring_costs_the_longer_of_hop_and_kernel_at_each_step(ranks, bandwidth):
    """Full attention: T = Σ over steps of max(compute, hop), the last step without a hop. The gradients wait for the blocks on the link."""
    device = replace(IDEAL, wires={"p2p": Link.of(0.0, bandwidth)})
    rank = rank_of(Cluster(device, ranks, ranks, network(1)), mask=(None, None))
    compute, hop = 4 * 8 * 64 * 1024**2 / 1e12, SHAPE.message(1024, 2) / bandwidth
    assert rank.one("forward").seconds == pytest.approx((ranks - 1) * max(compute, hop) + compute)
    back, home = 2.5 * compute, SHAPE.message(1024, 4) / bandwidth
    found = rank.one("backward").seconds
    assert found >= max(ranks * back + home, (ranks - 1) * hop + ranks * home)
    assert found <= ranks * (back + hop + home)


def test_ulysses_is_exposed_and_a_ring_of_one_computes_what_one_device_does():
    cluster = Cluster(IDEAL, 4, 4, network(1))
    alone_ = rank_of(Cluster(IDEAL, 1, 1, network(1)), tokens=4096, mask=(None, None)).one("forward")
    shared = rank_of(cluster, Scheme("contiguous", "ring", 4, 4, 4), mask=(None, None), shape=Shape(8, 4, 64, 64)).one("forward")
    assert alone_.exposed == 0 and shared.compute == pytest.approx(alone_.compute / 4)
    assert shared.exposed == pytest.approx(shared.tiers["links"], rel=1e-6)


def test_a_slow_network_is_paid_once_a_round_by_a_double_ring():
    cluster = Cluster(IDEAL, 8, 4, Link.of(0.0, 1e8))
    ring, double = (rank_of(cluster, Scheme("zigzag", order, 1, 8, 4)).one("forward").seconds for order in ("ring", "double_ring"))
    assert double < ring


def test_drag_is_paid_for_the_time_that_kernels_run_beside_a_transfer():
    still = rank_of(Cluster(replace(IDEAL, wires={"p2p": Link.of(0, 1e12)}), 2, 2, network(1))).one("forward").seconds
    dragged = rank_of(Cluster(replace(IDEAL, wires={"p2p": Link.of(0, 1e12, drag=0.5)}), 2, 2, network(1))).one("forward").seconds
    assert dragged - still == pytest.approx(0.5 * SHAPE.message(1024, 2) / 1e12)


def test_the_kernels_rates_are_those_that_were_measured():
    """Every cell of benchmarks/results: seconds within 15 %, the median within 3 %."""
    from benchmarks.record import RESULTS  # a mutant has no benchmarks

    rows = json.loads((RESULTS / "kernels_h100_80gb_hbm3.json").read_text())["rows"]
    errors = []
    for r in rows:
        if r["part"] in ("d64", "d128", "d256") and r["kernel"] == "distflash" and r["pass"] in PASSES:
            shape = Shape(r["H"], r["Hk"], r["D"], r["D"], batch=32768 // r["S"])
            visits = alone(packed((0, r["S"]), (0, r["S"]), Mask(None, 0 if r["causal"] else None)))
            found = compute_seconds(steps(visits, shape)[0], shape, DEVICES["h100"], r["pass"], True, True)
            flops = shape.flops(r["pass"]) * r["S"] ** 2 / (2 if r["causal"] else 1)
            errors.append(abs(found * r["tflops"] * 1e12 / flops - 1))
    assert len(errors) == 60
    assert max(errors) < 0.15 and sorted(errors)[30] < 0.03


def test_a_link_goes_through_its_points():
    link = Link(((0, 1e-5), (100, 2e-5), (1000, 5e-5)), drag=0.1)
    assert [link.seconds(n) for n in (0, 50, 100, 550, 1000, 2000)] == pytest.approx([0, 1.5e-5, 2e-5, 3.5e-5, 5e-5, 1e-4])
    assert link.bandwidth == 1000 / 5e-5
    assert link.scaled(2).seconds(1000) == pytest.approx(1e-5 + 2e-5) and link.scaled(1) == link


def test_a_wire_that_cannot_serve_says_why():
    assert "has no wire 'symmetric'" in Cluster(DEVICES["mi300x"], 8, 8, network(400), "symmetric").refusal()
    assert "not 16 of several" in Cluster(DEVICES["h100"], 16, 8, network(400), "symmetric").refusal()
    assert Cluster(DEVICES["h100"], 8, 8, network(400), "symmetric").refusal() is None


def test_devices_are_found_by_name_and_survive_a_file(tmp_path):
    assert find("NVIDIA H100 80GB HBM3").name == "H100" and find("NVIDIA A100-SXM4-80GB").name == "A100" and find("cpu").itemsize == 4
    for device in DEVICES.values():
        path = tmp_path / f"{device.name}.json"
        path.write_text(device.to_json())
        assert find(str(path)) == device
    with pytest.raises(ValueError, match="nothing is known of the device 'abacus': use one of a100, "):
        find("abacus")
    with pytest.raises(ValueError, match="No such file"):
        find(str(tmp_path / "none.json"))
    (tmp_path / "bad.json").write_text('{"name": "x"}')
    with pytest.raises(ValueError, match="this is no device"):
        find(str(tmp_path / "bad.json"))
