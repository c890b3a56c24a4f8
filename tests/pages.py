"""What the README and the docs hold: pages, code blocks, commands, links."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "SECURITY.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")))
# a block that no test can run says why, in a comment on the line before it
FENCE = re.compile(r"^(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block of a page; `line` is that of its first line of code."""

    page: str
    line: int
    language: str
    code: str
    not_run: str | None


def blocks_of(text: str, page: str = "") -> list[Block]:
    """Every fenced block. A fence that is indented, or that does not end, is an error: it would escape the tests."""
    found = []
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start("code")) + 1
        found.append(Block(page, line, match["language"], match["code"], match["reason"]))
    assert text.count("```") == 2 * len(found), f"{page} has a fence that is no block: start and end it at the margin"
    return found


def blocks(*languages: str) -> list[Block]:
    """Blocks of all pages in these languages."""
    return [block for page in PAGES for block in blocks_of((ROOT / page).read_text(), page) if block.language in languages]


def prose(page: str) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", (ROOT / page).read_text())
