"""The command `distflash`. Nothing here imports torch: `distflash --help` answers at once.

train, verify, plan and bench live elsewhere and are imported when they are called; they get the rest of the command line untouched.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import typer

from distflash.launch.doctor import doctor
from distflash.launch.parent import end_with_launcher
from distflash.launch.run import run

LATER = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

app = typer.Typer(
    name="distflash", no_args_is_help=True, add_completion=False, help="Exact attention over many GPUs.", pretty_exceptions_enable=False
)


def _later(name: str, module: str, about: str) -> None:
    """Register a command whose function `name` of `module` is imported when it is called."""

    def command(context: typer.Context) -> None:
        end_with_launcher()
        function: Callable[..., None] = getattr(import_module(module), name)
        single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        single.command(help=about)(function)
        single(context.args, prog_name=f"distflash {name}")

    app.command(name, help=about, context_settings=LATER)(command)


_later("train", "distflash.train.command", "Train a small language model with attention spread over the ranks.")
_later("verify", "distflash.launch.verify", "Check this machine's results against exact attention.")
_later("plan", "distflash.launch.plan", "Rank schemes for a model on a cluster by predicted time.")
_later("bench", "distflash.launch.bench", "Time attention across ranks beside the bound of one GPU.")
app.command("doctor")(doctor)
app.command("run", context_settings={"allow_interspersed_args": False})(run)


if __name__ == "__main__":
    app()
