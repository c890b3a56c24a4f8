"""The two all-to-alls of Ulysses, and attention between them: by messages over any wire, or by copy engines.

Legend: B batch, T local tokens, Tg tokens of the whole group, H heads, h heads of this rank, U ranks of the group, G groups of heads.

Over messages all heads come at once. Where ranks reach each other's memory, copy engines bring them in G groups: while one is worked on,
the next one comes and the one before it goes home. Heads know nothing of each other, so no bit depends on G.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor

from distflash.parallel.ulysses import Heads, Ulysses, dealt
from distflash.parallel.wire.base import Form, empty, pack, room, unpack
from distflash.parallel.wire.symmetric import Window, Windows, between, copy

Attend = Callable[..., Sequence[Tensor]]  # (number of a group, its tensors [B, Tg, h / G, ...]): tensors of as many tokens and heads


def around(
    ulysses: Ulysses, attend: Attend, tensors: Sequence[Tensor], shards: Sequence[Heads], back: Sequence[Heads]
) -> tuple[list[Tensor], list[Tensor]]:
    """What `attend` was given, all groups behind one another, [G * B * Tg * h / G, ...]; and what it returned, [B, T, H, ...] again.

    `tensors` are [B, T, H, ...] of this rank's tokens, their heads dealt out by `shards`; those of what comes back by `back`, and what
    several ranks hold of one head is summed.
    """
    during = ulysses.wire.journal.during
    with during("all-to-all"):
        way = (Copied if ulysses.reach else Sent)(ulysses, tensors, shards, back)
    for group in range(ulysses.groups):
        with during("all-to-all"):
            there = way.arrived(group)
        done = attend(group, *there)
        with during("all-to-all"):
            way.leave(group, done)
        del there, done
    with during("all-to-all"):
        return way.gathered, way.home()


class Sent:
    """A pass by messages: one from each rank to each other before attention, one after it."""

    def __init__(self, ulysses: Ulysses, tensors: Sequence[Tensor], shards: Sequence[Heads], back: Sequence[Heads]):
        self.ulysses, self.wire, self.back = ulysses, ulysses.wire, back
        ranks, me = range(ulysses.wire.size), ulysses.wire.rank
        give = [ulysses.of_heads(tensors, shards, rank, 0) for rank in ranks]
        found = self._exchanged(give, [ulysses.forms(tensors, shards, rank, me) for rank in ranks])
        self.whole = [torch.cat(column, dim=1) for column in zip(*found, strict=True)]
        self.found: list[list[Tensor]] = []

    @property
    def gathered(self) -> list[Tensor]:
        return [x.flatten(0, 2) for x in self.whole]

    def arrived(self, group: int) -> list[Tensor]:
        """There is one group."""
        return self.whole

    def leave(self, group: int, done: Sequence[Tensor]) -> None:
        """Each rank's tokens go to it."""
        ranks, me = range(self.wire.size), self.wire.rank
        give = [self.ulysses.of_tokens(done, rank) for rank in ranks]
        self.found = self._exchanged(give, [self.ulysses.forms(done, self.back, me, rank) for rank in ranks])

    def home(self) -> list[Tensor]:
        """What all ranks made of our tokens."""
        return assembled(self.found, self.back)

    def _exchanged(self, give: Sequence[list[Tensor]], forms: Sequence[list[Form]]) -> list[list[Tensor]]:
        """Give each rank its tensors; what each gave us, of these forms, in rank order."""
        arriving = {rank: empty(forms[rank], give[rank][0].device) for rank in self.ulysses.others()}
        self.wire.exchange({rank: pack(give[rank]) for rank in arriving}, arriving).wait()
        return [unpack(arriving[rank], forms[rank]) if rank in arriving else give[rank] for rank in range(self.wire.size)]


class Copied:
    """A pass by copy engines: others' parts come from their windows straight to their places, ours go to windows of theirs.

    Each group of heads has two windows of its own, so that no flag tells of another group: in one its parts are laid down before
    attention, into the other others write after it.
    """

    def __init__(self, ulysses: Ulysses, tensors: Sequence[Tensor], shards: Sequence[Heads], back: Sequence[Heads]):
        self.ulysses, self.wire, self.rank, self.others = ulysses, cast(Windows, ulysses.wire), ulysses.wire.rank, ulysses.others()
        self.back, groups = back, range(ulysses.groups)
        self.whole = [  # [G, B, Tg, h / G, ...]
            torch.empty((len(groups), batch, ulysses.gathered[0], *heads), dtype=dtype, device=x.device)
            for x, ((batch, _, *heads), dtype) in zip(tensors, ulysses.forms(tensors, shards, self.rank, self.rank), strict=True)
        ]
        self.ours = self.wire.mark()  # from here on this memory is
        self.laid = [Places(ulysses, f"heads {group}", tensors, shards) for group in groups]
        self.coming: list[torch.cuda.Event | None] = []  # by group: when all of it is there
        self.done: list[list[Tensor]] = []  # by group: what attention returned
        self.brought: list[Places] = []
        self.gone: torch.cuda.Event | None = None
        for group, places in enumerate(self.laid):
            places.window.writable(*self.others)
            for dest in self.others:
                for to, x in zip(places.of(self.rank, dest), ulysses.of_heads(tensors, shards, dest, group), strict=True):
                    to.copy_(x)
            places.window.give(*self.others)
        self._pull(0)
        for group in groups:
            own = ulysses.of_tokens([x[group] for x in self.whole], self.rank)
            for to, x in zip(own, ulysses.of_heads(tensors, shards, self.rank, group), strict=True):
                to.copy_(x)

    @property
    def gathered(self) -> list[Tensor]:
        return [x.flatten(0, 3) for x in self.whole]

    def arrived(self, group: int) -> list[Tensor]:
        """A group's tensors; those of the next one set out."""
        if group + 1 < len(self.laid):
            self._pull(group + 1)
        self.wire.after(self.coming[group])
        return [x[group] for x in self.whole]

    def leave(self, group: int, done: Sequence[Tensor]) -> None:
        """Each rank's tokens go to its window, while the next group is worked on."""
        mine = [x.contiguous() for x in done]
        places = Places(self.ulysses, f"tokens {group}", mine, self.back)
        there = self.wire.mark()
        with self.wire.beside("home"):
            self.wire.after(there)
            for dest in self.others:
                places.window.writable(dest)
                for x, to in zip(self.ulysses.of_tokens(mine, dest), places.of(dest, self.rank), strict=True):
                    copy(x, to)
                places.window.give(dest)
            self.gone = self.wire.mark()
        self.done.append(mine)
        self.brought.append(places)

    def home(self) -> list[Tensor]:
        """What all ranks made of our tokens."""
        for places in self.brought:
            for source in self.others:
                places.window.take(source)
        found = [  # by rank, then by group: heads in their order
            self.ulysses.of_tokens(done, source) if source == self.rank else places.of(self.rank, source)
            for source in range(self.wire.size)
            for done, places in zip(self.done, self.brought, strict=True)
        ]
        whole = assembled(found, [[one for rank in h for one in dealt(rank, len(self.done))] for h in self.back])
        for places in self.brought:
            for source in self.others:
                places.window.release(source)
        self.wire.after(self.gone)  # what was sent may be freed
        return whole

    def _pull(self, group: int) -> None:
        """Copy what others laid down: a sequence of the batch is contiguous there and here."""
        places = self.laid[group]
        with self.wire.beside("pull"):
            self.wire.after(self.ours)
            for source in self.others:
                places.window.take(source)
                here = self.ulysses.of_tokens([x[group] for x in self.whole], source)
                for x, to in zip(places.of(source, self.rank), here, strict=True):
                    copy(x, to)
                places.window.release(source)
            self.coming.append(self.wire.mark())


class Places:
    """A window: on each rank, what its tokens and each other rank's heads, those of one group, have in common."""

    def __init__(self, ulysses: Ulysses, name: str, like: Sequence[Tensor], shards: Sequence[Heads]):
        self.ulysses, self.like, self.shards = ulysses, like, shards
        self.nbytes = room(ulysses.largest(like, shards))
        self.window: Window = cast(Windows, ulysses.wire).window(name, self.nbytes * (ulysses.wire.size - 1))

    def of(self, owner: int, other: int) -> list[Tensor]:
        """In the owner's piece: its tokens, the other's heads."""
        return unpack(between(self.window, owner, other, self.nbytes), self.ulysses.forms(self.like, self.shards, owner, other))


def assembled(found: Sequence[Sequence[Tensor]], shards: Sequence[Sequence[range]]) -> list[Tensor]:
    """Of each tensor, the heads of `shards` side by side; what several of these have in common is summed."""
    return [_joined(column, heads) for column, heads in zip(zip(*found, strict=True), shards, strict=True)]


def _joined(column: Sequence[Tensor], shards: Sequence[range]) -> Tensor:
    if not any(a.stop > b.start for a, b in pairwise(shards)):
        return torch.cat(list(column), dim=2)
    first = column[0]
    whole = first.new_zeros(*first.shape[:2], shards[-1].stop, *first.shape[3:])
    for part, heads in zip(column, shards, strict=True):
        whole[:, :, heads.start : heads.stop] += part
    return whole
