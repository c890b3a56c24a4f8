"""`distflash verify --fuzz`: random problems equal the oracle; a wrong, refused or crashed one is a mismatch that its seed brings back."""

import json
import time
from collections import Counter
from contextlib import nullcontext
from itertools import count
from types import SimpleNamespace

import pytest
import torch

import distflash
from distflash.kernels import eager
from distflash.kernels.hopper import tma
from distflash.kernels.triton.configs import Config
from distflash.kernels.triton.kernel import TritonKernel
from distflash.launch import draw as drawing
from distflash.launch import fuzz
from distflash.launch.draw import SAME_FORM, draw
from distflash.launch.trial import Call, inputs, noise_of, on_ranks, truth_of
from distflash.parallel.layout import LAYOUTS
from distflash.parallel.plan import ORDERS
from distflash.parallel.wire import p2p
from distflash.testing import errors, spmd, spmd_processes

CPU = torch.device("cpu")
ALONE = SimpleNamespace(size=1, device=CPU, is_main=True)
PLAIN = {"sizes": None, "kernel": None, "length": None, "file": None}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("first", [10_000_000, 20_000_000])
def test_500_random_problems_equal_the_oracle_or_are_refused_where_they_must_be(first, capsys):
    assert fuzz.fuzzed(ALONE, 500, first, **PLAIN), capsys.readouterr().out


def test_what_is_rounded_before_a_sink_and_once_more_behind_it_is_no_mismatch():
    assert fuzz.judge(draw(210_534, CPU), ALONE) == ("equal", "")


@pytest.mark.parametrize("hosts", ["aa", "aab"])
def test_processes_judge_as_threads_do(monkeypatch, hosts):
    """On hosts that cannot form the double ring of a case, too."""
    monkeypatch.setattr(p2p, "host_name", lambda: hosts[torch.distributed.get_rank()])

    def judge():
        world = SimpleNamespace(size=len(hosts), device=CPU, is_main=torch.distributed.get_rank() == 0)
        verdicts = [fuzz.judge(draw(seed, CPU, [len(hosts)]), world) for seed in range(30)]
        return torch.tensor([verdict != "wrong" for verdict, _ in verdicts], dtype=torch.float64)

    for rank in spmd_processes(len(hosts), judge, timeout=100.0):
        assert rank.all(), f"seeds {(rank == 0).nonzero().flatten().tolist()}"


def test_a_seed_alone_determines_its_case():
    torch.manual_seed(1)
    first = draw(7, CPU)
    torch.manual_seed(2)
    second = draw(7, CPU)
    assert str(first) == str(second) and all(torch.equal(a, b) for a, b in zip(first.x, second.x, strict=True))
    assert str(draw(8, CPU)) != str(first)


def _form(case):
    call, x = case.call, case.x
    variants = call.softcap, call.dropout_p, call.slopes is None, call.deterministic, call.strides
    return x.q.dtype, x.q.shape[2:], x.k.shape[2:], x.v.shape[3], call.mask is not None, variants


def test_on_a_gpu_seeds_on_end_share_what_kernels_are_compiled_for_and_nothing_else(monkeypatch):
    apart = {_form(draw(seed, CPU, longest=20)) for seed in range(20)}
    assert len(apart) == 20
    of_gpu = drawing._generators
    monkeypatch.setattr(drawing, "_generators", lambda seed, kind: of_gpu(seed, "cuda"))
    blocks = [[draw(SAME_FORM * n + at, CPU, longest=20) for at in (0, *range(1, SAME_FORM, 9), SAME_FORM - 1)] for n in range(6)]
    assert all(len({_form(case) for case in block}) == 1 for block in blocks)
    assert len({_form(block[0]) for block in blocks}) == 6
    for name in ("layout", "order", "documents", "wanted", "wire"):
        assert all(len({getattr(case.call, name) for case in block}) > 1 for block in blocks), name
    assert all(len({(case.ranks, case.x.q.shape[1]) for case in block}) > 5 for block in blocks)


def test_pieces_are_cut_where_the_form_changes():
    n = SAME_FORM
    assert fuzz.pieces(range(3 * n)) == [range(n), range(n, 2 * n), range(2 * n, 3 * n)]
    assert fuzz.pieces(range(n - 1, n + 5)) == [range(n - 1, n), range(n, n + 5)]
    assert fuzz.pieces(range(7, 9)) == [range(7, 9)]


def test_processes_side_by_side_judge_what_one_does(tmp_path, capsys):
    file, count, first = tmp_path / "runs.json", 30, SAME_FORM - 12
    for jobs in (None, 2):
        assert fuzz.fuzzed(ALONE, count, first, **PLAIN | {"kernel": "eager", "length": 20, "file": file, "jobs": jobs})
    one, two = json.loads(file.read_text())["runs"]
    assert two["jobs"] == 2 and two["cases"] == count
    for name in ("cases", "equal", "refused", "mismatches", "first_seed", "last_seed", "options"):
        assert one[name] == two[name], name
    assert {axis: dict(counts) for axis, counts in one["covered"].items()} == two["covered"]


def test_mismatches_of_every_piece_are_told(monkeypatch):
    right = eager.EagerKernel.forward
    monkeypatch.setattr(eager.EagerKernel, "forward", lambda self, *args, **more: right(self, *args, **more)._replace(out=torch.ones(())))
    parts = [fuzz.judged(ALONE, range(n, n + 3), fuzz.Given(None, "eager", 20)) for n in (40, 43)]
    whole = fuzz.Tally()
    for part in parts:
        whole.merge(part)
    assert [m["seed"] for m in whole.mismatches] == [m["seed"] for part in parts for m in part.mismatches] and whole.mismatches
    assert sum(whole.verdicts.values()) == 6


def test_no_case_begins_after_the_time_that_is_given_and_none_at_all_is_no_success(tmp_path, capsys):
    file = tmp_path / "runs.json"
    assert not fuzz.fuzzed(ALONE, 5, 0, **PLAIN | {"file": file, "seconds": 0.0})
    (run,) = json.loads(file.read_text())["runs"]
    assert (run["cases"], run["equal"], run["mismatches"]) == (0, 0, [])
    assert "0 cases" in capsys.readouterr().out


def test_of_ranks_that_are_threads_one_compiles_at_a_time(monkeypatch):
    """Triton has no lock: each that finds a kernel missing compiles it."""
    active, most = [], []

    class Slow:
        def __getitem__(self, grid):
            return self.launch

        def launch(self, *args, **options):
            active.append(1)
            most.append(len(active))
            time.sleep(0.01)
            active.pop()

    on = torch.ones(1)
    spmd(4, lambda group: TritonKernel._launch(Slow(), on, 1, Config(16, 16, 4, 1)))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    spmd(4, lambda group: tma.launch(Slow(), (1,), on))
    assert most == [1] * 8


def test_everything_is_drawn():
    cases = [draw(seed, CPU, longest=40) for seed in range(1500)]
    for name, values in {
        "layout": {*LAYOUTS, "auto"},
        "order": {*ORDERS, "auto"},
        "causal": {False, True},
        "ulysses": {1, 2, 3, 4},
    }.items():
        assert {getattr(case.call, name) for case in cases} >= values, name
    drawn = Counter(name for case in cases for name in case.asked)
    assert drawn.keys() >= {
        "documents",
        "k_documents",
        "window_size",
        "mask",
        "balance",
        "softcap",
        "slopes",
        "dropout_p",
        "sinks",
        "scale",
    }
    assert drawn.keys() >= {"deterministic", "wanted", "strides", "batched", "kernel"}
    assert {case.x.q.dtype for case in cases} == {torch.float64, torch.float32, torch.bfloat16, torch.float16}
    assert {0, 1, 2, 3} < {case.x.q.shape[1] for case in cases} and any(case.x.q.shape[1] < case.ranks for case in cases)
    assert any(case.alone and case.x.q.shape[1] != case.x.k.shape[1] for case in cases)
    lengths = {b - a for case in cases if case.call.documents for a, b in zip(case.call.documents, case.call.documents[1:], strict=False)}
    assert {0, 1} < lengths
    refused = sum(bool(case.refusals) for case in cases)
    assert 0 < refused < 0.1 * len(cases)


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_a_wrong_kernel_is_found_told_and_recorded_with_the_command_that_shows_it_again(name, monkeypatch, capsys, tmp_path):
    right, file = getattr(eager.EagerKernel, name), tmp_path / "runs.json"

    def wrong(self, *args, **more):
        found = right(self, *args, **more)
        return found._replace(out=found.out * 1.01) if name == "forward" else (found[0] * 1.01, *found[1:])

    assert fuzz.fuzzed(ALONE, 2, 40, **PLAIN | {"kernel": "eager", "file": file})
    monkeypatch.setattr(eager.EagerKernel, name, wrong)
    assert not fuzz.fuzzed(ALONE, 8, 42, **PLAIN | {"kernel": "eager", "length": 30, "file": file})
    sound, broken = json.loads(file.read_text())["runs"]
    assert (sound["cases"], sound["first_seed"], sound["mismatches"]) == (2, 40, [])
    assert len(broken["mismatches"]) >= 5 and broken["equal"] + len(broken["mismatches"]) + sum(broken["refused"].values()) == 8
    assert sound["versions"]["torch"] == torch.__version__ and sum(sound["covered"]["ranks"].values()) == sound["equal"]
    said = broken["mismatches"][0]
    assert said["replay"] == f"distflash verify --fuzz 1 --seed {said['seed']} --kernel eager --length 30"
    assert ("out:" if name == "forward" else "dq:") in said["what"]
    assert said["replay"] in capsys.readouterr().out


def test_an_internal_error_is_a_mismatch(monkeypatch):
    monkeypatch.setattr(eager.EagerKernel, "forward", lambda *args, **more: 1 // 0)
    assert fuzz.judge(_served("eager"), ALONE) == ("wrong", "ZeroDivisionError: integer division or modulo by zero")


def test_a_refusal_without_need_is_a_mismatch(monkeypatch):
    def refuse(*args, **more):
        raise ValueError("we do not serve this")

    monkeypatch.setattr(distflash, "attention", refuse)
    assert fuzz.judge(_served("eager"), ALONE) == ("wrong", "ValueError: we do not serve this")


def test_what_must_be_refused_and_is_served_is_a_mismatch():
    verdict, what = fuzz.judge(_served("eager")._replace(refusals=("no such thing",)), ALONE)
    assert verdict == "wrong" and "must be refused: no such thing" in what


def _served(kernel):
    return next(case for case in (draw(seed, CPU, [2], kernel=kernel, longest=30) for seed in range(100)) if not case.refusals)


def test_what_was_asked_twice_and_is_deterministic_must_have_equal_bits(monkeypatch):
    case = _served("eager")
    case, found = case._replace(call=case.call._replace(deterministic=True)), fuzz._found
    assert fuzz.judge(case, ALONE)[0] == "equal"
    runs = count()

    def drifting(*given):
        seed, right = found(*given)
        return seed, right._replace(lse=right.lse + 1e-6 * next(runs))

    monkeypatch.setattr(fuzz, "_found", drifting)
    assert "other bits" in fuzz.judge(case, ALONE)[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["dq", "dk", "dv"])
def test_rounding_does_not_explain_a_gradient_that_is_2_percent_off(name, dtype):
    call, x = Call(causal=True), inputs(24, dtype=dtype)
    found, truth = on_ranks(1, 2, call, x), truth_of(call, x)
    noise = noise_of(call, x, truth, torch.float32)
    wrong = fuzz._forgiven(found._replace(**{name: 1.02 * getattr(found, name)}), truth, noise)
    assert [*errors(wrong, truth, truth_of(call, x, dtype), dtype)] == [name]


def test_scores_are_rounded_one_way_forward_and_another_backward():
    """A row of one key: its probability is 1 only if both passes sum 128 products alike, and products of other shapes do not."""
    call, x = Call(scale=1.0), inputs(1, heads=2, dim=128, dtype=torch.float32)
    x = x._replace(k=x.k - x.q * (x.q * x.k).sum(-1, keepdim=True) / x.q.square().sum(-1, keepdim=True))  # large products, a score of 0
    noise = noise_of(call, x, truth_of(call, x), torch.float32)
    summed = torch.finfo(torch.float32).eps * (x.q * x.k).norm(dim=-1, keepdim=True)  # a rounding of each product
    assert (noise.dv > summed * x.dout.abs()).all()
