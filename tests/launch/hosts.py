"""Two hosts on one: network namespaces with a cable (veth) between them, made without privileges in a user namespace of one's own.

`python -m tests.launch.hosts [--count 20] [--record]` pulls the cable in the middle of a ring, so many times, and prints in how many
cases each side named the other, and after how long.
"""

import argparse
import ctypes
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.launch.faults import LIMIT, Ended, fault, launch, ring

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000  # sched.h
ADDRESSES = "10.99.0.1", "10.99.0.2"


def unshare(flags: int) -> None:
    """Leave the parent's namespaces for new ones. OSError where the system does not let one."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(flags):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def ip(words: str) -> bool:
    return subprocess.run(["ip", *words.split()], capture_output=True, check=False).returncode == 0


def cable(folder: Path, rank: int) -> dict[str, Any]:
    """Put this process on a host of its own, cable `rank` plugged in; the variables that make it a rank of two hosts."""
    note = folder / "host1"
    if rank == 1:
        unshare(CLONE_NEWNET)
        (folder / "host1.part").write_text(str(os.getpid()))
        (folder / "host1.part").rename(note)
    else:
        wait(note.exists)
        assert ip(f"link add cable0 type veth peer name cable1 netns {note.read_text()}")
    wait(lambda: ip(f"addr add {ADDRESSES[rank]}/24 dev cable{rank}"))
    assert ip("link set lo up") and ip(f"link set cable{rank} up")
    return {"LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": ADDRESSES[0], "DISTFLASH_INTERFACE": f"cable{rank}"}


def wait(until: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline, "no cable came"
        time.sleep(0.01)


def on_two_hosts(folder: Path, body: Callable[[int], None], **options: Any) -> list[Ended]:
    """`faults.launch` of body(rank) on two hosts. OSError with the reason where namespaces are not to be had."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            ids = os.getuid(), os.getgid()
            unshare(CLONE_NEWUSER | CLONE_NEWNET)
            for name, text in (("setgroups", "deny"), ("uid_map", f"0 {ids[0]} 1"), ("gid_map", f"0 {ids[1]} 1")):
                Path(f"/proc/self/{name}").write_text(text)
            if not ip("link add cable0 type veth peer name cable1") or not ip("link del cable0"):
                raise OSError("no veth devices here (ip link add)")
            found: Any = launch(folder, body, ranks=2, place=lambda rank: cable(folder, rank), **options)
            (folder / "found").write_text(json.dumps(found))
            code = 0
        except OSError as error:
            (folder / "refused").write_text(str(error))
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if (folder / "refused").exists():
        raise OSError((folder / "refused").read_text())
    assert status == 0, "see stderr"
    return [Ended(*end) for end in json.loads((folder / "found").read_text())]


def cut(folder: Path, rank: int, call: int, hop: int) -> list[Ended]:
    """How two ranks ended whose cable was pulled on a rank's side, in a hop of a call of attention."""

    def strike() -> None:
        fault(folder)
        assert ip(f"link set cable{rank} down")

    return on_two_hosts(folder, lambda here: ring(here, rank, strike, call=call, hop=hop))


def both_named(ended: list[Ended]) -> bool:
    return all(f"DistFlashPeerLost: rank {1 - rank} (host " in end.said for rank, end in enumerate(ended))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true")
    asked = parser.parse_args()
    draw, named, gone, told = random.Random(asked.seed), [], [], 0
    for _ in range(asked.count):
        with tempfile.TemporaryDirectory() as folder:
            ended = cut(Path(folder), draw.randrange(2), draw.randrange(2, 200), draw.randrange(2))
        told += both_named(ended)
        named.append(max(end.named for end in ended))
        gone.append(max(end.gone for end in ended))
    row = {"count": asked.count, "told": told, "limit": LIMIT, "named_median": statistics.median(named), "named_max": max(named)}
    row |= {"gone_median": statistics.median(gone), "gone_max": max(gone)}
    print(row)
    if asked.record:
        from benchmarks.record import write

        write("hosts", [row], seed=asked.seed)


if __name__ == "__main__":
    main()
