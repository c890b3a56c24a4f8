"""What this machine can do, as a `distflash.cost.devices.Device`: rates of matmuls, memory, kernels and, with several ranks, of links.

Legend: N tokens, H heads, D head dim.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from distflash.cost.devices import Device, Link, Rate
    from distflash.launch.world import World


@dataclass(frozen=True)
class Sizes:
    """How large what is timed is."""

    matrix: int
    copied: int  # bytes
    tokens: tuple[int, int]  # two lengths, to tell what a row costs from what a pair costs
    heads: int
    head_dims: tuple[int, ...]
    messages: tuple[int, ...]  # bytes
    repeats: int = 5


GPU = Sizes(8192, 1 << 30, (4096, 16384), 16, (64, 128), (1 << 20, 8 << 20, 32 << 20, 128 << 20, 512 << 20))
CPU = Sizes(1024, 1 << 28, (256, 1024), 4, (64,), (1 << 16, 1 << 20, 1 << 24))


def measure(world: World, sizes: Sizes | None = None) -> Device:
    """This rank's device, and the links to its neighbours. A collective if there are several ranks; they must share a host.

    Raises ValueError if ranks are on several hosts: the slower of two kinds of links would be measured.
    """
    import torch

    from distflash.cost.devices import Device, find

    gpu = world.device.type == "cuda"
    sizes = sizes or (GPU if gpu else CPU)
    dtype = torch.bfloat16 if gpu else torch.float32
    x = torch.randn(sizes.matrix, sizes.matrix, device=world.device, dtype=dtype)
    y = torch.empty(sizes.copied, dtype=torch.uint8, device=world.device).fill_(1)
    z, tiny = torch.empty_like(y), torch.zeros(1, device=world.device)
    matmul = 2 * sizes.matrix**3 / _timed(lambda: x @ x, world.device, sizes.repeats)
    hbm = 2 * sizes.copied / _timed(lambda: z.copy_(y), world.device, sizes.repeats)
    launch = _timed(lambda: [tiny.add_(1) for _ in range(100)], world.device, sizes.repeats) / 100
    kernels: dict[str, dict[int, Rate]] = {"forward": {}, "backward": {}}
    for dim in sizes.head_dims:
        for pass_, rate in _rates(world.device, dtype, sizes, dim).items():
            kernels[pass_][dim] = rate
    basis = f"measured by distflash doctor, torch {torch.__version__}"
    common = {"matmul": matmul, "hbm": hbm, "launch": launch, "kernels": kernels, "itemsize": dtype.itemsize}
    if gpu:
        properties = torch.cuda.get_device_properties(world.device)
        shared = getattr(properties, "shared_memory_per_block_optin", 64 << 10)
        about = properties.name, float(properties.total_memory), shared, properties.multi_processor_count
    else:
        memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        about = "CPU", memory, 1 << 20, torch.get_num_threads()
    name, memory, on_chip, processors = about
    device = Device(name, memory=memory, on_chip=on_chip, processors=processors, wires={}, basis=basis, **common)
    try:
        known = find(name)
    except ValueError:
        known = None
    if world.size > 1:
        drag = 1.0 if known is None else known.wires["p2p"].drag
        return replace(device, wires={"p2p": _link(world, sizes, drag)}, basis=f"{basis}; that kernels are slowed by transfers is assumed")
    if known is not None:
        return replace(device, wires=known.wires, basis=f"{basis}; links are not: {known.basis}")
    return replace(device, basis=f"{basis}; no links: measure with several ranks")


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run, until its last kernel is done."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _timed(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Seconds of a run, the median; the first is not counted."""
    return median([seconds(run, device) for _ in range(repeats + 1)][1:])


def _rates(device: torch.device, dtype: torch.dtype, sizes: Sizes, dim: int) -> dict[str, Rate]:
    """Seconds a N² + b N of the default kernel at two lengths, full attention, as `Rate`s."""
    import torch

    import distflash
    from distflash.cost.devices import Rate
    from distflash.cost.traffic import PASSES, Shape

    times: dict[str, list[float]] = {pass_: [] for pass_ in PASSES}
    for n in sizes.tokens:
        q, k, v, dout = (torch.randn(1, n, sizes.heads, dim, device=device, dtype=dtype) for _ in range(4))
        times["forward"].append(_timed(lambda: distflash.attention(q, k, v), device, sizes.repeats))  # noqa: B023  run at once
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = distflash.attention(q, k, v)
        times["backward"].append(_timed(lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True), device, sizes.repeats))  # noqa: B023
    (n1, n2), found = sizes.tokens, {}
    for pass_, (t1, t2) in times.items():
        a = (t2 / n2 - t1 / n1) / (n2 - n1)
        if a <= 0 or (b := t1 / n1 - a * n1) < 0:  # noise: no start can be told
            a, b = t2 / n2**2, 0.0
        found[pass_] = Rate(Shape(sizes.heads, sizes.heads, dim, dim).flops(pass_) / a, b / a / 128)
    return found


def _link(world: World, sizes: Sizes, drag: float) -> Link:
    """A message to the next rank while one comes from the rank before, by size; the slowest rank counts."""
    import torch

    from distflash import SequenceParallel
    from distflash.cost.devices import Link

    wire = SequenceParallel().wire
    if wire.per_node < wire.size:
        raise ValueError(f"links are measured inside a host, but {wire.size} ranks are on several: start them on one")
    points: list[tuple[float, float]] = []
    for nbytes in (1, *sizes.messages):
        out, coming = (torch.zeros(nbytes, dtype=torch.uint8, device=wire.device) for _ in range(2))
        sends, receives = {(wire.rank + 1) % wire.size: out}, {(wire.rank - 1) % wire.size: coming}
        mine = _timed(lambda: wire.exchange(sends, receives).wait(), wire.device, sizes.repeats)  # noqa: B023  run at once
        slots = torch.zeros(wire.size, dtype=torch.float64, device=wire.device)
        slots[wire.rank] = mine
        slowest = float(wire.all_reduce(slots).max())
        points.append((0.0 if nbytes == 1 else float(nbytes), max(slowest, points[-1][1] if points else 0.0)))
    return Link(tuple(points), drag)
