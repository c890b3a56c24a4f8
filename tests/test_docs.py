"""What the pages say is what the results and the code say."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.figures import PAGES, rendered

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("page", PAGES)
def test_figures_come_from_the_results(page):
    text = (ROOT / page).read_text()
    assert rendered(text) == text, f"{page} is out of date: run python -m benchmarks.figures"


def test_the_ten_lines_of_the_readme_run():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    code += "\nassert whole.shape == (1, 1000, 8, 64) and loss.ndim == 0\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", ["docs/migrating.md"])
def test_the_python_blocks_of_a_page_run(page):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert blocks, f"{page} has no block"
    done = subprocess.run([sys.executable, "-c", "\n".join(blocks)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def test_the_layout_in_the_readme_is_the_layout():
    tree = re.search(r"```\n(distflash/.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    folders = ("distflash", "tests", "benchmarks", "docs", "examples")
    there = {*folders, *(path.name for folder in folders for path in (ROOT / folder).rglob("*"))}
    for line in tree.splitlines():
        names = re.match(r" *([^ ].*?)(?:  |$)", line)[1].split()
        for name in names:
            assert name.rstrip("/") in there, f"the README's tree names {name}, which does not exist"
