"""benchmarks/scaling.py: the tool runs, its extremes are the ones that the theory demands, and it says that it simulated."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import scaling

ABOUT = {"model": "llama-3-8b", "device": "h200", "per_node": 8, "nic": 400.0}


@pytest.mark.parametrize("name", scaling.SCHEMES)
def test_more_tokens_a_gpu_hide_more_and_work_is_conserved(name):
    few, many = (scaling.point(name, 64, 64 * tokens, **ABOUT) for tokens in (2 << 10, 64 << 10))
    assert few["tflops_a_gpu"] < many["tflops_a_gpu"] < 989 and few["efficiency"] < many["efficiency"] <= 1
    one, eight = (scaling.point(name, p, 1 << 20, **ABOUT) for p in (8, 64))
    assert one["forward"] + one["backward"] < 8.001 * (eight["forward"] + eight["backward"]), "no more than linear speed-up"


def test_weak_scaling_of_a_ring_is_flat_where_hops_are_hidden_and_hundreds_of_gpus_take_moments():
    small, large = (scaling.point("double ring", p, p * (64 << 10), **ABOUT) for p in (16, 512))
    assert large["tflops_a_gpu"] == pytest.approx(small["tflops_a_gpu"], rel=0.05)


def test_it_writes_what_it_simulated(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "LENGTHS", (128 << 10, 256 << 10))
    monkeypatch.setattr(sys, "argv", ["scaling", "--most", "16", "--out", str(tmp_path)])
    scaling.main()
    found = json.loads((tmp_path / "scaling_h200.json").read_text())
    assert found["simulated"] is True and found["basis"] and len(found["rows"]) == 3 * (2 * 2 + 2 * 2)
    assert (tmp_path / "scaling_h200.png").read_bytes().startswith(b"\x89PNG") and "simulated, not measured" in capsys.readouterr().out
