"""Every command of the pages is one: parsed by the very parsers that would run it, and not run."""

import argparse
import functools
import importlib.util
import re
import runpy
import shlex
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from distflash.launch import cli
from tests.pages import PAGES, ROOT, blocks, prose

LAUNCHERS = ("torchrun", "mpirun", "srun", "deepspeed")
YOURS = ("script.py", "first.py")  # what stands for a reader's own script


def commands():
    """Every line of a bash block, and inline code that is a whole distflash command, with its place."""
    found = []
    for block in blocks("bash"):
        lines = re.sub(r"\\\n", "", block.code).splitlines()
        found += [pytest.param(line, id=f"{block.page}: {line.partition('  ')[0]}") for line in lines if line.strip() and not block.not_run]
    for page in PAGES:
        for text in re.findall(r"`((?:distflash|python -m) [^`\n]* [^`\n]*)`", prose(page)):
            found.append(pytest.param(text, id=f"{page}: {text}"))
    return found


class Parsed(Exception):
    """The arguments are legal."""


@pytest.fixture
def parsing(monkeypatch):
    """Commands of distflash stop where they would begin."""

    def stop(function):
        @functools.wraps(function)
        def stopped(*_, **__):
            raise Parsed

        return stopped

    class Module:
        """A module of which every function stops; the command line imports most of its commands when they are called."""

        def __init__(self, name):
            self.module = import_module(name)

        def __getattr__(self, name):
            return stop(getattr(self.module, name))

    monkeypatch.setattr(cli, "import_module", Module)
    for command in cli.app.registered_commands:
        if command.callback.__module__ != cli.__name__:
            monkeypatch.setattr(command, "callback", stop(command.callback))
    real = argparse.ArgumentParser.parse_args

    def parse(*args, **kwargs):
        real(*args, **kwargs)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)


def stops(run):
    try:
        run()
    except Parsed:
        return True
    except SystemExit:
        return False
    return False


def is_there(script):
    assert script in YOURS or (ROOT / script).is_file(), f"there is no {script}"


def check(words, monkeypatch):
    program, *rest = words
    if program == "distflash":
        assert stops(lambda: cli.app(rest)), f"distflash does not take {shlex.join(rest)}"
        if rest[0] == "run" and "-m" not in rest:
            is_there(next(word for word in rest if word.endswith(".py")))
    elif program == "python":
        check_python(rest, monkeypatch)
    elif program == "make":
        targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in rest if "=" not in word} <= set(targets)
    elif program in LAUNCHERS:
        (script,) = [word for word in rest if word.endswith(".py")]
        is_there(script)
    elif program == "pip" and rest[0] == "install":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        asked = re.findall(r"\[([\w,]+)\]", " ".join(rest))
        assert {extra for group in asked for extra in group.split(",")} <= extras.keys()
    else:
        raise AssertionError(f"no test knows how to look at {program}")


def check_python(words, monkeypatch):
    """`python -m module ...`, `python script ...`: its parser takes the arguments; without a parser there must be none."""
    module = words[1] if words[0] == "-m" else None
    if module == "pytest":
        assert all(Path(ROOT, word.partition("::")[0]).exists() for word in words[2:] if not word.startswith("-")), words
        return
    if module is None and words[0] in YOURS:
        return
    if module:
        assert importlib.util.find_spec(module), f"there is no module {module}"
        path = Path(importlib.util.find_spec(module).origin)
    else:
        path = ROOT / words[0]
    arguments = words[2 if module else 1 :]
    if "parse_args" not in path.read_text():
        assert not arguments, f"{path.name} takes no arguments, got {arguments}"
        return
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    monkeypatch.delitem(sys.modules, module or "", raising=False)  # other tests import some of them
    run = functools.partial(runpy.run_module, module) if module else functools.partial(runpy.run_path, str(path))
    assert stops(lambda: run(run_name="__main__")), f"{path.name} does not take {shlex.join(arguments)}"


@pytest.mark.parametrize("text", commands())
def test_a_command_of_the_pages_is_one(text, parsing, monkeypatch):
    # N is a number; [--this] may be left out
    words = [re.sub(r"^[A-Z]$", "1", word.strip("[]")) for word in shlex.split(text, comments=True)]
    check(words, monkeypatch)


@pytest.mark.parametrize(
    "wrong", ["distflash verify --fuss 3", "distflash fly", "distflash plan --gpus many", "python -m tests.features now"]
)
def test_a_command_that_is_none_is_found(wrong, parsing, monkeypatch):
    with pytest.raises(AssertionError):
        check(shlex.split(wrong), monkeypatch)


def test_the_quickstart_names_every_command():
    page = (ROOT / "docs/quickstart.md").read_text()
    assert not [command.name for command in cli.app.registered_commands if f"| `distflash {command.name}" not in page]


def test_there_are_commands():
    assert len(commands()) > 20
