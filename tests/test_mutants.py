"""The suite itself is tested: seeded bugs must make a test fail. `make mutants` tries all of them, this file some of each run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import mutants

RUNNER = Path(__file__).with_name("mutants.py")
SOME = [*mutants.MUTANTS][::6]


def test_every_seeded_bug_has_its_place_and_its_test():
    assert len(mutants.MUTANTS) >= 30
    for name, mutant in mutants.MUTANTS.items():
        text = (mutants.ROOT / "distflash" / mutant.file).read_text()
        assert text.count(mutant.old) == 1, f"{name}: {mutant.file} holds {mutant.old!r} {text.count(mutant.old)} times"
        file, _, test = mutant.test.partition("::")
        assert f"def {test.partition('[')[0]}(" in (mutants.ROOT / "tests" / file).read_text() or not test, f"{name}: no {mutant.test}"


@pytest.mark.timeout(300)
def test_some_of_the_seeded_bugs_are_caught():
    done = subprocess.run([sys.executable, str(RUNNER), *SOME], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert f"{len(SOME)} of {len(SOME)} mutants killed" in done.stdout
