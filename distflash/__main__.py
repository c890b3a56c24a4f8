"""`python -m distflash` is the command `distflash`."""

from distflash.launch.cli import app

app(prog_name="distflash")
