"""Heads that are copied between the memories of ranks, a group at a time: threads that share windows."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter, defaultdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

import distflash
from distflash.cost import memory
from distflash.cost.traffic import Scheme, Shape, Share
from distflash.kernels.eager import EagerKernel
from distflash.parallel import all_to_all, autograd, ulysses
from distflash.parallel.mask import Mask
from distflash.parallel.ulysses import dealt, head_groups, head_shards
from distflash.parallel.wire.local import LocalWire
from distflash.testing import check, spmd
from tests.parallel.test_staging import Bare, Meter
from tests.schemes import Call, inputs, on_ranks, run_sequence, truth_of, whole


@pytest.fixture
def many(monkeypatch):
    """As many groups as the heads allow, whatever the size."""
    monkeypatch.setattr(ulysses, "PIECE", 1)


@given(kv=st.integers(1, 12), group=st.integers(1, 3), ranks=st.integers(1, 4), tokens=st.integers(0, 99), row=st.integers(0, 1 << 32))
def test_groups_are_equal_on_each_rank_and_whole(kv, group, ranks, tokens, row):
    if kv * group < ranks:
        return
    heads, kv_heads = head_shards(kv * group, kv, ranks)
    groups = head_groups(kv_heads, [tokens, 0], row)
    for mine, read in zip(heads, kv_heads, strict=True):
        each = [(len(a), len(b)) for a, b in zip(dealt(mine, groups), dealt(read, groups), strict=True)]
        assert set(each) == {(len(mine) // groups, len(read) // groups)}
        for some, of in zip(dealt(mine, groups), dealt(read, groups), strict=True):
            assert kv < ranks or {h // group for h in some} == set(of), "a group has the key heads that its query heads read"
    assert groups == 1 or tokens * row // ranks >= ulysses.PIECE * groups**2


def test_more_bytes_make_more_groups_as_far_as_heads_allow():
    def groups(heads, kv_heads, ranks, tokens):
        row = Shape(heads, kv_heads, 128, 128).row
        return head_groups(head_shards(heads, kv_heads, ranks)[1], [tokens] * ranks, row)

    assert [groups(32, 32, 2, tokens) for tokens in (4096, 8192, 16384, 32768, 65536, 1 << 18)] == [1, 1, 2, 2, 4, 8]
    assert [groups(32, 8, 2, tokens) for tokens in (4096, 65536, 1 << 20)] == [1, 2, 4]
    assert groups(32, 4, 4, 1 << 20) == groups(32, 2, 4, 1 << 20) == groups(14, 7, 2, 1 << 20) == 1, "one head, a shared one, 3 beside 4"


@pytest.fixture
def alike(monkeypatch):
    """Matrix products one by one, of copies: a BLAS's last bit may depend on the rest of a batch, and on where operands lie and how."""
    product = torch.matmul

    def one_by_one(a, b):
        shape = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        pairs = zip(a.expand(*shape, *a.shape[-2:]).flatten(0, -3), b.expand(*shape, *b.shape[-2:]).flatten(0, -3), strict=True)
        return torch.stack([product(x.contiguous(), y.contiguous()) for x, y in pairs]).unflatten(0, shape)

    monkeypatch.setattr(torch, "matmul", one_by_one)


@pytest.fixture
def launches(monkeypatch):
    """How often kernels ran, by pass."""
    count = Counter()
    for name in ("forward", "backward"):
        run = getattr(EagerKernel, name)
        monkeypatch.setattr(EagerKernel, name, lambda *a, _run=run, _name=name, **o: (count.update([_name]), _run(*a, **o))[1])
    return count


@pytest.mark.parametrize("heads, kv_heads, ranks", [(4, 4, 2), (8, 4, 2), (12, 6, 2), (6, 6, 3), (9, 9, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_no_bit_depends_on_the_number_of_groups(heads, kv_heads, ranks, dtype, launches, alike, monkeypatch):
    x = inputs(61, heads=heads, kv_heads=kv_heads, v_dim=5, dtype=dtype)
    for variant in ({"documents": (0, 7, 8, 40, 61)}, {"dropout_p": 0.3}, {"slopes": torch.linspace(0.1, 0.9, heads)}):
        call, found = Call("contiguous", ulysses=ranks, causal=True, wire="symmetric", **variant), []
        for piece, groups in ((1, kv_heads // ranks), (1 << 60, 1)):
            monkeypatch.setattr(ulysses, "PIECE", piece)
            launches.clear()
            found.append(on_ranks(ranks, call, x))
            assert launches == {"forward": ranks * groups, "backward": ranks * groups}
        found.append(on_ranks(ranks, call._replace(wire="p2p"), x))
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True)), variant
        check(found[0], truth_of(call, x), truth_of(call, x, dtype), dtype)


def test_heads_that_are_not_alike_on_all_ranks_and_shared_ones_come_at_once(many, launches):
    for heads, kv_heads, ranks in ((6, 2, 3), (7, 7, 2), (5, 1, 4)):
        launches.clear()
        x, call = inputs(23, heads=heads, kv_heads=kv_heads), Call(ulysses=ranks, causal=True, wire="symmetric")
        check(on_ranks(ranks, call, x), truth_of(call, x), truth_of(call, x), torch.float64)
        assert launches == {"forward": ranks, "backward": ranks}


def test_in_a_ring_and_over_messages_heads_come_at_once(many, launches):
    x = inputs(40, heads=8, kv_heads=8)
    for wire, ulysses_, forward, backward in (("symmetric", 2, 8, 12), ("p2p", 4, 4, 4)):
        launches.clear()
        call = Call("zigzag", ulysses=ulysses_, causal=True, wire=wire)
        check(on_ranks(4, call, x), truth_of(call, x), truth_of(call, x), torch.float64)
        assert launches == {"forward": forward, "backward": backward}, "two visits each, and half of the own block last"


def test_layers_of_other_sizes_share_windows_and_leave_their_flags_as_they_were(many):
    """Every piece that was given was taken and released, whatever the number of groups, and tokens that a rank has none of."""
    sizes = [(1, 8), (37, 4), (3, 8), (64, 2), (37, 8)]
    made = {(tokens, heads): inputs(tokens, heads=heads, kv_heads=heads) for tokens, heads in sizes}

    def work(group):
        found = []
        for size in (*sizes, *reversed(sizes)):
            call = Call("contiguous", ulysses=2, causal=True, wire="symmetric")
            sp = distflash.SequenceParallel(group, layout=call.layout, ulysses=2, wire=call.wire)
            found.append(run_sequence(call, made[size], sp.sequence(size[0])))
        return found, group.group.windows

    ranks = spmd(2, work)
    for n, size in enumerate((*sizes, *reversed(sizes))):
        truth = truth_of(Call(causal=True), made[size])
        check(whole([found[n] for found, _ in ranks]), truth, truth, torch.float64)
    windows = ranks[0][1]
    assert {name for _, name, _ in windows} == {f"{way} {group}" for way in ("heads", "tokens") for group in range(4)}
    for window in windows.values():
        assert not window.full and len(window.free) == 4


def test_nothing_is_sent_and_engines_copy_what_is_contiguous(many, monkeypatch):
    exchange, copy, moved = LocalWire.exchange, all_to_all.copy, Counter()
    monkeypatch.setattr(LocalWire, "exchange", lambda wire, sends, recvs: pytest.fail("sent") if sends else exchange(wire, sends, recvs))

    def copied(source, to):
        assert source.dtype == to.dtype and all(x.is_contiguous() for both in (source, to) for x in both)
        moved[source.shape[2:], source.dtype] += source.shape[0] * source.shape[1]
        copy(source, to)

    monkeypatch.setattr(all_to_all, "copy", copied)
    x, call = inputs(30, heads=8, kv_heads=4, v_dim=5, dtype=torch.bfloat16), Call("contiguous", ulysses=2, causal=True, wire="symmetric")
    on_ranks(2, call, x)
    rows, wide, narrow = 2 * 30, torch.float32, torch.bfloat16  # a token of a sequence, in each of two groups: all but what stays
    assert moved == {
        ((4 // 2, 8), narrow): 2 * 2 * rows // 1, ((2 // 2, 8), narrow): 2 * 2 * rows, ((2 // 2, 5), narrow): 2 * 2 * rows,
        ((4 // 2, 5), narrow): 2 * 2 * rows, ((4 // 2,), wide): 2 * 2 * rows,
    }  # fmt: skip


def test_a_group_comes_while_the_one_before_it_is_worked_on_and_goes_home_while_the_next_is(many, monkeypatch):
    """What each lane waits for, of rank 0: a wait that is missing is a race on GPUs, one too many ends the overlap."""
    lane, log, numbers, forward = threading.local(), defaultdict(list), defaultdict(Counter), EagerKernel.forward

    @contextlib.contextmanager
    def beside(wire, name):
        lane.name = name
        yield
        lane.name = "main"

    def mark(wire):
        name = getattr(lane, "name", "main")
        numbers[wire.rank][name] += 1
        return f"{name} {numbers[wire.rank][name]}"

    def after(wire, mark):
        log[wire.rank].append(f"{getattr(lane, 'name', 'main')} waits for {mark}")

    def computed(self, q, *args, **options):
        log[lane.rank].append("attention")
        return forward(self, q, *args, **options)

    for name, method in (("beside", beside), ("mark", mark), ("after", after)):
        monkeypatch.setattr(LocalWire, name, method)
    monkeypatch.setattr(EagerKernel, "forward", computed)
    x = inputs(16, heads=4, kv_heads=4)[:3]

    def work(group):
        lane.rank = group.rank
        seq = distflash.SequenceParallel(group, ulysses=2, wire="symmetric").sequence(16)
        distflash.attention(*(seq.shard(t) for t in x), seq)

    spmd(2, work)
    assert log[0] == [
        "pull waits for main 1", "pull waits for main 1", "main waits for pull 1", "attention", "home waits for main 2",
        "main waits for pull 2", "attention", "home waits for main 3", "main waits for home 2",
    ]  # fmt: skip


def test_shapes_without_data_are_those_of_the_real_thing_however_many_groups(many):
    def work(group):
        seq = distflash.SequenceParallel(group, ulysses=2, wire="symmetric").sequence(9)
        leaves = [torch.ones(2, seq.local_length, heads, dim, dtype=torch.bfloat16) for heads, dim in ((8, 8), (4, 8), (4, 5))]
        made, found = seq.scheme(Mask(None, 0, seq.cu_seqlens), EagerKernel(), 1.0, Shape(8, 4, 8, 5, 2)), []
        assert made.ulysses.groups == 2
        for mode in (contextlib.nullcontext(), FakeTensorMode()):
            with mode as fake:
                x = [fake.from_tensor(t) if fake else t for t in leaves]
                ticket = fake.from_tensor(made.ticket()) if fake else made.ticket()
                out, lse, kept = torch.ops.distflash.attention(*x, ticket, made.gathered, None, None, None)
                grads = torch.ops.distflash.attention_backward(out, lse, *kept[:3], out, kept[3], ticket, 4, None, None, None)
                found.append([(t.shape, t.dtype, t.is_contiguous()) for t in (out, lse, *kept, *grads)])
        assert found[0] == found[1]

    spmd(2, work)


def measured(group, shape, tokens, ulysses_):
    """(peak above the inputs by pass, as it is and by the formula; bytes of windows, as they are and by the formula) on this rank."""
    mask, ranks = Mask(None, 0, (0, tokens)), group.size
    seq = distflash.SequenceParallel(group, layout="contiguous", ulysses=ulysses_, wire="symmetric").sequence(tokens)
    made, plans = seq.scheme(mask, Bare(), 1.0, shape), seq.plans(mask, shape)
    scheme = Scheme("contiguous", "ring", ulysses_, ranks, ranks)
    spans = scheme.spans((0, tokens), mask)
    share = Share(scheme, spans, shape, group.rank, plans.sent)
    sizes = (
        (shape.heads, shape.head_dim),
        *((shape.kv_heads, n) for n in (shape.head_dim, shape.v_head_dim)),
        (shape.heads, shape.v_head_dim),
    )
    *leaves, dout = (torch.empty(2, seq.local_length, *size, dtype=torch.bfloat16) for size in sizes)
    for _ in range(2):  # the windows are there after the first
        pieces = [piece for window in group.group.windows.values() for piece in window.pieces]
        with Meter().over(*leaves, dout, *pieces) as there:
            out, lse, saved = autograd._forward._init_fn(*leaves, made.ticket(), made.gathered, None, None, None)
        rows = out, *saved
        with Meter().over(*leaves, dout, *rows, lse, *pieces) as back:
            autograd._backward._init_fn(dout, None, *saved[:3], out, saved[3], made.ticket(), shape.kv_heads, None, None, None)
    found = {"forward": there.peak, "backward": back.peak + sum(x.nbytes for x in rows)}
    largest = defaultdict(int)
    for members, name, nbytes in group.group.windows:
        if group.rank in members:
            largest[name] = max(largest[name], -(-nbytes // memory.GRAIN) * memory.GRAIN + memory.GRAIN)
    told = memory.windows(share.shape, max(map(len, (span for spans_ in spans for span in spans_))), scheme.ring) + memory.head_windows(
        share
    )
    return found, memory.peak(share, plans.copies, reach=True), sum(largest.values()), told


@pytest.mark.parametrize(
    "heads, kv_heads, ranks, ulysses_",
    [(4, 4, 2, 2), (8, 4, 2, 2), (18, 9, 3, 3), (5, 5, 2, 2), (8, 2, 4, 4), (2, 2, 2, 2), (8, 4, 4, 2), (9, 9, 6, 3), (6, 6, 4, 2)],
)
@pytest.mark.parametrize("v_dim", [16, 128])
@pytest.mark.parametrize("piece", [1, 1 << 60])
def test_the_formula_of_peak_memory_and_of_windows_counts_every_byte(heads, kv_heads, ranks, ulysses_, piece, v_dim, monkeypatch):
    monkeypatch.setattr(ulysses, "PIECE", piece)
    monkeypatch.setattr(Bare, "delta", lambda self, out, dout: torch.empty_like(out[..., 0].mT, dtype=torch.float32), raising=False)
    shape = Shape(heads, kv_heads, 16, v_dim, batch=2)
    for rank, (found, told, windows, expected) in enumerate(spmd(ranks, lambda group: measured(group, shape, 192, ulysses_))):
        assert (found, windows) == (told, expected), f"rank {rank}"


def test_explain_counts_the_windows_of_heads_as_well():
    tokens, shape = 64, Shape(8, 4, 16, 16)

    def work(group, ulysses_, wire):
        seq = distflash.SequenceParallel(group, ulysses=ulysses_, wire=wire, layout="contiguous").sequence(4 * tokens)
        return distflash.explain((1, tokens, 8, 16), (1, tokens, 4, 16), seq)

    asked = (4, "p2p"), (1, "symmetric"), (2, "symmetric"), (4, "symmetric")
    found = {key: spmd(4, lambda group, key=key: work(group, *key))[0] for key in asked}
    assert [one.window_bytes // memory.GRAIN for one in found.values()] == [0, 4, 8, 4], "a grain of data and one of flags each"
    scheme, mask = Scheme("contiguous", "ring", 4, 4, 4), Mask(None, None, (0, 4 * tokens))
    share = scheme.share(scheme.spans((0, 4 * tokens), mask), mask, shape, 0)
    assert found[4, "symmetric"].peak_bytes == max(memory.peak(share, reach=True).values())
    assert found[4, "p2p"].peak_bytes == max(memory.peak(share).values())
