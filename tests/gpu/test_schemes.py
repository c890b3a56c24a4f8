"""Every scheme on this machine's GPUs: threads that share one, and one process a GPU over NCCL."""

import subprocess
import sys

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]


def verify(*options):
    done = subprocess.run([sys.executable, "-m", "distflash", "verify", *options], capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert ", 0 out of budget" in done.stdout


def test_every_scheme_as_threads_of_one_gpu():
    verify()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_every_scheme_over_nccl():
    verify("--nproc", str(torch.cuda.device_count()))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_copies_between_gpus():
    command = [sys.executable, "-m", "distflash", "run", "-n", str(torch.cuda.device_count()), "-m", "tests.gpu.copies"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "OK" in done.stdout, done.stdout[-2000:] + done.stderr[-4000:]
