"""launch/early.py and who asks it: what cannot be is said in one line, before anything is computed."""

import importlib.util
import json
import os

import pytest
from typer.testing import CliRunner

import distflash
from distflash.launch import bench, early
from distflash.launch.cli import app


@pytest.fixture
def refused(monkeypatch, tmp_path):
    """Runs a command that must end with exit code 2 before it makes a world; what it said, on one line."""
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(distflash, "init", lambda: pytest.fail("it began"), raising=False)

    def run(*words):
        found = CliRunner().invoke(app, words)
        assert found.exit_code == 2, (found.output, found.exception)
        return " ".join(found.output.replace("│", "").split())

    return run


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "foo"], "no model 'foo'"),
        (["--data", "/no/such"], "--data '/no/such' does not exist"),
        (["--layout", "foo"], "layout='foo' is not known"),
        (["--order", "foo"], "order='foo' is not known"),
        (["--wire", "foo"], "wire='foo' is not known"),
        (["--kernel", "foo"], "kernel='foo' is not known"),
        (["--staging", "much"], "staging='much' is not a positive number"),
        (["--ulysses", "3"], "--ulysses must divide the 1 ranks"),
        (["--ulysses", "0"], "--ulysses must divide the 1 ranks"),
        (["--out", "/dev/null"], "--out /dev/null must be a folder"),
    ],
)
def test_train(refused, words, message):
    assert message in refused("train", "--nproc", "1", *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lengths", "abc"], "--lengths must be positive integers with commas between, as in 4096,8192, got 'abc'"),
        (["--lengths", "0"], "got '0'"),
        (["--lengths", "64,"], "got '64,'"),
        (["--heads", "4"], "--heads must be query heads / key and value heads"),
        (["--heads", "4/3"], "query heads must be a multiple of key and value heads, got 4/3"),
        (["--heads", "4/0"], "got 4/0"),
        (["--heads", "0/4"], "got 0/4"),
        (["--wires", "foo"], "wire='foo' is not known"),
        (["--orders", "ring,foo"], "order='foo' is not known"),
        (["--trace", "/dev/null/x"], "Not a directory"),
    ],
)
def test_bench(refused, words, message):
    assert message in refused("bench", "ring", *words)


@pytest.mark.parametrize("content", ["{}", "[]", "7", '{"runs": 3}', "{", "[" * 100_000])
def test_verify_and_a_record_that_is_none(refused, tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    for started in ([], ["--nproc", "2"]):
        told = refused("verify", "--fuzz", "2", "--record", "x.json", *started)
        assert 'x.json must be a JSON file with a list of "runs", or new: name another' in told
    assert (tmp_path / "x.json").read_text() == content


def test_verify_and_places_that_are_none(refused):
    assert "but /no/dir is none: create it" in refused("verify", "--fuzz", "2", "--record", "/no/dir/x.json")
    assert "must be a file that can be written" in refused("verify", "--fuzz", "2", "--record", "/tmp")
    for seed in (10**23, -1):
        assert "Invalid value for '--seed'" in refused("verify", f"--seed={seed}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seq", "0"], "--seq must be at least 1 token, got '0'"),
        (["--seq", "0k", "--documents", "0,0"], "--seq must be at least 1 token, got '0k'"),
        (["--picture", "/no/dir/x.png"], "--picture /no/dir/x.png must be in a folder that is there"),
        (["--picture", "x.foo"], "--picture x.foo must end in .png, .pdf, .svg"),
    ],
)
def test_plan(refused, words, message, monkeypatch):
    monkeypatch.setattr("distflash.cost.choose.choose", lambda *given, **more: pytest.fail("it plans"))
    assert message in refused("plan", *words)


def test_processes_that_a_launcher_has_started_start_no_more(refused, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("distflash.launch.run.launch", lambda *given: pytest.fail("it starts ranks"))
    assert "--nproc 3 starts processes, but a launcher has started this one already" in refused("verify", "--nproc", "3")


@pytest.mark.parametrize("name", ["safetensors", "matplotlib"])
@pytest.mark.parametrize("environ", [{}, {"RANK": "0", "WORLD_SIZE": "1"}])
def test_training_needs_what_it_will_need_at_its_end(refused, monkeypatch, name, environ):
    for variable, value in environ.items():
        monkeypatch.setenv(variable, value)
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda asked, *more: None if asked == name else found(asked, *more))
    assert f"training needs {name}, which is not installed: pip install 'distflash[train]'" in refused("train", "--nproc", "1")


def test_doctor(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr("distflash.launch.measure.measure", lambda world: pytest.fail("it measures"))
    found = CliRunner().invoke(app, ["doctor", "--measure", "/no/dir/x.json"])
    assert found.exit_code == 2 and "but /no/dir is none: create it" in found.output


@pytest.mark.parametrize("timeout", [0, -1.0, float("inf"), float("nan"), 1e300, 1e12])
def test_init(timeout):
    with pytest.raises(ValueError, match="timeout must be positive seconds, at most"):
        distflash.init(timeout=timeout)


def test_a_file_that_may_not_be_written(tmp_path, monkeypatch):
    (tmp_path / "x.json").write_text(json.dumps({"runs": [1]}))
    assert early.runs_of(tmp_path / "x.json") == [1] and early.runs_of(tmp_path / "new.json") == []
    monkeypatch.setattr(os, "access", lambda *given: False)
    with pytest.raises(ValueError, match="must be a file that can be written"):
        early.runs_of(tmp_path / "x.json")


@pytest.mark.parametrize(("tflops", "text"), [(0.0123456, "0.0123"), (3.14159, "3.14"), (99.94, "99.9"), (712.3, "712"), (1234.5, "1234")])
def test_rates_of_a_cpu_are_not_0(tflops, text):
    assert bench._rate(tflops) == text
