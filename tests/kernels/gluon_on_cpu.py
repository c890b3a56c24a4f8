"""Enough of Gluon to run the Hopper kernels' own source on a CPU: slow, and stricter than the GPU about what it must not do.

A partition is a thread, an mbarrier counts arrivals and bytes, TMA copies late and in any order (what it will write is NaN until then), a
wgmma or a TMA store reads its operands when it is issued and again when it is waited for: if they differ, somebody wrote too early (NaN,
of a copy that has not come, goes where it is used). A wait that nobody ends, bytes that were not expected and a read
outside a tensor fail. Layouts, registers and speed are not modelled.
"""

from __future__ import annotations

import importlib
import random
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace

import torch

DEADLOCK = 20.0  # seconds
_LOCAL = threading.local()  # .grid: the program, .mmas: wgmma under way


class Value(torch.Tensor):
    """Registers."""

    type = property(lambda self: SimpleNamespace(shape=tuple(self.shape), layout=None))


def value(x) -> Value:
    return torch.as_tensor(x).as_subclass(Value)


class Constexpr:
    """An annotation; called, what it is given."""

    def __new__(cls, x):
        return x


class Pointer:
    """Elements of a contiguous tensor."""

    def __init__(self, tensor: torch.Tensor, at=0):
        assert tensor.is_contiguous()
        self.tensor, self.at, self.dtype = tensor, at, SimpleNamespace(element_ty=tensor.dtype)

    def __add__(self, offset) -> Pointer:
        return Pointer(self.tensor, self.at + offset)

    def reach(self, mask):
        """(offsets, mask), of one shape."""
        at = value(self.at)
        mask = torch.ones((), dtype=torch.bool) if mask is None else mask
        at, mask = torch.broadcast_tensors(at, mask)
        inside = (at >= 0) & (at < self.tensor.numel())
        assert bool((inside | ~mask).all()), f"an access outside a tensor of {tuple(self.tensor.shape)}"
        return at, mask


class Shared:
    """Shared memory, or a view of it."""

    def __init__(self, data: torch.Tensor):
        self.data, self.dtype, self.shape = data, data.dtype, data.shape

    def index(self, i) -> Shared:
        assert 0 <= int(i) < self.data.shape[0]
        return Shared(self.data[int(i)])

    def slice(self, start, length, dim=0) -> Shared:
        assert int(start) + length <= self.data.shape[dim]
        return Shared(self.data.narrow(dim, int(start), length))

    def permute(self, order) -> Shared:
        return Shared(self.data.permute(order))

    def load(self, layout=None) -> Value:
        return value(self.data.clone())

    def store(self, x) -> None:
        assert x.shape == self.data.shape and x.dtype == self.data.dtype
        self.data.copy_(x)


class Machine:
    """One program: its barriers, its TMA unit and what has gone wrong."""

    def __init__(self, seed: int):
        self.changed = threading.Condition()
        self.copies: list = []
        self.error: BaseException | None = None
        self.running = True
        self.random = random.Random(seed)
        self.named: dict[int, Named] = {}

    def until(self, ready, what: str) -> None:
        end = time.monotonic() + DEADLOCK
        while not ready():
            if self.error:
                raise RuntimeError("another partition failed")
            assert time.monotonic() < end, f"deadlock: {what}"
            self.changed.wait(0.5)

    def tma(self) -> None:
        while self.running:
            time.sleep(self.random.random() * 2e-4)
            with self.changed:
                if self.copies:
                    self.copies.pop(self.random.randrange(len(self.copies)))()
                    self.changed.notify_all()


class Barriers:
    def __init__(self, machine: Machine, n: int):
        self.each = [Barrier(machine) for _ in range(n)]

    def index(self, i) -> Barrier:
        return self.each[int(i)]


class Barrier:
    def __init__(self, machine: Machine):
        self.machine, self.count, self.phase, self.arrived, self.bytes = machine, 0, 0, 0, 0

    def step(self, arrivals: int = 0, tx: int = 0) -> None:
        self.arrived += arrivals
        self.bytes += tx
        assert self.count and self.arrived <= self.count, "more arrivals than a phase takes"
        if self.arrived == self.count and self.bytes == 0:
            self.phase, self.arrived = self.phase + 1, 0
        self.machine.changed.notify_all()


def _init(bar: Barrier, count: int) -> None:
    bar.count = count


def _expect(bar: Barrier, size) -> None:
    with bar.machine.changed:
        bar.step(1, int(size))


def _arrive(bar: Barrier, count: int = 1, pred=True) -> None:
    if not pred:
        return
    with bar.machine.changed:
        bar.step(count)


def _wait(bar: Barrier, parity, pred=True) -> None:
    if not pred:
        return
    time.sleep(bar.machine.random.random() * 1e-4)
    with bar.machine.changed:
        bar.machine.until(lambda: bar.phase % 2 != int(parity), f"a wait for parity {int(parity)}")


class Descriptor:
    """A tensor in boxes; what lies outside reads as zero, and is not written."""

    def __init__(self, base, shape, strides, block_shape, layout):
        assert base.data_ptr() % 16 == 0 and all(s * base.element_size() % 16 == 0 for s in strides[:-1]) and strides[-1] == 1
        self.base, self.shape, self.strides, self.block_shape, self.layout = base, shape, strides, block_shape, layout
        self.dtype = base.dtype

    @property
    def view(self):
        return torch.as_strided(
            self.base, [0 if self.base.numel() == 0 else n for n in self.shape], self.strides, self.base.storage_offset()
        )

    def overlap(self, coordinates):
        """(where in the tensor, where in the box)."""
        assert int(coordinates[-1]) * self.base.element_size() % 16 == 0, "TMA reads an innermost coordinate on 16 bytes only"
        ours, theirs = [], []
        for at, n, box in zip(map(int, coordinates), self.view.shape, self.block_shape, strict=True):
            low, high = max(at, 0), max(min(at + box, n), max(at, 0))
            ours.append(slice(min(low, n), max(min(high, n), min(low, n))))
            theirs.append(slice(low - at, low - at + ours[-1].stop - ours[-1].start))
        return tuple(ours), tuple(theirs)


def garbage(dtype: torch.dtype) -> float:
    """What stands in shared memory until it is written."""
    return float("nan") if dtype.is_floating_point else 1 << 20


def _tma_load(desc: Descriptor, coordinates, bar: Barrier, into: Shared) -> None:
    ours, theirs = desc.overlap(coordinates)
    box = torch.zeros(desc.block_shape, dtype=desc.dtype)
    box[theirs] = desc.view[ours]
    assert box.numel() == into.data.numel() and box.dtype == into.data.dtype
    into.data.fill_(garbage(into.data.dtype))

    def land() -> None:
        into.data.copy_(box.view(into.data.shape))
        bar.step(0, -box.numel() * box.element_size())

    with bar.machine.changed:
        bar.machine.copies.append(land)


def _tma_reduce_add(desc: Descriptor, coordinates, source: Shared) -> None:
    ours, theirs = desc.overlap(coordinates)
    early, machine = source.data.clone(), _LOCAL.machine

    def leave() -> None:
        assert _same(early, source.data), "a buffer changed under a TMA reduction"
        with machine.changed:
            desc.view[ours] += source.data.view(desc.block_shape)[theirs]

    _LOCAL.stores.append(leave)


def _tma_store(desc: Descriptor, coordinates, source: Shared) -> None:
    ours, theirs = desc.overlap(coordinates)
    early = source.data.clone()

    def leave() -> None:
        assert _same(early, source.data), "a buffer changed under a TMA store"
        desc.view[ours] = source.data.view(desc.block_shape)[theirs]

    _LOCAL.stores.append(leave)


def _store_wait(pendings) -> None:
    while len(_LOCAL.stores) > pendings:
        _LOCAL.stores.pop(0)()


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


class Product:
    """A wgmma that may still be under way."""

    def __init__(self, a, b, acc):
        self.a, self.b, self.acc = a, b, acc
        self.early = self.multiply()

    def multiply(self):
        a, b = (x.data if isinstance(x, Shared) else x for x in (self.a, self.b))
        product = a.float() @ b.float()
        if isinstance(self.acc, Product):
            return self.acc.multiply() + product
        return product if self.acc is None else self.acc + product

    def finish(self) -> Value:
        late = self.multiply()
        assert _same(late, self.early), "an operand changed under a wgmma"
        return value(late)


def _mma(a, b, acc, use_acc=True, is_async=False):
    chained = bool(_LOCAL.mmas) and acc is _LOCAL.mmas[-1]  # onto the product issued just before: the tensor cores keep the order
    assert is_async and (chained or isinstance(acc, Value)), "an accumulator that is still under way"
    product = Product(a, b, acc if use_acc else None)
    _LOCAL.mmas.append(product)
    return product


def _mma_wait(outstanding, deps):
    done, _LOCAL.mmas = _LOCAL.mmas[: len(_LOCAL.mmas) - outstanding], _LOCAL.mmas[max(0, len(_LOCAL.mmas) - outstanding) :]
    results = {id(p): p.finish() for p in done}
    found = [results[id(x)] if isinstance(x, Product) else x for x in deps]  # KeyError: waited for too few
    return found[0] if len(found) == 1 else tuple(found)


@dataclass
class Named:
    """A named barrier: full when all its threads have come, and then empty again. Whoever comes twice has not waited for the others."""

    turn: int = 0
    threads: int = 0
    there: set[int] = field(default_factory=set)


def _named_barrier(verb, number, threads, warps=4, pred=True) -> None:
    if not pred:
        return
    machine, me = _LOCAL.machine, threading.get_ident()
    with machine.changed:
        bar = machine.named.setdefault(int(number), Named())
        assert me not in bar.there, f"named barrier {int(number)}: the same partition twice"
        bar.there.add(me)
        bar.threads += 32 * warps
        assert bar.threads <= threads, f"named barrier {int(number)}: {bar.threads} of {threads} threads"
        turn = bar.turn
        if bar.threads == threads:
            machine.named[int(number)] = Named(turn + 1)
            machine.changed.notify_all()
        if verb == "sync":
            machine.until(lambda: machine.named[int(number)].turn > turn, f"named barrier {int(number)}")


def _allocate(dtype, shape, layout):
    if dtype == torch.int64:
        return Barriers(_LOCAL.machine, shape[0])
    return Shared(torch.full(shape, garbage(dtype), dtype=dtype))


def _specialize(partitions, warps, registers) -> None:
    machine, program = _LOCAL.machine, _LOCAL.program
    assert len(partitions) == len(warps) + 1 and len(registers) == len(warps)

    def run(body, args) -> None:
        _LOCAL.machine, _LOCAL.program, _LOCAL.mmas, _LOCAL.stores = machine, program, [], []
        try:
            body(*args)
            assert not _LOCAL.mmas and not _LOCAL.stores, "a wgmma or a TMA store that nobody waited for"
        except BaseException as error:  # handed to the caller below
            with machine.changed:
                machine.error = machine.error or error
                machine.changed.notify_all()

    threads = [threading.Thread(target=run, args=partition) for partition in partitions]
    copier = threading.Thread(target=machine.tma)
    for thread in (*threads, copier):
        thread.start()
    for thread in threads:
        thread.join()
    machine.running = False
    copier.join()
    if machine.error:
        raise machine.error
    assert not machine.copies, "a copy that nobody waited for"
    assert not any(bar.there for bar in machine.named.values()), "a named barrier that is left half full"


def run(kernel, grid, *args, seed: int = 0, **options) -> None:
    """Every program of a launch, one after another."""
    args = [Pointer(x) if isinstance(x, torch.Tensor) else x for x in args]
    for program in range(grid[0]):
        _LOCAL.machine, _LOCAL.program = Machine(seed + program), program
        kernel(*args)


def _load(pointer: Pointer, mask=None, other=0.0):
    at, mask = pointer.reach(mask)
    found = pointer.tensor.flatten()[torch.where(mask, at, 0).long()]
    return value(torch.where(mask, found, torch.as_tensor(other, dtype=found.dtype)))


def _store(pointer: Pointer, x, mask=None) -> None:
    at, mask = pointer.reach(mask)
    assert x.dtype == pointer.tensor.dtype
    x, at, mask = torch.broadcast_tensors(x, at, mask)
    pointer.tensor.view(-1)[at[mask].long()] = x[mask]


def _where(c, a, b):
    if isinstance(a, Pointer):
        return a if c else b
    return value(torch.where(value(c), value(a), value(b)))


def _jit(*body, **options):
    return body[0] if body else lambda f: f


def _assert(condition) -> None:
    assert condition


def _modules() -> dict[str, ModuleType]:
    """The names that the kernels import."""
    layout = lambda *a, **k: None  # noqa: E731
    layout.get_default_for = lambda *a, **k: None
    gl = ModuleType("language")
    vars(gl).update(
        constexpr=Constexpr, float32=torch.float32, bfloat16=torch.bfloat16, float16=torch.float16, int64=torch.int64, int32=torch.int32,
        NVMMADistributedLayout=layout, NVMMASharedLayout=layout, SliceLayout=layout, DotOperandLayout=layout, BlockedLayout=layout,
        program_id=lambda axis: value(_LOCAL.program), arange=lambda a, b, layout=None: value(torch.arange(a, b)),
        zeros=lambda shape, dtype, layout=None: value(torch.zeros(shape, dtype=dtype)), load=_load, store=_store,
        where=_where, convert_layout=lambda x, layout: x,
        maximum=lambda a, b: value(torch.maximum(value(a), value(b))), minimum=lambda a, b: value(torch.minimum(value(a), value(b))),
        exp2=torch.exp2, log2=torch.log2, fma=lambda a, b, c: a * b + c, max=lambda x, axis: x.amax(axis), sum=lambda x, axis: x.sum(axis),
        static_assert=_assert, static_range=range, inline_asm_elementwise=lambda asm, c, args, **k: value(args[0]),
        allocate_shared_memory=_allocate, warp_specialize=_specialize,
    )  # fmt: skip
    gluon, hopper, compat = ModuleType("gluon"), ModuleType("hopper"), ModuleType("compat")
    gluon.jit, gluon.constexpr_function, gluon.language = _jit, _jit, gl  # type: ignore[attr-defined]
    vars(hopper).update(
        fence_async_shared=lambda: None, warpgroup_mma=_mma, warpgroup_mma_wait=_mma_wait, tma=SimpleNamespace(store_wait=_store_wait),
        mbarrier=SimpleNamespace(MBarrierLayout=layout, init=_init, expect=_expect, arrive=_arrive, wait=_wait),
    )  # fmt: skip
    vars(compat).update(
        NVMMASharedLayout=layout, TensorDescriptor=Descriptor, LATER=False, named_barrier=_named_barrier,
        group_sync=lambda number, threads: _named_barrier("sync", number, threads), thread_barrier=lambda: None, tma_load=_tma_load,
        tma_reduce_add=_tma_reduce_add, tma_store=_tma_store,
    )  # fmt: skip
    stats = ModuleType("stats")
    stats.stats_kernel, stats.delta_kernel = _stats, None  # type: ignore[attr-defined]
    root = "triton.experimental"
    ours = "distflash.kernels.hopper"
    package = ModuleType(ours)
    package.__path__ = importlib.import_module(ours).__path__  # without its __init__, which imports the host side with the real names
    return {
        root: ModuleType(root), f"{root}.gluon": gluon, f"{root}.gluon.language": gl, f"{root}.gluon.language.nvidia": ModuleType("nvidia"),
        f"{root}.gluon.language.nvidia.hopper": hopper, ours: package, f"{ours}.compat": compat, f"{ours}.stats": stats,
    }  # fmt: skip


def _stats(lse, delta, nlse, ndelta, fold, t, pad, block) -> None:
    """stats.py, which is plain Triton."""
    for row in range(nlse.tensor.shape[0]):
        x, y = (p.tensor.reshape(-1, t)[row] for p in (lse, delta))
        nlse.tensor[row], ndelta.tensor[row] = float("-inf"), 0.0
        nlse.tensor[row, :t] = torch.where(x == float("-inf"), x, x * -1.4426950408889634)
        ndelta.tensor[row, :t] = y * -fold


def gradients(seed: int = 0, programs: int = 3):
    """distflash.kernels.hopper.gradients, as `emulated`."""
    return emulated("gradients", seed, programs)


@contextmanager
def emulated(name: str, seed: int = 0, programs: int = 3):
    """A module of distflash.kernels.hopper, whose launches run here; `programs` stay where a kernel is persistent."""
    fakes, held = _modules(), {}
    names = [n for n in sys.modules if n.startswith("distflash.kernels.hopper")]
    for n in {*names, *fakes}:
        held[n] = sys.modules.pop(n, None)
    sys.modules.update(fakes)
    try:
        module = importlib.import_module(f"distflash.kernels.hopper.{name}")
        module.launch = lambda kernel, grid, *args, **options: _launch(module, kernel, grid, args, seed)  # type: ignore[attr-defined]
        module.sms = lambda device: programs  # type: ignore[attr-defined]
        yield module
    finally:
        for n in [n for n in sys.modules if n.startswith("distflash.kernels.hopper")]:
            del sys.modules[n]
        for n, module_ in held.items():
            sys.modules.pop(n, None)
            if module_ is not None:
                sys.modules[n] = module_


def _launch(module, kernel, grid, args, seed) -> None:
    if kernel is _stats:
        kernel(*(Pointer(x) if isinstance(x, torch.Tensor) else x for x in args))
    else:
        run(kernel, grid, *args, seed=seed)
