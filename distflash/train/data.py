"""Bytes as tokens: reading documents, holding some out, packing the rest into sequences that ranks agree upon.

    S sequence length   N tokens of one batch   window: S tokens of the epoch's stream

A token is a byte, or BOS, which opens every document. One epoch is one stream: the documents in an order drawn from
(seed, epoch). The stream is cut into windows of S tokens (the last may be shorter) and the windows are drawn in an order of
their own. So window number n is a pure function of (data, S, seed): ranks agree without talking, and the data position
of a checkpoint is one integer.

The label of a token is the next token of its document, also where the window ends in between; a document's last token has
none. Documents of one window do not see each other: their borders travel as cu_seqlens.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distflash.train.folder import holds_run

BOS = 256
IGNORE = -100  # the label of a token that has none, as in torch's cross_entropy
DEFAULT_TEXT = "sympy"  # comes with torch, so every machine has it


@dataclass(frozen=True)
class Corpus:
    """Documents, one after the other: document i is text[starts[i] : starts[i + 1]]."""

    text: NDArray[np.uint8]  # [bytes]
    starts: NDArray[np.int64]  # [documents + 1]

    @classmethod
    def of(cls, documents: Iterable[bytes]) -> Corpus:
        """Empty documents are left out. Raises ValueError if nothing is left."""
        kept = [d for d in documents if d]
        if not kept:
            raise ValueError("the data holds no text: name files, folders, .jsonl or .parquet that do")
        starts = np.concatenate([[0], np.cumsum([len(d) for d in kept])]).astype(np.int64)
        return cls(np.frombuffer(b"".join(kept), dtype=np.uint8), starts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Bytes of each document."""
        return np.diff(self.starts)

    def document(self, i: int) -> NDArray[np.uint8]:
        return self.text[self.starts[i] : self.starts[i + 1]]

    def digest(self) -> str:
        """SHA-256 of text and borders: two ranks, or two runs, with the same digest read the same data."""
        h = hashlib.sha256(self.text.tobytes())
        h.update(self.starts.astype("<i8").tobytes())
        return h.hexdigest()

    def split(self, fraction: float, seed: int) -> tuple[Corpus, Corpus]:
        """(training, held-out) documents; a single document is cut in two, so that both parts hold text."""
        if len(self) == 1:
            if len(self.text) < 2:
                raise ValueError(f"{len(self.text)} byte of data cannot be split: training and validation need a byte each")
            cut = max(1, min(len(self.text) - 1, int(len(self.text) * (1 - fraction))))
            return Corpus.of([self.text[:cut].tobytes()]), Corpus.of([self.text[cut:].tobytes()])
        order = _random(seed, -1).permutation(len(self))
        count = int(np.searchsorted(np.cumsum(self.lengths[order]), fraction * len(self.text))) + 1
        held = set(order[: min(count, len(self) - 1)].tolist())
        return tuple(  # type: ignore[return-value]
            Corpus.of(self.document(i).tobytes() for i in range(len(self)) if (i in held) == part) for part in (False, True)
        )


@dataclass(frozen=True)
class Batch:
    """What one dp rank computes on in one pass: windows one after the other, not yet sharded."""

    tokens: Tensor  # [N] int64
    labels: Tensor  # [N] int64, IGNORE where a token has none
    cu_seqlens: Tensor  # [documents + 1] int32

    @property
    def valid(self) -> int:
        """How many tokens have a label."""
        return int((self.labels != IGNORE).sum())

    def without_labels(self) -> Batch:
        """The same tokens, none of which counts."""
        return Batch(self.tokens, torch.full_like(self.labels, IGNORE), self.cu_seqlens)


class Windows:
    """The endless, numbered windows of a corpus."""

    def __init__(self, corpus: Corpus, seq_len: int, seed: int) -> None:
        if seq_len < 2:
            raise ValueError(f"seq_len must be at least 2, got {seq_len}: a token needs a next one")
        self.corpus, self.seq_len, self.seed = corpus, seq_len, seed
        self.tokens = len(corpus.text) + len(corpus)  # of one epoch: the bytes and one BOS a document
        self.per_epoch = -(-self.tokens // seq_len)
        self._epoch = functools.lru_cache(maxsize=2)(self._make_epoch)

    def _make_epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """(document order, stream position of each document in that order, window order)."""
        random = _random(self.seed, epoch)
        documents = random.permutation(len(self.corpus))
        starts = np.concatenate([[0], np.cumsum(self.corpus.lengths[documents] + 1)])
        return documents, starts, random.permutation(self.per_epoch)

    def window(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64], list[int]]:
        """(tokens, labels, document lengths) of window `number`, counted from the start of training."""
        epoch, nth = divmod(number, self.per_epoch)
        documents, starts, order = self._epoch(epoch)
        lo = int(order[nth]) * self.seq_len
        hi = min(lo + self.seq_len, self.tokens)
        tokens, labels, lengths = [], [], []
        at = int(np.searchsorted(starts, lo, side="right")) - 1
        while at < len(documents) and starts[at] < hi:
            first, stop = max(lo - int(starts[at]), 0), min(hi, int(starts[at + 1])) - int(starts[at])
            body = self.corpus.document(int(documents[at]))
            piece = _piece(body, first, stop + 1)  # one more token than the window holds: its last label
            tokens.append(piece[: stop - first])
            labels.append(np.append(piece[1:], IGNORE) if stop == len(body) + 1 else piece[1:])
            lengths.append(stop - first)
            at += 1
        return np.concatenate(tokens), np.concatenate(labels), lengths

    def batch(self, first: int, count: int) -> Batch:
        """Windows first .. first + count - 1 packed into one row."""
        tokens, labels, lengths = zip(*(self.window(n) for n in range(first, first + count)), strict=True)
        borders = np.concatenate([[0], np.cumsum([n for window in lengths for n in window])])
        return Batch(
            torch.from_numpy(np.concatenate(tokens)),
            torch.from_numpy(np.concatenate(labels)),
            torch.from_numpy(borders.astype(np.int32)),
        )


def _piece(body: NDArray[np.uint8], first: int, stop: int) -> NDArray[np.int64]:
    """Tokens first .. stop - 1 of the document BOS + body; less where it ends."""
    bytes_ = body[max(first - 1, 0) : max(stop - 1, 0)].astype(np.int64)
    return np.concatenate([[BOS], bytes_]) if first == 0 else bytes_


def _random(seed: int, epoch: int) -> np.random.RandomState:
    # RandomState, not Generator: numpy promises that its draws never change, and a checkpoint outlives a numpy.
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, epoch + 1])))


def load_corpus(paths: Sequence[str], field: str = "text", out: str | None = None) -> Corpus:
    """The documents of files, folders, .jsonl and .parquet in the order given; without paths, DEFAULT_TEXT.

    out: where the run writes. What it and those before it have left there is no data, also if the folder is inside of one of `paths`.
    """
    return Corpus.of(read_documents(paths, field, out) if paths else default_documents())


def default_documents() -> Iterator[bytes]:
    """sympy's Python sources without its tests (they are mostly long tables of numbers), ordered by path."""
    try:
        files = distribution(DEFAULT_TEXT).files or []
    except PackageNotFoundError:
        raise ValueError(f"the default text is the source of {DEFAULT_TEXT}, which is not installed: pass --data PATH") from None
    skipped = {"tests", "benchmarks"}
    for file in sorted(files, key=str):
        if file.suffix == ".py" and not skipped & set(file.parts):
            yield file.read_binary()


def read_documents(paths: Sequence[str], field: str, out: str | None = None) -> Iterator[bytes]:
    """Every document of `paths`; folders are walked in sorted order. Raises ValueError for a path that is not there."""
    for path in map(Path, paths):
        if path.is_dir():
            for file in sorted(p for p in path.rglob("*") if p.is_file() and not _hidden(p.relative_to(path))):
                if out is None or not _of_run(file.resolve(), Path(out).resolve()):
                    yield from _located(file, field, binary_ok=True)
        elif path.is_file():
            yield from _located(path, field, binary_ok=False)
        else:
            raise ValueError(f"--data {str(path)!r} is neither a file nor a folder: check the path")


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _of_run(file: Path, out: Path) -> bool:
    """Whether a file is in the folder of the run, or in one that was moved aside from there (OUT.1, OUT.2, ...)."""
    if not file.is_relative_to(out.parent):
        return False
    folder = out.parent / file.relative_to(out.parent).parts[0]
    return re.fullmatch(re.escape(out.name) + r"(\.[0-9]+)?", folder.name) is not None and holds_run(folder)


def _located(path: Path, field: str, binary_ok: bool) -> Iterator[bytes]:
    """One file's documents; an error of the file system or of another library gets the file's name."""
    try:
        yield from _read_file(path, field, binary_ok)
    except (ValueError, NotImplementedError) as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path} cannot be read ({error}): repair it or leave it out") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error}): repair it or leave it out") from None


def _read_file(path: Path, field: str, binary_ok: bool) -> Iterator[bytes]:
    """One file's documents. A binary file in a folder is passed over; one that was named is an error."""
    if path.suffix in (".jsonl", ".ndjson"):
        yield from _read_jsonl(path, field)
    elif path.suffix == ".parquet":
        yield from _read_parquet(path, field)
    else:
        content = path.read_bytes()
        if b"\0" not in content[:8192]:
            yield content
        elif not binary_ok:
            raise ValueError(f"{path} holds zero bytes, expected text, .jsonl or .parquet: leave it out or convert it")


def _read_jsonl(path: Path, field: str) -> Iterator[bytes]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row: Any = json.loads(line.decode())
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}:{number} is not JSON in UTF-8 ({error}): every line must be one JSON object") from None
            text = row.get(field) if isinstance(row, dict) else None
            if not isinstance(text, str):
                raise ValueError(f"{path}:{number} has no string {field!r}: name the field that holds the text with --field")
            try:
                yield text.encode()
            except UnicodeEncodeError as error:  # half of a surrogate pair: JSON can say it, UTF-8 cannot
                raise ValueError(f"{path}:{number} has text in {field!r} that is no Unicode ({error}): repair the line") from None


def _read_parquet(path: Path, field: str) -> Iterator[bytes]:
    try:
        import pyarrow.parquet as parquet  # an optional dependency
    except ImportError:
        raise ValueError(f"{path} needs pyarrow, which is not installed: pip install pyarrow") from None
    file = parquet.ParquetFile(path)
    if field not in file.schema_arrow.names:
        raise ValueError(f"{path} has no column {field!r}, only {file.schema_arrow.names}: name the text column with --field")
    for rows in file.iter_batches(columns=[field]):
        for value in rows.column(0).to_pylist():
            if value is not None:
                if not isinstance(value, str | bytes):
                    raise ValueError(f"column {field!r} of {path} holds {type(value).__name__}, expected text: name another with --field")
                yield value if isinstance(value, bytes) else value.encode()
