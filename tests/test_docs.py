"""What the pages say is what the results and the code say: figures, Python blocks, the source tree, the site's pages and links."""

import dataclasses
import re
import tomllib

import pytest
import yaml

import distflash
from benchmarks.figures import PAGES as WITH_FIGURES
from benchmarks.figures import rendered
from distflash.cost.choose import WIRES
from distflash.explanation import Explanation
from distflash.launch.world import shutdown
from distflash.parallel.layout import LAYOUTS
from distflash.parallel.plan import ORDERS
from tests.launch.programs import distflash as distflash_command
from tests.launch.programs import start
from tests.pages import PAGES, ROOT, blocks, blocks_of, prose
from tests.running import run

ELSEWHERE = {  # pages whose blocks need more than a process: the test that runs them
    "docs/deepspeed.md": "tests/integrations/test_deepspeed_transformers.py",
    "docs/transformers.md": "tests/integrations/test_accelerate.py",
}
NOT_RUN = {  # every block that carries a reason not to be run
    "docs/migrating.md": ["ring-flash-attn's side", "yunchang's side", "DeepSpeed's side", "PyTorch's side, whose kernels need GPUs"],
}
TWO_RANKS = ("README.md", "docs/pytorch.md", "docs/quickstart.md")
GROUPS = {"docs/pytorch.md"}  # pages that make groups: on two ranks only
METHODS = {  # named to mkdocstrings
    "sp": ("sequence", "seed_dropout", "single", "device"),
    "seq": ("shard", "unshard", "positions", "indices"),
}
HERE = sorted({block.page for block in blocks("python") if not block.not_run} - ELSEWHERE.keys() - GROUPS)


@pytest.mark.parametrize("page", WITH_FIGURES)
def test_figures_come_from_the_results(page):
    text = (ROOT / page).read_text()
    assert rendered(text) == text, f"{page} is out of date: run python -m benchmarks.figures"


@pytest.mark.parametrize("page", HERE)
def test_the_python_blocks_of_a_page_run(page):
    try:
        run(page)
    finally:
        shutdown()


def test_the_same_blocks_run_on_two_ranks_as_a_user_starts_them(tmp_path):
    module = ("-m", "tests.running")  # real processes: forked ones would share the state of random numbers
    done = start(distflash_command("run", "-n", "2", *module, *TWO_RANKS), tmp_path, timeout=100)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if "holds on" in line] == [f"{page} holds on 2 ranks" for page in TWO_RANKS]


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


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_the_requirements_are_those_of_the_package(page):
    text = (ROOT / page).read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (torch_needed,) = [needed for needed in project["dependencies"] if needed.startswith("torch")]
    assert f"Python {project['requires-python'].removeprefix('>=')}" in text and f"PyTorch {torch_needed.removeprefix('torch>=')}" in text
    known = re.search(r"_KNOWN = \(\((\d+), (\d+)\), \((\d+), (\d+)\)\)", (ROOT / "distflash/kernels/hopper/compat.py").read_text())
    assert known and "Triton {}.{} to {}.{}".format(*known.groups()) in text


def test_the_source_tree_is_the_tree():
    tree = re.search(r"```\n(distflash/.*?)```", (ROOT / "docs/architecture.md").read_text(), re.DOTALL)[1]
    folders = ("distflash", "tests", "benchmarks", "docs", "examples")
    there = {*folders, *(path.name for folder in folders for path in (ROOT / folder).rglob("*"))}
    for line in tree.splitlines():
        names = re.match(r" *([^ ].*?)(?:  |$)", line)[1].split()
        for name in names:
            assert name.rstrip("/") in there, f"the tree of docs/architecture.md names {name}, which does not exist"


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


def anchors(page):
    """The anchors of a page's headings, as MkDocs and GitHub make them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_anchor_is_a_heading(page):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", prose(page)):
        if "://" not in target:
            other = (ROOT / page).parent.joinpath(target).resolve().relative_to(ROOT) if target else page
            assert anchor in anchors(str(other)), f"{page} links to #{anchor} of {other}, which has no such heading"


def test_the_api_page_holds_the_public_names():
    named = re.findall(r"^::: distflash\.(\w+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    assert sorted(named) == sorted([*distflash.__all__, "testing"])


def test_the_api_page_holds_every_attribute_that_pages_use_and_each_exists():
    api = (ROOT / "docs/api.md").read_text()
    sp = distflash.SequenceParallel.single("cpu")
    there = {"sp": sp, "seq": sp.sequence(length=8)}
    listed = set(re.findall(r"`(sp|seq)\.(\w+)`", api))
    assert not [f"{kind}.{name}" for kind, name in listed if not hasattr(there[kind], name)]
    listed |= {("told", field.name) for field in dataclasses.fields(Explanation) if f"`{field.name}`" in api}
    listed |= {(kind, name) for kind, names in METHODS.items() for name in names}
    used = {found for block in blocks("python") if not block.not_run for found in re.findall(r"\b(seq|sp|told)\.(\w+)", block.code)}
    used |= {("told", field.name) for field in dataclasses.fields(Explanation)}
    assert not used - listed, "add them to docs/api.md"


@pytest.mark.parametrize("known", [LAYOUTS, ORDERS, WIRES], ids=["layouts", "orders", "wires"])
def test_the_page_on_schemes_names_each(known):
    page = (ROOT / "docs/schemes.md").read_text()
    assert not [name for name in known if name not in page]


def test_the_index_names_every_example():
    page = (ROOT / "docs/index.md").read_text()
    assert not [path.name for path in (ROOT / "examples").glob("*.py") if f"](../examples/{path.name})" not in page]
