"""`python -m benchmarks` runs what docs/benchmarks.md shows."""

import re

from benchmarks.__main__ import programs
from tests.pages import ROOT


def test_every_benchmark_of_the_page_is_run():
    named = set(re.findall(r"-m (benchmarks\.bench_\w+)", (ROOT / "docs/benchmarks.md").read_text()))
    run = {word for program in programs(2, hopper=True) for word in program}
    assert len(named) > 6 and named <= run


def test_one_gpu_runs_what_needs_no_second():
    run = [" ".join(program) for program in programs(1, hopper=False)]
    assert not [program for program in run if "bench_kernel" in program or "bench_ring" in program or "bench_long" in program]
    assert any("bench_train" in program for program in run) and run[-1].endswith("benchmarks.figures")
