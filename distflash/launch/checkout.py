"""Which commit of this project runs: what a result is recorded with."""

from __future__ import annotations

from pathlib import Path

from distflash.launch.doctor import output

ROOT = Path(__file__).parents[2]
RESULTS = "benchmarks/results"  # recording one result leaves the code of the next as it was


def commit(digits: int = 40) -> str | None:
    """The first digits of the commit, with -dirty if other files than results are not as it has them; None outside of a checkout."""
    if not (ROOT / ".git").exists():  # an archive, or an installation: a repository around it is not ours
        return None
    git = ["git", "-C", str(ROOT), "--no-optional-locks"]  # several ranks ask at the same time
    found = output([*git, "rev-parse", f"--short={digits}", "HEAD"])
    changes = output([*git, "status", "--porcelain", "--", ".", f":(exclude){RESULTS}"])
    return found and found + ("" if changes == "" else "-dirty")  # None: nobody says that it is clean
