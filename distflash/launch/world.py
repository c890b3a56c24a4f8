"""distflash.init(): one call that makes this process a rank, whatever started it.

Legend: rank in 0..size-1 of the whole job; local_rank in 0..local_size-1 of this host; one GPU per local rank.
environment.py says who we are, devices.py what computes, rendezvous.py where we meet, options.py what we may be asked for; this file
creates the process group and ends it.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import sys
import time
import traceback
import warnings
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any

from distflash.launch import devices, options, rendezvous
from distflash.launch.environment import Place, detect
from distflash.launch.heartbeat import Heartbeat, lost_connection
from distflash.launch.parent import end_with_launcher

if TYPE_CHECKING:
    import torch
    from torch.distributed import Store

GOODBYE = 5.0  # seconds the rank that serves the store waits for the others at exit


@dataclass(frozen=True)
class World:
    """This process among the ranks of its job."""

    rank: int
    local_rank: int
    size: int
    local_size: int
    device: torch.device
    backend: str | None  # "nccl" or "gloo" (or what the owner of an adopted group chose); None without a process group
    launcher: str  # torchrun deepspeed mpi slurm env single

    @property
    def is_main(self) -> bool:
        """True on rank 0: the one that prints and saves."""
        return self.rank == 0


@dataclass
class _Session:
    """What this process holds between init() and shutdown(). What it forks has a copy, without the threads and connections behind it."""

    process: int = field(default_factory=os.getpid)
    world: World | None = None
    adopted: bool = False
    store: Store | None = None
    heartbeat: Heartbeat | None = None
    serves: bool = False
    inits: int = 0
    hooked: bool = False
    failed: bool = False
    joined: dict[str, Any] = field(default_factory=dict)  # what init() made the group with, by the names of its arguments


_session = _Session()


def launched() -> bool:
    """True if a launcher started this process; False under plain python."""
    return detect(os.environ).launcher != "single"


def restarted() -> bool:
    """True if torchrun has started the ranks of this host before."""
    return detect(os.environ).restarts > 0


def job() -> str:
    """A name that this job keeps when torchrun starts its ranks again, and that no other job has."""
    name = detect(os.environ).job
    if name == "torchrun/none":  # torchrun's default, the same for every job; but then the agent that started rank 0 stays
        name += f"/{socket.gethostname()}/{os.getppid()}"
    return name


def init(
    *, backend: str | None = None, timeout: float = 600.0, interface: str | None = None, heartbeat: float | None = None,
    nccl_ctas: int | None = None,
) -> World:  # fmt: skip
    """Find this process' place, claim its device and create the default process group; a second call returns the same World.

    backend: "nccl" (one GPU per local rank), "gloo" (on the CPU), or None: nccl where CUDA works. timeout: seconds until a
    collective that a peer never joins raises. interface: the network interface that ranks of several hosts talk over (else
    DISTFLASH_INTERFACE); one host uses loopback. heartbeat: seconds after which a rank that is silent counts as lost, is named
    on every other rank and ends the job (else DISTFLASH_HEARTBEAT, else 10); 0 turns that off. nccl_ctas: how many thread blocks,
    and so SMs, NCCL's kernels take at most (None: as NCCL chooses); they run on a stream of high priority.

    Plain python is size 1, without a process group. A group that already exists (DeepSpeed, Accelerate) is adopted, has no
    heartbeat, keeps its options, and is left alone by shutdown(). Groups that are made later, by `new_group` or for a mesh, have
    the NCCL options that their maker gives them.

    Raises ValueError for arguments or variables that contradict each other, or what an earlier call made the group with, RuntimeError
    where the job cannot be joined.
    """
    import torch
    import torch.distributed as dist

    end_with_launcher()
    limit = options.checked(backend, timeout, heartbeat, nccl_ctas)
    known = _known(backend)
    if known:
        _check_same(nccl_ctas=nccl_ctas, interface=interface, heartbeat=heartbeat, timeout=None if timeout == 600.0 else timeout)
        return known
    if dist.is_available() and dist.is_initialized():
        if nccl_ctas is not None:
            raise ValueError(
                f"nccl_ctas={nccl_ctas} comes too late, torch.distributed is already initialised: leave it out, and give "
                "init_process_group ProcessGroupNCCL.Options with config.max_ctas"
            )
        _session.world, _session.adopted, _session.joined = _adopt(backend), True, {"nccl_ctas": None}
        return _session.world

    place = detect(os.environ)
    if nccl_ctas is not None and (backend == "gloo" or (backend is None and not torch.cuda.is_available())):
        raise ValueError(f"nccl_ctas={nccl_ctas} needs the backend nccl, and ranks of this job would talk over gloo: leave it out")
    _session.joined = {"nccl_ctas": nccl_ctas}
    if place.launcher == "single":
        device = devices.claim(place, backend)
        _session.world = World(0, 0, 1, 1, device, None, "single")
        return _session.world
    if not dist.is_available():
        raise RuntimeError(f"{place.launcher} started {place.size} ranks, but this torch has no distributed package: install another build")
    _session.process = os.getpid()
    _hook_failures()
    if place.local_rank is not None:
        devices.claim(place, backend)  # a rank that has no device fails here, before it meets the others
    named = rendezvous.named_interface(interface)
    _session.joined |= {"interface": named, "heartbeat": limit, "timeout": timeout}
    _session.world = _join(place, backend, timedelta(seconds=timeout), limit, named)
    atexit.register(_at_exit)
    return _session.world


def _check_same(**asked: object) -> None:
    """Raise ValueError if a later init() asks for something else than the group was made with; None asks for nothing."""
    for name, value in asked.items():
        had = _session.joined.get(name, value)  # one process alone has no peers to wait for, and an adopted group has its own options
        if value is not None and value != had:
            raise ValueError(f"init() already joined with {name}={had}, got {value}: call distflash.launch.shutdown() first")


def _known(backend: str | None) -> World | None:
    """The World of an earlier init() if it still stands."""
    import torch.distributed as dist

    world = _session.world
    if world is None or (world.backend is not None and not dist.is_initialized()):
        return None  # never made, or its owner destroyed the group
    if world.backend is None and dist.is_available() and dist.is_initialized():
        return None  # a group was created after a single-process init(): adopt it
    if backend is not None and world.backend is not None and backend not in world.backend:
        raise ValueError(f"init() already joined with backend {world.backend!r}, got {backend!r}: call distflash.launch.shutdown() first")
    return world


def _join(place: Place, backend: str | None, timeout: timedelta, limit: float, interface: str | None) -> World:
    import torch.distributed as dist

    store, place, serves = rendezvous.meet(place, timeout, interface)
    device = devices.claim(place, backend)
    rendezvous.use_interface(interface, place.one_host)
    if device.type == "cuda":
        rendezvous.avoid_multicast()
    if not place.one_host and place.rank == 0:
        warnings.warn(
            "ranks on several hosts: PyTorch's distributed package neither authenticates nor encrypts; use it on trusted networks only",
            stacklevel=3,
        )
    name = "nccl" if device.type == "cuda" else "gloo"
    store = dist.PrefixStore(str(_session.inits), store)  # keys of an earlier init() or attempt are never met again
    dist.init_process_group(
        name, store=store, rank=place.rank, world_size=place.size, timeout=timeout, device_id=device if name == "nccl" else None,
        pg_options=options.nccl_options(timeout, _session.joined["nccl_ctas"]) if name == "nccl" else None,
    )  # fmt: skip  # device_id: NCCL connects now, so that a broken link shows here and not in the first step
    _session.store, _session.serves, _session.adopted = store, serves, False
    if limit and place.size > 1:
        own = rendezvous.connect_again(store, timedelta(seconds=limit))
        own = dist.PrefixStore(f"distflash/{place.job}/{_session.inits}/heartbeat", own)
        _session.heartbeat = Heartbeat(own, place.rank, place.size, limit, None if place.agent_store else 0)
        _session.heartbeat.start()
    _session.inits += 1
    assert place.local_rank is not None and place.local_size is not None
    return World(place.rank, place.local_rank, place.size, place.local_size, device, name, place.launcher)


def _adopt(backend: str | None) -> World:
    """The World of a process group that somebody else created."""
    import torch
    import torch.distributed as dist

    rank, size, name = dist.get_rank(), dist.get_world_size(), str(dist.get_backend())
    if backend is not None and backend not in name:
        raise ValueError(f"torch.distributed is already initialised with backend {name!r}, got {backend!r}: pass backend=None")
    try:
        place = detect(os.environ)
    except ValueError:
        place = None  # the group exists: stale variables can no longer mislead
    if place is None or (place.rank, place.size) != (rank, size) or place.local_rank is None:
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        per_host = min(size, gpus) if "nccl" in name and gpus else size
        local = int(os.environ.get("LOCAL_RANK") or rank % per_host)
        place = Place("single" if size == 1 else "env", rank, size, local, max(per_host, local + 1))
    device = devices.claim(place, "nccl" if "nccl" in name else "gloo")
    assert place.local_rank is not None and place.local_size is not None
    return World(rank, place.local_rank, size, place.local_size, device, name, place.launcher)


def shutdown() -> None:
    """End what init() began; harmless when there is nothing to end, and in a process that a rank has forked. Runs by itself at exit."""
    import torch.distributed as dist

    if _session.process != os.getpid():
        return
    store, serves, world, adopted = _session.store, _session.serves, _session.world, _session.adopted
    heartbeat = _session.heartbeat
    _session.world = _session.store = None
    _session.serves = _session.adopted = False
    if world is None or adopted or _session.failed or world.backend is None or not dist.is_initialized():
        return  # after a failure the process just ends: destroying a group can wait for peers that will never answer
    if heartbeat is not None:
        if heartbeat.lost is not None:
            return
        heartbeat.stop()
        if heartbeat.lost is None:
            _session.heartbeat = None
    if store is not None:
        _say_goodbye(store, serves, world.size)
    dist.destroy_process_group()


def _at_exit() -> None:
    shutdown()
    if _session.process == os.getpid() and _session.heartbeat is not None:
        _session.heartbeat.end()


def _say_goodbye(store: Store, serves: bool, size: int) -> None:
    """Rank 0 takes the store with it when it exits: let the others finish first, but not for long."""
    try:
        left = store.add("goodbye", 1)
        deadline = time.monotonic() + GOODBYE
        while serves and left < size and time.monotonic() < deadline:
            time.sleep(0.01)
            left = store.add("goodbye", 0)
    except RuntimeError:
        return  # the store is gone, and with it whoever could be disturbed


def _hook_failures() -> None:
    """Note an uncaught exception, and when it happened, where `distflash run` and torchrun look for it."""
    if _session.hooked:
        return
    _session.hooked = True
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if _session.process != os.getpid():
            previous(kind, error, trace)
            return
        _session.failed = True
        path = os.environ.get("TORCHELASTIC_ERROR_FILE")
        if path:
            _write_failure(path, time.time_ns(), "".join(traceback.format_exception(kind, error, trace)), lost_connection(error))
        previous(kind, error, trace)
        if _session.heartbeat is not None:
            _session.heartbeat.failed(error)

    sys.excepthook = hook


def _write_failure(path: str, now: int, text: str, lost_connection: bool) -> None:
    """torchelastic's error file, with what tells cause from consequence besides: the time in nanoseconds, a lost connection."""
    extra = {"py_callstack": text, "timestamp": str(now // 10**9), "time_ns": now, "lost_connection": lost_connection}
    try:
        with open(f"{path}.new", "x", encoding="utf-8") as file:
            json.dump({"message": {"message": text.strip().rpartition("\n")[2], "extraInfo": extra}}, file)
        if not os.path.exists(path):  # what @record wrote stays
            os.rename(f"{path}.new", path)  # whole or not at all: half a file, of a rank that ends meanwhile, would end the launcher
    except OSError:
        return  # the traceback is on stderr already
