"""Agreement before communication: all ranks of a group compare what they are about to do, before the first message of it.

Notes go from host to host beside the messages (the group's store; shared memory between threads), so that ranks that differ in
their messages can still talk. A GPU is neither asked nor waited for. A note is JSON: field -> its value in words.
"""

from __future__ import annotations

import json
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from hashlib import blake2b
from typing import TYPE_CHECKING, Literal, Protocol

from distflash.parallel.slices import Slices
from distflash.parallel.wire.journal import AGREEING, Disagreement, DistFlashPeerLost, Journal, Now

if TYPE_CHECKING:
    import torch

Check = Literal["first", "always", "never"]
CHECKS: tuple[Check, ...] = ("first", "always", "never")

REMEMBERED = 1 << 14  # kinds of calls; alike on every rank, so that all forget at the same call
WORDS = 160  # characters of a value that are told
NOTE = 1 << 16  # bytes of a note that are read
_REFUSED, _TOLD = "refused", 4096  # field of a note, and characters of it
SLICE = 0.5  # seconds between two looks at what has become of the others


class Council(Protocol):
    """A wire whose ranks can compare notes."""

    rank: int
    size: int
    journal: Journal
    device: torch.device
    patience: float  # seconds after which a rank that does not come is an error

    def post(self, round: int, note: str) -> None:
        """Leave this rank's note of a round; that of the round before last, which everybody has read, may go."""
        ...

    def read(self, round: int, seconds: float) -> dict[int, str]:
        """The notes of a round by rank, all of them as soon as they are there, or those that came within `seconds`."""
        ...

    def others(self) -> dict[int, Now]:
        """What other ranks were last seen to do on this wire, as far as it is known."""
        ...


def agree(wire: Council, check: Check, call: str, fields: Mapping[str, object]) -> None:
    """Begin a call: raise Disagreement on every rank unless all are about to make the same one.

    `fields` are hashable values that must be alike on every rank and that tell one kind of call from another. "first" compares
    kinds that were not compared before, "always" every call, "never" none. What is not compared is numbered: see `Journal.make`.
    """
    journal, kind = wire.journal, (call, *fields.items())
    journal.counted = journal.counted and not _captures(wire)
    number = zlib.crc32(call.encode()) if check == "never" else journal.agreed.get(kind)
    if number is not None and check != "always":
        journal.enter(call, "")
        journal.make(number)
        return
    journal.enter(call, AGREEING)
    said = {"call": call, "seq": str(journal.now.call)} | {name: words(value) for name, value in fields.items()}
    _compare([_read(note, rank) for rank, note in enumerate(_confer(wire, json.dumps(said), call))])
    if len(journal.agreed) >= REMEMBERED:
        journal.agreed.clear()
    journal.make(journal.agreed.setdefault(kind, len(journal.agreed)))
    journal.now = journal.now._replace(doing="")


def of_gradient(wire: Council, check: Check, call: str) -> Callable[[], None]:
    """What the backward of a call begins with: it communicates, so it is a call too, and a rank may leave it out."""
    return partial(agree, wire, check, f"gradient of {call}", {}) if wire.size > 1 else nothing


def nothing() -> None:
    """The same of one rank."""


def refuse(wire: Council, check: Check, call: str, error: Exception) -> None:
    """Take part in a call that this rank refuses: whoever compares notes on it raises Disagreement with this error.

    Nobody is waited for: where the others do not compare, as for a kind agreed on before, they have gone on.
    """
    journal = wire.journal
    journal.enter(call, AGREEING)
    if check != "never":
        journal.rounds += 1
        said = {"call": call, "seq": str(journal.now.call), _REFUSED: f"{type(error).__name__}: {error}"[:_TOLD]}
        wire.post(journal.rounds, json.dumps(said))
    journal.now = journal.now._replace(doing="")


def _captures(wire: Council) -> bool:
    """Whether this call goes into a CUDA graph, to be made again without us."""
    if wire.device.type != "cuda":
        return False
    import torch  # here: heartbeats need this file, and the command line starts without torch

    return torch.cuda.is_current_stream_capturing()


@lru_cache(maxsize=256)
def mask_words(mask: Slices | None) -> str:
    """A mask in words; once, not in every layer."""
    return words(mask and tuple(tuple(s) for s in mask.slices))


def words(value: object) -> str:
    """A value in words: short ones as they are, long ones by their beginning and a hash of the whole."""
    text = value if isinstance(value, str) else repr(value)
    if len(text) <= WORDS:
        return text
    return f"{text[: WORDS - 40]}... ({len(text)} characters, hash {blake2b(text.encode(), digest_size=8).hexdigest()})"


def _confer(wire: Council, note: str, call: str) -> list[str]:
    """The notes of all ranks. Raises Disagreement if one has gone on without, or stays away for longer than the wire's patience."""
    journal = wire.journal
    journal.rounds += 1
    wire.post(journal.rounds, note)
    end = time.monotonic() + wire.patience
    while True:
        seen = wire.others()  # before reading: whoever went on had posted its note
        notes = wire.read(journal.rounds, SLICE)
        if len(notes) == wire.size:
            return [notes[rank] for rank in range(wire.size)]
        passed = [r for r, now in seen.items() if r not in notes and now.call >= journal.now.call and now.doing != AGREEING]
        told = f"rank {wire.rank} is at {journal.now.name}, seq {journal.now.call}, of a kind new to it: {note}"
        if passed:
            at = "; ".join(f"rank {r} is {seen[r]}" for r in passed)
            raise Disagreement(f"ranks disagree on a call: {told}; but {at}, of a kind agreed on before: see check='always'")
        if time.monotonic() > end:
            missing = [r for r in range(wire.size) if r not in notes]
            raise DistFlashPeerLost(f"ranks {missing} did not come to agree on a call within {wire.patience:g} s: {told}")


def _read(note: str, rank: int) -> dict[str, str]:
    said = json.loads(note) if len(note) <= NOTE else None
    if not isinstance(said, dict) or not all(isinstance(text, str) for text in said.values()):
        raise Disagreement(f"rank {rank} sent a note of {len(note)} characters that is not one of ours: run one version on all ranks")
    return said


def _compare(notes: list[dict[str, str]]) -> None:
    refused = [f"rank {rank}: {said[_REFUSED]}" for rank, said in enumerate(notes) if _REFUSED in said]
    if refused:
        raise Disagreement(f"ranks refuse {notes[0]['call']}, seq {notes[0]['seq']}; nothing was sent\n  " + "\n  ".join(refused))
    names = list(dict.fromkeys(name for said in notes for name in said))
    differing = [name for name in names if len({said.get(name) for said in notes}) > 1]
    if not differing:
        return
    if "call" in differing:  # then their other fields are not the same ones
        differing = ["call"]
    lines = [f"{name}: {_sides([said.get(name, 'not given') for said in notes])}" for name in differing]
    raise Disagreement(f"ranks disagree on {notes[0]['call']}, seq {notes[0]['seq']}; nothing was sent\n  " + "\n  ".join(lines))


def _sides(values: list[str]) -> str:
    """Who says what: "ranks 0, 2 say 1.0; rank 1 says 2.0"."""
    sides = defaultdict(list)
    for rank, value in enumerate(values):
        sides[value].append(rank)
    return "; ".join(
        f"rank {ranks[0]} says {value}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} say {value}"
        for value, ranks in sides.items()
    )
