"""`distflash verify`: every layout, order, Ulysses degree and kernel of this machine against fp64 dense attention.

Legend: P ranks, U ranks of a Ulysses group, S tokens, H query heads, Hk key/value heads, D head dim.

Started plainly, P ranks are threads of this process that share one device; with --nproc, or under a launcher, they are processes
and the wire is the real one. Every scheme runs every problem, forward and backward, and is judged by the error budget of
`distflash.testing`. With --fuzz, the problems and the schemes are random: `distflash.launch.fuzz`.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distflash.launch.early import runs_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from distflash import SequenceParallel
    from distflash.launch.world import World

HEADS, KV_HEADS = 8, 2


@dataclass(frozen=True)
class Case:
    """One attention problem; the dtype by name."""

    dtype: str
    head_dim: int
    causal: bool
    window: tuple[int, int] = (-1, -1)
    documents: bool = False
    kv_heads: int = KV_HEADS

    def __str__(self) -> str:
        kind = "causal" if self.causal else "full"
        window = f" window {self.window[0]},{self.window[1]}" if self.window != (-1, -1) else ""
        return f"{self.dtype} D={self.head_dim} {HEADS}:{self.kv_heads} {kind}{window}{' documents' * self.documents}"


@dataclass(frozen=True)
class Scheme:
    """One way to share a sequence among P ranks, and the kernel that computes."""

    kernel: str
    layout: str
    order: str
    ranks: int
    ulysses: int
    wire: str

    def __str__(self) -> str:
        return f"{self.kernel}, {self.layout}, {self.order}, P={self.ranks}, U={self.ulysses}, {self.wire}"


GPU_CASES = (
    Case("bfloat16", 128, causal=True),
    Case("float16", 64, causal=False, documents=True, kv_heads=HEADS),
    Case("bfloat16", 256, causal=True, documents=True),
    Case("float16", 59, causal=True, window=(170, 0), kv_heads=1),
)
CPU_CASES = (
    Case("float64", 32, causal=True),
    Case("float64", 16, causal=False, window=(30, 9), documents=True, kv_heads=1),
    Case("float32", 59, causal=True, documents=True),
    Case("float32", 64, causal=False, kv_heads=HEADS),
    Case("bfloat16", 64, causal=True, window=(40, 0)),
)


def verify(
    nproc: Annotated[int | None, typer.Option(min=1, help="Run on so many processes of this host.", show_default=False)] = None,
    ranks: Annotated[
        str | None, typer.Option(help="Numbers of ranks to try as threads of one process.  [default: 1,2,3,4]", show_default=False)
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(min=8, help="Tokens of a sequence; --fuzz: at most.  [default: 1021 on a GPU, 157 on CPU]", show_default=False),
    ] = None,
    kernel: Annotated[str | None, typer.Option(help="This kernel alone.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**62, help="Of the inputs and the documents; --fuzz: of the first case.")] = 0,
    fuzz: Annotated[int | None, typer.Option(min=1, help="Try so many random cases instead, one a seed.", show_default=False)] = None,
    record: Annotated[Path | None, typer.Option(help="Append what --fuzz found to this JSON file.", show_default=False)] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="--fuzz: in so many processes side by side, on each GPU in turn.", show_default=False)
    ] = None,
    seconds: Annotated[float | None, typer.Option(min=0, help="--fuzz: begin no case after so many.", show_default=False)] = None,
) -> None:
    """Compare every scheme and kernel of this machine with fp64 dense attention; exit code 1 if one is wrong."""
    import torch

    import distflash
    from distflash.kernels.select import KERNELS
    from distflash.launch.run import OURS, launch
    from distflash.launch.started import started
    from distflash.launch.world import launched

    if kernel is not None and kernel not in KERNELS:
        raise typer.BadParameter(f"--kernel {kernel!r} is not known: use one of {', '.join(map(repr, KERNELS))}")
    for name, value in {"--record": record, "--jobs": jobs, "--seconds": seconds}.items():
        if value is not None and fuzz is None:
            raise typer.BadParameter(f"{name} {value} says how --fuzz N works: give both")
    sizes = _sizes(ranks or "1,2,3,4")
    if record is not None and not launched():  # there may be other hosts, where it cannot be written
        _recordable(record)
    if nproc is not None:
        _refuse_alone(jobs, seconds, nproc)
        if (size := started()) > 1:  # each would start so many
            raise typer.BadParameter(
                f"--nproc {nproc} starts processes, but a launcher has started this one already, of {size}: leave it out"
            )
        if ranks is not None:
            raise typer.BadParameter("--ranks are threads of one process, --nproc are processes: give one of them")
        given = {"--length": length, "--kernel": kernel, "--fuzz": fuzz, "--record": record and record.absolute()}
        options = [word for name, value in given.items() if value is not None for word in (name, str(value))]
        raise typer.Exit(launch(OURS, ["verify", "--seed", str(seed), *options], nproc))
    world = distflash.init()
    if record is not None and world.is_main:
        _recordable(record)
    if world.size > 1:
        _refuse_alone(jobs, seconds, world.size)
        if ranks is not None:
            raise typer.BadParameter(f"--ranks are threads of one process, but a launcher started {world.size}: leave it out")
        sizes = [world.size]
    if world.device.type == "cpu":
        torch.set_num_threads(1)  # the ranks are the threads, and the problems are small
    if fuzz is not None:
        from distflash.launch.fuzz import fuzzed

        chosen = sizes if world.size > 1 or ranks is not None else None
        found = fuzzed(world, fuzz, seed, sizes=chosen, kernel=kernel, length=length, file=record, jobs=jobs, seconds=seconds)
        raise typer.Exit(0 if found else 1)
    report, sp = Report(world, sizes), distflash.SequenceParallel()
    for case in GPU_CASES if world.device.type == "cuda" else CPU_CASES:
        able, refused = serving(case, world.device, kernel)
        if refused:
            report.say(f"{kernel} cannot serve {case}: {refused}")
        if able:
            trial = Trial(case, length or (1021 if world.device.type == "cuda" else 157), seed, world.device)
            for scheme in schemes(able, sizes, sp):
                report.add(case, scheme, *trial.judge(scheme, world))
            report.say(f"{case}: done, {report.count} comparisons so far, {len(report.failures)} out of budget")
    report.print()
    raise typer.Exit(1 if report.failures or not report.count else 0)


def _recordable(record: Path) -> None:
    try:
        runs_of(record)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _refuse_alone(jobs: int | None, seconds: float | None, processes: int) -> None:
    """Raise if an option is given that is for cases of one process."""
    for name, value in {"--jobs": jobs, "--seconds": seconds}.items():
        if value is not None:
            raise typer.BadParameter(
                f"{name} {value} is for ranks that are threads, but {processes} processes share each case: leave it out"
            )


def _sizes(ranks: str) -> list[int]:
    words = ranks.split(",")
    if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        raise typer.BadParameter(f"--ranks {ranks!r} must be positive integers with commas between, as in 1,2,4")
    return [int(word) for word in words]


def serving(case: Case, device: torch.device, kernel: str | None) -> tuple[list[str], str | None]:
    """The kernels that can serve the case here, of all or of the one asked for; why not, if that one cannot."""
    import torch

    from distflash.kernels.base import Problem
    from distflash.kernels.select import ADAPTED, BY_NAME_ONLY, candidates

    problem = Problem(device, getattr(torch, case.dtype), HEADS, case.kv_heads, case.head_dim, case.head_dim)
    reasons = {name: None if reason == BY_NAME_ONLY.get(name) else reason for name, reason in candidates(problem)}
    ours = [name for name in reasons if name not in ADAPTED]  # other projects' kernels cost minutes, and are asked for by name
    asked = ours if kernel is None else [kernel]
    return [name for name in asked if reasons[name] is None], reasons[kernel] if kernel is not None else None


def wires(sp: SequenceParallel) -> list[str]:
    """What moves blocks here: threads can copy as GPUs do that reach each other's memory, processes can if their GPUs do."""
    return ["p2p", "symmetric"] if sp.size == 1 or sp.direct else ["p2p"]


def schemes(kernels: list[str], sizes: list[int], sp: SequenceParallel) -> Iterator[Scheme]:
    """Every layout, order, Ulysses degree and wire, for each kernel and number of ranks, that the processes of `sp` can form."""
    from distflash.parallel.group import unequal_hosts
    from distflash.parallel.layout import LAYOUTS
    from distflash.parallel.plan import ORDERS

    for name in kernels:
        for ranks in sizes:
            for layout in LAYOUTS:
                for order in ORDERS:
                    for ulysses in (u for u in range(1, min(ranks, HEADS) + 1) if ranks % u == 0):
                        if order == "double_ring" and unequal_hosts(sp.wire, ulysses):
                            continue
                        yield from (Scheme(name, layout, order, ranks, ulysses, wire) for wire in wires(sp)[:ranks])


class Trial:
    """The inputs of a case, the truth, and what the dense formula makes of them in the same dtype."""

    def __init__(self, case: Case, length: int, seed: int, device: torch.device):
        import torch

        from distflash.launch.trial import Call, inputs, truth_of

        dtype, generator = getattr(torch, case.dtype), torch.Generator().manual_seed(seed)
        documents = _documents(length, seed) if case.documents else None
        self.call = Call(causal=case.causal, window_size=case.window, documents=documents)
        shape = {"heads": HEADS, "kv_heads": case.kv_heads, "dim": case.head_dim}
        made = inputs(length, batch=1, dtype=dtype, generator=generator, **shape)
        self.x = type(made)._make(x.to(device) for x in made)
        self.truth, self.low = truth_of(self.call, self.x), truth_of(self.call, self.x, dtype)

    def judge(self, scheme: Scheme, world: World) -> tuple[float, str]:
        """(largest relative error, what is out of budget or '')."""
        from distflash.launch.trial import on_ranks
        from distflash.parallel.plan import unequal
        from distflash.testing import errors

        names = ("kernel", "layout", "order", "ulysses", "wire")
        call = self.call._replace(**{name: getattr(scheme, name) for name in names})
        half = scheme.ranks // 2  # a host, so that a double ring is one
        per_node = None if unequal(scheme.ranks, half, scheme.ulysses) else half
        found = on_ranks(world.size, scheme.ranks, call, self.x, per_node)
        broken = errors(found, self.truth, self.low, self.x.q.dtype)
        worst = max(_relative(a, b) for a, b in zip(found, self.truth, strict=True))
        return worst, "; ".join(f"{name}: {reason}" for name, reason in broken.items())


def _documents(length: int, seed: int) -> tuple[int, ...]:
    """Random borders: a one-token and an empty document, one that spans several ranks, and others."""
    rng = random.Random(seed)
    lengths, left = [1, 0, length // 2], length - 1 - length // 2
    while left:
        lengths.append(rng.randint(1, min(left, max(1, length // 5))))
        left -= lengths[-1]
    rng.shuffle(lengths)
    return (0, *accumulate(lengths))


def _relative(found: Tensor, truth: Tensor) -> float:
    seen = truth > float("-inf")
    return ((found.double() - truth)[seen].norm() / truth[seen].norm()).item()


class Report:
    """Collects results; prints a table of the worst relative errors, and every failure, on the main rank."""

    def __init__(self, world: World, sizes: list[int]):
        self.world, self.sizes = world, sizes
        self.worst: dict[tuple[str, str, str], dict[Case, float]] = defaultdict(dict)
        self.failures: list[str] = []
        self.count = 0

    def add(self, case: Case, scheme: Scheme, worst: float, broken: str) -> None:
        row = self.worst[scheme.kernel, scheme.layout, scheme.order]
        row[case] = max(row.get(case, 0.0), worst)
        self.count += 1
        if broken:
            self.failures.append(f"{scheme}, {case}: {broken}")

    def say(self, text: str) -> None:
        if self.world.is_main:
            print(text, flush=True)

    def print(self) -> None:
        if not self.world.is_main:
            return
        from rich.console import Console
        from rich.table import Table

        cases = list(dict.fromkeys(case for row in self.worst.values() for case in row))
        how = f"{self.world.size} processes" if self.world.size > 1 else f"P = {', '.join(map(str, self.sizes))} as threads"
        table = Table(title=f"largest relative error against fp64 (out, lse, dq, dk, dv), over every Ulysses degree and wire; {how}")
        for title in ("kernel", "layout", "order", *map(str, cases)):
            table.add_column(title, justify="left" if title in ("kernel", "layout", "order") else "right")
        for key, row in self.worst.items():
            table.add_row(*key, *(f"{row[case]:.1e}" if case in row else "-" for case in cases))
        console = Console(width=None if Console().is_terminal else 160)
        console.print(table)
        for failure in self.failures:
            console.print(f"[red]wrong[/red] {failure}", highlight=False)
        console.print(f"{self.count} comparisons, {len(self.failures)} out of budget")
