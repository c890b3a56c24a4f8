"""`distflash verify --fuzz N`: random problems of attention over random ranks, laid beside fp64 dense attention.

A case follows from its seed alone (and from the options and the kernels of the machine): `--fuzz 1 --seed K` runs it again. A case
equals the oracle within the error budget of `distflash.testing`, or it is refused where it must be; anything else is a mismatch.
Cases that share the form of their kernels (draw.SAME_FORM) run in one process: what one compiles, the others find compiled.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import UTC, datetime
from functools import cache
from itertools import pairwise
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

import distflash
from distflash.kernels.base import accumulator
from distflash.launch import trial
from distflash.launch.checkout import commit
from distflash.launch.doctor import versions
from distflash.launch.draw import RANKS, SAME_FORM, Case, draw
from distflash.launch.early import runs_of
from distflash.launch.parent import end_with
from distflash.launch.trial import SEED, Results, noise_of, truth_of
from distflash.parallel.group import unequal_hosts
from distflash.testing import errors

if TYPE_CHECKING:
    from distflash.launch.world import World

NOISE = 4.0  # times what several random roundings did at most


def judge(case: Case, world: World) -> tuple[str, str]:
    """("equal", ""), ("refused", with which words) or ("wrong", what)."""
    try:
        seed, found = _found(case, world)
        again = _found(case, world)[1] if case.call.deterministic else found
    except (ValueError, TypeError) as error:
        expected = next((words for words in case.refusals if words in str(error)), None)
        return ("wrong", f"{type(error).__name__}: {error}") if expected is None else ("refused", expected)
    except Exception as error:  # an internal error is a finding like any other, unless other processes wait for this one
        if world.size > 1:
            error.add_note(f"in case {case.seed}: {case}")
            raise
        return "wrong", f"{type(error).__name__}: {error}"
    if case.refusals:
        return "wrong", f"served, but must be refused: {' or '.join(case.refusals)}"
    if not all(a is b or torch.equal(a, b) for a, b in zip(found, again, strict=True)):
        return "wrong", "deterministic, but a second run gave other bits"
    broken = _broken(case, found, seed)
    return ("wrong", "; ".join(f"{name}: {reason}" for name, reason in broken.items())) if broken else ("equal", "")


def _broken(case: Case, found: Results, seed: int) -> dict[str, str]:
    """What is out of its error budget, and is not explained by rounding."""
    call, x, dtype = case.call, case.x, case.x.q.dtype
    truth = truth_of(call, x, seed=seed)
    low = truth if dtype == torch.float64 else truth_of(call, x, dtype, seed)
    broken = errors(found, truth, low, dtype)
    if broken:
        noise = noise_of(call, x, truth, accumulator(dtype) if x.q.device.type == "cpu" else dtype, seed)
        broken = errors(_forgiven(found, truth, noise), truth, low, dtype)
    return broken


def _forgiven(found: Results, truth: Results, noise: Results) -> Results:
    """`found`, nearer to the truth by what rounding explains."""
    near = (
        None if a is None else torch.where(a.isfinite(), a + torch.clamp(b - a, -NOISE * n, NOISE * n), a)
        for a, b, n in zip(found, truth, noise, strict=True)
    )
    return type(found)(*near)  # type: ignore[arg-type]


def _found(case: Case, world: World) -> tuple[int, Results]:
    """(the seed that dropout had, whole results): by threads, or by this process and its peers."""
    call, x = case.call, case.x
    if case.alone:
        return trial.run_alone(call, x)
    if world.size > 1:  # what their devices and hosts can
        double = call.order == "double_ring" and unequal_hosts(distflash.SequenceParallel().wire, call.ulysses)
        call = call._replace(wire="auto", order="auto" if double else call.order)
    return SEED, trial.on_ranks(world.size, case.ranks, call, x, case.per_node)


class Tally:
    """What has come of the cases so far."""

    def __init__(self) -> None:
        self.verdicts, self.refused = Counter(), Counter()
        self.mismatches: list[dict[str, Any]] = []
        self.covered: defaultdict[str, Counter] = defaultdict(Counter)

    def add(self, case: Case, verdict: str, what: str, replay: str) -> None:
        self.verdicts[verdict] += 1
        if verdict == "refused":
            self.refused[what] += 1
            return
        if verdict == "wrong":
            self.mismatches.append({"seed": case.seed, "what": what, "case": str(case), "replay": replay})
        call, x = case.call, case.x
        axes: dict[str, Any] = {
            "ranks": case.ranks,
            "dtype": str(x.q.dtype).removeprefix("torch."),
            "head_dim": x.q.shape[3],
            "values": case.values,
        }
        named = ("layout", "order", "ulysses", "wire", "kernel", "strides", "wanted")
        axes |= {name: getattr(call, name) for name in named}
        for axis, value in axes.items():
            self.covered[axis][str(value)] += 1
        self.covered["asked"].update(name for name in case.asked if name not in named)

    def merge(self, other: Tally) -> None:
        self.verdicts += other.verdicts
        self.refused += other.refused
        self.mismatches += other.mismatches
        for axis, counts in other.covered.items():
            self.covered[axis] += counts


class Given(NamedTuple):
    """What cases follow from beside their seeds."""

    sizes: Sequence[int] | None  # numbers of ranks
    kernel: str | None
    length: int | None

    def options(self, world: World) -> str:
        """As the command line says it."""
        named = {"--nproc": world.size} if world.size > 1 else {"--ranks": ",".join(map(str, self.sizes or ()))}
        named |= {"--kernel": self.kernel, "--length": self.length}
        return "".join(f" {name} {value}" for name, value in named.items() if value)


def fuzzed(
    world: World, count: int, first: int, *, sizes: Sequence[int] | None, kernel: str | None, length: int | None, file: Path | None,
    jobs: int | None = None, seconds: float | None = None,
) -> bool:  # fmt: skip
    """Judge the cases of `count` seeds; print, and append to `file`, what came of it. True if all that were judged, at least one, passed.

    `jobs`: in so many processes of one rank each, else in this one. No case begins after `seconds`, for which no other rank may wait.
    """
    start, seeds, given, tally = time.monotonic(), range(first, first + count), Given(sizes, kernel, length), Tally()
    until = math.inf if seconds is None else start + seconds
    if jobs is None:
        tally.merge(judged(world, seeds, given, until))
    else:
        for part in _side_by_side(jobs, seeds, given, until):
            tally.merge(part)
        tally.mismatches.sort(key=lambda found: found["seed"])
    seconds, cases = time.monotonic() - start, sum(tally.verdicts.values())
    if world.is_main:
        print(f"{cases} cases, seeds {first} to {first + count - 1}, {seconds:.0f} s ({1e3 * seconds / max(1, cases):.0f} ms a case)")
        print(f"{tally.verdicts['equal']} equal to the oracle, {tally.verdicts['refused']} refused, {len(tally.mismatches)} mismatches")
        for reason, number in tally.refused.most_common():
            print(f"  refused {number}: {reason}")
        if file is not None:
            _append(file, _record(world, tally, seeds, given.options(world), seconds) | ({"jobs": jobs} if jobs else {}))
    return cases > 0 and not tally.mismatches


def judged(world: World, seeds: range, given: Given, until: float = math.inf) -> Tally:
    """The cases of `seeds`, by the processes of `world`; none begins after `until` by the monotonic clock."""
    tally, options = Tally(), given.options(world)
    for seed in seeds:
        if time.monotonic() > until:
            break
        case = draw(seed, world.device, given.sizes or RANKS, kernel=given.kernel, longest=given.length)
        verdict, what = judge(case, world)
        replay = f"distflash verify --fuzz 1 --seed {seed}{options}"
        tally.add(case, verdict, what, replay)
        if world.is_main and (verdict == "wrong" or len(seeds) == 1):
            print(f"{verdict} {what}\n  {case}\n  {replay}", flush=True)
        if verdict == "wrong" and world.device.type == "cuda":
            torch.cuda.synchronize(world.device)  # raises if the device is lost: every later case here would be wrong
    return tally


def _side_by_side(jobs: int, seeds: range, given: Given, until: float) -> Iterator[Tally]:
    """Of `jobs` processes, each on one GPU in turn, that take the pieces of `seeds` one by one."""
    context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(",")
    gpus = context.SimpleQueue()
    for job in range(jobs):
        gpus.put(visible[job % len(visible)])
    pool = ProcessPoolExecutor(jobs, context, _place, (gpus, os.getpid()))
    try:
        yield from (done.result() for done in as_completed([pool.submit(_piece, piece, given, until) for piece in pieces(seeds)]))
    finally:
        pool.shutdown(cancel_futures=True)


def pieces(seeds: range) -> list[range]:
    """Cut where the form of kernels changes."""
    inner = range((seeds.start // SAME_FORM + 1) * SAME_FORM, seeds.stop, SAME_FORM)
    return [range(a, b) for a, b in pairwise((seeds.start, *inner, seeds.stop))]


def _place(gpus: SimpleQueue[str], parent: int) -> None:
    """Before a process of _side_by_side touches a GPU."""
    end_with(parent)
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus.get()
    torch.set_num_threads(1)


@cache
def _own_world() -> World:
    return distflash.init()


def _piece(seeds: range, given: Given, until: float) -> Tally:
    return judged(_own_world(), seeds, given, until)


def _record(world: World, tally: Tally, seeds: range, options: str, seconds: float) -> dict[str, Any]:
    return {
        "cases": sum(tally.verdicts.values()),
        "first_seed": seeds.start,
        "last_seed": seeds.stop - 1,
        "options": options.strip(),
        "equal": tally.verdicts["equal"],
        "refused": dict(tally.refused),
        "mismatches": tally.mismatches,
        "seconds": round(seconds, 1),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": torch.cuda.get_device_name() if world.device.type == "cuda" else "cpu",
        "processes": world.size,
        "versions": {name: value for name, value in versions().items() if value},
        "covered": {axis: dict(sorted(counts.items())) for axis, counts in tally.covered.items()},
    }


def _append(file: Path, run: dict[str, Any]) -> None:
    """Add a run to the JSON of a file: all of it, or nothing."""
    runs = runs_of(file)
    part = file.with_name(f".{file.name}.{os.getpid()}")
    part.write_text(json.dumps({"runs": [*runs, run]}, indent=1) + "\n")
    part.replace(file)
