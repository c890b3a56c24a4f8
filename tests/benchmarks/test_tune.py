"""What is read off the turns of the tuner."""

from __future__ import annotations

from benchmarks import tune


def row(kernel, S, direction="forward", **more):
    return {"part": "d64", "D": 64, "S": S, "causal": True, "pass": direction, "kernel": kernel, **more}


def test_a_variant_is_held_against_the_shipped_one_turn_by_turn():
    """Clocks fall from turn to turn: the variant is 4 % faster in each but one."""
    shipped = {"ms_of_turns": [1.04, 1.56, 2.08]}
    rows = [
        row("distflash", 2048, **shipped), row("named", 2048, ms_of_turns=[1.0, 1.5, 2.6]),
        row("named", 2048, "backward", error="it hangs"), row("distflash", 2048, "backward", **shipped),
        row("distflash", 8192, error="it broke"), row("named", 8192, ms_of_turns=[1.0, 1.0, 1.0]),
    ]  # fmt: skip
    (line,) = tune.against_shipped(rows)
    assert (line["S"], line["pass"], line["variant"]) == (2048, "forward", "named")
    assert (round(line["speed"], 6), round(line["least"], 6), round(line["largest"], 6)) == (1.04, 0.8, 1.04)


def test_the_tuner_takes_the_options_of_the_kernel_benchmark(monkeypatch, tmp_path, capsys):
    asked = []

    def measure(args, log):
        asked.append(args)
        return [row("distflash", 8192, ms_of_turns=[2.0]), row("simple", 8192, ms_of_turns=[4.0])]

    monkeypatch.setattr(tune, "measure", measure)
    monkeypatch.setattr("sys.argv", ["tune", "--part", "d64", "--variants", "simple", "--lengths", "8192", "--out", f"{tmp_path}/t.json"])
    tune.main()
    assert asked[0].variants == ["simple", "distflash"] and asked[0].lengths == [8192] and asked[0].peers == [] and asked[0].turns == 3
    assert "0.500 (0.500 to 0.500)" in capsys.readouterr().out
    assert '"speed": 0.5' in (tmp_path / "t.json").read_text()
