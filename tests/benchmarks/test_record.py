"""Results: of which commit and day they are, what is kept of one that is added to, and what may not be joined."""

import json
import math
from datetime import UTC, datetime

import pytest

from benchmarks import across, figures, io_model, record
from benchmarks.paper import tables
from benchmarks.record import RESULTS, held, write
from distflash.launch.checkout import commit
from tests.pages import ROOT

NEW = {"commit": "0123456789ab-dirty", "date": "2026-11-24T10:00:00+00:00"}
OLD = {"commit": None, "date": None}


def test_a_result_is_added_to_only_where_it_was_measured(tmp_path, monkeypatch):
    path = tmp_path / "some.json"
    monkeypatch.setattr("benchmarks.record.versions", lambda: {"device": "one"})
    assert held(path) == {"rows": []}
    assert write("some", [{"cell": "a"}], tmp_path, seed=7) == path
    assert held(path)["rows"] == [{"cell": "a"}] and held(path)["seed"] == 7
    monkeypatch.setattr("benchmarks.record.versions", lambda: {"device": "another"})
    with pytest.raises(ValueError, match=r"some\.json was measured with .*one.*, this is .*another.*--out"):
        held(path)


def test_a_result_says_of_which_commit_it_is_and_when_it_was_measured(tmp_path):
    found = json.loads(write("some", [], tmp_path).read_text())
    assert (found["commit"] or "").removesuffix("-dirty") == (commit(12) or "").removesuffix("-dirty")
    age = datetime.now(UTC) - datetime.fromisoformat(found["date"])
    assert 0 <= age.total_seconds() < 86400 and found["date"].endswith("+00:00")
    assert "earlier" not in found


def test_a_figure_that_json_has_no_number_for_is_null(tmp_path):
    path = write("some", [{"ratios": [1.5, math.inf], "of": {"error": math.nan}}], tmp_path, worst=-math.inf)
    found = json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert found["rows"] == [{"ratios": [1.5, None], "of": {"error": None}}] and found["worst"] is None


def test_rows_that_are_kept_keep_the_commit_and_the_date_of_their_run(tmp_path, monkeypatch):
    def run(run, names, append):
        monkeypatch.setattr(record, "RUN", run)
        monkeypatch.setattr(record, "_added_to", {})
        rows = held(tmp_path / "some.json")["rows"] if append else []
        for name in names:  # written after each cell, as some programs do
            rows = [*rows, {"cell": name}]
            path = write("some", rows, tmp_path)
        return json.loads(path.read_text())

    other = {"commit": "ba9876543210", "date": "2026-11-25T10:00:00+00:00"}
    (tmp_path / "some.json").write_text(json.dumps({"versions": record.versions(), "rows": [{"cell": "old"}]}))
    found = run(NEW, ["a", "b"], append=True)
    assert found["commit"] == NEW["commit"] and found["date"] == NEW["date"] and found["earlier"] == [OLD]
    assert run(other, ["c"], append=True)["earlier"] == [OLD, NEW]
    assert "earlier" not in run(other, ["a"], append=False)  # the same row, but measured again


@pytest.fixture(scope="module")
def dated(tmp_path_factory):
    """The committed results as they would have been written now."""
    folder = tmp_path_factory.mktemp("results")
    (folder / "history").mkdir()
    for path in (*RESULTS.glob("*.json"), *(RESULTS / "history").glob("*.json")):
        found = json.loads(path.read_text())
        if "versions" in found:
            found |= NEW | {"earlier": [OLD]}
        (folder / path.relative_to(RESULTS)).write_text(json.dumps(found))
    return folder


@pytest.mark.parametrize("page", [*figures.PAGES, io_model.PAGE])
def test_pages_are_the_same_with_and_without_commit_and_date(page, dated, monkeypatch):
    pages = io_model if page == io_model.PAGE else figures
    text = (ROOT / page).read_text()
    without = pages.rendered(text)
    for module in (record, figures, across, tables):
        monkeypatch.setattr(module, "RESULTS", dated)
    assert pages.rendered(text) == without
