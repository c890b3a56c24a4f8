"""A job of forked processes over gloo, of which one comes to harm: what tests/launch/test_heartbeat.py stands on.

`python -m tests.launch.faults [--count 20] [--limit 1] [--ranks 3]` kills and stops a random rank at random moments, so many times
each, and prints in how many cases every other rank named it, after how long, and how long until all had ended.
"""

import argparse
import atexit
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed.tensor

import distflash
from distflash.launch import world
from distflash.parallel.wire.journal import Journal
from tests.launch.test_rendezvous import free_port

LIMIT = 1.0
RANKS = 3
SLACK = 1.0  # of a busy machine


class Ended(NamedTuple):
    """How a rank ended, its times counted from the fault."""

    code: int
    said: str  # on stderr
    named: float  # seconds until the loss of a peer was named there
    gone: float  # seconds until the process had ended


def launch(folder: Path, body, *, limit=LIMIT, ranks=RANKS, deadline=30.0) -> list[Ended]:
    """Run body(rank) in forked ranks of a job of its own, which must end by themselves."""
    few = torch.zeros(1, 2, 1, 1)
    distflash.attention(few, few, few)  # what is imported at the first call is imported once, here
    port = free_port()
    pids = [_fork(folder, rank, ranks, port, body, limit) for rank in range(ranks)]
    codes, named, gone, stop = {}, {}, {}, time.monotonic() + deadline
    while len(codes) < ranks and time.monotonic() < stop:
        for rank, pid in enumerate(pids):
            if rank not in named and "DistFlashPeerLost" in said(folder, rank):
                named[rank] = time.monotonic()
            if rank not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[rank], gone[rank] = os.waitstatus_to_exitcode(status), time.monotonic()
        time.sleep(0.01)
    hanging = [rank for rank in range(ranks) if rank not in codes]
    for rank in hanging:
        os.kill(pids[rank], signal.SIGKILL)
        os.waitpid(pids[rank], 0)
    assert not hanging, f"ranks {hanging} did not end: {[said(folder, rank) for rank in range(ranks)]}"
    fault = float((folder / "fault").read_text()) if (folder / "fault").exists() else 0.0
    return [Ended(codes[r], said(folder, r), named.get(r, fault) - fault, gone[r] - fault) for r in range(ranks)]


def said(folder, rank):
    path = folder / f"stderr{rank}"
    return path.read_text() if path.exists() else ""


def _fork(folder, rank, ranks, port, body, limit):
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        atexit._clear()
        sys.excepthook = sys.__excepthook__
        torch.set_num_threads(1)
        with open(folder / f"stderr{rank}", "w") as file:
            os.dup2(file.fileno(), 2)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        place = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks}
        os.environ |= {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        world._session = world._Session()
        try:
            distflash.init(backend="gloo", timeout=60.0, heartbeat=limit)
            body(rank)
            code = 0
        except SystemExit as error:
            code = error.code
        except BaseException:
            sys.excepthook(*sys.exc_info())
        atexit._run_exitfuncs()
    finally:
        os._exit(code)


def fault(folder):
    (folder / "fault.part").write_text(str(time.monotonic()))
    (folder / "fault.part").rename(folder / "fault")


def ring(rank, victim, strike, calls=10**9, call=5, hop=1):
    """Calls of attention on end; in one of them, in the middle of the ring, `strike` the victim."""
    at = Journal.at

    def struck(self, now, hops):
        at(self, now, hops)
        if rank == victim and self.now.call == call and now == hop:
            strike()

    Journal.at = struck
    seq = distflash.SequenceParallel().sequence(48)
    q = torch.randn(1, seq.local_length, 2, 8)
    for _ in range(calls):
        distflash.attention(q, q, q, seq, causal=True)


def strike_with(folder, number):
    def strike():
        fault(folder)
        os.kill(os.getpid(), number)

    return strike


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--limit", type=float, default=LIMIT)
    parser.add_argument("--ranks", type=int, default=RANKS)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    draw = random.Random(asked.seed)
    for number in (signal.SIGKILL, signal.SIGSTOP):
        named, gone, told = [], [], 0
        for _ in range(asked.count):
            victim, call, hop = draw.randrange(asked.ranks), draw.randrange(2, 300), draw.randrange(asked.ranks)

            with tempfile.TemporaryDirectory() as name:
                strike = strike_with(Path(name), number)
                body = partial(ring, victim=victim, strike=strike, call=call, hop=hop)
                ended = launch(Path(name), body, limit=asked.limit, ranks=asked.ranks)
            rest = [end for rank, end in enumerate(ended) if rank != victim]
            told += all(f"DistFlashPeerLost: rank {victim} (host " in end.said for end in rest)
            named.append(max(end.named for end in rest))
            gone.append(max(end.gone for end in rest))
        print(
            f"{number.name}: named by every other rank in {told} of {asked.count}; seconds until the last one had named it: "
            f"median {statistics.median(named):.2f}, worst {max(named):.2f}; until all had ended: "
            f"median {statistics.median(gone):.2f}, worst {max(gone):.2f}"
        )


if __name__ == "__main__":
    main()
