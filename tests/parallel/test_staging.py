"""Limits on the memory that blocks take on their way: how far ahead they come, what is one visit, and that no bit depends on it."""

from __future__ import annotations

import weakref
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import distflash
from distflash.cost import choose, memory
from distflash.cost.traffic import Scheme, Shape, Share
from distflash.kernels.base import Partial
from distflash.kernels.eager import EagerKernel
from distflash.parallel import planning, ring, sequence, staging
from distflash.parallel.agreement import Disagreement
from distflash.parallel.direct import Direct
from distflash.parallel.layout import LAYOUTS, lengths, split
from distflash.parallel.mask import Mask
from distflash.parallel.messages import Messages
from distflash.parallel.plan import ORDERS, halved, narrowed, plan, readers, staged
from distflash.parallel.planning import Planner
from distflash.parallel.slices import Slices
from distflash.parallel.wire.local import LocalGroup, LocalWire
from distflash.testing import check, spmd, spmd_processes
from tests.parallel.test_ring import MASKS, RAGGED, LiveMessages, S, agree
from tests.schemes import Call, inputs, on_ranks, run_sequence, truth_of, whole

CU = (0, 40, 41, 97)


@pytest.fixture
def at_once(monkeypatch):
    """Nothing is waited for, so that blocks are one visit wherever memory allows."""
    monkeypatch.setattr(staging, "PACE", 0)


def limited(call, x, limit, group=None):
    """One rank's part with a limit on staging."""
    sp = distflash.SequenceParallel(group, layout=call.layout, order=call.order, ulysses=call.ulysses, wire=call.wire, staging=limit)
    return run_sequence(call, x, sp.sequence(cu_seqlens=call.documents or (0, x.q.shape[1])))


def block_of(x, layout, ranks, documents=None):
    """Bytes of K and V of the longest block, as a message."""
    shape = Shape(x.q.shape[2], x.k.shape[2], x.q.shape[3], x.v.shape[3], x.q.shape[0], x.q.itemsize)
    return shape.message(max(lengths(LAYOUTS[layout](documents or (0, x.q.shape[1]), ranks))), shape.itemsize)


@pytest.mark.parametrize(
    "said, limit",
    [(None, None), (1, 1), ("7", 7), ("7B", 7), ("1KB", 1000), ("3 MiB", 3 << 20), ("1.5GiB", 3 << 29), ("2GB", 2 * 10**9)],
)
def test_a_limit_is_bytes_or_text(said, limit):
    assert distflash.SequenceParallel(staging=said).staging == limit


@pytest.mark.parametrize("said", ["", "much", "-1", -1, 0, "0GiB", "2 gib", "1e9", "5 MiB/s"])
def test_what_is_no_size_is_refused(said):
    with pytest.raises(ValueError, match=r"staging=.* is not a positive number of bytes"):
        distflash.SequenceParallel(staging=said)


@pytest.mark.parametrize("said", [True, 1.5, (1,)])
def test_what_is_no_number_is_a_type_error(said):
    with pytest.raises(TypeError, match=r"staging=.* must be None, bytes as an integer"):
        distflash.SequenceParallel(staging=said)


def test_an_order_keeps_as_many_blocks_as_it_may():
    for ranks in (2, 3, 4, 8):
        most = {name: ORDERS[name](ranks, 2 if ranks % 2 == 0 else 1).held for name in ORDERS}
        assert (most["ring"], most["all_gather"]) == (min(2, ranks - 1), ranks - 1)
        for make in ORDERS.values():
            order = make(ranks, 2 if ranks % 2 == 0 else 1)
            for blocks in range(1, ranks + 2):
                found = order.within(blocks)
                assert (found.ranks, found.node) == (order.ranks, order.node) and all(found.sent[t] < t for t in range(1, ranks))
                assert all(found.sent[t] >= order.sent[t] for t in range(1, ranks)), "a block sets out before its order says"
                assert found.held <= max(blocks, min(2, ranks - 1))
    gather = ORDERS["all_gather"](8, 8)
    assert [gather.within(blocks).held for blocks in (2, 3, 4, 5, 6, 7)] == [2, 2, 4, 4, 6, 7]


class Held:
    """An exchange that owns what it sends until it is waited on, as those between processes do."""

    def __init__(self, pending, sends):
        self.pending, self.sends = pending, sends

    def wait(self):
        self.pending.wait()
        self.sends = None


@pytest.fixture
def held(monkeypatch):
    """Threads copy what they send, other wires do not: here it stays, and the copy does not count."""
    exchange = LocalWire.exchange

    def hold(wire, sends, recvs):
        with _disable_current_modes():
            return Held(exchange(wire, sends, recvs), sends)

    monkeypatch.setattr(LocalWire, "exchange", hold)


@pytest.mark.parametrize("blocks, most", [(2, 2), (3, 2), (4, 4), (5, 6), (9, 6)])
def test_messages_are_no_more_than_the_limit_allows(blocks, most, held, monkeypatch):
    """Those of others, and a copy of our own while all set out."""
    live, x = LiveMessages(monkeypatch), inputs(66, dtype=torch.bfloat16)
    call = Call("contiguous", "all_gather", causal=False)
    limit = blocks * block_of(x, "contiguous", 6)
    found = whole(spmd(6, lambda group: limited(call, x, limit, group)))
    check(found, truth_of(call, x), truth_of(call, x, torch.bfloat16), torch.bfloat16)
    assert live.peak[torch.bfloat16] == most


@pytest.mark.parametrize("wire", ["p2p", "symmetric"])
@pytest.mark.parametrize("ranks", [3, 4])
def test_no_bit_depends_on_the_limit(wire, ranks, at_once):
    x = inputs(S, dtype=torch.float32)
    for layout, documents in (("zigzag", None), ("contiguous", RAGGED)):
        # the reference sums a visit at once, so that other visits would be other bits
        call = Call(layout, "all_gather", causal=True, documents=documents, deterministic=True, wire=wire, kernel="reference")
        block = block_of(x, layout, ranks, documents)
        limits = 2 * block, 3 * block, 9 * block, None
        found = [whole(spmd(ranks, lambda group, n=n, call=call: limited(call, x, n, group))) for n in limits]
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_processes_that_send_messages_keep_the_limit_too():
    x, call = inputs(S), Call("zigzag", "all_gather", causal=True, documents=RAGGED)

    def work():
        sent = [limited(call, x, blocks * block_of(x, "zigzag", 3, RAGGED)) for blocks in (2, 3)]
        assert all(torch.equal(a, b) for a, b in zip(sent[0][1], sent[1][1], strict=True))
        return sent[0]

    check(whole(spmd_processes(3, work)), truth_of(call, x), truth_of(call, x), torch.float64)


@pytest.mark.parametrize("wire", ["p2p", "symmetric"])
def test_too_little_is_refused_on_every_rank_before_anything_is_sent(wire, monkeypatch):
    x = inputs(S)
    block = block_of(x, "zigzag", 3)
    nothing = lambda *_: pytest.fail("something was sent")  # noqa: E731
    monkeypatch.setattr(LocalWire, "exchange", nothing)
    monkeypatch.setattr(LocalWire, "window", nothing)

    def work(group):
        for limit in (1, block, 2 * block - 1024):
            with pytest.raises(ValueError, match=rf"staging={limit} bytes hold less than this call needs, \d+: 2 blocks of") as error:
                limited(Call("zigzag", causal=True, wire=wire), x, limit, group)
        return str(error.value)

    assert len(set(spmd(3, work))) == 1


def test_two_ranks_need_one_block():
    x = inputs(S)
    limit = block_of(x, "zigzag", 2)
    for wire in ("p2p", "symmetric"):
        call = Call("zigzag", causal=True, wire=wire)
        check(whole(spmd(2, lambda group, c=call: limited(c, x, limit, group))), truth_of(call, x), truth_of(call, x), torch.float64)


def test_ranks_that_are_told_other_limits_are_stopped():
    x = inputs(S)

    def work(group):
        with pytest.raises(Disagreement, match="staging: rank 0 says 1000000; rank 1 says 2000000"):
            limited(Call(causal=True), x, 10**6 * (group.rank + 1), group)

    spmd(2, work)


# blocks that are copied


def plans(layout, ranks, rank, mask):
    shared = LAYOUTS[layout](CU, ranks)
    return plan(shared, mask, ORDERS["ring"](ranks, ranks), rank), max(lengths(shared))


def pairs(visits, q_len):
    """How often each pair (query, owner, key) is kept."""
    count = {}
    for visit in visits:
        owners = np.concatenate([[part.owner] * len(part.keys) for part, _ in visit.placed])
        keys = np.concatenate([np.asarray(part.keys, dtype=int) for part, _ in visit.placed])
        assert len(keys) == visit.tiles.kv_len and [w.stop - w.start for _, w in visit.placed] == [len(p.keys) for p in visit.parts]
        for tile in visit.tiles:
            for i in range(tile.rows):
                for j in range(max(0, i + tile.band.lo), min(tile.columns, i + tile.band.hi + 1)):
                    at = tile.q.start + i, int(owners[tile.kv.start + j]), int(keys[tile.kv.start + j])
                    count[at] = count.get(at, 0) + 1
    return count


@pytest.mark.parametrize("layout", LAYOUTS)
def test_visits_of_several_blocks_keep_what_the_blocks_keep_and_fit_into_the_limit(layout):
    for window in (None, 30):
        for ranks in (2, 3, 5):
            for rank in range(ranks):
                visits, longest = plans(layout, ranks, rank, Mask(window, 0, CU))
                for one in (narrowed(visits), halved(narrowed(visits))):
                    kept = pairs([visit for visit in one if visit.tiles], visits[0].tiles.q_len)
                    for room in (min(2, ranks - 1) * longest, 3 * longest, ranks * longest):
                        for pace in (None, 0, 1.5):
                            found = staged(one, room, pace)
                            case = f"{layout}, P={ranks}, rank {rank}, room {room}, pace {pace}"
                            assert pairs(found, visits[0].tiles.q_len) == kept, case
                            assert all(count == 1 for count in kept.values()), case
                            assert max(memory._copied(found)) <= room, case
                            _sets_out_before_it_is_needed(found, rank, case)
                            if pace is None:
                                assert all(len(visit.parts) == 1 for visit in found), case


def _sets_out_before_it_is_needed(visits, rank, case):
    posted = [(visit.step, hop.step) for visit in visits for hop in visit.hops]
    needed = [visit.step for visit in visits if visit.owner != rank]
    assert [step for _, step in posted] == needed and all(now < then for now, then in posted), case
    busy = [visit.step for visit in visits]
    for before, step in pairwise(busy):
        if step in needed:
            assert any(then == step and now <= before for now, then in posted), f"{case}: nothing is computed while {step} comes"


def groups(ranks, tokens, blocks, pace, rank=0):
    cu, shared = (0, ranks * tokens), LAYOUTS["contiguous"]((0, ranks * tokens), ranks)
    visits = narrowed(plan(shared, Mask(None, None, cu), ORDERS["ring"](ranks, ranks), rank))
    found = staged(visits, blocks * tokens, pace)
    return [len(visit.parts) for visit in found], [[hop.step for hop in visit.hops] for visit in found]


def test_as_many_blocks_are_one_visit_as_have_come_and_as_fit():
    assert groups(4, 64, 3, 0) == ([1, 3], [[1], []])  # all that there is
    assert groups(4, 64, 3, 64)[0] == [1, 1, 1, 1]  # a block takes as long to come as it keeps us busy: one comes while one is worked on
    assert groups(4, 64, 3, 40) == ([1, 1, 2], [[1, 2], [], []])  # a little less: the last two have come after two
    assert groups(4, 64, 3, 32) == ([1, 2, 1], [[1, 3], [], []])  # half as long: two come while one is worked on
    assert groups(4, 64, 2, 0) == ([1, 1, 1, 1], [[1, 2], [], [3], []])  # two buffers
    assert groups(4, 64, 2, None) == groups(4, 64, 2, 0)
    assert groups(8, 64, 4, 0)[0] == [1, 2, 2, 2, 1]  # one half is worked on while the other fills
    assert groups(8, 64, 7, 0)[0] == [1, 7]
    assert groups(8, 64, 7, None) == ([1] * 8, [[*range(1, 8)], *[[]] * 7])
    assert groups(4, 64, 3, 1e9)[0] == [1, 1, 1, 1]  # copies are slow: nothing is waited for


@pytest.mark.parametrize(
    "ranks, ulysses, heads, kv_heads, tokens",
    [(4, 1, 8, 2, 8192), (8, 2, 16, 1, 8192), (8, 2, 8, 1, 32768), (9, 3, 8, 1, 9000), (8, 2, 3, 3, 16384), (8, 4, 5, 1, 32768)],
)
def test_the_model_looks_at_the_visits_that_are_carried_out(ranks, ulysses, heads, kv_heads, tokens):
    scheme, shape, cu = Scheme("zigzag", "ring", ulysses, ranks, ranks), Shape(heads, kv_heads, 128, 128), (0, tokens)
    mask = Mask(None, 0, cu)
    spans = scheme.spans(cu, mask)
    for rank in range(scheme.ring):
        visits = scheme.visits(spans, mask, rank)
        share = Share(scheme, spans, shape, rank * ulysses + scheme.fullest_head_rank(shape), visits)
        told = choose._copies(share, lengths(spans), visits)
        order = ORDERS["ring"](scheme.ring, scheme.ring)
        done = Planner(LocalGroup(scheme.ring).wire(rank), split(spans, ulysses), ulysses, order, None, True).plans(mask, shape, False)
        assert [[visit.parts for visit in visits] for visits in told] == [[v.parts for v in visits] for visits in done.copies]


@pytest.mark.parametrize("wire", ["p2p", "symmetric"])
def test_plans_of_masks_that_are_over_are_forgotten(wire, monkeypatch):
    monkeypatch.setattr(planning, "KEPT", 3)
    monkeypatch.setattr(sequence, "_SCHEMES", 2)

    def work(group):
        seq, q = distflash.SequenceParallel(group, wire=wire).sequence(16), torch.zeros(1, 8, 1, 8)
        made = []
        for n in range(1, 9):
            mask = Slices.documents([0, n, 16])
            distflash.attention(q, q, q, seq, mask=mask)
            made += map(weakref.ref, seq.visits(mask))
        return len(made), sum(ref() is not None for ref in made)

    assert spmd(2, work) == [(16, 6)] * 2


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_several_blocks_at_once_give_the_gradients_of_dense_attention(layout, ranks, at_once):
    x = inputs(S)
    for mask in MASKS:
        agree(ranks, Call(layout, "all_gather", wire="symmetric", **mask), x)


def test_variants_know_the_positions_of_all_blocks_of_a_visit(at_once):
    x = inputs(S)
    for variant in ({"slopes": torch.tensor([0.5, 0.1, 0.3, 0.2])}, {"dropout_p": 0.3}):
        for ulysses, ranks in ((1, 4), (2, 6)):
            call = Call("zigzag", ulysses=ulysses, causal=True, documents=RAGGED, wire="symmetric", **variant)
            check(on_ranks(ranks, call, x), truth_of(call, x), truth_of(call, x), torch.float64)


@pytest.mark.parametrize("blocks, launches", [(2, 4), (3, 2), (None, 2)])
def test_a_visit_is_one_launch_however_many_blocks_it_has(blocks, launches, at_once, monkeypatch):
    x, ranks = inputs(64, batch=1), 4
    calls, forward, backward = [], EagerKernel.forward, EagerKernel.backward
    monkeypatch.setattr(EagerKernel, "forward", lambda self, *a, **o: (calls.append("forward"), forward(self, *a, **o))[1])
    monkeypatch.setattr(EagerKernel, "backward", lambda self, *a, **o: (calls.append("backward"), backward(self, *a, **o))[1])
    call = Call("contiguous", causal=False, wire="symmetric")
    limit = None if blocks is None else blocks * block_of(x, "contiguous", ranks)
    spmd(ranks, lambda group: limited(call, x, limit, group))
    assert (calls.count("forward"), calls.count("backward")) == (ranks * launches, ranks * (launches + 1)), "half of our own comes last"


# memory


class Meter(TorchDispatchMode):
    """The most bytes that tensors made inside have held at a time."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and not any(a is x for a in args):
                storage = x.untyped_storage()
                if storage._cdata not in self.before:
                    self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {at: found for at, found in self.alive.items() if not found[0].expired()}
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self.alive.values()))
        return out

    def over(self, *given):
        """Do not count these."""
        self.before = {x.untyped_storage()._cdata for x in given}
        return self


class Bare:
    """A kernel that allocates what the Hopper kernels do, and computes nothing."""

    def forward(self, q, k, v, tiles, scale, *, acc=None, dtype=None):
        if acc is None:
            rows = q.shape[0], q.shape[2], q.shape[1]
            return Partial(torch.empty(*q.shape[:3], v.shape[3], dtype=dtype or torch.float32), torch.empty(rows, dtype=torch.float32))
        return acc if dtype is None else Partial(acc.out.to(dtype), acc.lse)

    def backward(self, dout, q, k, v, lse, delta, tiles, scale, *, dq=None, dq_dtype=None, dkv_dtype=None):
        in_base_2 = torch.empty_like(lse)
        dq = torch.empty(q.shape, dtype=dq_dtype or torch.float32) if dq is None else dq
        grads = [torch.empty(x.shape, dtype=dkv_dtype or torch.float32) for x in (k, v)]
        return (dq if dq_dtype in (None, dq.dtype) else dq.to(dq_dtype), *grads, in_base_2)[:3]


HEADS, KV, D = 4, 2, 16


def measured(wire, layout, order, ranks, tokens, blocks, direct):
    """(by pass: peak above the inputs, as it is and by the formula; staging by the formula, and its limit) on this rank."""
    scheme, cu = Scheme(layout, order, 1, ranks, ranks), (0, tokens * ranks)
    mask, shape = Mask(None, 0, cu), Shape(HEADS, KV, D, D, batch=2)
    spans, limit = scheme.spans(cu, mask), blocks * shape.message(tokens, shape.itemsize)
    order_ = ORDERS[order](ranks, ranks)
    visits = plan(spans, mask, order_ if direct else staging.within(order_, limit, limit // blocks), wire.rank)
    copies = staging.copies(visits, staging.room(limit, tokens, shape.token, ranks), KV, HEADS, False) if direct else None
    carrier = Direct(wire, lengths(spans), readers(spans, mask, wire.rank)) if direct else Messages(wire)
    share = Share(scheme, spans, shape, wire.rank, visits)
    q, dout = (torch.empty(2, tokens, HEADS, D, dtype=torch.bfloat16) for _ in range(2))
    k, v = (torch.empty(2, tokens, KV, D, dtype=torch.bfloat16) for _ in range(2))
    forward, backward = copies or (visits, visits)
    for _ in range(2):  # the windows are there after the first
        windows = [piece for window in wire.group.windows.values() for piece in window.pieces]
        with Meter().over(q, k, v, dout, *windows) as there:
            out, lse = ring.forward(forward, carrier, Bare(), q, k, v, 1.0)
        delta = torch.empty_like(lse)
        with Meter().over(q, k, v, dout, out, lse, delta, *windows) as back:
            ring.backward(backward, carrier, Bare(), dout, q, k, v, lse, delta, 1.0, dkv_dtype=k.dtype)
    saved = sum(x.nbytes for x in (out, lse, delta))
    return {"forward": there.peak, "backward": back.peak + saved}, memory.peak(share, copies), memory.staging(share, copies), limit


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize(
    "ranks, order, blocks", [(2, "ring", 1), (3, "all_gather", 2), (4, "ring", 2), (4, "all_gather", 3), (5, "all_gather", 4)]
)
@pytest.mark.parametrize("direct", [True, False], ids=["copies", "messages"])
def test_the_formula_of_peak_memory_counts_every_byte(direct, ranks, order, blocks, layout, at_once, held):
    for rank, (found, told, taken, limit) in enumerate(spmd(ranks, lambda wire: measured(wire, layout, order, ranks, 64, blocks, direct))):
        assert found == told, f"rank {rank}"
        assert taken <= limit, f"rank {rank}"


def test_windows_hold_a_block_and_a_gradient_of_every_other_rank():
    shape, tokens = Shape(32, 8, 128, 128), 65536
    block = 2 * tokens * 8 * 128
    assert memory.windows(shape, tokens, 1) == 0
    assert memory.windows(shape, tokens, 4) == 2 * block + 3 * 4 * block + 2 * memory.GRAIN


def test_a_million_tokens_on_four_ranks():
    """The figures of docs/io-model.md."""
    tokens, ranks, shape = 1 << 20, 4, Shape(32, 8, 128, 128)
    scheme, mask = Scheme("zigzag", "ring", 1, ranks, ranks), Mask(None, 0, (0, tokens))
    spans, most = scheme.spans((0, tokens), mask), {"forward": 0, "backward": 0}
    for rank in range(ranks):
        visits = scheme.visits(spans, mask, rank)
        copies = staging.copies(visits, staging.room(None, tokens // ranks, shape.token, ranks), shape.kv_heads, shape.heads, False)
        found = memory.peak(Share(scheme, spans, shape, rank, visits), copies)
        most = {name: max(most[name], nbytes) for name, nbytes in found.items()}
    assert {name: round(nbytes / 2**30, 1) for name, nbytes in most.items()} == {"forward": 8.0, "backward": 14.1}
    assert round(memory.windows(shape, tokens // ranks, ranks) / 2**30, 1) == 7.0


@pytest.mark.parametrize("wire", ["p2p", "symmetric"])
def test_explain_tells_the_limit_and_what_a_call_needs(wire):
    shape, ranks, tokens = Shape(4, 2, 16, 16), 4, 64
    block = shape.message(tokens, shape.itemsize)

    def work(group, limit, **options):
        seq = distflash.SequenceParallel(group, wire=wire, order="all_gather", layout="contiguous", staging=limit).sequence(ranks * tokens)
        return distflash.explain((1, tokens, 4, 16), (1, tokens, 2, 16), seq, **options)

    two, more, free = (spmd(ranks, lambda group, n=n: work(group, n))[0] for n in (2 * block, "1MiB", None))
    assert (two.staging_bytes, two.staging_limit) == (2 * block, 2 * block)
    assert (more.staging_bytes, more.staging_limit) == (3 * block, 1 << 20 if wire == "p2p" else (1 << 20) // shape.token * shape.token)
    assert free.staging_bytes == 3 * block and free.staging_limit == (None if wire == "p2p" else 3 * block)
    assert bool(two.window_bytes) == (wire == "symmetric")
    assert f"staging   {2 * block / 2**20:.1f} MiB" in str(two) and ("limit none" in str(free)) == (wire == "p2p")
    with pytest.raises(ValueError, match="2 blocks of K and V"):
        spmd(ranks, lambda group: work(group, block))
