"""launch/bench.py: what is timed is what was asked for, and so is what is traced."""

import json

import torch
from typer.testing import CliRunner

import distflash
from distflash.launch.cli import app


def test_each_wire_and_order_that_was_asked_for_is_traced(monkeypatch, tmp_path):
    made = []

    def noted(*group, **scheme):
        if not group:  # else it is only looked at
            made.append((scheme["wire"], scheme["order"]))
        return parallel(*group, **scheme)

    parallel = distflash.SequenceParallel
    monkeypatch.setattr(distflash, "SequenceParallel", noted)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    asked = ["--lengths", "64", "--heads", "2/2", "--wires", "auto,p2p", "--orders", "ring,all_gather", "--repeats", "1"]
    found = CliRunner().invoke(app, ["bench", "ring", *asked, "--trace", str(tmp_path)])
    assert found.exit_code == 0, (found.output, found.exception)
    schemes = [(wire, order) for wire in ("auto", "p2p") for order in ("ring", "all_gather")]
    names = {f"S64_H2_2_{wire}_{order}_rank0.json" for wire, order in schemes}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert all(json.loads(path.read_text())["traceEvents"] for path in tmp_path.iterdir())
    assert made == schemes + schemes  # timed, traced
