"""A job of forked processes over gloo, of which one comes to harm: what tests/launch/test_heartbeat.py stands on.

`python -m tests.launch.faults [--count 20] [--limit 1] [--ranks 3]` kills and stops a random rank at random moments, so many times
each, and prints in how many cases every other rank named it, after how long, and how long until all had ended; and what vigilance
costs: comparing notes, and the longest silence of a thread beside a compilation. `--record` writes it to benchmarks/results.
"""

import argparse
import atexit
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.tensor

import distflash
from distflash.launch import world
from distflash.parallel.wire.journal import Journal
from distflash.testing import spmd_processes
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


def launch(folder: Path, body, *, limit=LIMIT, ranks=RANKS, deadline=30.0, place=lambda rank: {}) -> list[Ended]:
    """Run body(rank) in forked ranks of a job of its own, which must end by themselves; place(rank) is run first and gives variables."""
    few = torch.zeros(1, 2, 1, 1)
    distflash.attention(few, few, few)  # what is imported at the first call is imported once, here
    port = free_port()
    pids = [_fork(folder, rank, ranks, port, body, limit, place) for rank in range(ranks)]
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


def _fork(folder, rank, ranks, port, body, limit, where):
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
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        world._session = world._Session()
        try:
            os.environ |= {name: str(value) for name, value in (place | where(rank)).items()}
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


def strikes(number: signal.Signals, count: int, limit: float, ranks: int, draw: random.Random) -> dict[str, Any]:
    """How often every other rank named the victim of a signal, and in how many seconds."""
    named, gone, told, early = [], [], 0, []
    for _ in range(count):
        victim, call, hop = draw.randrange(ranks), draw.randrange(2, 300), draw.randrange(ranks)
        with tempfile.TemporaryDirectory() as name:
            strike = strike_with(Path(name), number)
            ended = launch(Path(name), partial(ring, victim=victim, strike=strike, call=call, hop=hop), limit=limit, ranks=ranks)
            if not (Path(name) / "fault").exists():  # of a starved machine, for one
                early.append([end.said.strip().splitlines()[-1:] for end in ended])
                print(f"a job ended before it was struck: {early[-1]}")
                continue
        rest = [end for rank, end in enumerate(ended) if rank != victim]
        told += all(f"DistFlashPeerLost: rank {victim} (host " in end.said for end in rest)
        named.append(max(end.named for end in rest))
        gone.append(max(end.gone for end in rest))
    times = {"named": named, "gone": gone}
    found = {f"{what}_{kind.__name__}": round(kind(seconds), 3) for what, seconds in times.items() for kind in (statistics.median, max)}
    return {"fault": number.name, "count": count, "told": told, "early": len(early), "limit": limit, "ranks": ranks} | found


def notes(calls: int = 2000) -> dict[str, float]:
    """Seconds that two ranks of one host take to agree on a call, by median: of a known kind, and of a new one."""

    def work():
        seq, seconds = distflash.SequenceParallel().sequence(48), {}
        for name, kind in (("known", lambda n: 0), ("new", lambda n: n)):
            taken = []
            for n in range(calls):
                start = time.perf_counter()
                seq.agree(name, kind=kind(n))
                taken.append(time.perf_counter() - start)
            seconds[name] = statistics.median(taken)
        return torch.tensor([seconds["known"], seconds["new"]], dtype=torch.float64)

    known, new = (max(values) for values in zip(*(reply.tolist() for reply in spmd_processes(2, work)), strict=True))
    return {"known_us": round(1e6 * known, 1), "compared_ms": round(1e3 * new, 3)}


def silence() -> float:
    """The longest time for which a thread of 1 ms beats was not heard while Triton compiled a kernel in this process."""
    os.environ["TRITON_ALWAYS_COMPILE"] = "1"  # whatever its cache holds
    from distflash.kernels import compile_check

    case = next(compile_check.cases(["forward"], ["sm_90"], [128], ["bf16"]))
    gaps, over = [], threading.Event()

    def beat():
        last = time.monotonic()
        while not over.wait(0.001):
            now = time.monotonic()
            gaps.append(now - last)
            last = now

    thread = threading.Thread(target=beat)
    thread.start()
    start = time.monotonic()
    compile_check.build(case)
    assert time.monotonic() - start > 0.2, "nothing was compiled"
    over.set()
    thread.join()
    return round(max(gaps), 3)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--limit", type=float, default=LIMIT)
    parser.add_argument("--ranks", type=int, default=RANKS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true")
    asked = parser.parse_args()
    draw = random.Random(asked.seed)
    rows = [strikes(number, asked.count, asked.limit, asked.ranks, draw) for number in (signal.SIGKILL, signal.SIGSTOP)]
    cost = notes() | {"silence_s": silence()}
    for row in (cost, *rows):
        print(", ".join(f"{name} {value}" for name, value in row.items()))
    if asked.record:
        from benchmarks.record import write

        write("faults", rows, cost=cost, cores=len(os.sched_getaffinity(0)), load=round(os.getloadavg()[0], 1))


if __name__ == "__main__":
    main()
