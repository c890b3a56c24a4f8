"""Heartbeats through the store: who died, stopped, failed or cannot be reached is named on every rank that is left.

Each rank beats: it writes one note under its own key, and reads those of all others. Two threads, so that nothing can block both:

    beat     talks to the store, over a connection of its own
    watch    only looks at the clock and at what beat has read; it judges, tells, and in the end ends the process

A rank is silent if its note does not change; clocks of different hosts are never compared. A note also tells which call a rank made last
on each group: whoever has come as far sees whether it made the same ones (`Journal.counterpart`). The first to judge writes its verdict
into its note, and whoever reads it there adopts it. A thread waiting in gloo or in CUDA cannot be interrupted, so the process ends
with exit code EXIT_PEER_LOST some time after the verdict. NCCL's communicators end with it: aborting them first would wake a host
thread that goes on with half of a message, and can hang itself (for which reason PyTorch's own watchdog skips it, too).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distflash.parallel.agreement import NOTE
from distflash.parallel.wire import journal
from distflash.parallel.wire.journal import DistFlashPeerLost, Journal, Made, Now

if TYPE_CHECKING:
    from torch.distributed import Store

EXIT_PEER_LOST = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong with this process, starting again may help
LIMIT = 10.0  # seconds
BEATS = 10  # in a limit
GROUPS = 64  # of which a note tells, at most
SLOWEST = 1.0  # seconds between two beats at most: a rank that leaves is noticed while others say goodbye
WORDS = 1000  # characters of an error that peers are told

RUNS, LEFT, FAILED, LOST = "runs", "left", "failed", "lost"
# of a note; beside it "group" and "now", or neither
FORM = {"beat": int, "host": str, "pid": int, "state": str, "why": str, "about": int, "made": dict}


@dataclass
class _Peer:
    """What was last read of a rank."""

    since: float  # when its note last changed, by our clock
    text: bytes = b""
    note: dict[str, Any] = field(default_factory=dict)

    @property
    def state(self) -> str:
        return self.note.get("state", RUNS)


class Heartbeat:
    """This rank's beat and watch. `store` is a connection that nobody else uses, with keys that no other attempt has.

    limit: seconds after which a silent rank is named. server: the rank that serves the store; None if the launcher does.
    """

    def __init__(self, store: Store, rank: int, size: int, limit: float, server: int | None):
        self.store, self.rank, self.size, self.limit, self.server = store, rank, size, limit, server
        self.interval = min(limit / BEATS, SLOWEST)
        self.patience = limit - 3 * self.interval  # what is read may be an interval old, is looked at later, and passed on again
        now = time.monotonic()
        self.peers = {r: _Peer(now) for r in range(size) if r != rank}
        self.answered, self.broken = now, False  # when the store last answered; if its connection, or what came over it, broke
        self.odd: tuple[int, str] | None = None  # a rank whose note is none, and what it is
        self.strayed: tuple[int, str] | None = None  # a rank that makes other calls than we, and which
        self.state, self.why, self.about = RUNS, "", rank
        self.beats, self.process = 0, os.getpid()
        self.lost: str | None = None
        self.awaited = False  # a thread waits for the verdict, and will tell it
        self.threads = [threading.Thread(target=work, name=f"distflash{work.__name__}", daemon=True) for work in (self._beat, self._watch)]
        self.soon, self.told, self.over = threading.Event(), threading.Event(), threading.Event()

    def start(self) -> None:
        """Begin to beat and to watch."""
        for thread in self.threads:
            thread.start()
        journal.watcher = self

    def stop(self) -> None:
        """This rank ends as it should: its silence from now on means nothing."""
        if journal.watcher is self:
            journal.watcher = None
        if os.getpid() == self.process:  # threads do not survive a fork, and the connection is the parent's
            self._say(LEFT)
            self.over.set()
            self.soon.set()
            for thread in self.threads:  # the store may go after this
                thread.join(self.limit)
            if self.strayed and self.lost is None:  # whoever leaves last has read the last calls of all
                self.lost = self.strayed[1]
                _tell(self.lost)

    def failed(self, error: BaseException) -> None:
        """Tell the others of an uncaught exception, unless it follows from the loss of a peer: then its report is completed."""
        if isinstance(error, DistFlashPeerLost):
            return
        if lost_connection(error):
            lost = self.verdict()
            if lost is not None:
                _tell(lost)
                return
        self._say(FAILED, f"{type(error).__name__}: {error}"[:WORDS])

    def end(self) -> None:
        """Keep the store up until the others know why this rank ends; a rank that has lost another one ends here, for good."""
        if self.server == self.rank:
            deadline = time.monotonic() + self.limit / 2
            while time.monotonic() < deadline and any(p.state == RUNS and not self._silence(p) for p in self.peers.values()):
                time.sleep(self.interval / 4)
        if self.lost is not None:
            self._wake()
            self._let_go_first()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(EXIT_PEER_LOST)

    def _wake(self) -> None:
        """Let a rank that was stopped on this host go on: it hears that it was given up, and ends, instead of being left behind."""
        note = self.peers[self.about].note if self.about in self.peers else {}
        if note.get("host") == socket.gethostname() and type(note["pid"]) is int and note["pid"] > 1:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(note["pid"], signal.SIGCONT)

    def _let_go_first(self) -> None:
        """Wait for a rank of this host that ends by itself: whoever started both then sees its exit code before ours, the consequence."""
        peer = self.peers.get(self.about)
        if peer is None or peer.state not in (LEFT, FAILED) or peer.note["host"] != socket.gethostname():
            return
        deadline = time.monotonic() + self.limit
        while (there := _runs(peer.note["pid"])) and time.monotonic() < deadline:
            time.sleep(self.interval / 4)
        if not there:
            time.sleep(self.interval / 4)  # whoever looks at one process after the other has seen it, too

    def verdict(self) -> str | None:
        """Who was lost, in words: waits for as long as that takes to find out."""
        self.awaited = True
        self.told.wait(self.limit + self.interval)
        self.awaited = self.lost is not None
        return self.lost

    def now(self, rank: int) -> Now | None:
        """What a rank was last heard to do on the group that this process used last."""
        note = self.peers[rank].note
        if journal.latest is None or note.get("group") != journal.latest.group:
            return None
        return Now(*note["now"])

    # the thread that talks

    def _beat(self) -> None:
        try:
            while not self.over.is_set():
                self._talk()
                self.soon.wait(self.interval if all(peer.text for peer in self.peers.values()) else self.interval / 20)
                self.soon.clear()
        except (RuntimeError, ValueError):  # the store, or what was read from it, is not to be relied on any more: watch judges
            self.broken = True

    def _talk(self) -> None:
        self.beats += 1
        note = {"beat": self.beats, "host": socket.gethostname(), "pid": self.process}
        note |= {"state": self.state, "why": self.why, "about": self.about}
        note |= {"made": {kept.key: kept.made for kept in _journals() if kept.counted}}  # after the state: of a rank that left they are all
        now = journal.latest
        note |= {"group": now.group, "now": now.now} if now else {}
        self.store.set(str(self.rank), json.dumps(note))
        keys = {r: str(r) for r in self.peers if self.peers[r].text or self.store.check([str(r)])}
        for r, text in zip(keys, self.store.multi_get(list(keys.values())) if keys else (), strict=True):
            try:
                if text != self.peers[r].text:
                    self.peers[r] = _Peer(time.monotonic(), text, read_note(text, self.size))
            except ValueError as error:
                self.odd = r, f"{self._name(r)} sent {error}"
                raise
        self.strayed = self.strayed or self._strayed()
        self.answered = time.monotonic()

    def _strayed(self) -> tuple[int, str] | None:
        """(a rank that made another call than we, or ended without it, on a group of both; both calls), as far as can be told."""
        for r, peer in self.peers.items():
            for key, said in peer.note.get("made", {}).items():
                theirs, ours = Made(*said), journal.watched.get(key)
                if ours is None or (mine := ours.counterpart(theirs)) is None:
                    continue
                who, since = self._name(r), ours.alike.get(r, 0)
                if mine != theirs:
                    made = f"{who} made {theirs}, where rank {self.rank} made {mine}"
                    return r, f"{made}: their calls were alike until seq {since}, group {ours.group}"
                if peer.state == LEFT and mine != (last := ours.made):
                    return r, f"{who} has ended its program after {mine}, without {last} of rank {self.rank}, group {ours.group}"
                ours.alike[r] = mine.call
        return None

    def _say(self, state: str, why: str = "", about: int | None = None) -> None:
        """Change what this rank's note says, and see to it that it is written, if the store can still be reached."""
        self.state, self.why, self.about = state, why, self.rank if about is None else about
        said, deadline = self.beats + 2, time.monotonic() + 3 * self.interval  # the beat under way may have read the old state
        while self.beats < said and not self.broken and time.monotonic() < min(deadline, self.answered + 2 * self.interval):
            self.soon.set()
            time.sleep(self.interval / 20)

    # the thread that judges

    def _watch(self) -> None:
        last, stood = time.monotonic(), 0.0
        found = None
        while found is None:
            if self.over.wait(self.interval / 2):
                return
            now = time.monotonic()
            if now - last > self.limit / 2:  # it is we who were stopped or starved: hear the others first
                self.answered, stood = now, now - last
                for peer in self.peers.values():
                    peer.since = now
            last = now
            try:
                found = self._judge(now)
            except Exception as error:  # nobody else would notice that nobody watches
                found = self.rank, f"rank {self.rank} cannot watch over the others any more: {type(error).__name__}: {error}"
        if self.state != RUNS:  # it ends, and has told the others: their verdict of it is no news
            if not self.over.wait(self.limit):
                os._exit(1)
            return
        about, why = found
        self.lost = f"{why}; rank {self.rank} was {journal.latest or 'in no call of distflash'}"
        if stood:
            self.lost += f", and has itself been stopped for {stood:.1f} s"
        self._say(LOST, why, about)
        awaited = self.awaited
        self.told.set()
        if not awaited:
            _tell(self.lost)
        if not self.over.wait((3 if awaited else 1) * self.limit):  # time for an error to end the program, as it should
            if awaited:
                _tell(self.lost)
            self.end()

    def _judge(self, now: float) -> tuple[int, str] | None:
        """(the rank that was lost, or the one to ask first if that is the store's; what happened)."""
        if self.odd:
            return self.odd
        for r, peer in self.peers.items():
            if peer.state == FAILED:
                return r, f"{self._name(r)} failed with {peer.note['why']}"
        for peer in self.peers.values():
            if peer.state == LOST and peer.note["about"] != self.rank:
                return peer.note["about"], peer.note["why"]
            if peer.state == LOST:
                return self.rank, f"the other ranks have given up on this one: {peer.note['why']}"
        if self.strayed:
            return self.strayed
        if self.broken or now - self.answered > self.patience:
            how = "is gone" if self.broken else f"has not answered for {now - self.answered:.1f} s"
            if self.server not in self.peers:
                return 0, f"the store on the host of rank 0 {how}: the launcher that serves it, its host or the network is down"
            if self.peers[self.server].state == LEFT:
                self.over.set()  # it has finished and took the store along: nobody can watch any more
                return None
            return self.server, f"{self._name(self.server)}, which serves the store, {how}"
        for r, peer in self.peers.items():
            if silence := self._silence(peer):
                heard = f", last heard {Now(*peer.note['now'])}" if "now" in peer.note else ""
                return r, f"{self._name(r)} sent no heartbeat for {silence:.1f} s{heard}"
        if self.awaited:  # an error that somebody's leaving would explain
            for r, peer in self.peers.items():
                if peer.state == LEFT:
                    return r, f"{self._name(r)} has ended its program"
        return None

    def _silence(self, peer: _Peer) -> float:
        """Seconds for which a rank that should beat has not, if it is too long, else 0. Counted as far as the store answers."""
        silence = self.answered - peer.since
        return silence if peer.state == RUNS and silence > self.patience else 0.0

    def _name(self, rank: int) -> str:
        note = self.peers[rank].note
        return f"rank {rank} (host {note['host']}, pid {note['pid']})" if note else f"rank {rank}"


def read_note(text: bytes, size: int) -> dict[str, Any]:
    """A note of a rank among `size`. Raises ValueError unless it is of the form that `_talk` writes."""
    if len(text) > NOTE:
        raise ValueError(f"a note of {len(text)} bytes: a heartbeat's has at most {NOTE}")
    try:
        note = json.loads(text)
        known = {name: type(value) for name, value in note.items() if name not in ("group", "now")} == FORM
        known = known and all([*map(type, made)] == [*map(type, Made())] for made in note["made"].values())
        known = known and note["state"] in (RUNS, LEFT, FAILED, LOST) and 0 <= note["about"] < size
        if known and not note.keys().isdisjoint({"group", "now"}):
            known = type(note["group"]) is str and [*map(type, note["now"])] == [*map(type, Now())]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        note, known = {}, False
    if not known:
        raise ValueError(f"a note that is not one of ours, {text[:60]!r}: install one version of distflash everywhere")
    return note


def _journals() -> list[Journal]:
    """Those of this process that other ranks have, too."""
    there = (reference() for reference in journal.watched.valuerefs())
    return [one for one in there if one is not None][-GROUPS:]


def _runs(pid: int) -> bool:
    """Whether a process of this host is there and has not ended yet; False where there is no /proc to ask."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (OSError, IndexError):
        return False


def lost_connection(error: BaseException) -> bool:
    """Whether an error may only say that some other rank has ended: gloo's and NCCL's have no type of their own."""
    return isinstance(error, RuntimeError) and any(word in str(error) for word in ("onnection", "gloo", "NCCL"))


def _tell(lost: str) -> None:
    print(f"{DistFlashPeerLost.__name__}: {lost}", file=sys.stderr, flush=True)
