"""launch/checkout.py: the commit that runs, and whether it is what runs."""

import subprocess

import pytest

from distflash.launch import checkout


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A checkout with one commit, a tag behind it, and a result."""
    monkeypatch.setattr(checkout, "ROOT", tmp_path)
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    for name in ("code.py", "benchmarks/results/some.json"):
        (tmp_path / name).write_text("1")
    git(tmp_path, "init", "-q")
    for words in (["commit", "-qm", "first", "--allow-empty"], ["tag", "-a", "v1.0", "-m", "x"], ["add", "."], ["commit", "-qm", "second"]):
        git(tmp_path, *who, *words)
    return tmp_path


def git(root, *words):
    return subprocess.run(["git", *words], cwd=root, check=True, capture_output=True, text=True).stdout.strip()


def test_a_clean_tree_is_its_commit_whatever_is_tagged(root):
    whole = git(root, "rev-parse", "HEAD")
    assert checkout.commit() == whole and checkout.commit(12) == whole[:12]


@pytest.mark.parametrize("name", ["code.py", "new.py"])
def test_a_tree_with_changes_or_new_files_is_dirty(root, name):
    (root / name).write_text("2")
    assert checkout.commit(12) == git(root, "rev-parse", "HEAD")[:12] + "-dirty"


def test_results_that_were_written_since_do_not_make_it_dirty(root):
    (root / "benchmarks/results/some.json").write_text("2")
    (root / "benchmarks/results/other.json").write_text("2")
    assert checkout.commit(12) == git(root, "rev-parse", "HEAD")[:12]


def test_an_archive_has_no_commit_also_inside_of_another_repository(root, monkeypatch):
    inside = root / "archive"
    inside.mkdir()
    monkeypatch.setattr(checkout, "ROOT", inside)
    assert checkout.commit() is None


def test_a_checkout_that_git_cannot_read_has_none(root, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert checkout.commit() is None
    monkeypatch.undo()
    monkeypatch.setattr(checkout, "ROOT", root)
    (root / ".git/HEAD").write_text("ref: refs/heads/gone")
    assert checkout.commit() is None
