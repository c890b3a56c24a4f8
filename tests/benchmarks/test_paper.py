"""benchmarks/paper: every program runs, quickly and without a GPU, and what it computes of measurements is right."""

from __future__ import annotations

import importlib
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import io_model
from benchmarks.paper import attention, common, context, hbm, sparse, tables, texts
from benchmarks.paper.learner import Learner
from benchmarks.record import load

PROGRAMS = ("attention", "memory", "hbm", "sparse", "context")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """By program: what it wrote, and the folder."""
    folder, found = tmp_path_factory.mktemp("paper"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        for name in PROGRAMS:
            patch.setattr(sys, "argv", [name, "--quick", "--out", str(folder)])
            importlib.import_module(f"benchmarks.paper.{name}").main()
            found[name] = json.loads((folder / f"paper_{name}_quick.json").read_text())
    return found, folder


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_writes_rows_and_a_picture(results, name):
    found, folder = results
    assert found[name]["rows"] and found[name]["quick"] is True and found[name]["versions"]["torch"]
    assert (folder / f"paper_{name}_quick.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", PROGRAMS)
def test_without_a_gpu_a_program_says_that_it_needs_one(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [name])
    with pytest.raises(SystemExit, match="needs a CUDA GPU: --quick runs on a CPU"):
        importlib.import_module(f"benchmarks.paper.{name}").main()


@pytest.mark.parametrize("name", ["attention", "memory", "sparse"])
def test_a_spent_budget_leaves_what_there_is(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [name, "--quick", "--budget", "0", "--out", str(tmp_path)])
    importlib.import_module(f"benchmarks.paper.{name}").main()
    assert json.loads((tmp_path / f"paper_{name}_quick.json").read_text())["rows"] == []
    assert "the budget is spent" in capsys.readouterr().out


def test_standard_attention_adds_its_mask_once_forward_and_does_nothing_for_it_backward():
    """FlashAttention's own benchmark adds a mask too; masked_fill copies, fills, and fills again backward."""
    shape, seen = (2, 3, 16, 8), []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    attend, _ = common.contender("standard", SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32), 16, causal=True)
    q, k, v, dout = (torch.randn(shape, requires_grad=True) for _ in range(4))
    with Names():
        out = attend(q, k, v)
    forward = seen[:]
    with Names():
        torch.autograd.grad(out, (q, k, v), dout)
    assert forward.count("add") == 1 and not {"masked_fill", "bitwise_not", "_to_copy", "full", "triu"} & {*forward}
    assert not {"masked_fill", "add", "masked_fill_"} & {*seen[len(forward) :]}
    assert torch.allclose(out, F.scaled_dot_product_attention(q, k, v, is_causal=True), atol=1e-6)


def test_a_run_from_before_the_mask_was_added_says_so():
    found = load("paper_attention")
    said = "masked with `masked_fill` in this run"
    assert (said in tables.attention(found)) == (found.get("mask") != "added")
    assert said not in tables.attention(found | {"mask": "added"}) and said in tables.attention({**found, "mask": None})


def test_both_contenders_compute_the_same_and_each_pass_is_compared(results):
    found = results[0]["attention"]
    assert found["difference"] < 1e-5
    assert len(found["speedups"]) == len(found["rows"]) / 2 == (4 + 2 * 2) * 2
    rows = found["rows"]
    pair = [r["ms"] for r in rows if (r["part"], r["N"], r["causal"], r["dropout"], r["pass"]) == ("gpt2", 128, True, 0.1, "both")]
    (told,) = [r["speedup"] for r in found["speedups"] if (r["part"], r["causal"], r["dropout"], r["pass"]) == ("gpt2", True, 0.1, "both")]
    assert told == pytest.approx(pair[1] / pair[0]) and rows[0]["contender"] == "distflash"


def test_who_runs_out_of_memory_is_recorded_and_not_tried_at_longer_lengths(monkeypatch):
    tried = []

    def milliseconds(run, worth):
        run()
        return {"ms": 1.0}

    def inputs(batch, tokens, heads, dim, heads_first):
        tried.append((tokens, heads_first))
        if heads_first:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [torch.randn(batch, tokens, heads, dim, requires_grad=True) for _ in range(3)], torch.randn(batch, tokens, heads, dim)

    bench = common.Bench.__new__(common.Bench)
    bench.device, bench.dtype, bench.inputs, bench.milliseconds = torch.device("cpu"), torch.float32, inputs, milliseconds
    lost, rows = set(), []
    for n in (64, 128):
        rows += attention.time_cell(bench, {"part": "lengths", "B": 1, "H": 1, "N": n, "causal": True, "dropout": 0.0}, lost)
    errors = [(r["N"], r.get("error")) for r in rows if r["contender"] == "standard" and r["pass"] == "both"]
    assert errors == [(64, "out of memory"), (128, "out of memory at a shorter length")]
    assert (128, True) not in tried and (128, False) in tried
    assert [r["speedup"] for r in attention.speedups(rows)] == [None] * 4

    def broken():
        raise RuntimeError("an illegal memory access")

    with pytest.raises(RuntimeError, match="illegal"):
        bench.attempt(broken)


def test_memory_is_a_straight_line_and_a_parabola_is_not(results):
    assert results[0]["memory"]["fit"]["r2"] > 0.999 and not any(r["measured"] for r in results[0]["memory"]["rows"])
    x = [1024.0 * 2**n for n in range(8)]
    fit = common.linear_fit(x, [5 + 3 * n for n in x])
    assert (fit["slope"], fit["intercept"], fit["r2"]) == (pytest.approx(3), pytest.approx(5, abs=1e-6), pytest.approx(1))
    assert common.linear_fit(x, [n * n for n in x])["r2"] < 0.97


def test_as_many_blocks_are_kept_as_asked_for_and_the_diagonal_always(results):
    for fraction in sparse.FRACTIONS:
        kept = sparse.blocks(64, fraction)
        assert int(kept.sum()) == round(fraction * 64 * 64) and bool(kept.diagonal().all())
    assert int(sparse.blocks(64, 0.0).sum()) == 64
    assert [r["kept"] for r in results[0]["sparse"]["rows"] if r["kind"] == "sparse"][::2] == [1.0, 0.375, 0.125]


COUNTED = """==PROF== Connected to process 1
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","1","at::cuda::spin_kernel(long)","dram__bytes_read.sum","byte","512"
"0","1","at::cuda::spin_kernel(long)","dram__bytes_write.sum","byte","0"
"1","1","gemm","dram__bytes_read.sum","byte","1,000"
"1","1","gemm","dram__bytes_write.sum","byte","200"
"1","1","gemm","lts__t_bytes.sum","byte","5,000"
"2","1","softmax","dram__bytes_read.sum","byte","30"
"3","1","at::cuda::spin_kernel(long)","dram__bytes_read.sum","byte","512"
"4","1","forward_kernel","dram__bytes_read.sum","byte","7"
==PROF== Disconnected from process 1
"""


def test_what_ncu_counts_between_two_markers_belongs_to_the_first():
    assert hbm.counted(COUNTED, ["standard", "ours"]) == {"standard": {"hbm": 1230.0, "l2": 5000.0}, "ours": {"hbm": 7.0}}
    with pytest.raises(ValueError, match="2 markers of 3"):
        hbm.counted(COUNTED, ["standard", "ours", "more"])
    with pytest.raises(ValueError, match="0 markers"):
        hbm.counted("==ERROR== no permission\n", ["standard"])


def test_ncu_is_asked_again_without_what_it_does_not_know_and_its_refusal_is_kept(monkeypatch):
    asked = []
    names = [hbm.STANDARD, *hbm.TILES]
    lines = ['"ID","Kernel Name","Metric Name","Metric Value"']
    for n in range(len(names)):
        lines += [f'"{2 * n}","spin_kernel","dram__bytes_read.sum","1"', f'"{2 * n + 1}","work","dram__bytes_read.sum","{n}"']

    def run(command, **options):
        asked.append(command[command.index("--metrics") + 1])
        both = "lts" in asked[-1]
        return SimpleNamespace(stdout="==ERROR== Failed to find metric lts__t_bytes.sum" if both else "\n".join(lines), stderr="")

    monkeypatch.setattr(hbm.shutil, "which", lambda name: "/usr/bin/ncu")
    monkeypatch.setattr(hbm.subprocess, "run", run)
    found, refused = hbm.watch(SimpleNamespace(left=10.0), 128, 1)
    assert refused is None and len(asked) == 2 and [found[name]["hbm"] for name in names] == list(range(len(names)))
    lines.clear()
    monkeypatch.setattr(hbm.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="==ERROR== ERR_NVGPUCTRPERM", stderr=""))
    assert hbm.watch(SimpleNamespace(left=10.0), 128, 1) == ({}, "==ERROR== ERR_NVGPUCTRPERM")
    monkeypatch.setattr(hbm.shutil, "which", lambda name: None)
    assert hbm.watch(SimpleNamespace(left=10.0), 128, 1) == ({}, "there is no ncu on the PATH")


def test_smaller_tiles_move_more_and_standard_attention_moves_the_scores():
    found = [hbm.predicted(name, 4096, 512, 2, 132) for name in hbm.TILES]
    assert [one["l2_predicted"] for one in found] == sorted(one["l2_predicted"] for one in found)
    assert all(one["hbm_predicted"] < 0.1 * hbm.predicted(hbm.STANDARD, 4096, 512, 2, 132)["hbm_predicted"] for one in found)


@pytest.mark.parametrize("length", [129, 130, 192, 193, 1000])
def test_windows_predict_every_byte_once_with_half_a_context_before_it(length):
    seen = [0] * length
    for start, first in texts.windows(length, 128):
        assert start + 128 < length
        for j in range(first, 128):
            seen[start + j + 1] += 1
            assert j + 1 >= min(64, start + j + 1)
    assert seen == [0] + [1] * (length - 1)


def test_held_out_losses_are_those_of_the_model_and_every_byte_lies_in_its_bucket():
    learner = Learner(context.QUICK, SimpleNamespace(size=1, device=torch.device("cpu")), torch.float32)
    held = [bytes(range(200)), bytes(range(50, 240))]
    found = learner.held_out(held, 128, lambda: None)  # [documents, buckets, 2]
    assert found[:, :, 1].tolist() == [[63, 64, 72], [63, 64, 62]]
    text = torch.tensor(list(held[0]))
    seq = learner.sequence(128, 128)
    nats = F.cross_entropy(learner.placement.forward(text[None, :128], seq)[0], text[1:129], reduction="none")
    assert found[0, 0, 0] == pytest.approx(nats[:63].sum().item(), rel=1e-5)


def test_features_are_means_over_the_context_whatever_follows_it():
    learner = Learner(context.QUICK, SimpleNamespace(size=1, device=torch.device("cpu")), torch.float32)
    pieces = torch.randint(256, (5, 129), generator=torch.Generator().manual_seed(0))
    changed = torch.cat([pieces[:, :64], (pieces[:, 64:] + 1) % 256], 1)
    same, other = (learner.features(x, 64, lambda: None) for x in (pieces, changed))
    assert torch.equal(same, other) and same.shape == (5, 32)
    assert not torch.equal(learner.features(pieces, 128, lambda: None), learner.features(changed, 128, lambda: None))


def test_crops_are_whole_pieces_of_the_texts_that_are_named_and_the_same_every_time():
    found = texts.crops([b"a" * 50, b"bc" * 100, b"de" * 30], [1, 2, 0], 40, (0, 1))
    assert [set(bytes(row.tolist())) for row in found] == [set(b"bc"), set(b"de"), set(b"a")] and found.shape == (3, 41)
    assert torch.equal(found, texts.crops([b"a" * 50, b"bc" * 100, b"de" * 30], [1, 2, 0], 40, (0, 1)))


def test_what_is_held_out_is_in_no_training_text():
    training, held = texts.split(texts.documents())
    sizes = [sum(len(text) for _, text in share) for share in (training, held)]
    assert not {text for _, text in training} & {text for _, text in held if len(text) > 1000} and 0.1 < sizes[1] / sum(sizes) < 0.25
    parts = texts.parts_of((training, held), 32768)
    assert len(parts) == texts.CLASSES and all(len(one[1]) > 100_000 for one in parts.values())


def test_a_classifier_learns_what_is_linear_and_chance_is_what_it_says():
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(256) % texts.CLASSES
    centres = torch.randn(texts.CLASSES, 16, generator=random, dtype=torch.float64) * 3
    train, test = (centres[labels] + torch.randn(256, 16, generator=random, dtype=torch.float64) for _ in range(2))
    assert context.classify(train, labels, test, labels) > 250
    assert context.classify(torch.randn(256, 16, generator=random, dtype=torch.float64), labels, test, labels) < 80


def test_intervals_and_paired_differences_are_the_textbook_ones():
    low, high = context.wilson(10, 20)
    assert (low, high) == (pytest.approx(0.2993, abs=1e-4), pytest.approx(0.7007, abs=1e-4))
    base = np.array([[[10.0, 10]], [[20.0, 10]]])
    away = context.paired(base - np.array([[[1.0, 0]], [[3.0, 0]]]), base)
    assert away == {"mean": pytest.approx(-0.2), "error": pytest.approx(0.1)}


def test_a_budget_that_is_spent_half_way_leaves_the_runs_that_are_done(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["context", "--quick", "--out", str(tmp_path)])
    features, lefts = Learner.features, []

    def spend(self, *args):
        lefts.append(1)
        return features(self, *args)

    monkeypatch.setattr(Learner, "features", spend)
    monkeypatch.setattr(common.Bench, "left", property(lambda self: -1.0 if len(lefts) > 2 else 100.0))
    context.main()
    found = json.loads((tmp_path / "paper_context_quick.json").read_text())
    assert [r["context"] for r in found["rows"]] == [64] and found["complete"] is False
    assert "the budget is spent" in capsys.readouterr().out


def test_the_page_says_what_is_not_measured_and_shows_what_is(results, monkeypatch):
    found, folder = results
    for module in ("benchmarks.paper.tables", "benchmarks.record"):
        monkeypatch.setattr(f"{module}.RESULTS", folder)
    assert set(tables.TABLES) == set(PROGRAMS)
    for name in PROGRAMS:
        said = io_model.FIGURES[f"paper_{name}"]
        assert said() == f"Not measured yet: `python -m benchmarks.paper.{name}` on a GPU.\n"
        (folder / f"paper_{name}.json").write_text(json.dumps(found[name]))
        head, *lines = said().splitlines()
        columns = head.count("|")
        rows = [line for line in lines if line.startswith("| ")]
        assert len(rows) > 2 and all(row.count("|") == columns for row in rows), name
        assert f"paper_{name}.png" in said() and found[name]["versions"]["torch"] in said()
