"""The suite itself is tested: every seeded bug must make a test fail."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

RUNNER = Path(__file__).with_name("mutants.py")


@pytest.mark.timeout(300)
def test_every_seeded_bug_is_caught():
    done = subprocess.run([sys.executable, str(RUNNER)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "mutants killed" in done.stdout
