"""`make sanitize` takes what compute-sanitizer says at its word: what is not known to be none is a finding."""

import pytest

from tests.gpu import sanitize

KNOWN_RACE = """========= COMPUTE-SANITIZER
========= Error: Race reported between Read access at forward_kernel+0x120 in forward.py:432
=========     and Write access at forward_kernel+0xc080 in forward.py:432 [42 hazards]
=========     and Write access at forward_kernel+0x16b40 in forward.py:460 [33 hazards]
=========
========= Error: Race reported between Read access at backward_kernel+0xf0 in backward.py:492
=========     and Write access at backward_kernel+0x9f40 in backward.py:492 [20 hazards]
========= \n1 passed in 9.19s
========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)
"""
OUTSIDE = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 2 bytes
=========     at dq_kernel+0x3a0 in dq.py:162
=========     by thread (1,0,0) in block (0,0,0)
=========
========= Invalid __global__ write of size 4 bytes
=========     at void at::native::elementwise_kernel+0x70
=========     by thread (1,0,0) in block (0,0,0)
=========
========= ERROR SUMMARY: 2 errors
"""


def test_what_is_known_passes_and_the_same_elsewhere_does_not():
    assert sanitize.verdict("racecheck", KNOWN_RACE) == (2, [])
    known, (new,) = sanitize.verdict("racecheck", KNOWN_RACE.replace("forward_kernel+0x120", "forward_kernel+0xa120"))
    assert known == 1 and new.startswith("Error: Race reported between Read access at forward_kernel+0xa120")
    assert len(sanitize.verdict("memcheck", KNOWN_RACE)[1]) == 2


def test_a_finding_in_our_kernels_is_told_whole_and_torchs_are_not_ours():
    known, (new,) = sanitize.verdict("memcheck", OUTSIDE)
    assert known == 0 and new.splitlines()[0] == "Invalid __global__ read of size 2 bytes" and "dq.py:162" in new


@pytest.mark.parametrize("tool", sanitize.TOOLS)
def test_no_finding_passes_only_with_a_summary_and_none_may_be_left_out(tool):
    assert sanitize.verdict(tool, "========= COMPUTE-SANITIZER\n3 passed\n========= ERROR SUMMARY: 0 errors\n") == (0, [])
    assert "did not end" in sanitize.verdict(tool, "Segmentation fault")[1][0]
    assert "raise --print-limit" in sanitize.verdict(tool, "========= ERROR SUMMARY: 7 errors\n")[1][0]


def test_the_tests_that_are_named_exist():
    text = (sanitize.__file__ or "").replace("sanitize.py", "test_kernels.py")
    with open(text) as file:
        source = file.read()
    for words in sanitize.PARTS:
        assert f"{words.split()[0]}_" in source, words


def test_initcheck_runs_what_it_can_judge_and_the_other_tools_run_all():
    assert sanitize.parts("memcheck") == sanitize.parts("racecheck") == sanitize.parts(None) == sanitize.PARTS
    assert sum("triton" in part for part in sanitize.parts("initcheck")) == len(sanitize.TESTS)
    assert [part for part in sanitize.parts("initcheck") if "hopper" in part] == ["nothing and hopper"]
