"""launch/cli.py: the commands are there, and asking for help costs no import of torch."""

import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from distflash.launch.cli import app


def test_help_names_the_commands():
    told = CliRunner().invoke(app, ["--help"])
    assert told.exit_code == 0
    for command in ("train", "verify", "doctor", "run"):
        assert command in told.stdout


def test_help_is_fast_since_torch_stays_out():
    code = "import sys\nfrom distflash.launch.cli import app\napp(['--help'], standalone_mode=False)\nassert 'torch' not in sys.modules"
    begin = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)
    assert time.monotonic() - begin < 5  # 0.4 s on an idle machine


def test_commands_that_are_imported_late_get_their_arguments_untouched(monkeypatch):
    from types import ModuleType

    module, got = ModuleType("fake"), []

    def verify(name: str, size: int = 1) -> None:
        got.append((name, size))

    module.__dict__["verify"] = verify
    monkeypatch.setitem(sys.modules, "distflash.launch.verify", module)
    assert CliRunner().invoke(app, ["verify", "ring", "--size", "4"]).exit_code == 0
    assert got == [("ring", 4)]
    assert "--size" in CliRunner().invoke(app, ["verify", "--help"]).stdout
    assert CliRunner().invoke(app, ["verify", "ring", "--sise", "4"]).exit_code == 2


@pytest.mark.parametrize(("arguments", "message"), [(["missing.py"], "expected a Python file"), (["-n", "0", __file__], "--ranks")])
def test_run_refuses_what_cannot_run(arguments, message):
    told = CliRunner().invoke(app, ["run", *arguments])
    assert told.exit_code == 2 and message in told.output


def test_run_hands_options_behind_the_script_to_the_script(monkeypatch, tmp_path):
    from distflash.launch import run as runner

    script, got = tmp_path / "job.py", []
    script.touch()
    monkeypatch.setattr(runner, "launch", lambda *arguments: got.append(arguments) or 5)
    told = CliRunner().invoke(app, ["run", "-n", "3", str(script), "-n", "8", "--flag", "a;b $(c)"])
    assert told.exit_code == 5
    assert got == [([str(script)], ["-n", "8", "--flag", "a;b $(c)"], 3)]
    CliRunner().invoke(app, ["run", "-n", "2", "-m", "some.module", "--flag"])
    assert got[-1] == (["-m", "some.module"], ["--flag"], 2)
