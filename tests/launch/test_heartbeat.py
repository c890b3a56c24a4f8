"""launch/heartbeat.py: real processes over gloo; one of them is killed, stopped, raises or leaves, the others must say so and end."""

import atexit
import json
import os
import random
import re
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed import HashStore, P2POp
from torch.utils.checkpoint import checkpoint

import distflash
from distflash.launch import options
from distflash.launch.heartbeat import EXIT_PEER_LOST, Heartbeat, read_note
from distflash.parallel.wire.journal import DistFlashPeerLost
from tests.launch.faults import LIMIT, RANKS, SLACK, fault, launch, ring, strike_with
from tests.parallel.test_agreement import PASSES


@pytest.mark.parametrize("victim", [0, 2])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_killed_or_stopped_in_a_ring_is_named_by_every_other_one_within_the_limit(tmp_path, how, victim):
    ended = launch(tmp_path, lambda rank: ring(rank, victim, strike_with(tmp_path, how)))
    for rank in set(range(RANKS)) - {victim}:
        code, words, named, _ = ended[rank]
        assert f"DistFlashPeerLost: rank {victim} (host " in words, words
        assert f"; rank {rank} was in ring hop " in words and "forward, attention, seq 5, group default_pg" in words, words
        if "Traceback" in words:  # the error itself comes first, as the cause
            assert words.index("onnection ") < words.rindex("DistFlashPeerLost"), words
        assert code == EXIT_PEER_LOST
        assert named < LIMIT + SLACK
    assert ended[victim].code == (-9 if how == signal.SIGKILL else EXIT_PEER_LOST)  # nobody is left behind


def test_a_rank_that_raises_is_named_with_its_error_and_shows_its_own_traceback_only(tmp_path):
    def strike():
        fault(tmp_path)
        raise KeyError("the bug of rank 1")

    ended = launch(tmp_path, lambda rank: ring(rank, 1, strike))
    assert ended[1].code == 1 and "DistFlashPeerLost" not in ended[1].said
    assert ended[1].said.rstrip().endswith("KeyError: 'the bug of rank 1'")
    for rank in (0, 2):
        assert "DistFlashPeerLost: rank 1 (host " in ended[rank].said and "failed with KeyError: 'the bug of rank 1'" in ended[rank].said
        assert ended[rank].code == EXIT_PEER_LOST and ended[rank].named < LIMIT + SLACK


def test_a_rank_that_waits_for_agreement_hears_of_a_rank_that_died_on_the_way_to_it(tmp_path):
    def body(rank):
        seq = distflash.SequenceParallel().sequence(48)
        if rank == 2:
            strike_with(tmp_path, signal.SIGKILL)()
        q = torch.randn(1, seq.local_length, 2, 8)
        distflash.attention(q, q, q, seq)

    ended = launch(tmp_path, body)
    for code, words, named, _ in ended[:2]:
        assert "DistFlashPeerLost: rank 2 (host " in words and "was in agreeing, attention, seq 1" in words, words
        assert code == EXIT_PEER_LOST and named < LIMIT + SLACK


def test_a_rank_that_takes_another_kind_of_call_for_agreed_is_named_where_the_kind_is_new(tmp_path):
    def body(rank):
        seq = distflash.SequenceParallel().sequence(48)
        q = torch.randn(1, seq.local_length, 2, 8)
        distflash.attention(q, q, q, seq)
        if rank == 1:
            fault(tmp_path)
        distflash.attention(q, q, q, seq, softmax_scale=0.5 if rank == 1 else None)

    ended = launch(tmp_path, body)
    assert (
        ended[1].code == 1 and "Disagreement: ranks disagree on a call: rank 1 is at attention, seq 2, of a kind new to it" in ended[1].said
    )
    for rank in (0, 2):
        assert "DistFlashPeerLost: rank 1 (host " in ended[rank].said and "failed with Disagreement" in ended[rank].said
        assert ended[rank].code == EXIT_PEER_LOST


def train(steps, passes=lambda step: True, between=lambda step: None, name="attention"):
    """Steps of one kind of call, the backward of which may be left out; `between` one and the next."""
    seq = distflash.SequenceParallel().sequence(48)
    x = torch.randn(1, seq.local_length, 2, 8, requires_grad=True)
    for step in range(steps):
        loss = PASSES[name](seq, x)
        if passes(step):
            loss.backward()
        between(step)


@pytest.mark.parametrize(("name", "tagged"), [("attention", True), ("unshard", True), ("token_mean", True), ("attention", False)])
def test_a_rank_that_leaves_one_backward_out_of_many_is_named_and_over_gloo_nothing_is_taken_for_gradients(tmp_path, name, tagged):
    """All kinds were agreed on in the steps before, and blocks have the size of gradients. NCCL's messages have no tags."""

    def body(rank):
        def passes(step):
            if rank == 1 and step == 5:
                fault(tmp_path)
            return rank != 1 or step != 5

        def between(step):
            if rank == 0 and step == 5:
                print("took a step", file=sys.stderr)

        if not tagged:
            post = P2POp.__init__
            P2POp.__init__ = lambda self, *args, tag=0, **rest: post(self, *args, **rest)
        train(10**9, passes, between, name)

    ended = launch(tmp_path, body, ranks=2)
    told = r"rank \d \(host .*\) made (.*), seq (\d+), where rank \d made (.*), seq \2: their calls were alike until seq (\d+), group d"
    for code, words, named, _ in ended:
        found = re.search(told, words)
        assert code == EXIT_PEER_LOST and found and named < LIMIT + SLACK, words
        assert int(found[4]) < 12 <= int(found[2]), words
        if tagged:
            assert {found[1], found[3]} == {f"gradient of {name}", name} and found[2] == "12", words
    assert ("took a step" in ended[0].said) != tagged


def test_a_rank_that_ends_its_program_without_the_last_backward_is_named(tmp_path):
    def body(rank):
        train(5, lambda step: rank != 1 or step != 4)
        fault(tmp_path)

    ended = launch(tmp_path, body)
    assert ended[1].code == 0
    for rank in (0, 2):
        assert ended[rank].code == EXIT_PEER_LOST and ended[rank].named < LIMIT + SLACK
        assert re.search(r"DistFlashPeerLost: rank 1 \(host .*\) has ended its program", ended[rank].said), ended[rank].said


def test_whoever_leaves_last_compares_the_last_calls_of_all(tmp_path):
    """Between two beats, and no message of them waits: one rank ends with another call than the other."""

    def body(rank):
        seq = distflash.SequenceParallel().sequence(48)
        for name in ("eval", "train"):
            seq.agree(name)
        time.sleep(0.3 * LIMIT * rank)
        seq.agree("eval" if rank else "train")

    first, last = launch(tmp_path, body, ranks=2)
    assert (first.code, first.said) == (0, "") and last.code == EXIT_PEER_LOST
    assert re.search(r"rank 0 \(host .*\) made train, seq 3, where rank 1 made eval, seq 3", last.said), last.said


def test_ranks_that_run_ahead_evaluate_accumulate_run_layers_again_and_share_groups_are_left_in_peace(tmp_path):
    def body(rank):
        both, pair = distflash.SequenceParallel(), distflash.SequenceParallel([dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2])
        draw, shared = random.Random(rank), random.Random(0)
        end = torch.tensor(time.monotonic() + 3 * LIMIT)
        dist.broadcast(end, 0)
        over = torch.zeros(1)
        while not over:
            sp = shared.choice([both, pair])
            seq = sp.sequence(shared.choice([32, 48]))
            x = torch.randn(1, seq.local_length, 2, 8, requires_grad=True)

            def layer(x, seq=seq):
                return distflash.attention(x, x, x, seq, causal=True)

            with torch.set_grad_enabled(shared.random() < 0.8):
                out = checkpoint(layer, x, use_reentrant=False) if shared.random() < 0.5 else layer(x)
                losses = [distflash.token_mean(out.sum((2, 3)), seq), seq.unshard(out).mean()]
            if out.requires_grad and shared.random() < 0.8:
                for loss in reversed(losses):
                    loss.backward(retain_graph=True)
            if draw.random() < 0.01:
                time.sleep(0.1)
            if sp is both:  # all end at the same step
                over[0] = float(time.monotonic() > end)
                dist.broadcast(over, 0)

    assert [(code, said) for code, said, *_ in launch(tmp_path, body, ranks=4)] == [(0, "")] * 4


def test_ranks_that_end_as_they_should_are_not_missed_even_long_after(tmp_path):
    def body(rank):
        ring(rank, None, None, calls=3)
        if rank != 2:
            distflash.launch.shutdown()
        time.sleep(2.5 * LIMIT if rank == 2 else 0)

    assert [(code, said) for code, said, *_ in launch(tmp_path, body)] == [(0, "")] * RANKS


def test_a_rank_that_leaves_while_others_wait_for_it_is_named(tmp_path):
    def strike():
        fault(tmp_path)
        sys.exit(7)

    ended = launch(tmp_path, lambda rank: ring(rank, 1, strike))
    assert ended[1].code == 7 and ended[1].said == ""
    for rank in (0, 2):
        assert "rank 1 (host " in ended[rank].said and "has ended its program" in ended[rank].said, ended[rank].said
        assert ended[rank].code == EXIT_PEER_LOST


@pytest.mark.parametrize("error", [SystemExit(7), KeyError("the bug of rank 1")])
def test_whoever_has_lost_a_rank_of_its_host_lets_it_end_first_and_its_own_verdict_is_no_news_to_it(tmp_path, error):
    def strike():
        fault(tmp_path)
        raise error

    def linger():
        """The last thing that it does: the others hear that the connections are gone before the process is."""
        for link in Path("/proc/self/fd").iterdir():
            with suppress(OSError):
                connection = socket.socket(fileno=os.dup(int(link.name)))
                connection.getpeername()  # a listener has none
                connection.shutdown(socket.SHUT_RDWR)
        time.sleep(0.6)

    def place(rank):
        if rank == 1:
            atexit.register(linger)
        return {}

    ended = launch(tmp_path, lambda rank: ring(rank, 1, strike), place=place)
    assert ended[1].code == (7 if isinstance(error, SystemExit) else 1) and "DistFlashPeerLost" not in ended[1].said
    for rank in (0, 2):
        assert ended[rank].code == EXIT_PEER_LOST and ended[rank].gone > 0.6


MADE = {"made": {"key": [1, 2, "attention"]}}
NOW = {"group": "g", "now": [1, "attention", "forward", 0, 2]}
GOOD = MADE | NOW | {"beat": 1, "host": "h", "pid": 2, "state": "runs", "why": "", "about": 1}


@pytest.mark.parametrize(
    "text",
    [
        "5", "{", "[" * 50_000, '{"state": "lost"}', '{"state": "failed"}', '{"beat": 1, "now": [1]}', "x" * 70_000,
        *(json.dumps(GOOD | change) for change in (
            {"state": "odd"}, {"pid": "2"}, {"pid": None}, {"host": 3}, {"state": "lost", "about": 2}, {"about": -1}, {"why": None},
            {"now": [1, "a", "f", 0]}, {"now": [1, "a", "f", 0, "2"]}, {"now": 7}, {"group": 3},
            {"made": [1]}, {"made": {"key": 1}}, {"made": {"key": [1, "2", "attention"]}},
        )),
        *(json.dumps({name: value for name, value in GOOD.items() if name != left_out}) for left_out in GOOD),
    ],
)  # fmt: skip
def test_a_note_of_another_form_is_a_verdict_that_names_who_sent_it(text, monkeypatch):
    told = []
    monkeypatch.setattr(Heartbeat, "end", lambda self: told.append(self.lost))
    store = HashStore()
    store.set("1", text)
    watch = Heartbeat(store, 0, 2, 0.5, None)
    watch.awaited = True
    for thread in watch.threads:
        thread.start()
    assert watch.told.wait(0.4), "nobody is told"
    assert watch.lost.startswith("rank 1 sent a note "), watch.lost
    watch.over.set()
    watch.soon.set()


def test_a_note_of_the_known_form_is_read():
    assert read_note(json.dumps(GOOD).encode(), 2) == GOOD
    short = {name: value for name, value in GOOD.items() if name not in ("group", "now")}
    assert read_note(json.dumps(short).encode(), 2) == short


def test_a_watch_that_breaks_says_so_instead_of_falling_silent(monkeypatch):
    monkeypatch.setattr(Heartbeat, "_judge", lambda self, now: 1 // 0)
    monkeypatch.setattr(Heartbeat, "end", lambda self: None)
    watch = Heartbeat(HashStore(), 0, 2, 0.5, None)
    watch.awaited = True
    for thread in watch.threads:
        thread.start()
    assert watch.told.wait(0.4)
    assert "rank 0 cannot watch over the others any more: ZeroDivisionError" in watch.lost
    watch.over.set()
    watch.soon.set()


def test_a_stopped_rank_is_woken_to_hear_that_it_was_given_up_and_ends(tmp_path):
    ended = launch(tmp_path, lambda rank: ring(rank, 1, strike_with(tmp_path, signal.SIGSTOP)))
    assert [end.code for end in ended] == [EXIT_PEER_LOST] * RANKS
    assert "DistFlashPeerLost: " in ended[1].said and "has itself been stopped for " in ended[1].said


def test_a_lost_peer_can_be_caught_and_still_ends_the_process_with_its_exit_code(tmp_path):
    def body(rank):
        try:
            ring(rank, 2, strike_with(tmp_path, signal.SIGKILL))
        except DistFlashPeerLost as error:
            assert error.__cause__ is not None
            print("caught", error, file=sys.stderr, flush=True)

    ended = launch(tmp_path, body)
    assert {ended[0].code, ended[1].code} == {EXIT_PEER_LOST}
    assert any("caught rank 2 (host " in end.said for end in ended[:2])


def test_without_heartbeats_errors_are_as_they_were(tmp_path):
    ended = launch(tmp_path, lambda rank: ring(rank, 1, strike_with(tmp_path, signal.SIGKILL)), limit=0.0)
    for rank in (0, 2):
        assert "onnection" in ended[rank].said and "DistFlashPeerLost" not in ended[rank].said and ended[rank].code == 1


@pytest.mark.parametrize("given", [-1.0, 0.1, float("nan"), float("inf")])
def test_a_limit_that_cannot_be_kept_is_refused(given):
    with pytest.raises(ValueError, match="heartbeat must be 0"):
        options.limit_of(given)


def test_the_limit_is_the_argument_else_the_variable_else_ten_seconds(monkeypatch):
    assert options.limit_of(None) == 10.0
    monkeypatch.setenv("DISTFLASH_HEARTBEAT", "3")
    assert options.limit_of(None) == 3.0 and options.limit_of(0) == 0.0
    monkeypatch.setenv("DISTFLASH_HEARTBEAT", "soon")
    with pytest.raises(ValueError, match="'soon'"):
        options.limit_of(None)
