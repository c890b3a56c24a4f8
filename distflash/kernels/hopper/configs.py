"""Launch configurations by head size: data only. `check.py` compiles every one of them; `benchmarks/tune.py` measures others."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ForwardConfig:
    """BM = 64 * consumers query rows a block, block_n keys a tile, `stages` buffers of K and of V."""

    consumers: int
    block_n: int
    stages: int
    late_cast: bool  # carry probabilities over the loop in fp32 (forward.step)
    poly: int = 0  # of each 4 exponentials (2 of each 4 if 2), how many by polynomial
    persistent: bool = True  # one program an SM; False: one an item
    regs: tuple[int, int] = (240, 24)  # consumer, producer
    max_regs: int = 168  # a thread at launch: registers * warps must be 64 Ki

    @property
    def block_m(self) -> int:
        return 64 * self.consumers


@dataclass(frozen=True)
class BackwardConfig:
    """block_m query rows a step against 128 keys a program, `stages` buffers of Q and of dO."""

    block_m: int
    stages: int
    overlap: bool  # the next step's K Qᵀ runs beside this step's dQ and dK
    late: bool  # dV is issued after dS, not beside it: fewer registers
    regs: tuple[int, int] = (240, 24)
    max_regs: int = 168


_THREE = {"regs": (160, 32), "max_regs": 128}  # three consumers: four warpgroups share the register file

FORWARD = {
    64: ForwardConfig(2, 128, 3, late_cast=False),
    128: ForwardConfig(2, 128, 2, late_cast=False),
}
# what `benchmarks/bench_kernel.py --variants` and `benchmarks/tune.py` try beside the shipped ones; the first is the surely right one
FORWARD_VARIANTS = {
    64: {
        "simple": ForwardConfig(2, 128, 2, late_cast=False, persistent=False),
        "wg3": ForwardConfig(3, 128, 2, late_cast=False, **_THREE),  # spills row numbers once an item, so never shipped: 0 is the rule
        "poly1": ForwardConfig(2, 128, 3, late_cast=False, poly=1),
        "poly2": ForwardConfig(2, 128, 3, late_cast=False, poly=2),
        "wg3poly1": ForwardConfig(3, 128, 2, late_cast=False, poly=1, **_THREE),
        "wg3poly2": ForwardConfig(3, 128, 2, late_cast=False, poly=2, **_THREE),
        "late": ForwardConfig(2, 128, 3, late_cast=True),
    },
    128: {
        "simple": ForwardConfig(2, 128, 2, late_cast=False, persistent=False),
        "late": ForwardConfig(2, 128, 2, late_cast=True),
        "nb3": ForwardConfig(2, 128, 3, late_cast=False),
        "poly1": ForwardConfig(2, 128, 2, late_cast=False, poly=1),
    },
    256: {  # not shipped: there is no backward, and merging with a running partial spills
        "plain": ForwardConfig(2, 64, 2, late_cast=False),
        "simple": ForwardConfig(2, 64, 2, late_cast=False, persistent=False),
        "late": ForwardConfig(2, 64, 2, late_cast=True),
    },
}

BACKWARD = {
    64: BackwardConfig(64, 2, overlap=True, late=False),
    128: BackwardConfig(64, 2, overlap=False, late=False),
}
BACKWARD_VARIANTS = {
    64: {
        "simple": BackwardConfig(64, 2, overlap=False, late=True),
        "early": BackwardConfig(64, 2, overlap=False, late=False),
        "m128": BackwardConfig(128, 2, overlap=True, late=True),
        "m128s": BackwardConfig(128, 2, overlap=False, late=True),
        "nb4": BackwardConfig(64, 4, overlap=True, late=False),
    },
    128: {
        "simple": BackwardConfig(64, 2, overlap=False, late=True),
        "overlap": BackwardConfig(64, 2, overlap=True, late=True),
    },
}
