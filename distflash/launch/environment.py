"""Where this process stands, read off the variables its launcher left behind. No torch, no sockets, nothing is written.

Precedence, highest first:
    1  torchrun     TORCHELASTIC_RUN_ID with RANK, WORLD_SIZE, ...     wins over OMPI_* and SLURM_*: `srun torchrun` is legal
    2  deepspeed    CROSS_SIZE and LOCAL_SIZE with RANK, WORLD_SIZE    likewise
    3  mpi          Open MPI, MVAPICH2, MPICH, Intel MPI               wins over SLURM_*: mpirun starts its daemons with srun
    4  slurm        a step of two or more tasks
    5  env          RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT exported by hand
    6  single       none of these
RANK and WORLD_SIZE that no launcher vouches for must agree with mpirun's or srun's, else it is an error: one of them is stale.

Legend: size P of ranks in the job, local_size ranks on this host, local_rank this process among those.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypedDict
from zlib import crc32

Environment = Mapping[str, str]

MPI_FAMILIES = (  # name, rank, size, local rank, local size
    ("Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("MVAPICH2", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ("MPICH or Intel MPI", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
SLURM_SPECIAL_STEP = 0xFFFFFFF0  # ids from here on are the batch script, an interactive shell or the extern step: no `srun`
SLURM_PORTS = range(15000, 31000)  # below Linux's ephemeral ports
HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?|[0-9A-Fa-f:]*:[0-9A-Fa-f:.]*")


@dataclass(frozen=True)
class Place:
    """Who this process is in its job, and where rank 0 can be reached if the launcher said so."""

    launcher: str
    rank: int = 0
    size: int = 1
    local_rank: int | None = 0  # None: only MPI itself can tell
    local_size: int | None = 1
    address: str | None = None
    port: int | None = None
    agent_store: bool = False  # the launcher already serves a store at address:port
    job: str = ""  # tells this job's keys from those of another in the same store
    restarts: int = 0  # attempts of this host's torchrun before this one; other hosts may count otherwise

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 <= self.rank < self.size:
            raise ValueError(
                f"{self.launcher}: rank must be in 0..{self.size - 1} for size {self.size}, got {self.rank}: start again from a clean shell"
            )
        if self.local_rank is None or self.local_size is None:
            return
        if not 0 <= self.local_rank < self.local_size <= self.size:
            raise ValueError(
                f"{self.launcher}: expected 0 <= local rank < local size <= size, got local rank {self.local_rank}, local size "
                f"{self.local_size}, size {self.size}: start again from a clean shell"
            )
        if self.address is not None and not HOST.fullmatch(self.address):
            raise ValueError(f"{self.launcher}: expected a host name or an IP address, got {self.address!r}: correct MASTER_ADDR")
        if self.port is not None and not 0 < self.port < 65536:
            raise ValueError(f"{self.launcher}: expected a port in 1..65535, got {self.port}: correct MASTER_PORT")

    @property
    def one_host(self) -> bool:
        """True if every rank of the job runs on this host."""
        return self.local_size == self.size


def detect(environ: Environment) -> Place:
    """The place of this process; the precedence is at the top of this file.

    Raises ValueError where variables are malformed or contradict each other.
    """
    vouched = _torchrun(environ) or _deepspeed(environ)
    if vouched:
        return vouched
    started = _mpi(environ) or _slurm(environ)
    if started:
        _agree(environ, started)
        return replace(started, **_master(environ, default_port=started.port, default_address=started.address))
    return _exported(environ)


def _torchrun(environ: Environment) -> Place | None:
    if "TORCHELASTIC_RUN_ID" not in environ or "RANK" not in environ:
        return None
    return Place(
        "torchrun",
        rank=_integer(environ, "RANK"),
        size=_integer(environ, "WORLD_SIZE"),
        local_rank=_integer(environ, "LOCAL_RANK"),
        local_size=_integer(environ, "LOCAL_WORLD_SIZE"),
        agent_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        job=f"torchrun/{environ['TORCHELASTIC_RUN_ID']}",
        restarts=_integer(environ, "TORCHELASTIC_RESTART_COUNT", 0),
        **_master(environ),
    )


def _deepspeed(environ: Environment) -> Place | None:
    if not all(name in environ for name in ("CROSS_SIZE", "LOCAL_SIZE", "RANK", "WORLD_SIZE")):
        return None
    return Place(
        "deepspeed",
        rank=_integer(environ, "RANK"),
        size=_integer(environ, "WORLD_SIZE"),
        local_rank=_integer(environ, "LOCAL_RANK"),
        local_size=_integer(environ, "LOCAL_SIZE"),
        job="deepspeed",
        **_master(environ),
    )


def _mpi(environ: Environment) -> Place | None:
    for _, rank, size, local_rank, local_size in MPI_FAMILIES:
        if rank not in environ or size not in environ:
            continue
        has_local = local_rank in environ and local_size in environ
        if rank == "PMI_RANK" and not has_local and environ[size] == environ.get("SLURM_STEP_NUM_TASKS"):
            continue  # srun --mpi=pmi2 sets PMI_* too
        return Place(
            "mpi",
            rank=_integer(environ, rank),
            size=_integer(environ, size),
            local_rank=_integer(environ, local_rank) if has_local else None,
            local_size=_integer(environ, local_size) if has_local else None,
            job="mpi",
        )
    return None


def _slurm(environ: Environment) -> Place | None:
    """The place inside a step of at least two tasks.

    SLURM_NTASKS alone describes the allocation: in an `salloc` shell or a batch script plain python is one process, and waiting
    for the others would hang.
    """
    if "SLURM_PROCID" not in environ or "SLURM_STEP_NUM_TASKS" not in environ:
        return None
    step = environ.get("SLURM_STEP_ID", environ.get("SLURM_STEPID", "0"))
    if step.isdigit() and int(step) >= SLURM_SPECIAL_STEP:
        return None
    size = _integer(environ, "SLURM_STEP_NUM_TASKS")
    if size == 1:
        return None
    job = f"{environ.get('SLURM_JOB_ID', environ.get('SLURM_JOBID', '0'))}.{step}"
    counts = _tasks_per_node(environ.get("SLURM_STEP_TASKS_PER_NODE", environ.get("SLURM_TASKS_PER_NODE", "")))
    node = _integer(environ, "SLURM_NODEID")
    if sum(counts) != size or node >= len(counts):
        raise ValueError(
            f"SLURM_STEP_TASKS_PER_NODE must add up to SLURM_STEP_NUM_TASKS={size} and hold node {node}, got {counts}: "
            "start with srun, not by hand"
        )
    return Place(
        "slurm",
        rank=_integer(environ, "SLURM_PROCID"),
        size=size,
        local_rank=_integer(environ, "SLURM_LOCALID"),
        local_size=counts[node],
        address=first_host(environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_NODELIST", "localhost"))),
        port=SLURM_PORTS[crc32(job.encode()) % len(SLURM_PORTS)],
        job=f"slurm/{job}",
    )


def _exported(environ: Environment) -> Place:
    """RANK and WORLD_SIZE set by hand, or nothing at all."""
    if "RANK" not in environ and environ.get("WORLD_SIZE", "1") == "1":
        return Place("single")
    for name, other in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")):
        if name not in environ:
            raise ValueError(
                f"{other}={environ[other]} is set but {name} is not: set both, or `unset {other}`, or start with `distflash run`"
            )
    rank, size = _integer(environ, "RANK"), _integer(environ, "WORLD_SIZE")
    master = _master(environ)
    if size > 1 and (master["address"] is None or master["port"] is None):
        raise ValueError(
            f"WORLD_SIZE={size} needs MASTER_ADDR and MASTER_PORT, got {environ.get('MASTER_ADDR')}:{environ.get('MASTER_PORT')}: set both"
        )
    local = size == 1 or master["address"] in ("127.0.0.1", "localhost", "::1")
    if not local and not ("LOCAL_RANK" in environ and "LOCAL_WORLD_SIZE" in environ):
        raise ValueError(
            f"WORLD_SIZE={size} with MASTER_ADDR={master['address']} needs LOCAL_RANK and LOCAL_WORLD_SIZE: "
            "set both, or start with torchrun"
        )
    return Place(
        "env",
        rank=rank,
        size=size,
        local_rank=_integer(environ, "LOCAL_RANK", rank),
        local_size=_integer(environ, "LOCAL_WORLD_SIZE", size),
        job="env",
        **_master(environ),
    )


def _agree(environ: Environment, started: Place) -> None:
    """Raise unless RANK and WORLD_SIZE, where exported, say what mpirun or srun says."""
    launcher = "mpirun" if started.launcher == "mpi" else "srun"
    for name, expected in (("WORLD_SIZE", started.size), ("RANK", started.rank)):
        if name in environ and _integer(environ, name) != expected:
            raise ValueError(
                f"{name}={environ[name]} is exported, but {launcher} says {expected}: `unset {name}`, or start with one launcher only"
            )


class _Master(TypedDict):
    address: str | None
    port: int | None


def _master(environ: Environment, *, default_address: str | None = None, default_port: int | None = None) -> _Master:
    port = _integer(environ, "MASTER_PORT") if "MASTER_PORT" in environ else default_port
    return {"address": environ.get("MASTER_ADDR", default_address), "port": port}


def _integer(environ: Environment, name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not re.fullmatch(r"[0-9]{1,9}", text):
        raise ValueError(f"{name} must be an integer >= 0, got {text!r}: correct or unset it")
    return int(text)


def _tasks_per_node(text: str) -> list[int]:
    """SLURM's run-length list: "4(x2),1" is [4, 4, 1]."""
    counts = []
    for item in filter(None, text.split(",")):
        match = re.fullmatch(r"([0-9]+)(?:\(x([0-9]+)\))?", item)
        if not match:
            raise ValueError(f"SLURM_STEP_TASKS_PER_NODE must look like 4(x2),1, got {text!r}: start with srun, not by hand")
        counts += [int(match[1])] * min(int(match[2] or 1), 1_000_000)
    return counts


def first_host(nodelist: str) -> str:
    """The first host of a SLURM node list: "gpu[003-007,9],login" is "gpu003", "rack[0-1]b[2-3]" "rack0b2"."""
    first = re.match(r"(?:[^\[,]|\[[^\]]*\])*", nodelist)
    host = re.sub(r"\[([0-9]+)[^\]]*\]", r"\1", first[0]) if first else ""
    if not HOST.fullmatch(host):
        raise ValueError(f"SLURM_STEP_NODELIST must start with a host name, got {nodelist!r}: export MASTER_ADDR")
    return host
