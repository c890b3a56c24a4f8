"""Every integration on two GPUs, a process each over NCCL, and the examples as a user starts them."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.launch.programs import distflash
from tests.launch.test_mpi import mpirun

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


def run(command):
    """What a program printed that is started from the repository with two GPUs."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=580, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    return done.stdout


def two_ranks(example, *arguments):
    return [*distflash("run", "-n", "2"), EXAMPLES / example, *arguments]


def needs(*libraries):
    for library in libraries:
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"{library} is not installed")


def assert_falls(losses, steps):
    found = [float(x) for x in losses]
    assert len(found) == steps and found[-1] < found[0], found


def test_every_integration_is_one_process():
    assert "\nOK" in run([*distflash("run", "-n", "2"), "-m", "tests.gpu.integrations"])


def test_hello():
    told = re.findall(r"rank (\d) of 2 on cuda:(\d), started by torchrun: the ranks add up to 1", run(two_ranks("hello.py")))
    assert sorted(told) == [("0", "0"), ("1", "1")]


@pytest.mark.parametrize("options", [(), ("--compile",)], ids=["eager", "compiled"])
def test_fsdp2_learns(options):
    assert_falls(re.findall(r"loss (\S+)", run(two_ranks("fsdp2.py", "--steps", "6", *options))), 6)


LAUNCHERS = {
    "distflash run": lambda script, *words: two_ranks(script.name, *words),
    "deepspeed": lambda script, *words: [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", script, *words],
    "mpirun": lambda script, *words: mpirun(str(script), *words),
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_zero3_learns(launcher):
    needs("deepspeed", "hjson")
    told = run(LAUNCHERS[launcher](EXAMPLES / "deepspeed_zero3.py", "--steps", "6"))
    assert_falls(re.findall(r"^step \d loss (\S+)$", told, re.MULTILINE), 6)


def test_the_trainer_learns():
    needs("transformers", "accelerate")
    ((before, after),) = re.findall(r"2 ranks, cuda: .* (\d\.\d+), after training (\d\.\d+)", run(two_ranks("hf_sft.py")))
    assert float(after) < float(before) - 1.5


def test_under_mpirun_ranks_get_the_gradient_of_one_process():
    needs("mpi4py")
    told = run(mpirun(str(EXAMPLES / "mpi.py")))
    assert sorted(re.findall(r"rank (\d) of 2 on cuda:(\d): 552 of 1104 tokens", told)) == [("0", "0"), ("1", "1")]
    ((out, gradient),) = re.findall(r"out within (\S+), gradient within (\S+)", told)
    assert max(float(out), float(gradient)) < 1e-4  # in fp32


def test_a_long_context_is_exact():
    told = run([sys.executable, EXAMPLES / "long_context.py"])
    assert told.startswith("131,072 tokens on cuda")
    shares = dict(re.findall(r"^(\S.*\S) +(\d+\.\d+)% of all pairs", told, re.MULTILINE))
    assert float(shares["causal"]) >= 50 > float(shares["4 sinks and a window"])
    out, lse, merged = (float(x) for x in re.findall(r"within (\S+?)[, \n]", told))
    assert max(out, merged) < 1e-2 and lse < 1e-3  # bf16 of values below 1, and fp32
