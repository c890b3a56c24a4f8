"""Programs for real launches: what every rank runs, and how a test starts them."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Prints one line a rank; then, as the arguments say, fails on one rank while the others wait for it.
RANK = """
import atexit, os, signal, sys, time
from pathlib import Path
import torch, torch.distributed as dist
from distflash.launch import init

def listening():
    inodes = set()
    for link in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(link)
        except OSError:
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for fields in map(str.split, Path(table).read_text().splitlines()[1:]):
            if fields[3] == "0A" and fields[9] in inodes:
                found.add(fields[1].split(":")[0])
    return sorted(found)

how, slowly = sys.argv[1] if len(sys.argv) > 1 else "end", sys.argv[2:] == ["slowly"]
if slowly and os.environ["RANK"] == "1":
    atexit.register(time.sleep, 3)  # after all that is registered later
world = init(timeout=60, heartbeat=1.0 if how == "stop" else None)
assert init() is world
total = torch.tensor([world.rank + 1])
dist.all_reduce(total)
os.write(1, f"RANK {world.rank}/{world.size} local {world.local_rank}/{world.local_size} {world.device} {world.backend} {world.launcher} "
            f"sum {total.item()} threads {os.environ.get('OMP_NUM_THREADS')} listens {listening()}\\n".encode())
if how != "end":
    if world.rank == 1:
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
            dist.all_reduce(total)  # may succeed: the other rank's part is there
            time.sleep(60)  # until the verdict of the other rank, or the launcher, ends it
        if how == "exit":
            sys.exit(7)
        raise RuntimeError("the bug of rank 1")
    dist.all_reduce(total)
"""


def start(command, tmp_path, *, timeout=60):
    """Run a launcher from a clean environment, the package on its path."""
    (tmp_path / "rank.py").write_text(RANK)
    kept = ("PATH", "HOME", "TMPDIR", "LANG", "VIRTUAL_ENV", "LD_LIBRARY_PATH")
    environ = {name: os.environ[name] for name in kept if name in os.environ}
    environ |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}  # on the CPU, also where there are GPUs
    return subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=timeout, check=False)


def distflash(*arguments):
    return [sys.executable, "-m", "distflash", *arguments]


def ranks_of(done):
    """The lines that ranks printed, in order of rank."""
    return sorted(line for line in done.stdout.splitlines() if line.startswith("RANK "))
