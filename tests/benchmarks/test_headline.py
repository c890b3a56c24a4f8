"""benchmarks/headline.py: what the README says of peers is what was measured of them."""

import pytest

from benchmarks import across, headline
from benchmarks.record import load


def test_a_pass_names_the_peers_that_have_a_figure_in_it_and_no_others():
    told = dict(line.removeprefix("- ").split(": ") for line in headline._peers(load(headline.KERNELS)["rows"]).splitlines())
    assert "FlashAttention-3" in told["forward, dense"] and "FlashAttention-3" not in told["backward, dense"]
    assert told["backward, documents"] == "FlashAttention-4, FlashAttention-2"


def test_what_was_slower_is_said():
    ratios = [cell["ratio"] for cell in load(headline.KERNELS)["cells"] if cell["ratio"]]
    behind = sum(ratio < 1 for ratio in ratios)
    assert f"A peer is faster in {behind} of {len(ratios)} cells" in headline.kernels()
    assert headline.slower_kernels().count("(FlashAttention") + headline.slower_kernels().count("(cuDNN)") == behind


def test_rows_of_peers_as_shipped_are_shown():
    shown = across.ring()
    assert shown.count("FlashAttention-2 (as shipped)") == sum("[fa2]" in r["how"] for r in load(headline.RINGS)["rows"])


def test_targets_that_never_ran_are_those_that_are_compiled_for_beside_hopper():
    pytest.importorskip("triton")
    from distflash.kernels.compile_check import TARGETS

    assert {*headline.COMPILED_ONLY, "sm_90"} == TARGETS.keys()


def test_a_training_run_says_with_which_kernel_it_was_made():
    head, _, *rows = across.train().partition("\n\n")[0].splitlines()
    column = [cell.strip() for cell in head.split("|")].index("kernel")
    assert {row.split("|")[column].strip() for row in rows} == {r["kernel"] for r in load("train_2xh200")["rows"]}
