"""What a rank is about on a wire, for whoever watches over it; and who was lost, for whoever waits on a wire.

A journal is written by the thread that communicates and read by others; each entry is replaced as a whole. Python writes it, so
it tells what was begun by the host: a GPU may be behind, and what a CUDA graph replays is not noted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import NamedTuple, ParamSpec, Protocol, TypeVar, cast
from weakref import WeakValueDictionary

AGREEING = "agreeing"
KEPT = 1 << 13  # calls that are remembered: those of the seconds by which what is heard of another rank is old
_FACTOR, _PRIME = 48271, 2**31 - 1  # of a hash of all calls so far: MINSTD's
P = ParamSpec("P")
R = TypeVar("R")


class DistFlashPeerLost(RuntimeError):
    """A rank died, stopped, failed, makes other calls or cannot be reached; the message names it, and what this rank was doing."""


class Disagreement(RuntimeError):
    """Ranks of a group were about to do different things, and nothing of it was sent; or one of them has left out what others did."""


class Now(NamedTuple):
    """A moment on a wire: which call, what of it, and where in its ring."""

    call: int = 0  # collectives begun on this group so far, from 1
    name: str = ""  # attention, unshard, ...
    doing: str = ""  # agreeing, forward, backward, all-to-all; "" is between calls, or in user code
    hop: int = 0
    hops: int = 0

    def __str__(self) -> str:
        if not self.call:
            return "in no call yet"
        where = f"{self.doing}, " if self.doing else ""
        hop = f"ring hop {self.hop}/{self.hops}, " if self.hops else ""
        return f"{'in' if self.doing else 'after'} {hop}{where}{self.name}, seq {self.call}"


class Made(NamedTuple):
    """A call that a rank makes, and what tells all that it has made on the group so far from any other ones.

    Every rank of a group makes the same calls in the same order, so the n-th is the same to all of them.
    """

    call: int = 0
    path: int = 1  # below 2^31
    name: str = "no call"

    def __str__(self) -> str:
        return f"{self.name}, seq {self.call}" if self.call else self.name


@dataclass
class Journal:
    """One rank's part in a group."""

    group: str
    key: str = ""  # that only the ranks of this group have, or "" if nobody watches over them
    now: Now = field(default_factory=Now)
    rounds: int = 0  # of comparing notes
    agreed: dict[tuple, int] = field(default_factory=dict)  # kinds of calls on which all ranks agree, numbered alike
    made: Made = field(default_factory=Made)  # last
    counted: bool = True  # False once some calls may be made without Python: a CUDA graph holds them
    alike: dict[int, int] = field(default_factory=dict)  # by rank of the job: the last call known to be the same there
    kept: list[Made | None] = field(default_factory=lambda: [None] * KEPT, repr=False)  # by call number, modulo KEPT

    def enter(self, name: str, doing: str) -> None:
        """Another call begins."""
        global latest
        latest = self
        self.now = Now(self.now.call + 1, name, doing)

    def make(self, kind: int) -> None:
        """What was entered is carried out, and is of a kind with this number."""
        made = Made(self.now.call, (self.made.path * _FACTOR + kind + 1) % _PRIME, self.now.name)
        self.kept[made.call % KEPT] = made  # before `made` is there: other threads look up no later call
        self.made = made

    def counterpart(self, theirs: Made) -> Made | None:
        """Our call of the number of another rank's last: equal to it, unless one of us left a call out. None if we have not come to it,
        have forgotten it, or do not count.
        """
        if not self.counted or self.made.call < theirs.call:
            return None
        ours = self.kept[theirs.call % KEPT] or Made()
        if ours.call > theirs.call:
            return None
        return ours if ours.call == theirs.call else Made()

    @contextmanager
    def during(self, doing: str) -> Iterator[None]:
        """Note what is being done; an error leaves the note as it is."""
        global latest
        latest = self
        self.now = self.now._replace(doing=doing, hop=0, hops=0)
        yield
        self.now = self.now._replace(doing="", hop=0, hops=0)

    def at(self, hop: int, hops: int) -> None:
        """The ring has come to a hop."""
        self.now = self.now._replace(hop=hop, hops=hops)

    def __str__(self) -> str:
        return f"{self.now}, group {self.group}"


class Noting(Protocol):
    """A wire or a carrier, as far as this file is concerned."""

    journal: Journal


class Watcher(Protocol):
    """Whoever knows what became of the other ranks of the job."""

    lost: str | None  # who was lost, in words

    def verdict(self) -> str | None:
        """Who was lost, once that is known: waits for it as long as finding out takes. None if everybody is there."""
        ...

    def now(self, rank: int) -> Now | None:
        """What a rank of the job was last heard to do on the group that this process used last."""
        ...


watched: WeakValueDictionary[str, Journal] = WeakValueDictionary()  # of this process, by key
latest: Journal | None = None  # of this process: the one it wrote to last
watcher: Watcher | None = None  # of this process, set by whoever started one


@contextmanager
def blaming() -> Iterator[None]:
    """Turn a wire's error into one that names the rank whose loss caused it, if somebody can tell; the error itself is its cause."""
    try:
        yield
    except RuntimeError as error:
        lost = watcher.verdict() if watcher is not None and not isinstance(error, DistFlashPeerLost) else None
        if lost is None:
            raise
        raise DistFlashPeerLost(lost) from error


def noted(doing: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Note in the journal of a function's second argument that it runs."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            with cast(Noting, args[1]).journal.during(doing):
                return function(*args, **kwargs)

        return run

    return decorate
