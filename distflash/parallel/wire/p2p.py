"""Point-to-point messages over torch.distributed: NCCL between GPUs, gloo between CPUs.

Every exchange is one batch, so that no rank waits in a send for a peer that waits in a send. NCCL runs it on its own stream:
`exchange` makes that stream wait for what was enqueued so far, `wait` makes the current stream wait for the messages; the
host waits for neither.
"""

from __future__ import annotations

import socket
import zlib
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from distflash.parallel.wire.base import Pending, SubWire, Wire


class P2PWire:
    """The wire over a ProcessGroup. Creating it gathers one integer a rank: which host it runs on."""

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.rank, self.size = group, group.rank(), group.size()
        backend = dist.get_backend(group)
        self.name = f"p2p ({backend})"
        self.device = torch.device("cuda", torch.cuda.current_device()) if "nccl" in backend else torch.device("cpu")
        self.per_node = self._ranks_per_node()

    def _ranks_per_node(self) -> int:
        """How many consecutive ranks each host holds, or all ranks where hosts hold unequal or scattered runs."""
        host = torch.tensor([zlib.crc32(host_name().encode())], dtype=torch.int64, device=self.device)
        found = [torch.empty_like(host) for _ in range(self.size)]
        dist.all_gather(found, host, group=self.group)
        hosts = [int(h) for h in found]
        per_node = next((n for n in range(1, self.size) if hosts[n] != hosts[0]), self.size)
        runs = [hosts[i : i + per_node] for i in range(0, self.size, per_node)]
        regular = all(len(run) == per_node and len(set(run)) == 1 for run in runs) and len(runs) == len(set(hosts))
        return per_node if regular else self.size

    def exchange(self, sends: Mapping[int, Tensor], recvs: Mapping[int, Tensor]) -> Pending:
        post = [(dist.isend, rank, x) for rank, x in sends.items()] + [(dist.irecv, rank, x) for rank, x in recvs.items()]
        ops = [dist.P2POp(op, x, group=self.group, group_peer=rank) for op, rank, x in post if x.numel()]
        return _Posted(dist.batch_isend_irecv(ops) if ops else [], [x for *_, x in post])

    def all_reduce(self, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total, group=self.group)
        return total

    def sub(self, members: Sequence[int]) -> Wire:
        return SubWire(self, members, max(1, self.per_node * len(members) // self.size))


class _Posted:
    def __init__(self, works: list[dist.Work], buffers: list[Tensor]):
        self.works, self.buffers = works, buffers

    def wait(self) -> None:
        for work in self.works:
            work.wait()
        self.works, self.buffers = [], []


def host_name() -> str:
    """What tells hosts apart."""
    return socket.gethostname()
