"""Tile sizes as data: one fixed configuration a (pass, architecture family, element size, head size). No autotuning: it costs minutes.

`rows` is the block of the tile table that a program owns, `columns` the step in which it walks the entries. Shared memory must fit the
family's smallest member (compile_check holds the limits) and the 16-bit configurations of sm_90 must not spill.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

WHOLE, EVERY = 1, 2  # steps that load through descriptors: those that need no mask; all


@dataclass(frozen=True)
class Config:
    """Tile sizes of a program, its warps, and how many steps its loads run ahead.

    boxes: the steps that load through descriptors (TMA) where the tensors' strides allow it, WHOLE or EVERY; 0 is none.
    overlap (forward): the product with the values runs a step late, beside the next exponentials.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    boxes: int = 0
    overlap: bool = False

    def __post_init__(self) -> None:
        for value in (self.rows, self.columns, self.warps):
            if value < 1 or value & (value - 1):
                raise ValueError(f"rows, columns and warps are powers of two, got {self}")


PASSES = ("forward", "dkv", "dq")
_WIDTHS = (64, 128, 256)  # of the padded head; the columns of the tables below
_HOPPER = {
    "forward": (Config(128, 64, 4, 3, WHOLE), Config(64, 64, 4, 2, WHOLE, overlap=True), Config(128, 32, 8, 3)),
    "dkv": (Config(64, 64, 4, 3, WHOLE), Config(64, 64, 4, 2, EVERY), Config(64, 32, 8, 2)),
    "dq": (Config(64, 64, 4, 3, EVERY), Config(128, 64, 8, 3), Config(64, 32, 4, 2)),
}
_BLACKWELL = {  # at D = 256 the accumulators of larger blocks need more than the 512 columns of tensor memory
    "forward": (Config(128, 128, 8, 2), Config(128, 64, 8, 3), Config(128, 32, 8, 3)),
    "dkv": (Config(128, 64, 8, 2), Config(64, 32, 4, 3), Config(32, 32, 4, 1)),
    "dq": (Config(128, 64, 8, 3), Config(128, 64, 8, 3), Config(64, 32, 4, 2)),
}
_AMPERE = {  # fits the 99 KB of sm_86, sm_89 and sm_120 too
    "forward": (Config(128, 64, 4, 2), Config(128, 32, 4, 2), Config(64, 32, 4, 2)),
    "dkv": (Config(64, 64, 4, 2), Config(64, 32, 4, 2), Config(32, 32, 4, 1)),
    "dq": (Config(64, 64, 4, 2), Config(64, 32, 4, 2), Config(32, 32, 4, 1)),
}
_CDNA = {
    "forward": (Config(128, 64, 4, 1), Config(128, 32, 4, 1), Config(64, 32, 4, 1)),
    "dkv": (Config(64, 64, 4, 1), Config(64, 32, 4, 1), Config(32, 32, 4, 1)),
    "dq": (Config(64, 64, 4, 1), Config(64, 32, 4, 1), Config(32, 32, 4, 1)),
}
_FP32 = {  # exact fp32 dots run on the FMA units, operands in registers
    "forward": (Config(32, 32, 4, 1), Config(32, 32, 4, 1), Config(16, 16, 4, 1)),
    "dkv": (Config(32, 32, 4, 1), Config(32, 16, 4, 1), Config(16, 16, 4, 1)),
    "dq": (Config(32, 32, 4, 1), Config(32, 16, 4, 1), Config(16, 16, 8, 1)),
}
# with softcap, ALiBi or dropout, which take instructions and registers a score. Each warp of a dot whose result goes into another has
# 16 rows to itself, on sm_80 and sm_90: with more warps than rows / 16 some would compute the same scores
_ASKED_HOPPER = {
    "forward": (Config(64, 64, 4, 2), Config(128, 64, 8, 2), Config(128, 32, 8, 1)),
    "dkv": (Config(64, 32, 4, 2), Config(64, 32, 4, 2), Config(32, 32, 4, 1)),
    "dq": (Config(64, 64, 4, 2), Config(128, 64, 8, 2), Config(128, 32, 8, 1)),
}
_ASKED_BLACKWELL = {
    "forward": (Config(128, 32, 8, 2), Config(128, 32, 8, 2), Config(64, 32, 8, 1)),
    "dkv": (Config(64, 32, 8, 2), Config(64, 32, 8, 2), Config(32, 32, 4, 1)),
    "dq": (Config(64, 32, 8, 2), Config(64, 32, 8, 2), Config(32, 32, 4, 1)),
}
_ASKED_AMPERE = {
    "forward": (Config(128, 32, 8, 2), Config(128, 32, 8, 2), Config(64, 32, 8, 1)),
    "dkv": (Config(64, 32, 4, 2), Config(128, 16, 8, 2), Config(32, 32, 4, 1)),
    "dq": (Config(64, 32, 4, 2), Config(64, 32, 4, 2), Config(32, 32, 4, 1)),
}
_ASKED_CDNA = {
    "forward": (Config(128, 32, 4, 1), Config(128, 32, 4, 1), Config(64, 32, 4, 1)),
    "dkv": (Config(64, 32, 4, 1), Config(64, 32, 4, 1), Config(32, 32, 4, 1)),
    "dq": (Config(64, 32, 4, 1), Config(64, 32, 4, 1), Config(32, 32, 4, 1)),
}
_SMALL = {
    "forward": (Config(64, 64, 4, 1, WHOLE, overlap=True),) * 3,
    "dkv": (Config(64, 64, 4, 1, EVERY),) * 3,
    "dq": (Config(64, 64, 4, 1, WHOLE),) * 3,
}
FAMILIES = {"sm90": _HOPPER, "sm100": _BLACKWELL, "sm80": _AMPERE, "gfx9": _CDNA, "interpreter": _SMALL}
_ASKED = {"sm90": _ASKED_HOPPER, "sm100": _ASKED_BLACKWELL, "sm80": _ASKED_AMPERE, "gfx9": _ASKED_CDNA, "interpreter": _SMALL}


@cache
def family(device: torch.device) -> str:
    """The architecture family of a device; what is unknown gets the smallest tiles of its vendor."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip:
        return "gfx9"
    return {9: "sm90", 10: "sm100"}.get(torch.cuda.get_device_capability(device)[0], "sm80")


@cache
def config(pass_: str, arch: str, itemsize: int, width: int, plain: bool = True) -> Config:
    """The configuration of a pass for a padded head of `width`; not `plain`: with softcap, ALiBi or dropout."""
    table = (FAMILIES if plain else _ASKED)[arch]
    if arch != "interpreter" and itemsize == 4:
        table = _FP32
    return table[pass_][next(n for n, limit in enumerate(_WIDTHS) if width <= limit)]


def pad(dim: int) -> int:
    """A head size as the power of two that tl.dot works on."""
    return max(16, 1 << (dim - 1).bit_length())
