"""launch/plan.py: sizes and borders as people write them, the table, JSON and the picture."""

import json

import pytest
import typer
from typer.testing import CliRunner

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
    for expected in (title, "exposed", "basis: kernels measured on an H100", "left out: "):
        assert expected in told.stdout
    found = ranking("--model", "llama-3-8b", "--seq", "256k", "--gpus", "16", "--device", "h200")["ranking"]
    times = [row["forward"] + row["backward"] for row in found]
    assert times == sorted(times) and all(row["reason"] for row in found) and found[0]["step"] > 32 * times[0]
    assert found[0]["layout"] in told.stdout and len(told.stdout.splitlines()) < 40


def test_masks_and_what_is_asked_for_by_name_are_honoured():
    options = ("--model", "gpt-2", "--seq", "32k", "--gpus", "4", "--ulysses", "1", "--order", "ring", "--layout", "zigzag")
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


def test_the_picture_is_a_png(tmp_path):
    path = tmp_path / "schedule.png"
    told = invoke("--model", "gpt-2", "--seq", "16k", "--gpus", "4", "--picture", str(path))
    assert told.exit_code == 0 and path.read_bytes().startswith(b"\x89PNG")
