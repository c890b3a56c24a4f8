"""Reading, splitting and packing: nothing is lost, nothing is read twice, no label crosses a document."""

from __future__ import annotations

import json
from contextlib import suppress

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distflash.train.data import BOS, IGNORE, Corpus, Windows, load_corpus, read_documents

DOCUMENTS = [b"a", b"bc" * 40, b"xyz", b"0123456789" * 13, b"\xff\x00"]
documents = st.lists(st.binary(min_size=0, max_size=60), min_size=1, max_size=8).filter(any)


def epoch(windows: Windows, number: int = 0):
    first = number * windows.per_epoch
    return [windows.window(n) for n in range(first, first + windows.per_epoch)]


@settings(max_examples=60, deadline=None)
@given(documents, st.integers(2, 40), st.integers(0, 5), st.integers(0, 2))
def test_an_epoch_holds_every_byte_once_as_a_token_and_once_as_a_label(docs, seq_len, seed, number):
    corpus = Corpus.of(docs)
    seen, wanted = [], []
    for tokens, labels, lengths in epoch(Windows(corpus, seq_len, seed), number):
        assert len(tokens) == len(labels) == sum(lengths) <= seq_len
        seen += [t for t in tokens if t != BOS]
        wanted += [t for t in labels if t != IGNORE]
    assert sorted(seen) == sorted(wanted) == sorted(b"".join(docs))


@settings(max_examples=60, deadline=None)
@given(documents, st.integers(2, 40), st.integers(0, 5))
def test_a_label_is_the_next_token_of_its_document_or_none(docs, seq_len, seed):
    stretches = []
    for tokens, labels, lengths in epoch(Windows(Corpus.of(docs), seq_len, seed)):
        at = 0
        for n in lengths:
            assert (labels[at : at + n - 1] == tokens[at + 1 : at + n]).all()  # inside a piece
            assert BOS not in tokens[at + 1 : at + n]  # BOS only opens
            assert labels[at + n - 1] != BOS  # so no label crosses into another document
            stretches.append((tuple(tokens[at : at + n]), labels[at + n - 1]))
            at += n
    ends = sum(last == IGNORE for _, last in stretches)
    assert ends == sum(map(bool, docs))  # one token without a label for each document, its last
    opened = [s for s, _ in stretches if s[0] == BOS]
    assert len(opened) == ends


def test_a_long_document_is_split_and_its_pieces_join_up():
    windows = Windows(Corpus.of([bytes(range(200))]), 64, seed=3)
    pieces = sorted((w for w in epoch(windows)), key=lambda w: int(w[0][0]) if w[0][0] != BOS else -1)
    assert [len(w[0]) for w in pieces] == [64, 64, 64, 9]
    assert np.concatenate([w[0] for w in pieces]).tolist() == [BOS, *range(200)]
    assert np.concatenate([w[1] for w in pieces]).tolist() == [*range(200), IGNORE]


def test_windows_are_the_same_for_a_seed_and_differ_by_seed_and_epoch():
    corpus = Corpus.of(DOCUMENTS)
    same, again, other = (np.concatenate([w[0] for w in epoch(Windows(corpus, 16, s))]) for s in (7, 7, 8))
    assert (same == again).all()
    assert not np.array_equal(same, other)
    assert not np.array_equal(same, np.concatenate([w[0] for w in epoch(Windows(corpus, 16, 7), 1)]))


def test_the_order_of_a_seed_never_changes():
    windows = Windows(Corpus.of(DOCUMENTS), 16, seed=1)  # golden: a checkpoint's data position must outlive a numpy
    second_tokens = [int(tokens[1]) for tokens, _, _ in epoch(windows)]
    assert second_tokens == [50, 120, 98, 98, 54, 98, 56, 50, 54, 98, 48, 98, 48, 52]
    assert windows.window(0)[2] == [9, 3, 4]


def test_a_batch_is_its_windows_in_one_row_with_all_borders():
    windows = Windows(Corpus.of(DOCUMENTS), 16, seed=1)
    batch = windows.batch(2, 3)
    parts = [windows.window(n) for n in (2, 3, 4)]
    assert batch.tokens.tolist() == np.concatenate([p[0] for p in parts]).tolist()
    assert batch.cu_seqlens.tolist() == [0, *np.cumsum([n for p in parts for n in p[2]])]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.valid == sum(int((p[1] != IGNORE).sum()) for p in parts)
    assert batch.without_labels().valid == 0


def test_held_out_documents_are_not_trained_on():
    corpus = Corpus.of([bytes([n]) * (n + 1) for n in range(100)])
    train, held = corpus.split(0.1, seed=0)
    assert len(train) + len(held) == 100
    assert not set(train.text.tolist()) & set(held.text.tolist())
    assert 0.1 * len(corpus.text) <= len(held.text) <= 0.13 * len(corpus.text)


@pytest.mark.parametrize("docs", [[b"just one document"], [b"a", b"b"], [b"xy"]])
def test_a_split_leaves_text_on_both_sides(docs):
    train, held = Corpus.of(docs).split(0.02, seed=0)
    assert sorted([*train.text, *held.text]) == sorted(b"".join(docs))
    assert len(train.text) and len(held.text)


def test_the_digest_sees_bytes_and_borders():
    digests = {Corpus.of(d).digest() for d in ([b"ab", b"c"], [b"a", b"bc"], [b"abc"], [b"abd"])}
    assert len(digests) == 4


def test_files_folders_jsonl_and_parquet_are_read(tmp_path):
    (tmp_path / "b.txt").write_text("text é")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.md").write_text("markdown")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("hidden")
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": "one"}) + "\n\n" + json.dumps({"text": "two", "id": 1}) + "\n")
    pq.write_table(pa.table({"text": ["three", None, "four"], "n": [1, 2, 3]}), tmp_path / "d.parquet")
    found = [d.decode() for d in read_documents([str(tmp_path)], "text")]
    assert found == ["text é", "one", "two", "three", "four", "markdown"]
    assert list(read_documents([str(tmp_path / "d.parquet"), str(tmp_path / "b.txt")], "text")) == [b"three", b"four", "text é".encode()]


def test_another_field_can_be_named(tmp_path):
    (tmp_path / "c.jsonl").write_text('{"body": "here"}\n')
    assert list(read_documents([str(tmp_path / "c.jsonl")], "body")) == [b"here"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"text": "fine"}\n{"tex', r"x.jsonl:2 is not JSON.*one JSON object"),
        ("x.jsonl", b'{"body": "fine"}\n', r"x.jsonl:1 has no string 'text'.*--field"),
        ("x.jsonl", b"[1]\n", r"x.jsonl:1 has no string 'text'"),
        ("x.jsonl", b'{"text": "fine"}\n{"text": "\xff"}\n', r"x.jsonl:2 is not JSON in UTF-8"),
        ("x.jsonl", b'{"text": "fine"}\n\n{"text": "\\ud800"}\n', r"x.jsonl:3 has text in 'text' that is no Unicode"),
        ("x.jsonl", b"[" * 100_000, r"x.jsonl:1 is not JSON"),
        ("x.parquet", b"PAR1 and so on", r"x.parquet cannot be read \(.*: repair it or leave it out"),
        ("x.parquet", b"", r"x.parquet cannot be read"),
        ("x.bin", b"\0\0", "holds zero bytes, expected text"),
        ("x.txt", b"", "holds no text"),
    ],
)
def test_bad_data_is_named_with_its_place_and_cure(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_corpus([str(tmp_path / name)])


def test_a_missing_path_and_a_missing_column_are_errors(tmp_path):
    with pytest.raises(ValueError, match="neither a file nor a folder"):
        load_corpus([str(tmp_path / "nowhere")])
    pq.write_table(pa.table({"n": [1]}), tmp_path / "d.parquet")
    with pytest.raises(ValueError, match=r"has no column 'text', only \['n'\].*--field"):
        load_corpus([str(tmp_path / "d.parquet")])
    pq.write_table(pa.table({"text": [1]}), tmp_path / "d.parquet")
    with pytest.raises(ValueError, match="holds int, expected text"):
        load_corpus([str(tmp_path / "d.parquet")])


@pytest.mark.parametrize("cut", range(60, 400, 17))
def test_a_damaged_parquet_file_is_named_or_read_but_raises_nothing_else(tmp_path, cut):
    path = tmp_path / "d.parquet"
    pq.write_table(pa.table({"text": ["three", "four"] * 9}), path)
    content = bytearray(path.read_bytes())
    content[cut % len(content)] ^= 0x55
    path.write_bytes(content)
    with suppress(ValueError):
        list(read_documents([str(path)], "text"))


def test_what_runs_have_left_in_the_folder_of_the_data_is_no_data(tmp_path):
    out = tmp_path / "runs" / "tiny"
    for folder in (out, tmp_path / "runs" / "tiny.1", tmp_path / "runs" / "tinyer"):
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text('{"text": "a loss"}\n')
    (tmp_path / "runs" / "tiny.2").write_text("a file")
    (tmp_path / "a.txt").write_text("data")
    assert list(read_documents([str(tmp_path)], "text", str(out))) == [b"data", b"a file", b"a loss"]


def test_the_default_text_is_large_and_the_same_each_time():
    corpus = load_corpus([])
    assert len(corpus.text) > 10_000_000
    assert corpus.digest() == load_corpus([]).digest()
