"""Point-to-point messages over torch.distributed: NCCL between GPUs, gloo between CPUs.

Every exchange is one batch, so that no rank waits in a send for a peer that waits in a send. Gloo's messages are tagged with all calls that
led to them: those of a rank that left one out are taken for no others, and whoever waits for it hears from heartbeats who it is. NCCL knows
no tags, and runs the batch on its own stream: `exchange` makes that stream wait for what was enqueued so far, `wait` makes the current
stream wait for the messages; the host waits for neither.
"""

from __future__ import annotations

import secrets
import socket
import time
import zlib
from collections.abc import Mapping, Sequence
from itertools import groupby
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from distflash.parallel.wire import journal
from distflash.parallel.wire.base import Pending, SubWire, Wire
from distflash.parallel.wire.journal import DistFlashPeerLost, Journal, Now, blaming

_PAUSE = 5e-4  # seconds between two looks into the store, growing
_JOURNALS: WeakKeyDictionary[dist.ProcessGroup, tuple[Journal, dist.Store]] = WeakKeyDictionary()


class P2PWire:
    """The wire over a ProcessGroup. Creating it gathers two integers a rank: which host it runs on, and a random number.

    Wires over one group share its journal, and rank 0's number tells their keys in the store from all others.
    """

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.rank, self.size = group, group.rank(), group.size()
        backend = dist.get_backend(group)
        self.name = f"p2p ({backend})"
        self.device = torch.device("cuda", torch.cuda.current_device()) if "nccl" in backend else torch.device("cpu")
        mine = torch.tensor([zlib.crc32(host_name().encode()), secrets.randbits(62)], dtype=torch.int64, device=self.device)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        with blaming():
            dist.all_gather(found, mine, group=group)
            hosts, numbers = torch.stack(found).T.tolist()
        self.per_node, self.unequal = _ranks_per_node(hosts)
        if group not in _JOURNALS:
            store = dist.PrefixStore(f"distflash/{numbers[0]:x}", dist.distributed_c10d._get_process_group_store(group))
            _JOURNALS[group] = Journal(f"{group.group_desc} {group.group_name}", f"{numbers[0]:x}"), store
            journal.watched[f"{numbers[0]:x}"] = _JOURNALS[group][0]
        self.journal, self.store = _JOURNALS[group]
        self.patience: float = self.store.timeout.total_seconds()  # type: ignore[attr-defined]  # it has one, its stub has not

    def exchange(self, sends: Mapping[int, Tensor], recvs: Mapping[int, Tensor]) -> Pending:
        post = [(dist.isend, rank, x) for rank, x in sends.items()] + [(dist.irecv, rank, x) for rank, x in recvs.items()]
        tag = self.journal.made.path
        ops = [dist.P2POp(op, x, group=self.group, group_peer=rank, tag=tag) for op, rank, x in post if x.numel()]
        with blaming():
            return _Posted(dist.batch_isend_irecv(ops) if ops else [], [x for *_, x in post])

    def all_reduce(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":  # gloo's own has no tag
            return SubWire(self, range(self.size), self.per_node).all_reduce(x)
        total = x.clone()
        with blaming():
            dist.all_reduce(total, group=self.group)
        return total

    def sub(self, members: Sequence[int]) -> Wire:
        return SubWire(self, members, max(1, self.per_node * len(members) // self.size))

    def post(self, round: int, note: str) -> None:
        with blaming():
            self.store.set(f"{round}/{self.rank}", note)
            if round > 2:
                self.store.delete_key(f"{round - 2}/{self.rank}")

    def read(self, round: int, seconds: float) -> dict[int, str]:
        keys, end, pause = {rank: f"{round}/{rank}" for rank in range(self.size)}, time.monotonic() + seconds, _PAUSE
        with blaming():
            while not self.store.check([*keys.values()]):  # not store.wait: it is loud about every time that it waits in vain
                if journal.watcher is not None and journal.watcher.lost is not None:
                    raise DistFlashPeerLost(journal.watcher.lost)
                if time.monotonic() > end:
                    keys = {rank: key for rank, key in keys.items() if self.store.check([key])}
                    break
                time.sleep(pause)
                pause = min(1.5 * pause, 100 * _PAUSE)
            return {rank: self.store.get(key).decode() for rank, key in keys.items()}

    def others(self) -> dict[int, Now]:
        watcher = journal.watcher
        if watcher is None:
            return {}
        seen = {rank: watcher.now(dist.get_global_rank(self.group, rank)) for rank in range(self.size) if rank != self.rank}
        return {rank: now for rank, now in seen.items() if now is not None}


class _Posted:
    def __init__(self, works: list[dist.Work], buffers: list[Tensor]):
        self.works, self.buffers = works, buffers

    def wait(self) -> None:
        with blaming():
            for work in self.works:
                work.wait()
        self.works, self.buffers = [], []


def _ranks_per_node(hosts: list[int]) -> tuple[int, str | None]:
    """(consecutive ranks of each host, None); where hosts hold unequal or scattered runs (1, which): none are sure to share one."""
    runs = [len([*run]) for _, run in groupby(hosts)]
    if len({*runs}) == 1 and len(runs) == len({*hosts}):
        return runs[0], None
    return 1, f"{len(runs)} runs of {' or '.join(map(str, sorted({*runs})))} on {len({*hosts})} hosts"


def host_name() -> str:
    """What tells hosts apart."""
    return socket.gethostname()
