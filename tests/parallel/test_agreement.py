"""Agreement before communication: what differs between ranks raises alike on all of them, before anything is sent."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import distflash
from distflash.parallel import agreement
from distflash.parallel.agreement import AGREEING, Disagreement, mask_words, words
from distflash.parallel.wire.local import LocalWire
from distflash.testing import spmd, spmd_processes

S = 24
BALANCED = {"layout": "balanced"}
WAYS = {  # what rank 1 does otherwise -> the field that names it, and both values
    "documents": ({"documents": (0, 5, S)}, "documents: ranks 0, 2 say (0, 24); rank 1 says (0, 5, 24)"),
    "length": ({"documents": (0, S + 6)}, "length: ranks 0, 2 say 24; rank 1 says 30"),
    "layout": ({"share": {"layout": "striped"}}, "layout: ranks 0, 2 say zigzag; rank 1 says striped"),
    "order": ({"share": {"order": "all_gather"}}, "order: ranks 0, 2 say ring; rank 1 says all_gather"),
    "ulysses": ({"share": {"ulysses": 3}}, "ulysses: ranks 0, 2 say 1; rank 1 says 3"),
    "work": ({"share": BALANCED, "work": distflash.Slices.documents((0, S))}, "balanced: ranks 0, 2 say None; rank 1 says ((("),
    "batch": ({"batch": 2}, "batch: ranks 0, 2 say (1,); rank 1 says (2,)"),
    "heads": ({"heads": 6}, "heads: ranks 0, 2 say (3, 3); rank 1 says (6, 3)"),
    "head dims": ({"v_dim": 5}, "head_dims: ranks 0, 2 say (4, 4); rank 1 says (4, 5)"),
    "dtype": ({"dtype": torch.float64}, "dtype: ranks 0, 2 say torch.float32; rank 1 says torch.float64"),
    "causal": ({"causal": True}, "causal: ranks 0, 2 say False; rank 1 says True"),
    "window": ({"window_size": (3, 0)}, "window_size: ranks 0, 2 say (-1, -1); rank 1 says (3, 0)"),
    "mask": (
        {"mask": distflash.Slices([((0, S), (0, S))])},
        "mask: ranks 0, 2 say None; rank 1 says (((0, 24), (0, 24), 'full', (-1, -1)),)",
    ),
    "scale": ({"softmax_scale": 0.25}, "softmax_scale: ranks 0, 2 say 0.5; rank 1 says 0.25"),
    "sinks": ({"sinks": torch.zeros(3)}, "sinks: ranks 0, 2 say False; rank 1 says True"),
    "determinism": ({"deterministic": True}, "deterministic: ranks 0, 2 say False; rank 1 says True"),
    "lse": ({"return_lse": True}, "return_lse: ranks 0, 2 say False; rank 1 says True"),
    "kernel": ({"kernel": "reference"}, "kernel: ranks 0, 2 say eager; rank 1 says reference"),
    "gradients": ({"gradients": True}, "gradients: ranks 0, 2 say False; rank 1 says True"),
}


def call(group, *, share=None, documents=(0, S), work=None, batch=1, heads=3, v_dim=4, dtype=torch.float, gradients=False, **options):
    """One attention call of a rank."""
    seq = distflash.SequenceParallel(group, **(share or {})).sequence(cu_seqlens=documents, mask=work)
    q, k, v = (torch.zeros(batch, seq.local_length, h, d, dtype=dtype) for h, d in ((heads, 4), (3, 4), (3, v_dim)))
    return distflash.attention(q.requires_grad_(gradients), k, v, seq, **options)


@pytest.fixture
def sent(monkeypatch):
    """The ranks that sent something."""
    count = []
    exchange = LocalWire.exchange

    def counted(self, sends, recvs):
        count.append(self.rank)
        return exchange(self, sends, recvs)

    monkeypatch.setattr(LocalWire, "exchange", counted)
    return count


@pytest.mark.parametrize("way", WAYS)
def test_a_rank_that_is_about_to_do_otherwise_raises_on_every_rank_and_is_named_with_both_values(way, sent):
    other, told = WAYS[way]
    rest = {"share": BALANCED} if way == "work" else {}

    def work(group):
        with pytest.raises(Disagreement) as caught:
            call(group, **(other if group.rank == 1 else rest))
        return str(caught.value)

    first, second, third = spmd(3, work)
    assert first == second == third
    head, *lines = first.split("\n  ")
    assert head == "ranks disagree on attention, seq 1; nothing was sent"
    assert any(line.startswith(told) for line in lines), lines
    assert not sent


def test_what_differs_is_named_and_nothing_else():
    def work(group):
        with pytest.raises(Disagreement) as caught:
            call(group, softmax_scale=1.0 + group.rank, return_lse=group.rank == 2)
        return str(caught.value)

    told = "softmax_scale: rank 0 says 1.0; rank 1 says 2.0; rank 2 says 3.0\n  return_lse: ranks 0, 1 say False; rank 2 says True"
    assert set(spmd(3, work)) == {f"ranks disagree on attention, seq 1; nothing was sent\n  {told}"}


def test_different_calls_and_different_numbers_of_calls_are_told_apart():
    def work(group):
        seq = distflash.SequenceParallel(group).sequence(S)
        with pytest.raises(Disagreement, match=r"\n  call: rank 0 says unshard; rank 1 says attention$"):
            call(group) if group.rank else seq.unshard(torch.zeros(seq.local_length), 0)
        if group.rank == 1:
            group.journal.enter("attention", "")  # a call that rank 0 did not make
        with pytest.raises(Disagreement, match=r"\n  seq: rank 0 says 2; rank 1 says 3\n  causal: rank 0 says True; rank 1 says False$"):
            call(group, causal=group.rank == 0)

    spmd(2, work)


def test_shards_to_be_gathered_must_fit_together(sent):
    def work(group):
        seq = distflash.SequenceParallel(group).sequence(S)
        for x in (
            torch.zeros(group.rank + 1, seq.local_length),
            torch.zeros(1, seq.local_length, dtype=(torch.half, torch.float)[group.rank]),
        ):
            with pytest.raises(Disagreement, match="ranks disagree on unshard"):
                seq.unshard(x)

    spmd(2, work)
    assert not sent


@pytest.fixture
def rounds(monkeypatch):
    """How often ranks compared notes."""
    count = []
    post = LocalWire.post
    monkeypatch.setattr(LocalWire, "post", lambda self, round, note: (count.append(self.rank), post(self, round, note))[1])
    return count


@pytest.mark.parametrize(("check", "expected"), [("first", 2), ("always", 6), ("never", 0)])
def test_each_kind_is_compared_once_or_always_or_never(check, expected, rounds):
    def work(group):
        for _ in range(3):  # however many SequenceParallels and sequences are made over a group
            call(group, share={"check": check})
            call(group, share={"check": check}, causal=True)

    spmd(2, work)
    assert sorted(rounds) == [0] * expected + [1] * expected


def test_always_finds_kinds_that_were_agreed_on_before_in_another_order():
    def work(group):
        for causal in (False, True):
            call(group, share={"check": "always"}, causal=causal)
        with pytest.raises(Disagreement, match="causal: rank 0 says True; rank 1 says False"):
            call(group, share={"check": "always"}, causal=group.rank == 0)

    spmd(2, work)


def test_a_rank_that_went_on_with_a_kind_agreed_on_before_is_named_where_the_kind_is_new(monkeypatch):
    monkeypatch.setattr(agreement, "SLICE", 0.05)

    def work(group):
        call(group)
        if group.rank == 0:
            call(group)
        else:
            call(group, softmax_scale=0.25)

    told = r"rank 1 is at attention, seq 2, of a kind new to it: .*; but rank 0 is (in ring hop|after attention, seq 2)"
    with pytest.raises(Disagreement, match=told):
        spmd(2, work)


PASSES = {
    "attention": lambda seq, x: distflash.attention(x, x, x, seq).sum(),
    "unshard": lambda seq, x: seq.unshard(x).sum(),
    "token_mean": lambda seq, x: distflash.token_mean(x.sum((2, 3)), seq),
}


@pytest.mark.parametrize(("check", "steps"), [("first", 1), ("always", 3)])
@pytest.mark.parametrize("name", PASSES)
def test_a_rank_that_leaves_a_backward_out_is_named(name, check, steps, monkeypatch):
    """With "always" at any step, with "first" where a kind of call is new."""
    monkeypatch.setattr(agreement, "SLICE", 0.05)

    def work(group):
        seq = distflash.SequenceParallel(group, check=check).sequence(S)
        x = torch.zeros(1, seq.local_length, 2, 4, requires_grad=True)
        for n in range(steps):
            loss = PASSES[name](seq, x)
            if group.rank == 0 or n < steps - 1:
                loss.backward()
        PASSES[name](seq, x)

    went_on = f"rank 0 is at gradient of {name}, seq 2, of a kind new to it: .*; but rank 1 is .*{name}, seq 2, of a kind agreed on before"
    differ = f"ranks disagree on gradient of {name}, seq 6; nothing was sent\n  call: rank 0 says gradient of {name}; rank 1 says {name}"
    with pytest.raises(Disagreement, match=went_on if check == "first" else differ):
        spmd(2, work)


@pytest.mark.parametrize("left_out", ["backward", "both"])
@pytest.mark.parametrize("wire", ["p2p", "symmetric"])
@pytest.mark.parametrize("name", PASSES)
def test_what_a_rank_sends_of_another_call_is_not_taken_for_this_one(name, wire, left_out):
    """Of kinds that all were agreed on before, each of which sends as much as the one that was left out."""

    def work(group):
        seq = distflash.SequenceParallel(group, wire=wire).sequence(S)
        x = torch.zeros(1, seq.local_length, 2, 4, requires_grad=True)
        for n in range(4):
            for options in ({}, {"causal": True}):
                if group.rank == 1 and n == 3 and left_out == "both" and not options:
                    continue
                loss = distflash.attention(x, x, x, seq, **options).sum() + PASSES[name](seq, x)
                if group.rank == 0 or n != 3 or left_out == "both":
                    loss.backward()

    told = r"ranks disagree on calls: rank \d (sent something of|made) .*, seq (\d+), rank \d (waits for|made) .*, seq \2$"
    with pytest.raises(Disagreement, match=told):
        spmd(2, work)


def test_a_rank_that_does_not_come_is_named_when_patience_ends(monkeypatch):
    monkeypatch.setattr(agreement, "SLICE", 0.05)
    monkeypatch.setattr(LocalWire, "patience", 0.2)

    def work(group):
        if group.rank != 1:
            call(group)

    with pytest.raises(RuntimeError, match=r"ranks \[1\] did not come to agree on a call within 0.2 s: rank [02] is at attention, seq 1"):
        spmd(3, work)


def test_one_rank_alone_compares_nothing(rounds):
    call(None, share={"check": "always"})
    spmd(1, lambda group: call(group, share={"check": "always"}))
    assert not rounds


def test_after_a_disagreement_ranks_can_go_on_together():
    x = torch.randn(1, S, 2, 4)

    def work(group):
        seq = distflash.SequenceParallel(group).sequence(S)
        with pytest.raises(Disagreement):
            call(group, causal=group.rank == 0)
        local = seq.shard(x)
        return seq.unshard(distflash.attention(local, local, local, seq))

    for out in spmd(2, work):
        assert torch.allclose(out, distflash.attention(x, x, x), atol=1e-6)


def bad_call(group, seq, check):
    call(group, share={"check": check}, softcap=-1.0 if group.rank == 1 else 0.0)


def bad_shard(group, seq, check):
    seq.unshard(torch.zeros(1, seq.local_length + (group.rank == 1)))


def bad_loss(group, seq, check):
    distflash.token_mean(torch.zeros(4), seq, ignore=torch.zeros(4 + (group.rank == 1), dtype=torch.bool))


@pytest.mark.parametrize("check", ["first", "always"])
@pytest.mark.parametrize(
    "begin, name, told",
    [
        (bad_call, "attention", r"softcap=-1\.0 must be a finite number"),
        (bad_shard, "unshard", r"unshard\(\) needs this rank's 8 tokens along dim 1, got shape \(1, 9\)"),
        (bad_loss, "token_mean", r"ignore must be a bool tensor of the loss's shape \(4,\)"),
    ],
    ids=["attention", "unshard", "token_mean"],
)
def test_what_one_rank_refuses_is_raised_on_every_rank_and_they_can_go_on_together(begin, name, told, check, sent):
    def work(group):
        seq = distflash.SequenceParallel(group, check=check).sequence(S)
        if group.rank == 1:
            with pytest.raises(ValueError, match=f"^{told}"):
                begin(group, seq, check)
        else:
            with pytest.raises(Disagreement, match=f"^ranks refuse {name}, seq 1; nothing was sent\n  rank 1: ValueError: {told}"):
                begin(group, seq, check)
        assert not sent
        for causal in (False, True):
            call(group, share={"check": check}, causal=causal)
        return group.journal.rounds, group.journal.now.call

    assert spmd(3, work) == [(3, 3)] * 3


def test_what_every_rank_refuses_keeps_nobody_waiting_and_rounds_in_step():
    def work(group):
        for _ in range(5):
            with pytest.raises(ValueError, match="softcap=-1"):
                call(group, softcap=-1.0)
        call(group)
        return group.journal.rounds

    assert spmd(2, work) == [6, 6]
    assert spmd(1, work) == [0]


def test_all_kinds_are_forgotten_at_the_same_call_when_there_are_too_many(monkeypatch, rounds):
    monkeypatch.setattr(agreement, "REMEMBERED", 2)

    def work(group):
        for scale in (1.0, 2.0, 3.0, 1.0):
            call(group, softmax_scale=scale)
        return len(group.journal.agreed)

    assert spmd(2, work) == [2, 2] and rounds.count(0) == 4


def test_notes_do_not_pile_up():
    def work(group):
        for n in range(20):
            call(group, softmax_scale=1.0 + n)
        return len(group.group.notes)

    assert max(spmd(2, work)) <= 3


def test_long_values_are_shortened_and_still_told_apart():
    long = [tuple(range(10_000)), tuple(range(9_999)) + (1234,)]
    assert len({words(value) for value in long}) == 2 and all(len(words(value)) <= agreement.WORDS + 40 for value in long)
    masks = [distflash.Slices([((0, 4), (0, 4)), ((4, 8), (0, 4))]), distflash.Slices([((0, 4), (0, 4)), ((4, 8), (4, 8))])]
    assert len(set(map(mask_words, masks))) == 2 and mask_words(None) == "None"


@pytest.mark.parametrize("note", ["[1]", '{"call": 1}', " " * (agreement.NOTE + 1)])
def test_a_note_that_is_not_one_of_ours_is_refused(note):
    with pytest.raises(Disagreement, match="rank 3 sent a note of"):
        agreement._read(note, 3)


def test_an_unknown_time_to_check_is_refused():
    with pytest.raises(ValueError, match="check='sometimes' is not known: use one of 'first', 'always', 'never'"):
        distflash.SequenceParallel(check="sometimes")


def test_processes_agree_over_the_groups_store_and_leave_no_keys_behind():
    def work():
        rank, group = dist.get_rank(), dist.new_group([0, 2])
        seq = distflash.SequenceParallel().sequence(S)
        told = []
        for n in range(5):
            with pytest.raises(Disagreement) as caught:
                call(None, softmax_scale=1.0 + n + (rank == 2))
            told.append(str(caught.value))
        call(None, causal=True)
        if rank != 1:  # a group inside the group counts its own ranks and calls
            with pytest.raises(Disagreement, match=r"seq 1; nothing was sent\n  causal: rank 0 says True; rank 1 says False"):
                call(group, causal=rank == 0)
        dist.barrier()
        wire = seq.sp.wire
        left = [n for n in range(1, 7) for r in range(3) if wire.store.check([f"{n}/{r}"])]
        dist.barrier()
        assert wire.journal.now.doing != AGREEING
        return told, left

    replies = spmd_processes(3, work)
    assert len({str(told) for told, _ in replies}) == 1
    assert "softmax_scale: ranks 0, 1 say 5.0; rank 2 says 6.0" in replies[0][0][4]
    assert all(set(left) == {5, 6} for _, left in replies)
