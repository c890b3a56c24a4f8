"""The documents of benchmarks/paper/context.py: modules of sympy followed by their tests, crops of them, windows over them."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import distribution

import numpy as np
import torch
from torch import Tensor

from distflash.train.data import DEFAULT_TEXT

CLASSES, HELD_OUT = 8, 0.15  # parts of sympy that crops are from; share of the bytes that is held out
Documents = list[tuple[str, bytes]]  # (part, text)


def documents() -> Documents:
    """Every module of sympy, followed by its tests, in the order of their paths."""
    texts = {str(f): f.read_binary() for f in distribution(DEFAULT_TEXT).files or [] if f.suffix == ".py" and len(f.parts) > 2}
    modules = sorted(path for path in texts if "/tests/" not in path and "/benchmarks/" not in path)
    tests = (path.rpartition("/") for path in modules)
    together = [texts[path] + texts.get(f"{folder}/tests/test_{name}", b"") for path, (folder, _, name) in zip(modules, tests, strict=True)]
    return [(path.split("/")[1], text) for path, text in zip(modules, together, strict=True)]


def split(found: Documents) -> tuple[Documents, Documents]:
    """(training, held-out): of every part about HELD_OUT of its bytes, whole documents, the first of a part never."""
    shares: tuple[Documents, Documents] = [], []
    sizes: dict[str, list[int]] = {}
    for n in np.random.RandomState(0).permutation(len(found)):
        part, text = found[n]
        total, held = sizes.setdefault(part, [0, 0])
        out = held < HELD_OUT * total
        sizes[part] = [total + len(text), held + out * len(text)]
        shares[out].append((part, text))
    return shares


def parts_of(shares: tuple[Documents, Documents], least: int) -> dict[str, tuple[bytes, bytes]]:
    """The CLASSES parts with the most held-out text: all of a part's training and held-out documents, joined."""
    names = {part for part, _ in shares[0]}
    joined = {name: tuple(b"".join(text for part, text in share if part == name) for share in shares) for name in names}
    largest = sorted(joined, key=lambda name: (-min(map(len, joined[name])), name))[:CLASSES]
    assert min(len(joined[largest[-1]][n]) for n in (0, 1)) > least
    return {name: (joined[name][0], joined[name][1]) for name in sorted(largest)}


def crops(texts: Sequence[bytes], which: Sequence[int] | int, length: int, seed: tuple[int, ...]) -> Tensor:
    """[count, length + 1] bytes from random places: of the texts named by `which`, or of as many as it says, long ones more often."""
    random = np.random.RandomState(seed)
    rooms = np.array([max(0, len(text) - length) for text in texts])
    chosen = random.choice(len(texts), which, p=rooms / rooms.sum()) if isinstance(which, int) else which
    starts = [random.randint(rooms[n]) for n in chosen]
    pieces = [np.frombuffer(texts[n], np.uint8, length + 1, start) for n, start in zip(chosen, starts, strict=True)]
    return torch.from_numpy(np.stack(pieces).astype(np.int64))


def windows(length: int, context: int) -> list[tuple[int, int]]:
    """(start, first that counts) of windows of `context` tokens that predict the bytes 1 .. length - 1 of a document once each."""
    last = length - 1 - context
    starts = [*range(0, last, context // 2), last] if last > 0 else [0]
    ends = [0, *(start + context for start in starts)]
    return [(start, end - start) for start, end in zip(starts, ends, strict=False)]
