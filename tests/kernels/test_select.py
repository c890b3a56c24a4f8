"""A kernel asked for by name runs or raises; only "auto" chooses, and it can say why."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from distflash.kernels import select as module
from distflash.kernels.base import Problem
from distflash.kernels.eager import EagerKernel
from distflash.kernels.select import BY_NAME_ONLY, KERNELS, candidates, select

CPU = Problem(torch.device("cpu"), torch.float32, 4, 2, 64, 64)


@pytest.fixture
def refusing(monkeypatch):
    """A first candidate that serves fp16 only, and a second one whose module is missing."""

    class Refusing(EagerKernel):
        name = "refusing"

        def supports(self, problem):
            return None if problem.dtype == torch.float16 else f"it has no {problem.dtype}"

    module.Refusing = Refusing
    known = {"refusing": f"{module.__name__}:Refusing", "missing": "distflash.kernels.nowhere:Kernel", **KERNELS}
    monkeypatch.setattr(module, "KERNELS", known)
    module._load.cache_clear()
    select.cache_clear()
    yield Refusing
    del module.Refusing
    module._load.cache_clear()
    select.cache_clear()


def test_auto_takes_the_first_candidate_that_has_no_reason_against():
    for problem in (CPU, Problem(torch.device("cpu"), torch.float64, 1, 1, 8, 3)):
        free = [name for name, reason in candidates(problem) if reason is None]
        assert select("auto", problem).name == free[0]


def test_on_a_cpu_that_is_eager_and_the_others_say_why_not():
    reasons = dict(candidates(CPU))
    assert list(reasons) == list(KERNELS)
    assert reasons["eager"] is None and all(reasons[name] for name in reasons if name != "eager")
    assert select("auto", CPU).name == "eager"


def test_auto_never_takes_the_dense_reference_nor_another_project_s_kernel():
    assert set(BY_NAME_ONLY) == {"reference", "cudnn", "fa2", "fa3", "fa4"}
    assert "ask for it by name" in dict(candidates(CPU))["reference"]
    assert select("reference", CPU).name == "reference"


@pytest.mark.parametrize("name", ["eager", "reference"])
def test_a_kernel_asked_for_by_name_is_that_kernel(name):
    assert select(name, CPU).name == name


def test_a_deterministic_problem_gets_the_deterministic_form_of_the_kernel(refusing, monkeypatch):
    form = EagerKernel()
    monkeypatch.setattr(refusing, "deterministic", lambda self: form)
    half = Problem(CPU.device, torch.float16, 4, 2, 64, 64, deterministic=True)
    assert select("refusing", half) is form and select("auto", half) is form
    assert isinstance(select("refusing", Problem(CPU.device, torch.float16, 4, 2, 64, 64)), refusing)


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"kernel='fast' is not known: use 'auto' or one of .*'eager'"):
        select("fast", CPU)


def test_a_kernel_asked_for_that_cannot_serve_raises_its_reason_and_nothing_else_runs(refusing):
    with pytest.raises(ValueError, match=r"kernel='refusing' cannot serve this problem: it has no torch.float32; kernel='auto' would"):
        select("refusing", CPU)
    with pytest.raises(ValueError, match="kernel='missing' cannot serve this problem: not available: No module named"):
        select("missing", CPU)


def test_auto_passes_over_what_cannot_serve_and_keeps_the_reasons(refusing):
    assert select("auto", CPU).name == "eager"
    assert dict(candidates(CPU))["refusing"] == "it has no torch.float32"
    assert "not available" in dict(candidates(CPU))["missing"]
    half = Problem(CPU.device, torch.float16, 4, 2, 64, 64)
    assert isinstance(select("auto", half), refusing)


def test_importing_the_library_imports_no_kernel_and_asking_for_eager_no_other():
    code = (
        "import sys, torch, distflash; from distflash.kernels.base import Problem; from distflash.kernels.select import select\n"
        "select('eager', Problem(torch.device('cpu'), torch.float32, 4, 2, 64, 64))\n"
        "assert not [m for m in sys.modules if m.startswith(('distflash.kernels.hopper', 'distflash.kernels.triton'))]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_hopper_kernel_comes_first_and_gives_way_with_a_reason():
    assert list(KERNELS)[:2] == ["hopper", "triton"]
    assert dict(candidates(CPU))["hopper"]
