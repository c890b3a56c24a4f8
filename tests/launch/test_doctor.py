"""launch/doctor.py: facts, verdict, text and JSON."""

import copy
import json

import pytest
from typer.testing import CliRunner

import distflash
from distflash.cost.devices import find
from distflash.launch import doctor, measure
from distflash.launch.cli import app
from distflash.testing import spmd_processes

HEALTHY = {
    "versions": {"torch": "2.13.0+cu130", "cuda": "13.0", "hip": None, "triton": "3.7.1", "nccl": "2.28.3", "cudnn": "91300"},
    "driver": "/dev/nvidia0",
    "gpus": [{"index": i, "name": "GPU", "memory_gib": 80.0, "capability": "9.0", "processors": 132} for i in range(2)],
    "peer_access": [[True, True], [True, True]],
    "nvlink": None,
    "mpi": {"mpirun": None, "library": None, "error": "mpi4py is not installed"},
    "packages": dict.fromkeys(doctor.PACKAGES, "1.0"),
    "kernels": [{"device": "cuda", "dtype": "bfloat16", "chosen": "triton", "passed_over": {"hopper": "needs compute capability 9.0"}}],
    "wire": {"chosen": "p2p over NCCL", "why": "2 CUDA devices, one rank each"},
}


def changed(**changes):
    facts = copy.deepcopy(HEALTHY)
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = facts
        for parent in parents:
            place = place[parent]
        place[last] = value
    return facts


def test_a_healthy_machine_has_neither_problems_nor_advice():
    assert doctor.judge(HEALTHY) == ([], [])


@pytest.mark.parametrize(
    ("facts", "cure"),
    [
        (changed(versions__cuda=None, versions__torch="2.13.0+cpu", gpus=[], peer_access=[]), "install a CUDA build of torch"),
        (changed(gpus=[], peer_access=[]), "check CUDA_VISIBLE_DEVICES"),
        (changed(versions__triton=None), "pip install triton"),
        (changed(versions__nccl=None), "no NCCL"),
        (changed(versions__torch="2.8.1"), "2.9 or newer"),
        (changed(kernels=[{"device": "cpu", "dtype": "float32", "chosen": None, "passed_over": {}}]), "no kernel serves float32 on cpu"),
    ],
)
def test_what_is_broken_is_told_with_its_cure(facts, cure):
    problems, _ = doctor.judge(facts)
    assert len(problems) == 1 and cure in problems[0]


@pytest.mark.parametrize(
    ("facts", "hint"),
    [
        (changed(driver=None, gpus=[], peer_access=[], versions__nccl=None), "everything runs on the CPU"),
        (changed(peer_access=[[True, False], [False, True]]), "cannot reach each other's memory"),
        (changed(mpi__mpirun="mpirun (Open MPI) 5.0"), r"pip install 'distflash[mpi]'"),
        (changed(packages__safetensors=None), r"pip install 'distflash[train]'"),
    ],
)
def test_what_could_be_better_is_advice_only(facts, hint):
    problems, advice = doctor.judge(facts)
    assert problems == [] and len(advice) == 1 and hint in advice[0]


def test_text_and_json_tell_the_same_and_the_exit_code_is_the_verdict(monkeypatch):
    cli = CliRunner()
    told = cli.invoke(app, ["doctor", "--json"])
    facts = json.loads(told.stdout)
    assert told.exit_code == (0 if facts["usable"] else 1)
    assert facts["kernels"] and all(kernel["chosen"] for kernel in facts["kernels"])

    monkeypatch.setattr(doctor, "examine", lambda: changed(versions__nccl=None))
    text = cli.invoke(app, ["doctor"])
    assert text.exit_code == 1
    for expected in ("2.13.0+cu130", "GPU 1", "not hopper: needs compute capability 9.0", "broken: several GPUs", "p2p over NCCL"):
        assert expected in text.stdout
    assert json.loads(cli.invoke(app, ["doctor", "--json"]).stdout)["problems"] == doctor.judge(changed(versions__nccl=None))[0]


SMALL = measure.Sizes(64, 1 << 16, (64, 128), 2, (16,), (1 << 10, 1 << 16), repeats=2)


def test_what_is_measured_is_a_device_that_plan_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "CPU", SMALL)
    path = tmp_path / "here.json"
    told = CliRunner().invoke(app, ["doctor", "--json", "--measure", str(path)])
    assert told.exit_code == 0, told.output
    assert json.loads(told.stdout)["usable"] and f"wrote {path}" in " ".join(told.stderr.split())
    device = find(str(path))
    assert device.itemsize == 4 and device.matmul > 1e7 and device.hbm > 1e7 and device.memory > 1e8 and 0 < device.launch < 1e-2
    for table in device.kernels.values():
        assert table[16].flops > 1e6 and table[16].start >= 0
    planned = CliRunner().invoke(app, ["plan", "--model", "gpt-2", "--seq", "4k", "--gpus", "2", "--device", str(path), "--json"])
    assert planned.exit_code == 0 and json.loads(planned.stdout)["basis"].startswith("measured by distflash doctor")
    assert "writes JSON" in CliRunner().invoke(app, ["doctor", "--measure", "here.txt"]).output


def test_several_ranks_measure_the_links_between_them():
    links = spmd_processes(2, lambda: measure.measure(distflash.init(), SMALL).wires["p2p"].points)
    assert links[0] == links[1], "ranks agree on the slowest"
    sizes, seconds = zip(*links[0], strict=True)
    assert sizes == (0, 1 << 10, 1 << 16) and 0 < seconds[0] <= seconds[1] <= seconds[2]
