"""The store at which ranks meet. It listens on loopback unless several hosts, or a named interface, ask for more.

torch's TCPStore listens on every interface whatever address it is given; so rank 0 binds a socket itself and hands it over.
PyTorch's distributed package knows no passwords and no encryption: whoever reaches the store controls the job.

    listen     a socket on one address, never on all
    meet       torch's Store for a Place; rank 0 serves it unless the launcher does
    attempt    a name for this attempt among others that used the same store
    connect_again  a connection for a thread of its own
    mpi        rank 0's address to all ranks by one broadcast of bytes (nothing is unpickled)
"""

from __future__ import annotations

import os
import socket
import struct
import sys
import time
import uuid
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

from distflash.launch.environment import HOST, Place

if TYPE_CHECKING:
    from torch.distributed import Store, TCPStore

LOOPBACK = "127.0.0.1"
NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
POLL = 0.01  # seconds
MPI_MESSAGE = 512  # bytes: "ok address port", or "no reason"


def listen(address: str, port: int = 0) -> socket.socket:
    """A socket that listens on `address` alone; port 0 takes a free one."""
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(4096)
    except OSError as error:
        listener.close()
        raise RuntimeError(
            f"rank 0 cannot listen on {address} port {port} ({error.strerror}): free it, or set MASTER_PORT to another"
        ) from error
    return listener


def serve(listener: socket.socket, timeout: timedelta) -> TCPStore:
    """A TCPStore server on a socket that already listens. The store owns the socket from here on."""
    from torch.distributed import TCPStore

    address, port = listener.getsockname()[:2]
    return TCPStore(
        address, port, None, True, timeout, wait_for_workers=False, multi_tenant=True, master_listen_fd=listener.detach()
    )  # multi_tenant: another TCPStore of this process on that port (torchrun's agent, say) shares the server


def meet(place: Place, timeout: timedelta, interface: str | None) -> tuple[Store, Place, bool]:
    """The job's store, the place completed by what MPI knows, and whether this process serves the store.

    Raises ValueError or RuntimeError, with the cure, where several hosts have no address that was named on purpose.
    """
    from torch.distributed import PrefixStore, TCPStore

    listener = None
    if place.agent_store:
        address, port = _reachable(place)
    elif place.size == 1 and None in (place.address, place.port, place.local_rank):
        place, listener = replace(place, local_rank=0, local_size=1), listen(LOOPBACK)  # nobody else comes
        address, port = LOOPBACK, 0
    elif place.launcher == "mpi" and (place.address is None or place.port is None or place.local_rank is None):
        place, listener = _mpi(place, interface)
        address, port = _reachable(place)
    else:
        address, port = _meeting_point(place, interface)
        if place.rank == 0:
            listener = listen(_bind_address(place, address, interface), port)
    store = serve(listener, timeout) if listener else TCPStore(address, port, None, False, timeout, wait_for_workers=False)
    if place.agent_store:  # it outlives the attempts
        name = attempt(PrefixStore(f"distflash/{place.job}", store), place.rank, place.size, timeout)
        place = replace(place, job=f"{place.job}/{name}")
    return PrefixStore(f"distflash/{place.job}", store), place, listener is not None


def attempt(store: Store, rank: int, size: int, timeout: timedelta) -> str:
    """A name that all ranks of this attempt share and no earlier one had. Raises RuntimeError if some rank does not come in time.

    Restart counts are no such name: each torchrun agent counts the failures that it saw itself. Rank 0 makes one up and tells whoever
    asks under a word of its own, until all have answered under that name; what ranks that are gone have asked is answered in vain.
    """
    own = uuid.uuid4().hex
    if rank > 0:
        store.set(f"ask/{rank}", own)
        name = store.get(f"told/{own}").decode()
        store.set(f"here/{name}/{rank}", "")
        return name
    missing, told, deadline = set(range(1, size)), set[str](), time.monotonic() + timeout.total_seconds()
    while missing:
        asking = [r for r in sorted(missing) if store.check([f"ask/{r}"])]
        for word in {store.get(f"ask/{r}").decode() for r in asking} - told:
            store.set(f"told/{word}", own)
            told.add(word)
        missing -= {r for r in asking if store.check([f"here/{own}/{r}"])}
        if missing and time.monotonic() > deadline:
            raise RuntimeError(f"ranks {sorted(missing)} did not come within {timeout.total_seconds():.0f} s: see what became of them")
        time.sleep(POLL if missing else 0)
    return own


def connect_again(store: Store, timeout: timedelta) -> Store:
    """Another connection to the store that `meet` returned: requests on one wait for each other."""
    from torch.distributed import PrefixStore, TCPStore

    while isinstance(store, PrefixStore):
        store = store.underlying_store
    assert isinstance(store, TCPStore)
    return TCPStore(store.host, store.port, None, False, timeout, wait_for_workers=False)


def _reachable(place: Place) -> tuple[str, int]:
    if place.address is None or place.port is None:
        raise ValueError(
            f"{place.launcher}: expected MASTER_ADDR and MASTER_PORT, got {place.address} and {place.port}: start again from a clean shell"
        )
    return place.address, place.port


def _meeting_point(place: Place, interface: str | None) -> tuple[str, int]:
    """Where ranks other than 0 connect to when no MPI broadcast tells them."""
    address, port = _reachable(place)
    if not place.one_host:
        if place.launcher == "slurm" and interface is None and "MASTER_ADDR" not in os.environ:
            raise _unnamed_interface()
        return address, port
    return (interface_address(interface) if interface else LOOPBACK), port


def _bind_address(place: Place, address: str, interface: str | None) -> str:
    """The one address rank 0 listens on, checked to be the one that the others were told."""
    if place.one_host:
        return address
    try:
        told = socket.getaddrinfo(address, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
        raise RuntimeError(
            f"rank 0 cannot resolve its own name {address!r} ({error.strerror}): export MASTER_ADDR=<its IP address>"
        ) from error
    if str(told).startswith("127."):
        raise RuntimeError(f"on rank 0 {address!r} is {told}, which other hosts cannot reach: export MASTER_ADDR=<its IP address>")
    if interface and interface_address(interface) != told:
        raise RuntimeError(
            f"the others connect to {address!r} ({told}), but interface {interface} of rank 0 is {interface_address(interface)}: "
            f"export MASTER_ADDR={interface_address(interface)}"
        )
    return str(told)


def _mpi(place: Place, interface: str | None) -> tuple[Place, socket.socket | None]:
    """Complete the place through MPI: local ranks by shared memory domain, rank 0's address by a broadcast of bytes.

    MPI only introduces the ranks to each other. If this function started MPI it also finalises it: a rank that dies later then
    leaves at once and mpirun stops the others, where MPI_Finalize at exit would wait for them for ever. Programs that use MPI
    themselves import mpi4py.MPI before distflash.init().
    """
    theirs = "mpi4py.MPI" in sys.modules
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise RuntimeError(
            f"mpirun started this process, but mpi4py cannot load MPI ({error}): "
            "pip install 'distflash[mpi]', or export MASTER_ADDR and MASTER_PORT"
        ) from error
    world = MPI.COMM_WORLD
    if world.Get_size() != place.size or world.Get_rank() != place.rank:
        raise RuntimeError(
            f"mpirun says rank {place.rank} of {place.size}, mpi4py says {world.Get_rank()} of {world.Get_size()}: "
            "mpi4py was built for another MPI; reinstall it against this mpirun's, or export MASTER_ADDR and MASTER_PORT"
        )
    local = world.Split_type(MPI.COMM_TYPE_SHARED)
    place = replace(place, local_rank=local.Get_rank(), local_size=local.Get_size())
    local.Free()

    message, listener = bytearray(MPI_MESSAGE), None
    if place.rank == 0:
        text, listener = _invite(place, interface)
        message[: len(text)] = text
    world.Bcast([message, MPI.BYTE], root=0)
    if not theirs:
        MPI.Finalize()
    verdict, _, rest = message.rstrip(b"\0").decode(errors="replace").partition(" ")
    if verdict != "ok":
        raise RuntimeError(rest)
    address, port = rest.split()
    if not HOST.fullmatch(address):
        raise RuntimeError(f"rank 0 announced {address!r}, expected a host name or an IP address: export MASTER_ADDR")
    return replace(place, address=address, port=int(port)), listener


def _invite(place: Place, interface: str | None) -> tuple[bytes, socket.socket | None]:
    """What rank 0 broadcasts: where it listens, or why it cannot, so that no rank is left waiting."""
    try:
        if interface:
            address = interface_address(interface)
        elif place.one_host:
            address = LOOPBACK
        elif place.address:
            address = _bind_address(place, place.address, None)
        else:
            raise _unnamed_interface()
        listener = listen(address, place.port or 0)
    except (ValueError, RuntimeError) as error:
        return f"no {error}".encode()[:MPI_MESSAGE], None
    return f"ok {address} {listener.getsockname()[1]}".encode(), listener


def named_interface(interface: str | None) -> str | None:
    """The interface that was asked for: the argument, else DISTFLASH_INTERFACE."""
    name = interface or os.environ.get("DISTFLASH_INTERFACE") or None
    if name is not None and name not in _interfaces():
        raise ValueError(f"expected one of this host's interfaces {_interfaces()}, got {name!r}: name one of them")
    return name


def use_interface(interface: str | None, one_host: bool) -> None:
    """Keep gloo's and NCCL's own sockets to one interface: loopback on one host. What the user exported stays."""
    if interface is None and one_host:
        interface = next((name for name in _interfaces() if name in ("lo", "lo0")), None)
    if interface is None:
        return
    os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")  # "=": this very name, not a prefix


def avoid_multicast() -> None:
    """Leave NVLink multicast off: nothing here needs it, and a job that dies with it can upset its host. What was exported stays."""
    for name, value in NO_MULTICAST.items():
        os.environ.setdefault(name, value)


def interface_address(interface: str) -> str:
    """The IPv4 address of an interface."""
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            request = struct.pack("256s", interface.encode()[:15])
            return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), 0x8915, request)[20:24])  # SIOCGIFADDR
        except OSError as error:
            raise ValueError(
                f"interface {interface!r} must have an IPv4 address ({error.strerror}): name one of {_interfaces()}"
            ) from error


def _interfaces() -> list[str]:
    return [name for _, name in socket.if_nameindex()]


def _unnamed_interface() -> ValueError:
    return ValueError(
        "several hosts need a network interface that is named on purpose, got none: "
        f'distflash.init(interface="eth0") or DISTFLASH_INTERFACE=eth0 (here: {_interfaces()}), or export MASTER_ADDR and MASTER_PORT'
    )
