"""What devices and links can do, as data: vendors' figures, and what this project measured.

Rates of the kernels come from the results named beside them; where nothing was measured, a share of the peak is assumed, and `basis`
says so. Bandwidths are in bytes a second and one direction; a tile is 128 keys against 128 queries.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

GB, MiB = 10**9, 1 << 20


class Rate(NamedTuple):
    """A kernel's seconds are those of its FLOPs, and of `start` tiles more for each block of 128 rows that it works on."""

    flops: float  # FLOP/s of long rows
    start: float


@dataclass(frozen=True)
class Link:
    """Seconds of a message, linear between measured points (bytes, seconds); beyond the last at its rate.

    `drag`: computing beside a transfer loses this share of the transfer's time. `host`: seconds of the host that a transfer takes.
    """

    points: tuple[tuple[float, float], ...]
    drag: float = 0.0
    host: float = 0.0

    @classmethod
    def of(cls, latency: float, bandwidth: float, drag: float = 0.0) -> Link:
        return cls(((0, latency), (GB, latency + GB / bandwidth)), drag)

    def seconds(self, nbytes: float) -> float:
        if nbytes <= 0:
            return 0.0
        n = min(max(1, bisect_left(self.points, (nbytes, 0.0))), len(self.points) - 1)
        (x0, t0), (x1, t1) = self.points[n - 1], self.points[n]
        if nbytes > x1:
            return t1 * nbytes / x1
        return t0 + (t1 - t0) * (nbytes - x0) / (x1 - x0)

    @property
    def bandwidth(self) -> float:
        """Of the largest message: nothing goes faster."""
        return max(x / t for x, t in self.points[1:])

    def scaled(self, factor: float) -> Link:
        """The same latency, `factor` times the bandwidth."""
        latency = self.points[0][1]
        return replace(self, points=tuple((x, latency + (t - latency) / factor) for x, t in self.points))


@dataclass(frozen=True)
class Device:
    """One device, and the links to others of its host, by wire."""

    name: str
    matmul: float  # FLOP/s, dense, of the inputs' dtype
    hbm: float
    memory: float  # bytes
    on_chip: int  # bytes of shared memory that a block can use
    processors: int
    launch: float  # seconds of one kernel
    wires: dict[str, Link] = field(hash=False)
    kernels: dict[str, dict[int, Rate]] = field(hash=False)  # by pass and head size
    basis: str  # where the rates of kernels and links come from
    itemsize: int = 2  # of the dtype that the rates are of

    def rate(self, pass_: str, head_dim: int) -> tuple[Rate, float]:
        """The rate of a head size, and the factor by which its FLOPs grow where the kernel pads it."""
        table = self.kernels[pass_]
        size = min((d for d in table if d >= head_dim), default=max(table))
        return table[size], max(1.0, size / head_dim)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Device:
        """Raises ValueError if the text is no device."""
        try:
            found: dict[str, Any] = json.loads(text)
            wires = {name: Link(**link | {"points": tuple((x, t) for x, t in link["points"])}) for name, link in found.pop("wires").items()}
            kernels = {name: {int(d): Rate(*rate) for d, rate in table.items()} for name, table in found.pop("kernels").items()}
            return cls(**found, wires=wires, kernels=kernels)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"this is no device as `distflash doctor --measure` writes one: {error!r}") from error


# H200, NV18, torch 2.11, of 8, 32, 128 and 512 MiB: NCCL send/recv in a ring of 4; copy engines between 2, pulls, the slower way (pushes:
# 326 to 391 GB/s). 20 µs of latency assumed. Drag: attention of 1.8 ms beside 32 and 128 MiB took 1.07 and 1.28 of its time with NCCL,
# whose kernels take SMs, 1.03 and 1.04 with copy engines, which take none but share the HBM; the mean. Host: a round of flags.
_SIZES = (8 * MiB, 32 * MiB, 128 * MiB, 512 * MiB)
_NCCL = Link(((0, 20e-6), *((n, n / (r * GB)) for n, r in zip(_SIZES, (37, 87, 139, 326), strict=True))), drag=0.42)
_COPIES = Link(((0, 20e-6), *((n, n / (r * GB)) for n, r in zip(_SIZES, (297, 355, 369, 371), strict=True))), drag=0.35, host=46e-6)


def _nvlink(generation: float) -> dict[str, Link]:
    return {"p2p": _NCCL.scaled(generation), "symmetric": _COPIES.scaled(generation)}


# `python -m benchmarks.io_model` fits these two numbers to the ten cells of each pair in each run of benchmarks/kernel_table.py's RUNS
_HOPPER = {
    "forward": {64: Rate(559e12, 2.5), 128: Rate(714e12, 2.2), 256: Rate(771e12, 1.9)},
    "backward": {64: Rate(567e12, 3.9), 128: Rate(620e12, 3.4), 256: Rate(515e12, 2.6)},
}
# the same of an H200 at D = 128, from the dense blocks of benchmarks/results/ring_2xh200.json: calls in a row, at the clock that the power
# limit leaves; other head sizes, not measured there, by the ratio of the two devices at this one
_LASTING = {"forward": Rate(639e12, 2.4), "backward": Rate(583e12, 2.1)}
_HOPPER_LASTING = {
    name: {d: Rate(rate.flops * _LASTING[name].flops / table[128].flops, rate.start) for d, rate in table.items()} | {128: _LASTING[name]}
    for name, table in _HOPPER.items()
}


def _assumed(peak: float, forward: float = 0.50, backward: float = 0.43) -> dict[str, dict[int, Rate]]:
    """The shares of the peak that the portable kernel has on an H100 at D = 128 (benchmarks/results/portable_h100_80gb_hbm3.json)."""
    return {name: {d: Rate(peak * share, 3.5) for d in (64, 128, 256)} for name, share in (("forward", forward), ("backward", backward))}


_MEASURED = "kernels measured on an H100, at D = 128 on two H200, links on 2 and 4 H200"
_GUESSED = "kernels assumed: the portable kernel's share of the peak on an H100; links: H200's, scaled by the vendor's bandwidth"

# Datasheets: NVIDIA A100 80GB SXM (2020), H100 SXM (2022), H200 SXM (2023), HGX B200 (2024); AMD Instinct MI300X (2023). Dense 16-bit
# matmuls; NVLink 600, 900, 900, 1800 GB/s both directions together; MI300X: 128 GB/s both directions between two of eight GPUs.
# Shared memory a block can use: CUDA C++ programming guide, "Technical Specifications per Compute Capability"; CDNA 3 ISA: 64 KB of LDS.
DEVICES = {
    "a100": Device("A100", 312e12, 2039 * GB, 80 * GB, 163 << 10, 108, 5e-6, _nvlink(300 / 450), _assumed(312e12), _GUESSED),
    "h100": Device("H100", 989e12, 3350 * GB, 80 * GB, 227 << 10, 132, 5e-6, _nvlink(1), _HOPPER, _MEASURED),
    "h200": Device("H200", 989e12, 4800 * GB, 141 * GB, 227 << 10, 132, 5e-6, _nvlink(1), _HOPPER_LASTING, _MEASURED),
    "b200": Device("B200", 2250e12, 8000 * GB, 180 * GB, 227 << 10, 148, 5e-6, _nvlink(2), _assumed(2250e12), _GUESSED),
    "mi300x": Device(
        "MI300X", 1307e12, 5300 * GB, 192 * GB, 64 << 10, 304, 8e-6, {"p2p": Link.of(20e-6, 48 * GB, 0.42)}, _assumed(1307e12),
        "kernels assumed: the portable kernel's share of the peak on an H100; links assumed: 3/4 of one xGMI link",
    ),
    "cpu": Device(
        "CPU", 100e9, 20 * GB, 64 * GB, 1 << 20, 8, 2e-5, {"p2p": Link.of(1e-4, 2 * GB, 1.0)}, _assumed(100e9), "a guess: measure it",
        itemsize=4,
    ),
}  # fmt: skip


def network(gigabits: float) -> Link:
    """A NIC of so many Gbit/s for each device. Assumed: 10 µs, nine tenths of the line rate, the drag of NCCL."""
    return Link.of(10e-6, 0.9 * gigabits / 8 * GB, _NCCL.drag)


def find(name: str) -> Device:
    """A device by its name here, by the name that torch gives it, or from a file of `distflash doctor --measure`.

    Raises ValueError if it is none of these.
    """
    if name.endswith(".json"):
        try:
            return Device.from_json(Path(name).read_text())
        except OSError as error:
            raise ValueError(f"cannot read the device in {name!r}: {error.strerror}") from error
    words = name.lower().replace("-", " ").split()
    known = next((key for key in DEVICES if key in words), None)
    if known is None:
        known = ", ".join(DEVICES)
        raise ValueError(f"nothing is known of the device {name!r}: use one of {known}, or measure it: distflash doctor --measure F.json")
    return DEVICES[known]
