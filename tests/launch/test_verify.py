"""`distflash verify`: it passes what is right, fails what is wrong, and ignores no option."""

import json
from types import SimpleNamespace

import pytest
import typer
from typer.testing import CliRunner

import distflash
from distflash.kernels import eager
from distflash.launch import verify as module
from distflash.parallel.plan import ORDERS

SMALL = ["--ranks", "1,2", "--length", "24", "--kernel", "eager"]


@pytest.fixture
def verify(monkeypatch):
    """Run the command on one case, in this process."""
    monkeypatch.setattr(module, "CPU_CASES", (module.Case("float64", 8, causal=True, documents=True),))
    monkeypatch.setenv("COLUMNS", "200")
    app = typer.Typer()
    app.command()(module.verify)
    return lambda *words: CliRunner().invoke(app, words)


def test_right_results_pass_and_every_scheme_is_tried(verify):
    result = verify(*SMALL)
    assert result.exit_code == 0, result.output
    assert "60 comparisons, 0 out of budget" in result.output  # 4 layouts x 3 orders x (P, U) of (1, 1), and (2, 1), (2, 2) over both wires


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_a_wrong_kernel_gives_exit_code_1_and_is_named(verify, monkeypatch, name):
    right = getattr(eager.EagerKernel, name)

    def wrong(self, *args, **more):
        found = right(self, *args, **more)
        return found._replace(out=found.out * 1.01) if name == "forward" else (found[0] * 1.01, *found[1:])

    monkeypatch.setattr(eager.EagerKernel, name, wrong)
    result = verify(*SMALL)
    assert result.exit_code == 1
    assert "wrong eager" in result.output and ("out:" if name == "forward" else "dq:") in result.output


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (["--kernel", "cuda"], ["'cuda' is not known", "'eager'"]),
        (["--kernel", "triton"], ["triton cannot serve", "CUDA and ROCm"]),
        (["--ranks", "two"], ["--ranks", "'two'", "1,2,4"]),
        (["--ranks", "0"], ["--ranks", "'0'"]),
        (["--ranks", "2", "--nproc", "2"], ["--ranks", "--nproc"]),
        (["--record", "found.json"], ["--record", "--fuzz"]),
        (["--jobs", "2"], ["--jobs 2", "--fuzz"]),
        (["--seconds", "9"], ["--seconds 9", "--fuzz"]),
        (["--fuzz", "5", "--jobs", "3", "--nproc", "2"], ["--jobs 3", "2 processes"]),
        (["--fuzz", "5", "--seconds", "3", "--nproc", "2"], ["--seconds 3", "2 processes"]),
    ],
)
def test_what_cannot_be_done_is_said(verify, words, fragments):
    result = verify(*words)
    assert result.exit_code != 0
    assert all(fragment in result.output for fragment in fragments), result.output


def test_more_ranks_than_heads_can_be_tried(verify):
    result = verify("--ranks", "9", "--length", "24", "--kernel", "eager")
    assert result.exit_code == 0 and ", 0 out of budget" in result.output, result.output
    assert {scheme.ulysses for scheme in module.schemes(["eager"], [16], distflash.SequenceParallel())} == {1, 2, 4, 8}


def test_a_double_ring_that_the_hosts_cannot_form_is_not_tried(verify):
    """By threads on one host there always is one; by processes the hosts say."""
    for spread, refused in ((None, set()), ("2 runs of 1 or 2 on 2 hosts", {"double_ring"})):
        sp = SimpleNamespace(size=3, direct=False, wire=SimpleNamespace(size=3, per_node=1, unequal=spread))
        assert {scheme.order for scheme in module.schemes(["eager"], [3], sp)} == {*ORDERS} - refused
    result = verify("--ranks", "6", "--length", "24", "--kernel", "eager")
    assert result.exit_code == 0 and ", 0 out of budget" in result.output, result.output


def test_random_problems_are_tried_instead_from_the_seed_on_and_recorded(verify, tmp_path):
    result = verify("--fuzz", "3", "--seed", "5", "--ranks", "2", "--length", "20", "--record", str(tmp_path / "runs.json"))
    assert result.exit_code == 0, result.output
    assert "3 cases, seeds 5 to 7" in result.output and ", 0 mismatches" in result.output
    (run,) = json.loads((tmp_path / "runs.json").read_text())["runs"]
    assert (run["cases"], run["first_seed"], run["options"]) == (3, 5, "--ranks 2 --length 20")


def test_a_mismatch_among_random_problems_gives_exit_code_1(verify, monkeypatch):
    right = eager.EagerKernel.forward
    monkeypatch.setattr(eager.EagerKernel, "forward", lambda self, *a, **b: (x := right(self, *a, **b))._replace(out=1.01 * x.out))
    result = verify("--fuzz", "4", "--kernel", "eager")
    assert result.exit_code == 1 and "distflash verify --fuzz 1 --seed" in result.output
