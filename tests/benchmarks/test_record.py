"""Results that are added to: what is kept, and what may not be joined."""

import pytest

from benchmarks.record import held, write


def test_a_result_is_added_to_only_where_it_was_measured(tmp_path, monkeypatch):
    path = tmp_path / "some.json"
    monkeypatch.setattr("benchmarks.record.versions", lambda: {"device": "one"})
    assert held(path) == {"rows": []}
    assert write("some", [{"cell": "a"}], tmp_path, seed=7) == path
    assert held(path)["rows"] == [{"cell": "a"}] and held(path)["seed"] == 7
    monkeypatch.setattr("benchmarks.record.versions", lambda: {"device": "another"})
    with pytest.raises(ValueError, match=r"some\.json was measured with .*one.*, this is .*another.*--out"):
        held(path)
