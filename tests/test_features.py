"""docs/features.md is what the features do: equal to the oracle, or refused with a reason."""

from __future__ import annotations

import pytest

from tests import features


@pytest.mark.timeout(300)
def test_every_feature_equals_the_oracle_or_raises_under_every_scheme_and_the_page_says_which():
    pytest.importorskip("triton")
    assert features.PAGE.read_text() == features.page(), "docs/features.md is out of date: run python -m tests.features"


def test_a_wrong_result_is_no_refusal(monkeypatch):
    truth_of = features.truth_of
    monkeypatch.setattr(features, "truth_of", lambda *given: (true := truth_of(*given))._replace(dq=1.01 * true.dq))
    with pytest.raises(AssertionError, match="dq"):
        features.run("causal", "zigzag")


def test_a_call_that_is_refused_is_shown_with_its_reason(monkeypatch):
    monkeypatch.setitem(features.FEATURES, "too few heads", features.Feature({}, {"heads": 1, "kv_heads": 1}))
    assert "ulysses=2 needs at least as many query heads" in features.run("too few heads", "Ulysses")
