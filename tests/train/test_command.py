"""The command line and the config behind it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from distflash.train import command
from distflash.train.config import TrainConfig


def parse(words: list[str], monkeypatch) -> tuple[TrainConfig, int | None]:
    """What the command would start."""
    got: list = []
    monkeypatch.setattr(command, "start", lambda config, nproc: got.append((config, nproc)) or 0)
    app = typer.Typer()
    app.command()(command.train)
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    return got[0]


def test_the_defaults_of_the_command_are_those_of_the_config(monkeypatch):
    assert parse([], monkeypatch) == (TrainConfig(out="runs/tiny"), None)


def test_a_config_survives_its_command_line(monkeypatch):
    config = TrainConfig(
        out="there", data=("a b", "-c"), ulysses=2, resume=True, shard=False, recompute=True, compare_steps=0, seed=3, cp=2
    )
    assert parse(["--nproc=4", *command.arguments(config)], monkeypatch) == (config, 4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps=0"], "--steps must be at least 1, got 0"),
        (["--lr=0"], "--lr must be above 0, got 0.0"),
        (["--lr=inf"], "--lr must be above 0, got inf"),
        (["--clip=nan"], "--clip must be above 0, got nan"),
        (["--weight-decay=nan"], "--weight-decay must not be negative, got nan"),
        (["--weight-decay=inf"], "--weight-decay must not be negative, got inf"),
        (["--dtype=int8"], "no dtype 'int8'"),
        (["--ulysses=many"], "--ulysses must be auto or a number, got 'many'"),
        (["--model=huge", "--nproc=2"], "no model 'huge'"),
        (["--cp=3", "--nproc=4"], "--cp must divide the 4 ranks, got 3"),
        (["--data=nowhere", "--nproc=2"], "'nowhere' does not exist"),
    ],
)
def test_wrong_options_are_refused_before_anything_starts(words, message, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    app = typer.Typer()
    app.command()(command.train)
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert message in result.output


def test_the_options_are_read_without_torch():
    program = "import sys, distflash.train.command; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_comparing_is_the_default_only_where_it_is_cheap():
    config = TrainConfig(out="x")
    assert config.steps_to_compare(4, "cpu") == 2
    assert config.steps_to_compare(1, "cpu") == config.steps_to_compare(4, "cuda") == 0
    assert TrainConfig(out="x", compare_steps=9, steps=5).steps_to_compare(4, "cuda") == 5
