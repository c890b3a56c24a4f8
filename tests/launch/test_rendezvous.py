"""launch/rendezvous.py: the store listens where it should and nowhere else."""

import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import HashStore

from distflash.launch import rendezvous
from distflash.launch.environment import Place

MINUTE = timedelta(seconds=60)
LOOPBACK_HEX = ("0100007F", "00000000000000000000000001000000")


def listeners(port):
    """The addresses, in /proc's hexadecimal, that listen on `port`."""
    found = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            _, local, _, state = line.split()[:4]
            address, _, number = local.partition(":")
            if state == "0A" and int(number, 16) == port:
                found.append(address)
    return found


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("launcher", ["env", "deepspeed", "slurm"])
def test_one_host_meets_on_loopback_alone_whatever_its_name(launcher):
    port = free_port()
    places = [Place(launcher, rank, 2, rank, 2, "some-host-name", port, job="j") for rank in range(2)]
    store, _, serves = rendezvous.meet(places[0], MINUTE, None)
    assert serves and listeners(port) == ["0100007F"]
    other, _, serves = rendezvous.meet(places[1], MINUTE, None)
    assert not serves
    other.set("key", "value")
    assert store.get("key") == b"value"


def test_a_rank_may_come_before_the_store():
    port = free_port()
    late = threading.Timer(0.5, lambda: kept.append(rendezvous.meet(Place("env", 0, 2, 0, 2, "localhost", port), MINUTE, None)))
    kept: list = []
    late.start()
    store, _, _ = rendezvous.meet(Place("env", 1, 2, 1, 2, "localhost", port), MINUTE, None)
    late.join()
    store.set("key", "value")
    assert kept[0][0].get("key") == b"value"


def test_jobs_and_attempts_do_not_see_each_others_keys():
    port = free_port()
    first, _, _ = rendezvous.meet(Place("env", 0, 1, 0, 1, "localhost", port, job="a/0"), MINUTE, None)
    second, _, _ = rendezvous.meet(Place("env", 1, 2, 1, 2, "localhost", port, job="a/1"), MINUTE, None)
    first.set("key", "stale")
    assert not second.check(["key"])


def test_an_attempt_has_one_name_on_all_ranks_whatever_ranks_that_are_gone_have_left_in_the_store():
    store = HashStore()
    store.set("ask/1", "a word of a rank that is gone")
    store.set("here/0/2", "")
    names = [together(3, store), together(3, store), together(2, store), together(1, store)]
    assert all(len(set(found)) == 1 for found in names) and len({found[0] for found in names}) == 4


def together(size, store):
    with ThreadPoolExecutor(size) as pool:  # the others first: they find what the attempt before has left
        found = [pool.submit(rendezvous.attempt, store, rank, size, MINUTE) for rank in reversed(range(size))]
        return [name.result() for name in found]


def test_ranks_that_do_not_come_to_an_attempt_are_named():
    store = HashStore()
    store.set("ask/2", "a word of a rank that is gone")
    with pytest.raises(RuntimeError, match=r"ranks \[1, 2\] did not come within 0 s"):
        rendezvous.attempt(store, 0, 3, timedelta(seconds=0.1))


def test_a_port_in_use_is_named_with_the_cure():
    with rendezvous.listen("127.0.0.1") as taken, pytest.raises(RuntimeError, match="free it, or set MASTER_PORT"):
        rendezvous.listen("127.0.0.1", taken.getsockname()[1])


def test_several_hosts_need_an_interface_named_on_purpose(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ValueError, match=r'distflash.init\(interface="eth0"\) or DISTFLASH_INTERFACE'):
        rendezvous.meet(Place("slurm", 1, 4, 1, 2, "node1", 15000), MINUTE, None)
    verdict, listener = rendezvous._invite(Place("mpi", 0, 4, 0, 2), None)
    assert verdict.startswith(b"no several hosts need") and listener is None


def test_rank_0_refuses_an_address_that_others_cannot_reach():
    with pytest.raises(RuntimeError, match=r"is 127.0.0.1, which other hosts cannot reach: export MASTER_ADDR"):
        rendezvous.meet(Place("env", 0, 4, 0, 2, "localhost", free_port()), MINUTE, None)


def test_mpi_rank_0_invites_to_loopback_on_one_host():
    text, listener = rendezvous._invite(Place("mpi", 0, 2, 0, 2), None)
    assert listener is not None
    with listener:
        port = listener.getsockname()[1]
        assert text == f"ok 127.0.0.1 {port}".encode() and listeners(port) == ["0100007F"]


def test_an_interface_is_taken_from_the_argument_then_the_environment(monkeypatch):
    monkeypatch.delenv("DISTFLASH_INTERFACE", raising=False)
    assert rendezvous.named_interface(None) is None
    monkeypatch.setenv("DISTFLASH_INTERFACE", "lo")
    assert rendezvous.named_interface(None) == "lo"
    assert rendezvous.interface_address("lo") == "127.0.0.1"
    with pytest.raises(ValueError, match=r"expected one of this host's interfaces .*, got 'nope0'"):
        rendezvous.named_interface("nope0")


def test_the_transports_stay_on_loopback_on_one_host_and_keep_what_the_user_set(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "so that it is restored")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    rendezvous.use_interface(None, one_host=False)
    assert "GLOO_SOCKET_IFNAME" not in rendezvous.os.environ
    rendezvous.use_interface(None, one_host=True)
    assert rendezvous.os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    assert rendezvous.os.environ["NCCL_SOCKET_IFNAME"] == "ib0"


def test_nvlink_multicast_stays_off_unless_the_user_exported_otherwise(monkeypatch):
    for name in rendezvous.NO_MULTICAST:
        monkeypatch.setenv(name, "so that it is restored")
        monkeypatch.delenv(name)
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "2")
    rendezvous.avoid_multicast()
    assert [rendezvous.os.environ[name] for name in rendezvous.NO_MULTICAST] == ["2", "1", "1"]
