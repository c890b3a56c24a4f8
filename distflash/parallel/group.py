"""Which ranks share sequences and what wire they talk over: the arguments of SequenceParallel, checked. The same on every rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from distflash.parallel.plan import unequal
from distflash.parallel.wire.local import LocalGroup, LocalWire
from distflash.parallel.wire.p2p import P2PWire
from distflash.parallel.wire.symmetric import SymmetricWire, obstacle

Group = dist.ProcessGroup | DeviceMesh | LocalWire

started: Callable[[], int] | None = None  # how many processes this job has: set by launch/, which reads the environment


def one_of(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raise ValueError unless the argument of that name has one of the allowed values."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not known: use one of {', '.join(map(repr, allowed))}")


def resolve(group: Group | None, ulysses: int | str) -> tuple[dist.ProcessGroup | LocalWire | None, int]:
    """The one group of all P ranks, and the Ulysses degree as a number."""
    if isinstance(ulysses, bool) or not (ulysses == "auto" or isinstance(ulysses, int)):
        raise TypeError(f"ulysses={ulysses!r} must be an integer or 'auto'")
    if not isinstance(group, DeviceMesh):
        if group is not None and not isinstance(group, (dist.ProcessGroup, LocalWire)):
            raise TypeError(f"group={group!r} must be None, a ProcessGroup or a DeviceMesh that this rank belongs to")
        return group, 1 if ulysses == "auto" else int(ulysses)
    if group.ndim == 1:
        return group.get_group(), 1 if ulysses == "auto" else int(ulysses)
    names = group.mesh_dim_names
    if group.ndim != 2 or names is None or set(names) != {"ring", "ulysses"}:
        raise ValueError(f"a {group.ndim}-D mesh with axes {names} was given: pass a 1-D mesh, or a 2-D one with axes 'ring' and 'ulysses'")
    degree = group.size(names.index("ulysses"))
    if ulysses not in ("auto", degree):
        raise ValueError(f"ulysses={ulysses} disagrees with the mesh, whose 'ulysses' axis has {degree} ranks: leave it 'auto'")
    if names != ("ring", "ulysses"):
        raise ValueError("the mesh's axes must be ('ring', 'ulysses'), Ulysses inner: adjacent ranks share heads")
    ranks = group.mesh.flatten().tolist()
    if ranks != sorted(ranks):  # a process group counts its members in ascending order: other ranks would become neighbours
        raise ValueError(f"the mesh must list its ranks in ascending order, row by row, got {ranks}: renumber the processes")
    return group._flatten().get_group(), degree


def wire_of(group: dist.ProcessGroup | LocalWire | None, asked: str) -> tuple[P2PWire | LocalWire, str]:
    """The wire asked for among all ranks of the group, and why it is this one.

    Raises ValueError if it cannot be, RuntimeError if there is no group although several processes were started.
    """
    if isinstance(group, LocalWire):
        return group, "ranks are threads of one process"
    if group is None and dist.is_available() and dist.is_initialized():
        group = dist.group.WORLD
    if group is None and started is not None and (processes := started()) > 1:
        raise RuntimeError(
            f"{processes} processes were started, but there is no process group: call distflash.init() before SequenceParallel(), "
            "or use SequenceParallel.single() where each process works alone"
        )
    if group is None or group.size() == 1:
        return LocalGroup(1, default_device()).wire(0), "there is one rank"
    wire = P2PWire(group)
    if asked == "p2p":
        return wire, "asked for"
    reason = obstacle(wire)
    if reason is None:
        return SymmetricWire(group), "the GPUs of the host reach each other's memory"
    if asked == "symmetric":
        raise ValueError(f"wire='symmetric' cannot serve this group: {reason}; wire='auto' would take p2p")
    return wire, f"not symmetric: {reason}"


def default_device() -> torch.device:
    """Where a rank lives that nobody gave a device: the current GPU, the CPU without one."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def usual_order(wire: P2PWire | LocalWire, order: str, ulysses: int) -> str:
    """`order`, or what "auto" usually is: a ring, double across several hosts. Raises ValueError if it or `ulysses` cannot be."""
    if ulysses < 1 or wire.size % ulysses:
        divisors = [d for d in range(1, wire.size + 1) if wire.size % d == 0]
        raise ValueError(f"ulysses={ulysses} must divide the {wire.size} ranks of the group: use one of {divisors}")
    found = unequal_hosts(wire, ulysses)
    if order == "double_ring" and found:
        raise ValueError(f"double_ring needs as many consecutive ranks on each host, got {found}: use ring")
    several_hosts = not found and ulysses < wire.per_node < wire.size
    return ("double_ring" if several_hosts else "ring") if order == "auto" else order


def unequal_hosts(wire: P2PWire | LocalWire, ulysses: int) -> str | None:
    """Why the ranks of a wire cannot make a double ring; None if they can, if only one that is a ring."""
    return wire.unequal or unequal(wire.size, wire.per_node, ulysses)
