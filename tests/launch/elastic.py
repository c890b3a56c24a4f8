"""Training under torchrun whose ranks, or whole agents, are killed: what tests/launch/test_elastic.py stands on.

`python -m tests.launch.elastic --count 20 [--ranks 3] [--seed 0] [--record]` kills a random rank of `torchrun --max-restarts` at a random
moment of a training run, so many times; `--resizes 3` takes one of two agents away as often, and later lets a smaller one join:
4 ranks, 2, 3. Nothing but torchrun starts the ranks again. Each time the curve is laid beside that of an undisturbed run.
"""

import argparse
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distflash.train.command import arguments
from distflash.train.config import TrainConfig
from tests.launch.programs import ROOT
from tests.launch.test_rendezvous import free_port, listeners
from tests.train.kills import curve, start

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--max-restarts=5"]
ALONE = ["--standalone"]
STEPS = 24
LONG = 384  # steps of a run that is not over before a newcomer has started
SLOW = 1e-4  # learning rate of it: what is learned by heart amplifies roundings
PATIENCE = 180.0  # seconds


def job(folder: Path, steps: int, lr: float = 3e-3) -> TrainConfig:
    """A run in folder/run with a checkpoint at every fourth step."""
    text = folder / "text"
    text.mkdir(parents=True)
    (text / "text.txt").write_text("".join(f"line {n} of a text that is learned by heart\n" for n in range(500)))
    about = {"model": "tiny", "seq_len": 240, "warmup": 2, "lr": lr, "checkpoint_every": 4, "compare_steps": 0, "validate": 0, "sample": 0}
    return TrainConfig(out=str(folder / "run"), data=(str(text),), steps=steps, **about)


def train(config: TrainConfig, ranks: int, agent: list[str], *, shared: bool = True) -> subprocess.Popen:
    """An agent that trains on `ranks` ranks of its own and writes a log; `agent` are torchrun's further options."""
    command = [*TORCHRUN, *agent, f"--nproc-per-node={ranks}", "-m", "distflash", "train", *arguments(config)]
    environ = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "DISTFLASH_HEARTBEAT": "2", "OMP_NUM_THREADS": "1"}
    environ |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": str(int(not shared))}  # torch 2.13 does not tell a newcomer of a shared store
    cores = sorted(os.sched_getaffinity(0))[:ranks]  # one a rank: then each computes with one thread, on any machine
    with log(config).open("a") as file:
        return subprocess.Popen(
            command, env=environ, stdout=file, stderr=file, start_new_session=True, preexec_fn=lambda: os.sched_setaffinity(0, cores)
        )


def log(config: TrainConfig) -> Path:
    return Path(config.out).with_name("log")


@contextmanager
def running(*args: Any, **options: Any):
    """`train`, of which nothing is left afterwards."""
    agent = train(*args, **options)
    try:
        yield agent
    finally:
        end(agent)


def end(agent: subprocess.Popen) -> None:
    """Kill an agent and its ranks, as the loss of a host would; harmless when they have ended."""
    ranks = workers(agent).values() if agent.poll() is None else ()
    for pid in (agent.pid, *ranks):
        if pid != agent.pid or agent.poll() is None:
            os.kill(pid, signal.SIGKILL)
    agent.wait()


def workers(agent: subprocess.Popen) -> dict[int, int]:
    """The process of each rank that an agent has started."""
    found = {}
    for pid in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split():
        try:
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:  # it has just ended
            continue
        found |= {int(text[5:]): int(pid) for text in variables if text.startswith(b"RANK=")}
    return found


def said(config: TrainConfig) -> str:
    return log(config).read_text()


def resumed(config: TrainConfig) -> int:
    """How often a run has found itself started again."""
    return sum("resuming after step" in line or "starting from step 0" in line for line in said(config).splitlines())


def wait(until: Callable[[], bool], config: TrainConfig, agent: subprocess.Popen) -> None:
    """AssertionError with the log if it takes too long until something is true, or the agent ends before."""
    deadline = time.monotonic() + PATIENCE
    while not until():
        assert agent.poll() is None and time.monotonic() < deadline, f"waited in vain, {agent.returncode=}:\n{said(config)[-6000:]}"
        time.sleep(0.02)


def finish(config: TrainConfig, agent: subprocess.Popen) -> list[tuple]:
    """The curve of a run that ends by itself, and well."""
    assert agent.wait(PATIENCE) == 0, said(config)[-6000:]
    return curve(config)


def undisturbed(folder: Path, ranks: int, steps: int, **more: float) -> list[tuple]:
    """The curve of a run of forked ranks: no torchrun, and nothing happens to it."""
    config = job(folder, steps, **more)
    assert [end.code for end in start(config, ranks, None)] == [0] * ranks
    return curve(config)


def kill_a_rank(folder: Path, ranks: int, steps: int, draw: random.Random) -> tuple[list[tuple], dict[str, Any]]:
    """(the curve of a run of which a random rank is killed at a random moment, what happened)."""
    config = job(folder, steps)
    victim, at = draw.randrange(ranks), draw.randrange(steps - 2)
    with running(config, ranks, ALONE) as agent:
        wait(lambda: len(workers(agent)) == ranks and len(curve(config)) >= at, config, agent)
        time.sleep(draw.uniform(0, 0.1))
        struck, rows = time.monotonic(), len(curve(config))
        os.kill(workers(agent)[victim], signal.SIGKILL)
        wait(lambda: resumed(config) == 1, config, agent)
        back = time.monotonic() - struck
        return finish(config, agent), {"victim": victim, "struck_after_step": rows, "seconds_until_it_went_on": round(back, 1)}


def resize(folder: Path, steps: int, draw: random.Random) -> tuple[list[tuple], dict[str, Any]]:
    """(the curve of a run on 2 + 2 ranks that loses one agent with its two, and is joined by one with a single rank; what happened)."""
    port, several = free_port(), ["--nnodes=1:2", "--rdzv-backend=c10d", "--rdzv-id=resize", f"--local-addr={own_address()}"]
    several += [f"--rdzv-endpoint=127.0.0.1:{port}", "--monitor-interval=0.5"]
    several += ["--rdzv-conf=last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3"]
    config, lost, joined = job(folder, steps, SLOW), draw.randrange(1, steps // 16), draw.randrange(steps // 16, steps // 8)
    with running(config, 2, several, shared=False) as first:
        wait(lambda: bool(listeners(port)), config, first)
        with running(config, 2, several, shared=False):
            wait(lambda: len(curve(config)) >= lost, config, first)
        wait(lambda: resumed(config) == 1 and len(curve(config)) >= joined, config, first)
        with running(config, 1, several, shared=False) as another:
            wait(lambda: resumed(config) == 2, config, first)
            found = finish(config, first)
            assert another.wait(PATIENCE) == 0
    sizes = re.findall(r"(\d+) dp x (\d+) cp ranks", said(config))
    return found, {"ranks": [int(dp) * int(cp) for dp, cp in sizes]}


def own_address() -> str:
    """An address of this host that others could reach."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # nothing is sent
        return probe.getsockname()[0]


def apart(found: list[tuple], truth: list[tuple]) -> float:
    """The largest relative difference of two curves' losses; infinite if they are not of the same steps and windows."""
    same = [(row[0], row[-1]) for row in found] == [(row[0], row[-1]) for row in truth]
    return max(abs(a[1] / b[1] - 1) for a, b in zip(found, truth, strict=True)) if same else float("inf")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--resizes", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true")
    asked = parser.parse_args()
    draw, kills, resizes = random.Random(asked.seed), [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        truth = undisturbed(folder / "truth", asked.ranks, asked.steps)
        for n in range(asked.count):
            found, about = kill_a_rank(folder / f"kill{n}", asked.ranks, asked.steps, draw)
            kills.append(about | {"equal": found == truth})
            print(kills[-1], flush=True)
        truth = undisturbed(folder / "four", 4, LONG, lr=SLOW)
        for n in range(asked.resizes):
            found, about = resize(folder / f"resize{n}", LONG, draw)
            resizes.append(about | {"apart": apart(found, truth)})
            print(resizes[-1], flush=True)
    if asked.record:
        from benchmarks.record import write

        write("elastic", kills, resizes=resizes, ranks=asked.ranks, steps=asked.steps, seed=asked.seed)


if __name__ == "__main__":
    main()
