"""Every scheme against the fp64 oracle, forward and backward, on ranks that are threads."""

from __future__ import annotations

import threading
from collections import Counter
from itertools import pairwise

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import distflash
from distflash.kernels import eager
from distflash.parallel import messages
from distflash.parallel.layout import LAYOUTS
from distflash.parallel.plan import ORDERS
from distflash.parallel.slices import Slices
from distflash.parallel.wire.local import LocalWire
from distflash.testing import Attention, check, dense, errors, keep_mask, oracle, spmd
from tests.schemes import Call, Inputs, inputs, on_ranks, run_rank, run_sequence, truth_of, whole

S = 37
RAGGED = (0, 7, 8, 8, 30, S)  # one-token and empty documents, one that spans every rank
SCATTERED = Slices([  # every kind, rows and keys that take no part, far keys that most ranks skip
    ((30, S), (0, 7), "full"),
    ((0, 9), (20, 36), "causal"),
    ((9, 22), (4, 11), "inverse-causal"),
    ((9, 29), (11, S), "band", (4, 2)),
])  # fmt: skip
MASKS = [
    {"causal": True},
    {"causal": False},
    {"causal": True, "documents": RAGGED},
    {"causal": True, "window_size": (5, 0)},
    {"window_size": (3, 2), "documents": RAGGED},
    {"mask": Slices.prefix_lm(S, 11)},
    {"mask": Slices.sinks_and_window(S, 3, 6)},
    {"mask": SCATTERED},
]


def agree(ranks: int, call: Call, x: Inputs, per_node: int | None = None) -> None:
    truth = truth_of(call, x)
    broken = errors(on_ranks(ranks, call, x, per_node), truth, truth, torch.float64)
    assert not broken, f"P={ranks}, per_node={per_node}, {call}: {broken}"


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_scheme_gives_the_gradients_of_dense_attention(layout, order, ranks):
    x = inputs(S)
    for ulysses in divisors(ranks):
        for mask in MASKS:
            agree(ranks, Call(layout, order, ulysses, **mask), x, per_node=2 if ranks == 4 else None)


@pytest.mark.parametrize("ulysses", [1, 2, 4])
@pytest.mark.parametrize("order, per_node", [("ring", None), ("double_ring", 2), ("double_ring", 4)])
def test_eight_ranks_in_two_and_four_hosts(order, per_node, ulysses):
    agree(8, Call("zigzag", order, ulysses, causal=True, documents=RAGGED), inputs(S), per_node=per_node)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [1, 2, 3, 5])
def test_fewer_tokens_than_ranks_leave_empty_shards_that_take_part(layout, tokens):
    x = inputs(tokens)
    for ranks in (2, 4, 6):
        for order in ORDERS:
            agree(ranks, Call(layout, order, causal=True), x, per_node=2)
        agree(ranks, Call(layout, ulysses=2, causal=True), x)


@pytest.mark.parametrize(
    "heads, kv_heads, dim, v_dim",
    [(4, 1, 8, 8), (6, 2, 8, 3), (4, 4, 1, 5), (3, 3, 5, 16)],
    ids=["one key head", "grouped", "one-wide keys", "wide values"],
)
@pytest.mark.parametrize("kernel", ["eager", "reference"])
def test_grouped_heads_and_other_value_dims(heads, kv_heads, dim, v_dim, kernel):
    x = inputs(S, heads=heads, kv_heads=kv_heads, dim=dim, v_dim=v_dim)
    for ranks, layout in ((2, "zigzag"), (3, "striped")):
        agree(ranks, Call(layout, causal=True, documents=RAGGED, kernel=kernel), x)


def test_a_scale_of_ones_own_reaches_forward_and_backward():
    agree(3, Call(causal=True, scale=0.7), inputs(S))
    for scale in (0.0, -1.3):
        agree(2, Call(causal=True, scale=scale), inputs(S))
        agree(2, Call(causal=True, scale=scale, ulysses=2), inputs(S))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_documents_equal_separate_calls(layout):
    x = inputs(S)
    for order, ulysses in (("ring", 1), ("all_gather", 1), ("double_ring", 1), ("ring", 2), ("ring", 4)):
        call = Call(layout, order, ulysses, causal=True, documents=RAGGED, window_size=(6, -1))
        found = on_ranks(4, call, x, per_node=2)
        for start, stop in pairwise(RAGGED):
            if start == stop:
                continue
            part = Inputs(*(t[:, start:stop] for t in x[:4]), x.dlse[:, :, start:stop])
            alone = distflash.SequenceParallel.single().sequence(stop - start)
            _, expected = run_sequence(call, part, alone)
            for name in Attention._fields:
                mine = getattr(found, name)
                mine = mine[:, :, start:stop] if name == "lse" else mine[:, start:stop]
                worst = (mine - getattr(expected, name)).abs().max().item()
                assert worst < 1e-12, f"{call}, document {start}..{stop}: {name} is off by {worst:.1e}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_error_does_not_grow_with_the_number_of_ranks(dtype):
    x = inputs(768, batch=1, heads=4, kv_heads=2, dim=64, dtype=dtype)
    call = Call("zigzag", causal=True, kernel="eager")
    truth = truth_of(call, x)

    def error(ranks: int) -> dict[str, float]:
        found = on_ranks(ranks, call, x)
        assert found.out.dtype == found.dq.dtype == found.dk.dtype == found.dv.dtype == dtype
        return {name: ((getattr(found, name).double() - t).norm() / t.norm()).item() for name, t in truth._asdict().items()}

    one, many = error(1), {ranks: error(ranks) for ranks in range(2, 9)}
    for name in Attention._fields:
        row = [many[ranks][name] for ranks in many]
        floor = torch.finfo(torch.float32).eps / 4  # where fp32 itself is the limit, the order of additions decides
        assert max(row) <= 1.10 * one[name] + floor, f"{name}: 1 rank errs {one[name]:.3e}, 2..8 ranks {row}"
        assert sum(row[-3:]) <= 1.05 * sum(row[:3]) + 3 * floor, f"{name} errs more with more ranks: {row}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("ranks, ulysses", [(1, 1), (4, 1), (4, 2), (4, 4)])
def test_low_precision_stays_within_its_error_budget(dtype, ranks, ulysses):
    x = inputs(150, batch=1, heads=4, kv_heads=2, dim=64, dtype=dtype)
    call = Call("zigzag", ulysses=ulysses, causal=True, documents=(0, 1, 60, 60, 150), kernel="eager")
    check(on_ranks(ranks, call, x), truth_of(call, x), truth_of(call, x, dtype), dtype)


def test_partial_results_are_kept_in_fp32_until_the_last_hop(monkeypatch):
    low, wide, seen = torch.bfloat16, torch.float32, []
    forward, backward = eager.EagerKernel.forward, eager.EagerKernel.backward

    def watch_forward(self, *args, **kwargs):
        found = forward(self, *args, **kwargs)
        seen.append(("forward", found.out.dtype, found.lse.dtype))
        return found

    def watch_backward(self, *args, **kwargs):
        found = backward(self, *args, **kwargs)
        seen.append(("backward", *(t.dtype for t in found)))
        return found

    monkeypatch.setattr(eager.EagerKernel, "forward", watch_forward)
    monkeypatch.setattr(eager.EagerKernel, "backward", watch_backward)
    on_ranks(3, Call(kernel="eager"), inputs(S, dtype=low))
    expected = [("forward", wide, wide)] * 6 + [("forward", low, wide)] * 3
    expected += [("backward", wide, wide, wide)] * 6 + [("backward", low, wide, wide)] * 3
    assert sorted(seen, key=str) == sorted(expected, key=str)


class LiveMessages:
    """Counts the messages that the ring loop holds at once, per rank; 16-bit ones are K/V, fp32 ones gradients."""

    def __init__(self, monkeypatch):
        self.mine, self.peak = threading.local(), {}
        empty, pack = messages.empty, messages.pack
        monkeypatch.setattr(messages, "empty", lambda forms, device: self._seen(empty(forms, device), forms[0][1]))
        monkeypatch.setattr(messages, "pack", lambda tensors: self._seen(pack(tensors), tensors[0].dtype))

    def _seen(self, message, dtype):
        alive = self.mine.__dict__.setdefault(dtype, [])
        alive[:] = [ref for ref in alive if not ref.expired()] + [StorageWeakRef(message.untyped_storage())]
        self.peak[dtype] = max(self.peak.get(dtype, 0), len(alive))
        return message


@pytest.mark.parametrize("ranks", [2, 3, 5, 8])
def test_a_ring_holds_two_messages_at_a_time_whatever_the_number_of_ranks(ranks, monkeypatch):
    live = LiveMessages(monkeypatch)
    on_ranks(ranks, Call("zigzag", "ring", causal=True), inputs(64, dtype=torch.bfloat16))
    assert live.peak == {torch.bfloat16: 2, torch.float32: 2}


@pytest.mark.parametrize("ranks", [4, 8])
def test_a_double_ring_holds_one_message_more(ranks, monkeypatch):
    live = LiveMessages(monkeypatch)
    on_ranks(ranks, Call("zigzag", "double_ring", causal=True), inputs(64, dtype=torch.bfloat16), per_node=2)
    assert live.peak == {torch.bfloat16: 3, torch.float32: 2}


def test_all_gather_holds_every_block_and_says_so(monkeypatch):
    live = LiveMessages(monkeypatch)
    on_ranks(4, Call("zigzag", "all_gather", causal=True), inputs(64, dtype=torch.bfloat16))
    assert live.peak == {torch.bfloat16: 4, torch.float32: 2}


@pytest.mark.parametrize("ranks", [4, 8])
def test_where_ranks_skip_blocks_the_number_of_messages_stays_bounded(ranks, monkeypatch):
    """Documents that begin and end anywhere: blocks come from their owners, gradients go straight home."""
    live = LiveMessages(monkeypatch)
    mask = Slices([((64 - 8 * n, 72 - 8 * n), (8 * n - 8, 8 * n), "full") for n in range(1, 9)])
    x = inputs(64, dtype=torch.bfloat16)
    call = Call("contiguous", "ring", mask=mask)
    check(on_ranks(ranks, call, x), truth_of(call, x), truth_of(call, x, torch.bfloat16), torch.bfloat16)
    assert live.peak[torch.bfloat16] <= 3 and live.peak[torch.float32] <= 3, live.peak


@pytest.fixture
def traffic(monkeypatch):
    """Bytes of all exchanges so far, by (from, to)."""
    count, exchange = Counter(), LocalWire.exchange

    def counted(wire, sends, recvs):
        count.update({(wire.rank, dest): message.numel() for dest, message in sends.items()})
        return exchange(wire, sends, recvs)

    monkeypatch.setattr(LocalWire, "exchange", counted)
    return count


@pytest.mark.parametrize("order", ["ring", "all_gather"])
@pytest.mark.parametrize("window, reach", [(15, 1), (17, 2)])
def test_a_window_over_contiguous_shards_moves_blocks_between_neighbours_only(window, reach, order, traffic):
    ranks, shard = 8, 16
    x, call = inputs(ranks * shard, batch=1, heads=2, kv_heads=1), Call("contiguous", order, causal=True, window_size=(window, 0))
    wanted = {(rank, rank + near) for rank in range(ranks) for near in range(1, reach + 1) if rank + near < ranks}

    def forward(group):
        seq = distflash.SequenceParallel(group, layout="contiguous", order=order).sequence(ranks * shard)
        distflash.attention(*(seq.shard(t) for t in x[:3]), seq, **call.options)

    spmd(ranks, forward)
    block = 2 * shard * 8 * 8  # bytes of K and V, and of dK and dV, in fp64
    assert set(traffic) == (wanted if order == "all_gather" else {(rank, rank + 1) for rank in range(ranks - 1)})
    assert sum(traffic.values()) == block * len(wanted)
    traffic.clear()
    agree(ranks, call, x)
    # K and V twice, and gradients, which pass the ranks that add to them and go home from the last
    assert sum(traffic.values()) == block * (2 * len(wanted) + len(wanted) + ranks - 1)


def test_documents_inside_shards_move_nothing(traffic):
    agree(4, Call("contiguous", causal=True, documents=(0, 3, 8, 16, 20, 24, 32)), inputs(32))
    assert not traffic
    agree(4, Call("contiguous", causal=True, documents=(0, 3, 9, 16, 20, 24, 32)), inputs(32))
    assert set(traffic) == {(0, 1), (1, 0)}, "K and V one way, their gradients the other"


def test_a_block_that_is_masked_for_all_my_queries_does_not_touch_the_result():
    # what the skipped blocks hold is NaN: contiguous and causal, rank 0 must never read what later ranks hold
    x = inputs(32)
    x.k[:, 16:], x.v[:, 16:] = float("nan"), float("nan")
    call = Call("contiguous", causal=True)
    (_, first), (_, second), *_ = spmd(4, lambda group: run_rank(call, x, group))
    for found in (first, second):
        assert torch.isfinite(found.out).all() and torch.isfinite(found.lse).all() and torch.isfinite(found.dq).all()


@pytest.mark.parametrize("score", [1e4, -1e4, 0.0])
def test_the_weights_of_hops_add_up_to_one_whatever_the_size_of_the_scores(score):
    ones = torch.ones(1, 64, 2, 4)
    x = Inputs(ones * score, ones, ones, ones, torch.zeros(1, 2, 64))
    for call in (Call(causal=True, scale=0.25), Call(scale=0.25), Call(ulysses=2, scale=0.25, causal=True)):
        out = on_ranks(4, call, x).out
        assert (out - 1).abs().max() < 1e-5, f"{call}: every value is 1, the output is {out.min():.6f} to {out.max():.6f}"


def test_two_runs_are_bit_equal_whatever_the_threads_do():
    x, call = inputs(S, dtype=torch.bfloat16), Call("zigzag", "ring", 2, causal=True)
    first, second = (on_ranks(4, call, x) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_backward_may_run_after_other_sequences_and_out_of_order():
    x, call = inputs(S), Call("zigzag", causal=True)
    truth = truth_of(call, x)

    def work(group):
        sp = distflash.SequenceParallel(group)
        made = []
        for length in (S, 5, S):
            seq = sp.sequence(length)
            leaves = [seq.shard(t[:, :length]).detach().requires_grad_() for t in (x.q, x.k, x.v)]
            out, lse = distflash.attention(*leaves, seq, causal=True, return_lse=True)
            made.append((seq, leaves, out, lse))
        for seq, _, out, lse in (made[2], made[0]):
            loss = (out * seq.shard(x.dout)).sum() + (lse * seq.shard(x.dlse, dim=2)).sum()
            loss.backward()
        seq, leaves, out, lse = made[0]
        return seq.indices, Attention(out.detach(), lse.detach(), *(leaf.grad for leaf in leaves))

    check(whole(spmd(3, work)), truth, truth, torch.float64)


def test_only_the_output_or_only_the_lse_may_have_a_gradient():
    x = inputs(S)
    for use in ("out", "lse"):
        call = Call("zigzag", causal=True)
        part = x._replace(dlse=torch.zeros_like(x.dlse)) if use == "out" else x._replace(dout=torch.zeros_like(x.dout))
        truth = truth_of(call, part)

        def work(group, use=use):
            seq = distflash.SequenceParallel(group).sequence(S)
            leaves = [seq.shard(t).detach().requires_grad_() for t in (x.q, x.k, x.v)]
            out, lse = distflash.attention(*leaves, seq, causal=True, return_lse=True)
            (out * seq.shard(x.dout)).sum().backward() if use == "out" else (lse * seq.shard(x.dlse, dim=2)).sum().backward()
            return seq.indices, Attention(out.detach(), lse.detach(), *(leaf.grad for leaf in leaves))

        broken = errors(whole(spmd(3, work)), truth, truth, torch.float64)
        assert not broken, f"gradient of {use} alone: {broken}"


def test_the_oracle_itself_agrees_with_pytorchs_attention():
    x = inputs(S, kv_heads=4)
    q, k, v = (t.transpose(1, 2) for t in x[:3])
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    out, _ = dense(x.q, x.k, x.v, keep_mask(S, S, causal=True))
    assert (out - expected).abs().max() < 1e-13
    assert (oracle(x.q, x.k, x.v, x.dout, keep_mask(S, S, causal=True)).out - expected).abs().max() < 1e-13


def test_the_kernel_is_not_asked_about_blocks_of_which_nothing_is_kept(monkeypatch):
    asked = []
    for name in ("forward", "backward"):
        inner = getattr(eager.EagerKernel, name)

        def counted(self, *args, name=name, inner=inner, **more):
            asked.append(name)
            return inner(self, *args, **more)

        monkeypatch.setattr(eager.EagerKernel, name, counted)
    x, call = inputs(S), Call("contiguous", causal=True)
    agree(4, call, x)
    assert asked.count("forward") == asked.count("backward") == 1 + 2 + 3 + 4  # rank r keeps something of r + 1 blocks
