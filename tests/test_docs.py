"""What the pages say is what the results and the code say: figures, Python blocks, the README's tree, the site's pages and links."""

import re
from functools import partial

import pytest
import yaml

import distflash
from benchmarks.figures import PAGES as WITH_FIGURES
from benchmarks.figures import rendered
from distflash.cost.choose import WIRES
from distflash.launch.world import shutdown
from distflash.parallel.layout import LAYOUTS
from distflash.parallel.plan import ORDERS
from distflash.testing import spmd_processes
from tests.pages import PAGES, ROOT, blocks, blocks_of, prose

ELSEWHERE = {  # pages whose blocks need more than a process: the test that runs them
    "docs/deepspeed.md": "tests/integrations/test_deepspeed_transformers.py",
    "docs/transformers.md": "tests/integrations/test_accelerate.py",
}
BEFORE = {  # what a page takes as given
    # the graphs are the same, and Inductor's compiler takes half a minute
    "docs/pytorch.md": "import functools, torch\ntorch.compile = functools.partial(torch.compile, backend='aot_eager')",
    "docs/reliability.md": "import distflash, torch\nmodel, tokens = torch.nn.Linear(8, 1), torch.randn(8)",
}
AFTER = {"README.md": "assert whole.shape == (1, 1000, 8, 64) and loss.ndim == 0"}
NOT_RUN = {  # every block that carries a reason not to be run
    "docs/migrating.md": ["ring-flash-attn's side", "yunchang's side", "DeepSpeed's side", "PyTorch's side, whose kernels need GPUs"],
}
TWO_RANKS = ("README.md", "docs/pytorch.md", "docs/quickstart.md")
GROUPS = {"docs/pytorch.md"}  # pages that make groups: on two ranks only, in processes of their own
HERE = sorted({block.page for block in blocks("python") if not block.not_run} - ELSEWHERE.keys() - GROUPS)


@pytest.mark.parametrize("page", WITH_FIGURES)
def test_figures_come_from_the_results(page):
    text = (ROOT / page).read_text()
    assert rendered(text) == text, f"{page} is out of date: run python -m benchmarks.figures"


def run(page):
    """The page's Python blocks, one after the other, in one namespace; an error shows the page's own line."""
    names = {"__name__": page}
    exec(BEFORE.get(page, ""), names)
    try:
        for block in blocks("python"):
            if block.page == page and not block.not_run:
                exec(compile("\n" * (block.line - 1) + block.code, str(ROOT / page), "exec"), names)
        exec(AFTER.get(page, ""), names)
    finally:
        shutdown()


@pytest.mark.parametrize("page", HERE)
def test_the_python_blocks_of_a_page_run(page):
    run(page)


@pytest.mark.parametrize("page", TWO_RANKS)
def test_the_same_blocks_run_on_two_ranks(page):
    spmd_processes(2, partial(run, page))


@pytest.mark.parametrize(("page", "test"), ELSEWHERE.items())
def test_other_pages_are_run_by_the_tests_of_their_integration(page, test):
    assert f'"{page}"' in (ROOT / test).read_text(), f"{test} does not run {page} any more"
    assert blocks_of((ROOT / page).read_text()), f"{page} has no block: take it out of ELSEWHERE"


def test_every_page_with_python_is_run_somewhere():
    assert {block.page for block in blocks("python")} == {*HERE, *TWO_RANKS, *ELSEWHERE}


def test_blocks_that_are_not_run_are_these():
    found = {}
    for block in blocks("python", "bash"):
        if block.not_run:
            found.setdefault(block.page, []).append(block.not_run)
    assert found == NOT_RUN


def test_no_block_escapes_by_another_name():
    for page in PAGES:
        for block in blocks_of((ROOT / page).read_text(), page):
            known = block.language in ("python", "bash", "diff", "json", "math", "")
            assert known, f"{page}:{block.line} is a block of {block.language}, which no test looks at"
            assert block.language or "import distflash" not in block.code, f"{page}:{block.line} is Python: say so"


def test_a_reason_not_to_run_is_read_and_belongs_to_its_block_alone():
    text = "<!-- not run: two GPUs -->\n```python\na\n```\ntext\n\n```python\nb\nc\n```\n"
    assert [(block.line, block.code, block.not_run) for block in blocks_of(text)] == [(3, "a\n", "two GPUs"), (8, "b\nc\n", None)]
    with pytest.raises(AssertionError, match="a fence that is no block"):
        blocks_of(" ```python\n a\n ```\n")


def test_the_new_side_of_a_diff_is_ours():
    for block in blocks("diff"):
        new = "\n".join(line[1:] for line in block.code.splitlines() if not line.startswith("-"))
        exec(compile("\n" * (block.line - 1) + new, str(ROOT / block.page), "exec"), {})


def test_the_layout_in_the_readme_is_the_layout():
    tree = re.search(r"```\n(distflash/.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    folders = ("distflash", "tests", "benchmarks", "docs", "examples")
    there = {*folders, *(path.name for folder in folders for path in (ROOT / folder).rglob("*"))}
    for line in tree.splitlines():
        names = re.match(r" *([^ ].*?)(?:  |$)", line)[1].split()
        for name in names:
            assert name.rstrip("/") in there, f"the README's tree names {name}, which does not exist"


# the site


class Lenient(yaml.SafeLoader):
    """mkdocs.yml, without the Python objects that its tags name."""


Lenient.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)


def in_navigation(entries):
    for entry in entries:
        for target in entry.values() if isinstance(entry, dict) else [entry]:
            yield from in_navigation(target) if isinstance(target, list) else [target]


def test_every_page_is_in_the_navigation_once():
    named = list(in_navigation(yaml.load((ROOT / "mkdocs.yml").read_text(), Lenient)["nav"]))
    assert sorted(named) == sorted(page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")), "see nav in mkdocs.yml"


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_leads_somewhere(page):
    text = re.sub(r"`[^`\n]*`", "", prose(page))  # f(x)[i](y) in code is no link
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (ROOT / page).parent.joinpath(target).exists(), f"{page} links to {target}, which does not exist"


def test_the_api_page_holds_the_public_names():
    named = re.findall(r"^::: distflash\.(\w+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    assert sorted(named) == sorted([*distflash.__all__, "testing"])


@pytest.mark.parametrize("known", [LAYOUTS, ORDERS, WIRES], ids=["layouts", "orders", "wires"])
def test_the_page_on_schemes_names_each(known):
    page = (ROOT / "docs/schemes.md").read_text()
    assert not [name for name in known if name not in page]


def test_the_index_names_every_example():
    page = (ROOT / "docs/index.md").read_text()
    assert not [path.name for path in (ROOT / "examples").glob("*.py") if f"](../examples/{path.name})" not in page]
