"""launch/plan.py: sizes and borders as people write them, the table, JSON and the picture."""

import json
from itertools import combinations

import pytest
import typer
from typer.testing import CliRunner

from distflash.cost import simulate
from distflash.launch import plan
from distflash.launch.cli import app


def invoke(*options):
    return CliRunner().invoke(app, ["plan", *options])


def ranking(*options):
    told = invoke("--json", *options)
    assert told.exit_code == 0, told.output
    return json.loads(told.stdout)


def test_sizes_rates_and_documents_are_read_as_people_write_them():
    assert [plan.size(text) for text in ("4096", "128k", "1M", " 2m ")] == [4096, 131072, 1 << 20, 2 << 20]
    assert [plan.gigabits(text) for text in ("400Gb", "200", "12.5 Gbit/s")] == [400, 200, 12.5]
    assert plan.borders(None, 10) == (0, 10) and plan.borders("3", 10) == (0, 3, 6, 10)
    assert plan.borders("1k,1,3", 1028) == (0, 1024, 1025, 1028)
    for wrong in (lambda: plan.size("1G"), lambda: plan.gigabits("fast"), lambda: plan.gigabits("0"), lambda: plan.borders("1,2", 4)):
        with pytest.raises(typer.BadParameter):
            wrong()
    with pytest.raises(typer.BadParameter, match="5 documents do not fit into 4"):
        plan.borders("5", 4)


def test_the_table_names_the_best_scheme_why_and_what_was_left_out():
    told = invoke("--model", "llama-3-8b", "--seq", "256k", "--gpus", "16", "--per-node", "8", "--nic", "400Gb", "--top", "3")
    assert told.exit_code == 0, told.output
    title = "llama-3-8b, 262,144 tokens, causal, 16 x H200, 8 a host"
    for expected in (title, "exposed ms", "GB per GPU", "basis: kernels measured on an H100", "left out: "):
        assert expected in told.stdout
    found = ranking("--model", "llama-3-8b", "--seq", "256k", "--gpus", "16", "--device", "h200")["ranking"]
    times = [row["forward"] + row["backward"] for row in found]
    assert times == sorted(times) and all(row["reason"] for row in found) and found[0]["step"] > 32 * times[0]
    assert found[0]["layout"] in told.stdout and len(told.stdout.splitlines()) < 40


def test_masks_and_what_is_asked_for_by_name_are_honoured():
    options = (
        "--model",
        "gpt-2",
        "--seq",
        "32k",
        "--gpus",
        "4",
        "--ulysses",
        "1",
        "--order",
        "ring",
        "--layout",
        "zigzag",
        "--wire",
        "p2p",
    )
    masks = ([], ["--full"], ["--window", "1000"], ["--documents", "64"])
    causal, full, window, documents = (ranking(*options, *more)["ranking"] for more in masks)
    assert [len(rows) for rows in (causal, full, window, documents)] == [1] * 4
    assert full[0]["forward"] > 1.5 * causal[0]["forward"] > 1.5 * documents[0]["forward"]
    assert window[0]["forward"] < causal[0]["forward"]
    wires = {row["wire"] for row in ranking("--seq", "32k", "--gpus", "4", "--wire", "auto")["ranking"]}
    assert wires == {"p2p", "symmetric"}
    options = ("--model", "llama-3-70b", "--seq", "1M", "--gpus", "8", "--device", "h100")
    small = ranking(*options, "--layout", "zigzag", "--order", "ring")["ranking"]
    assert not small[0]["fits"] and "do not fit into 80" in small[0]["reason"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--model", "llama-9"), "use one of gpt-2"),
        (("--layout", "spiral"), "use one of auto, contiguous"),
        (("--wire", "string"), "--wire is one of auto, p2p"),
        (("--device", "abacus"), "nothing is known of the device"),
        (("--ulysses", "3", "--gpus", "8"), "there is none"),
        (("--seq", "12q"), "is no number of tokens"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_cure(options, said):
    told = invoke(*options)
    assert told.exit_code == 2 and said in " ".join(told.output.replace("│", " ").split())


def test_without_a_word_on_the_wire_it_is_the_one_that_a_run_takes():
    assert ranking("--seq", "32k", "--gpus", "4")["ranking"][0]["wire"] == "symmetric"
    assert {row["wire"] for row in ranking("--seq", "32k", "--gpus", "4", "--per-node", "2")["ranking"]} == {"p2p"}


def test_rows_of_equal_figures_are_one_and_the_title_names_the_window():
    options = ("--model", "gpt-2", "--seq", "64k", "--gpus", "4", "--window", "4000", "--top", "50")
    told, found = invoke(*options).stdout, ranking(*options)["ranking"]
    assert "causal, window 4,000, 4 x H200" in told and "zigzag, balanced" in told
    merged = plan._merged(found)
    assert sum(len(row["layout"].split(", ")) * len(row["order"].split(", ")) for row in merged) == len(found) > len(merged)
    figures = [tuple(text for head, text in row.items() if head not in ("layout", "order")) for row in merged]
    orders = [{*row["order"].split(", ")} for row in merged]
    assert all(a != b or one != other for (a, one), (b, other) in combinations(zip(figures, orders, strict=True), 2))


@pytest.mark.parametrize(
    ("options", "known"), [(("--gpus", "2"), True), (("--gpus", "8"), False), (("--gpus", "2", "--device", "h100"), False)]
)
def test_it_says_where_no_measurement_stands_beside_the_prediction(options, known):
    asked = ("--model", "gpt-2", "--seq", "16k", *options)
    assert ("not validated: predicted times stand beside measured ones of up to 2 H200" in invoke(*asked).stdout) != known
    assert ranking(*asked)["validated"] == known


@pytest.mark.parametrize("options", [("--wire", "p2p"), ("--wire", "symmetric"), ("--ulysses", "2"), ("--per-node", "2")])
def test_the_picture_shows_the_schedule_of_the_first_row(options, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(simulate, "simulate", lambda ranks, pass_, run=simulate.simulate: made.append(run(ranks, pass_)) or made[-1])
    asked = ("--model", "gpt-2", "--seq", "64k", "--gpus", "4", *options)
    told = invoke(*asked, "--picture", str(tmp_path / "schedule.png"))
    assert told.exit_code == 0, told.output
    first = ranking(*asked)["ranking"][0]
    assert [found.seconds for found in made] == pytest.approx([first["forward"], first["backward"]], rel=0.02)


def test_the_picture_is_of_a_row_that_fits_or_says_that_none_does(monkeypatch):
    drawn = []
    monkeypatch.setattr(plan, "_draw", lambda best, title, *rest: drawn.append((best, title)))
    options = ("--model", "llama-3-8b", "--gpus", "8", "--device", "h100", "--picture", "x.png")
    told = ranking("--seq", "512k", *options[:-2])["ranking"]
    invoke("--seq", "512k", *options)
    invoke("--seq", "1M", *options)
    first = next(row for row in told if row["fits"])
    assert not told[0]["fits"], "or this shows nothing"
    assert (drawn[0][0].scheme.layout, drawn[0][0].wire, drawn[0][0].seconds) == (
        first["layout"], first["wire"], first["forward"] + first["backward"],
    )  # fmt: skip
    assert "does not fit" in drawn[1][1] and "does not fit" not in drawn[0][1]


def test_the_picture_is_a_png(tmp_path):
    path = tmp_path / "schedule.png"
    told = invoke("--model", "gpt-2", "--seq", "16k", "--gpus", "4", "--picture", str(path))
    assert told.exit_code == 0 and path.read_bytes().startswith(b"\x89PNG")
    large = invoke("--gpus", "128", "--seq", "1M", "--layout", "zigzag", "--order", "ring", "--ulysses", "1", "--picture", str(path))
    assert large.exit_code == 0, large.output
