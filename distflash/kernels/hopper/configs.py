"""Launch configurations by head size: data only. `check.py` compiles every one of them; `benchmarks/tune.py` measures others."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from distflash.kernels.hopper.compat import LATER

NONE, HALVES, REDUCER = range(3)  # who computes dQ in the one pass (backward.py)


@dataclass(frozen=True)
class ForwardConfig:
    """BM = 64 * consumers query rows a block, block_n keys a tile, `stages` buffers of K and of V."""

    consumers: int
    block_n: int
    stages: int
    q_stages: int = 1  # buffers of Q: with 2, the next item's Q comes during this one
    ahead: bool = False  # the next item's first Q Kᵀ runs beside this item's last P V and epilogue
    staged: bool = False  # out leaves by TMA where it can: through a Q buffer if there are two, else through one of its own
    pingpong: bool = False  # consumers take turns at the tensor cores
    one_bound: bool = False  # masks look at one bound where no segment has another
    named: bool = False  # K and V are given back at named barriers, and a row's sum stays with its four threads until an item's end
    q_regs: int = 0  # columns of Q that a consumer holds in registers: what Q Kᵀ needs not read from shared memory
    anew: bool = False  # a masked tile looks its segment up in memory, not in registers
    persistent: bool = True  # one program an SM; False: one an item
    regs: tuple[int, int] = (240, 24)  # consumer, producer
    max_regs: int = 168  # a thread at launch: registers * warps must be 64 Ki

    @property
    def block_m(self) -> int:
        return 64 * self.consumers


@dataclass(frozen=True)
class KeysConfig:
    """backward.py: block_m query rows a step against 128 keys a program, `stages` buffers of Q and of dO."""

    block_m: int
    stages: int
    overlap: bool  # the next step's K Qᵀ runs beside this step's dQ and dK
    late: bool  # dV is issued after dS, not beside it: fewer registers
    dq: int = HALVES
    kv_regs: int = 0  # of K and V, how many are held in registers: K first
    prompt: bool = False  # lse and delta are read before the matmuls are waited for, dV is issued before dS is fenced
    named: bool = False  # Q and dO are given back together, at a named barrier
    staged: bool = False  # dK and dV leave through buffers of Q and dO by TMA where they can
    hide: bool = False  # where K and V lie is not kept in registers from step to step
    regs: tuple[int, int, int] = (240, 0, 24)  # consumer, reducer, producer
    max_regs: int = 168
    keys = 128


@dataclass(frozen=True)
class RolesConfig:
    """dkv.py: block_m query rows a step against 64 keys a program, `stages` buffers of Q and of dO."""

    block_m: int
    stages: int
    regs: tuple[int, int] = (240, 24)
    max_regs: int = 168
    keys = 64


@dataclass(frozen=True)
class RowsConfig:
    """dq.py: 128 query rows a program, block_n keys a step, `stages` buffers of K, `v_stages` of V."""

    block_n: int
    stages: int
    v_stages: int
    regs: tuple[int, int] = (240, 24)
    max_regs: int = 168


@dataclass(frozen=True)
class BackwardConfig:
    """One pass of five matmuls where there is one, else (and where gradients must be bit-equal) two of four and three."""

    one_pass: KeysConfig | None
    dkv: KeysConfig | RolesConfig
    dq: RowsConfig


def fit(pairs: Iterable[tuple[int, int]], head_dim: int, v_head_dim: int) -> tuple[int, int] | None:
    """The smallest of `pairs` that holds both head sizes, or None."""
    return min((p for p in pairs if p[0] >= head_dim and p[1] >= v_head_dim), key=sum, default=None)


_THREE = {"regs": (160, 32), "max_regs": 128}  # three consumers: four warpgroups share the register file
_AHEAD = {"q_stages": 2, "ahead": True}

# all by tiles of (query and key, value) head size: others are padded to the next pair that holds both (`fit`)
FORWARD = {
    (64, 64): ForwardConfig(3, 128, 2, **_AHEAD, **_THREE, staged=True, pingpong=True),
    (96, 96): ForwardConfig(2, 128, 3, q_stages=2, staged=True, pingpong=True, one_bound=True, q_regs=64),
    (128, 128): ForwardConfig(2, 128, 2, **_AHEAD, staged=True, pingpong=True, one_bound=True, named=True),
    (192, 128): ForwardConfig(2, 128, 2),
    (192, 192): ForwardConfig(2, 64, 3, one_bound=True),
    (256, 256): ForwardConfig(2, 64, 2, ahead=True, staged=True, q_regs=64),
}
_ANEW_64 = ForwardConfig(3, 128, 2, **_AHEAD, **_THREE, pingpong=True, one_bound=True, named=True, anew=True)
if LATER:  # a thread's numbers and addresses stay in registers from partition to partition: the producer needs room for them, too
    _ROOM = (224, 56)
    FORWARD |= {
        (64, 64): _ANEW_64,
        (96, 96): replace(FORWARD[96, 96], q_regs=0),
        (128, 128): ForwardConfig(2, 128, 2, q_stages=2, staged=True, pingpong=True, one_bound=True, regs=_ROOM),
        (192, 128): ForwardConfig(2, 128, 2, regs=_ROOM),
        (256, 256): ForwardConfig(2, 64, 2, ahead=True, anew=True),
    }
# what `benchmarks/bench_kernel.py --variants` and `benchmarks/tune.py` try beside the shipped ones; the first is the surely right one
FORWARD_VARIANTS = {
    (64, 64): {
        "simple": ForwardConfig(2, 128, 2, persistent=False),
        "wg2": ForwardConfig(2, 128, 3),
        "wg3nb3": ForwardConfig(3, 128, 3, **_THREE),
        "plain": ForwardConfig(3, 128, 2, **_THREE),
        "two_q": ForwardConfig(3, 128, 2, q_stages=2, **_THREE),
        "ahead_nb3": ForwardConfig(3, 128, 3, **_AHEAD, **_THREE),
        "ahead": ForwardConfig(3, 128, 2, **_AHEAD, **_THREE),
        "alone": ForwardConfig(3, 128, 2, **_AHEAD, **_THREE, staged=True),
        "named": ForwardConfig(3, 128, 2, **_AHEAD, **_THREE, staged=True, pingpong=True, named=True),
        "named_anew": _ANEW_64,
        "wg2ahead_staged": ForwardConfig(2, 128, 3, **_AHEAD, staged=True),
        "wg2pingpong": ForwardConfig(2, 128, 3, **_AHEAD, staged=True, pingpong=True),
    },
    (96, 96): {
        "simple": ForwardConfig(2, 128, 2, persistent=False),
        "one_q": ForwardConfig(2, 128, 3),
        "ahead": ForwardConfig(2, 128, 3, **_AHEAD),
        "ahead_staged": ForwardConfig(2, 128, 3, **_AHEAD, staged=True),
        "alone": ForwardConfig(2, 128, 3, q_stages=2, staged=True, one_bound=True),
        "not_held": ForwardConfig(2, 128, 3, q_stages=2, staged=True, pingpong=True, one_bound=True),
    },
    (128, 128): {
        "simple": ForwardConfig(2, 128, 2, persistent=False),
        "nb3": ForwardConfig(2, 128, 3),
        "one_q": ForwardConfig(2, 128, 2),
        "two_q": ForwardConfig(2, 128, 2, q_stages=2),
        "ahead": ForwardConfig(2, 128, 2, **_AHEAD),
        "ahead_staged": ForwardConfig(2, 128, 2, **_AHEAD, staged=True),
        "alone": ForwardConfig(2, 128, 2, q_stages=2, staged=True, one_bound=True),
        "pingpong_ahead": ForwardConfig(2, 128, 2, **_AHEAD, staged=True, pingpong=True, one_bound=True),
        "named": ForwardConfig(2, 128, 2, q_stages=2, staged=True, pingpong=True, one_bound=True, named=True),
        "held64": ForwardConfig(2, 128, 2, **_AHEAD, staged=True, pingpong=True, one_bound=True, named=True, q_regs=64),
        "pingpong": ForwardConfig(2, 128, 2, q_stages=2, staged=True, pingpong=True, one_bound=True),
    },
    (192, 128): {
        "simple": ForwardConfig(2, 128, 2, persistent=False),
        "ahead": ForwardConfig(2, 128, 2, ahead=True),
        "pingpong": ForwardConfig(2, 128, 2, pingpong=True),
    },
    (192, 192): {
        "simple": ForwardConfig(2, 64, 2, persistent=False),
        "ahead": ForwardConfig(2, 64, 3, ahead=True),
        "pingpong": ForwardConfig(2, 64, 3, pingpong=True, one_bound=True),
    },
    (256, 256): {
        "simple": ForwardConfig(2, 64, 2, persistent=False),
        "one_q": ForwardConfig(2, 64, 2),
        "ahead": ForwardConfig(2, 64, 2, ahead=True),
        "staged": ForwardConfig(2, 64, 2, staged=True),
        "pingpong": ForwardConfig(2, 64, 2, ahead=True, staged=True, pingpong=True),
        "named": ForwardConfig(2, 64, 2, ahead=True, staged=True, named=True),
        "not_held": ForwardConfig(2, 64, 2, ahead=True, staged=True),
        "anew": ForwardConfig(2, 64, 2, ahead=True, anew=True),
        "held32": ForwardConfig(2, 64, 2, ahead=True, staged=True, q_regs=32),
        "named_held64": ForwardConfig(2, 64, 2, ahead=True, staged=True, named=True, q_regs=64),
    },
}

_REDUCER = {"dq": REDUCER, "regs": (208, 72, 24), "max_regs": 128}  # four warpgroups again

_KEYS_64 = KeysConfig(64, 2, True, False, kv_regs=2, prompt=True, named=True, staged=True, **_REDUCER)
_KEYS_128 = KeysConfig(64, 2, overlap=False, late=True, prompt=True, named=True, staged=True, hide=True)

BACKWARD = {
    (64, 64): BackwardConfig(_KEYS_64, dkv=KeysConfig(64, 4, overlap=True, late=False), dq=RowsConfig(128, 2, 2)),
    (128, 128): BackwardConfig(_KEYS_128, dkv=KeysConfig(64, 2, overlap=False, late=False), dq=RowsConfig(128, 2, 2)),
    (256, 128): BackwardConfig(None, dkv=RolesConfig(64, 2), dq=RowsConfig(64, 2, 2)),
    (256, 256): BackwardConfig(None, dkv=RolesConfig(64, 2), dq=RowsConfig(64, 2, 1)),
}
if LATER:
    BACKWARD |= {
        (64, 64): replace(BACKWARD[64, 64], one_pass=replace(_KEYS_64, kv_regs=1)),
        (128, 128): BackwardConfig(
            replace(_KEYS_128, overlap=True), dkv=KeysConfig(64, 2, overlap=False, late=False, hide=True), dq=RowsConfig(128, 2, 2)
        ),
        (256, 128): replace(BACKWARD[256, 128], dq=RowsConfig(64, 2, 2, regs=(240, 32))),
        (256, 256): replace(BACKWARD[256, 256], dq=RowsConfig(64, 2, 1, regs=(240, 32))),
    }
_64, _128, _256 = BACKWARD[64, 64], BACKWARD[128, 128], BACKWARD[256, 256]
BACKWARD_VARIANTS = {
    (64, 64): {
        "kv_in_memory": replace(_64, one_pass=KeysConfig(64, 2, overlap=False, late=True, **_REDUCER)),
        "simple": replace(_64, one_pass=KeysConfig(64, 2, overlap=False, late=True, kv_regs=2, **_REDUCER)),
        "nb4": replace(_64, one_pass=KeysConfig(64, 4, overlap=False, late=True, kv_regs=2, **_REDUCER)),
        "prompt": replace(_64, one_pass=KeysConfig(64, 2, True, True, kv_regs=2, prompt=True, **_REDUCER)),
        "named": replace(_64, one_pass=KeysConfig(64, 2, True, True, kv_regs=2, prompt=True, named=True, **_REDUCER)),
        "named_early": replace(_64, one_pass=KeysConfig(64, 2, True, False, kv_regs=2, prompt=True, named=True, **_REDUCER)),
        "named_simple": replace(_64, one_pass=KeysConfig(64, 2, False, False, kv_regs=2, prompt=True, named=True, **_REDUCER)),
        "staged": replace(_64, one_pass=KeysConfig(64, 2, overlap=True, late=True, kv_regs=2, staged=True, **_REDUCER)),
        "late": replace(_64, one_pass=KeysConfig(64, 2, overlap=True, late=True, kv_regs=2, **_REDUCER)),
        "k_in_registers": replace(_64, one_pass=replace(_KEYS_64, kv_regs=1)),
        "two": replace(_64, one_pass=None),
        "two_m128": replace(_64, one_pass=None, dkv=KeysConfig(128, 2, overlap=False, late=False)),
    },
    (128, 128): {
        "early": replace(_128, one_pass=KeysConfig(64, 2, overlap=False, late=False)),
        "overlap": replace(_128, one_pass=KeysConfig(64, 2, overlap=True, late=True)),
        "prompt": replace(_128, one_pass=KeysConfig(64, 2, overlap=False, late=True, prompt=True, hide=True)),
        "prompt_early": replace(_128, one_pass=KeysConfig(64, 2, overlap=False, late=False, prompt=True, hide=True)),
        "named": replace(_128, one_pass=KeysConfig(64, 2, overlap=False, late=True, prompt=True, hide=True, named=True)),
        "late": replace(_128, one_pass=KeysConfig(64, 2, overlap=False, late=True)),
        "early_named": replace(_128, one_pass=KeysConfig(64, 2, False, False, prompt=True, hide=True, named=True, staged=True)),
        "staged": replace(_128, one_pass=KeysConfig(64, 2, overlap=False, late=True, hide=True, staged=True)),
        "overlap_hide": replace(_128, one_pass=KeysConfig(64, 2, overlap=True, late=True, hide=True, staged=True)),
        "overlap_named": replace(_128, one_pass=KeysConfig(64, 2, True, True, prompt=True, hide=True, named=True, staged=True)),
        "two": replace(_128, one_pass=None),
        "two_hide": replace(_128, one_pass=None, dkv=KeysConfig(64, 2, overlap=False, late=False, hide=True)),
        "two_overlap": replace(_128, one_pass=None, dkv=KeysConfig(64, 2, overlap=True, late=True)),
        "two_n64": replace(_128, one_pass=None, dq=RowsConfig(64, 2, 2)),
    },
    (256, 256): {
        "n32": replace(_256, dq=RowsConfig(32, 2, 2)),
        "n32k4": replace(_256, dq=RowsConfig(32, 4, 2)),
        "m32": replace(_256, dkv=RolesConfig(32, 4)),
    },
}
