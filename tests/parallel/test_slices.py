"""Custom masks: what they keep, what they refuse, and that every scheme keeps exactly that."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import distflash
from distflash.parallel import mask as masks
from distflash.parallel import slices
from distflash.parallel.layout import LAYOUTS
from distflash.parallel.plan import plan
from distflash.parallel.slices import KINDS, Slice, Slices
from distflash.testing import dense, errors, keep_mask, spmd, spmd_processes
from tests.parallel.test_plan import kept, orders, tokens
from tests.schemes import Call, inputs, on_ranks, run_rank, truth_of, whole

S = 29


def pairs(mask: Slices, queries: int = S, keys: int = S) -> np.ndarray:
    return keep_mask(queries, keys, mask=mask).numpy()


def ranges(limit: int = S):
    return st.tuples(st.integers(0, limit), st.integers(0, limit)).map(lambda ends: (min(ends), max(ends)))


WINDOWS = st.tuples(st.integers(-1, 9), st.integers(-1, 9))
SLICE = st.builds(
    lambda q, k, kind, window: Slice(q, k, kind, window if kind == "band" else (-1, -1)),
    ranges(),
    ranges(),
    st.sampled_from(KINDS),
    WINDOWS,
)


@st.composite
def disjoint(draw) -> Slices:
    """Rectangles of a grid of random lines, some left out, each of any kind."""
    lines = [sorted({0, S, *draw(st.lists(st.integers(1, S - 1), max_size=4))}) for _ in range(2)]
    found = []
    for q in zip(lines[0], lines[0][1:], strict=False):
        for k in zip(lines[1], lines[1][1:], strict=False):
            kind = draw(st.sampled_from((*KINDS, "none")))
            if kind != "none":
                found.append(Slice(q, k, kind, draw(WINDOWS) if kind == "band" else (-1, -1)))
    return Slices(draw(st.permutations(found)))


@settings(max_examples=200)
@given(mask=disjoint(), ranks=st.integers(1, 8), layout=st.sampled_from(sorted(LAYOUTS)), data=st.data())
def test_every_kept_pair_is_in_exactly_one_tile_of_one_rank_whatever_the_layout_and_the_order(mask, ranks, layout, data):
    name, order = data.draw(st.sampled_from(sorted(orders(ranks).items(), key=lambda item: item[0])))
    spans = LAYOUTS[layout]((0, S), ranks)
    index, count = tokens(spans), np.zeros((S, S), dtype=int)
    for rank in range(ranks):
        for visit in plan(spans, mask, order, rank):
            for tile in visit.tiles:
                keep = kept(tile)
                assert keep.any(0).all() and keep.any(1).all(), f"{tile} is not tight"
                assert tile.area == keep.sum() and tile.full == keep.all(), tile
                count[np.ix_(index[rank][tile.q], index[visit.owner][tile.kv])] += keep
    assert (count == pairs(mask)).all(), (layout, name, ranks, mask.slices)
    assert mask.area == pairs(mask).sum()


@settings(max_examples=400)
@given(found=st.lists(SLICE, min_size=1, max_size=5))
def test_slices_are_refused_if_and_only_if_two_of_them_keep_one_pair(found):
    count = sum(pairs(Slices([s])).astype(int) for s in found)
    if (count <= 1).all():
        assert (pairs(Slices(found)) == count).all()
    else:
        with pytest.raises(ValueError, match="must be disjoint") as caught:
            Slices(found)
        a, b, query, key = (int(word.rstrip(",")) for word in str(caught.value).split() if word.rstrip(",").isdigit())
        assert pairs(Slices([found[a]]))[query, key] and pairs(Slices([found[b]]))[query, key], caught.value


def test_each_kind_is_aligned_as_documented():
    wide, tall = ((0, 2), (0, 4)), ((0, 4), (0, 2))
    expected = {
        ("causal", wide): [[1, 1, 1, 0], [1, 1, 1, 1]],
        ("causal", tall): [[0, 0], [0, 0], [1, 0], [1, 1]],
        ("inverse-causal", wide): [[1, 1, 1, 1], [0, 1, 1, 1]],
        ("inverse-causal", tall): [[1, 1], [0, 1], [0, 0], [0, 0]],
    }
    for (kind, (q, k)), matrix in expected.items():
        assert pairs(Slices([(q, k, kind)]), q[1], k[1]).astype(int).tolist() == matrix, (kind, q, k)
        (piece,) = Slices([(q, k, kind)]).pieces
        assert piece.area == np.sum(matrix)
    # a band counts global positions, wherever its rectangle is
    band = pairs(Slices([((5, 9), (2, 12), "band", (1, 2))]))
    assert all(band[i, j] == (5 <= i < 9 and 2 <= j < 12 and -1 <= j - i <= 2) for i in range(S) for j in range(S))
    assert (pairs(Slices([(range(3, 7), range(2, 5))])) == pairs(Slices([((3, 7), (2, 5))]))).all()


def test_helpers_keep_what_they_say():
    at = np.arange(S)
    causal = at[None, :] <= at[:, None]
    for prefix in (0, 7, S, S + 3):
        assert (pairs(Slices.prefix_lm(S, prefix)) == (causal | (at < prefix))).all(), prefix
    near = causal & (at[None, :] >= at[:, None] - 5)
    for sinks in (0, 3, S, S + 4):
        assert (pairs(Slices.sinks_and_window(S, sinks, 5)) == (near | (causal & (at < sinks)))).all(), sinks
    cu = (0, 0, 4, 5, 20, S)
    for options in ({}, {"causal": False}, {"window_size": (3, 2)}, {"window_size": (3, 2), "causal": False}):
        expected = keep_mask(S, S, cu_seqlens_q=cu, causal=options.get("causal", True), window_size=options.get("window_size", (-1, -1)))
        assert (pairs(Slices.documents(cu, **options)) == expected.numpy()).all(), options
    with pytest.raises(ValueError, match="documents: window_size="):
        Slices.documents(cu, window_size=(3,))
    assert (pairs(Slices.documents(torch.tensor(cu))) == pairs(Slices.documents(cu))).all()


@settings(max_examples=100)
@given(
    data=st.data(),
    rows=st.integers(1, 6),
    columns=st.integers(1, 6),
    size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    causal=st.booleans(),
)
def test_a_block_mask_keeps_its_blocks_cut_at_the_lengths(data, rows, columns, size, causal):
    blocks = np.array(data.draw(st.lists(st.lists(st.integers(0, 1), min_size=columns, max_size=columns), min_size=rows, max_size=rows)))
    lengths = tuple(n * s - data.draw(st.integers(0, s - 1)) for n, s in zip(blocks.shape, size, strict=True))
    expected = np.kron(blocks, np.ones(size, dtype=int))[: lengths[0], : lengths[1]].astype(bool)
    if causal:
        expected &= np.arange(lengths[1])[None, :] <= np.arange(lengths[0])[:, None]
    for given_as in (blocks, blocks.tolist(), torch.tensor(blocks), torch.tensor(blocks, dtype=torch.bool)):
        mask = Slices.from_block_mask(given_as, size, lengths, causal=causal)
        assert (pairs(mask, *lengths) == expected).all()
    for same in (size, np.array(size), torch.tensor(size)):
        assert Slices.from_block_mask(blocks, same).area == blocks.sum() * size[0] * size[1]


def test_a_full_block_mask_is_one_slice():
    assert len(Slices.from_block_mask(np.ones((8, 8)), 16)) == len(Slices.from_block_mask(np.ones((8, 8)), np.int64(16))) == 1
    assert len(Slices.from_block_mask(np.tri(8), 16)) == 8


BAD = {
    "no slice": ([3], TypeError, ["slice 0", "(q, k, kind)", "got 3"]),
    "a range alone": ([((0, 4),)], TypeError, ["slice 0", "(q, k)"]),
    "five fields": ([((0, 4), (0, 4), "full", (-1, -1), 1)], TypeError, ["slice 0"]),
    "an unknown kind": ([((0, 4), (0, 4), "diagonal")], ValueError, ["slice 0", "kind='diagonal'", "'inverse-causal'"]),
    "a range that falls": ([((0, 1), (0, 1)), ((4, 2), (0, 4))], ValueError, ["slice 1", "q=(4, 2)", "0 <= start <= stop"]),
    "below 0": ([((0, 4), (-1, 4))], ValueError, ["slice 0", "k=(-1, 4)"]),
    "floats": ([((0, 4), (0, 2.5))], TypeError, ["slice 0", "k=(0, 2.5)", "two integers"]),
    "three ends": ([((0, 4, 8), (0, 2))], TypeError, ["slice 0", "q=(0, 4, 8)", "two integers"]),
    "strides": ([(range(0, 8, 2), (0, 2))], ValueError, ["consecutive"]),
    "a window of another kind": ([((0, 4), (0, 4), "causal", (3, 0))], ValueError, ["slice 0", "only a slice of kind 'band'"]),
    "a window below -1": ([((0, 4), (0, 4), "band", (-3, 0))], ValueError, ["slice 0", "window_size=(-3, 0)", "-1 (unlimited)"]),
    "a window of one number": ([((0, 4), (0, 4), "band", 3)], ValueError, ["slice 0", "window_size=3", "two integers"]),
    "overlap": ([((0, 8), (0, 8), "causal"), ((9, 12), (0, 3)), ((3, 5), (2, 4))], ValueError, ["0 and 2", "query 3", "key 2", "disjoint"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_slices_are_refused_with_the_reason(case):
    given, kind, fragments = BAD[case]
    with pytest.raises(kind) as caught:
        Slices(given)
    assert all(fragment in str(caught.value) for fragment in fragments), caught.value


@pytest.mark.parametrize(
    "args, fragment",
    [
        (([], 4), "at least one row"),
        (([[1, 0], [1]], 4), "must be a matrix"),
        (([[1, 2]], 4), "0 and 1, got 2"),
        (([[1, 0]], 4, (4, 3)), "(4, 8)"),
        (([[1, 0]], 4, (4,)), "lengths=(4,)"),
        *((([[1, 0]], size), f"block_size={size!r} must be") for size in (0, (4,), (4, 8, 16), 2.5, "44", (4, None), (4, 0), None)),
    ],
)
def test_bad_block_masks_are_refused(args, fragment):
    with pytest.raises(ValueError) as caught:
        Slices.from_block_mask(*args)
    assert fragment in str(caught.value)


@pytest.mark.parametrize("window", [-1, 2.0, None])
def test_a_window_beside_sinks_has_a_limit(window):
    with pytest.raises(ValueError, match=r"window=.* must be an integer, 0 \(only itself\) or more"):
        Slices.sinks_and_window(8, 2, window)


def test_masks_are_compared_by_value_so_that_layers_share_a_plan():
    seq, q = distflash.SequenceParallel().sequence(S), torch.randn(1, S, 2, 4)
    for _ in range(2):
        distflash.attention(q, q, q, seq, mask=Slices.prefix_lm(S, 5))
    distflash.attention(q, q, q, seq, mask=Slices.prefix_lm(S, 6))
    assert seq._planner._planned.cache_info().misses == len(seq._schemes) == 2
    assert Slices.prefix_lm(S, 5) != Slices.prefix_lm(S, 6) and Slices.prefix_lm(S, 5) != "prefix"
    assert repr(Slices.prefix_lm(4, 2)) == "Slices(2 slices, 11 pairs)"


@settings(max_examples=40)
@given(mask=disjoint(), ranks=st.sampled_from([1, 2, 3, 4]), layout=st.sampled_from(sorted(LAYOUTS)), ulysses=st.booleans(), data=st.data())
def test_random_slices_give_the_gradients_of_dense_attention(mask, ranks, layout, ulysses, data):
    torch.manual_seed(0)
    kernel, order = data.draw(st.sampled_from(["eager", "reference"])), data.draw(st.sampled_from(["ring", "all_gather", "double_ring"]))
    call = Call(layout, order, 2 if ulysses and ranks % 2 == 0 else 1, kernel=kernel, mask=mask)
    x = inputs(S)
    truth = truth_of(call, x)
    broken = errors(on_ranks(ranks, call, x, per_node=2 if ranks == 4 else None), truth, truth, torch.float64)
    assert not broken, f"P={ranks}, {call}: {broken}"


def test_over_gloo_too():
    x = inputs(S)
    for mask, layout in ((Slices.sinks_and_window(S, 2, 6), "contiguous"), (Slices.prefix_lm(S, 9), "balanced")):
        call = Call(layout, mask=mask)
        truth = truth_of(call, x)
        broken = errors(whole(spmd_processes(3, partial(run_rank, call, x))), truth, truth, torch.float64)
        assert not broken, f"{call}: {broken}"


def test_queries_and_keys_may_differ_in_number_on_one_device():
    x, y = inputs(9), inputs(13)
    x = x._replace(k=y.k, v=y.v)
    mask = Slices([((0, 4), (0, 13), "causal"), ((4, 9), (2, 7), "inverse-causal"), ((4, 9), (7, 13), "band", (0, 4))])
    found = distflash.attention(x.q, x.k, x.v, mask=mask)
    alone = distflash.attention(x.q, x.k, x.v, mask=mask, kernel="reference")
    expected, _ = dense(x.q, x.k, x.v, keep_mask(9, 13, mask=mask))
    assert (found - expected).abs().max() < 1e-12 and (alone - expected).abs().max() < 1e-12


def test_a_slice_across_documents_is_refused_on_every_rank_whether_for_the_mask_or_for_the_layout():
    cu, across = (0, 10, S), Slices.prefix_lm(S, 4)

    def work(group):
        sp = distflash.SequenceParallel(group, layout="balanced")
        with pytest.raises(ValueError, match="crosses a border of documents"):
            sp.sequence(cu_seqlens=cu, mask=across)
        seq = sp.sequence(cu_seqlens=cu)
        q = torch.zeros(1, seq.local_length, 2, 4)
        with pytest.raises(ValueError, match="crosses a border of documents"):
            distflash.attention(q, q, q, seq, mask=across)
        with pytest.raises(ValueError, match="there are 29 queries"):
            distflash.attention(q, q, q, seq, mask=Slices.prefix_lm(S + 1, 4))

    spmd(2, work)


def test_documents_and_slices_inside_them_go_together():
    cu = (0, 10, 10, S)
    x, mask = inputs(S), Slices([*Slices.prefix_lm(10, 4).slices, ((10, S), (10, S), "band", (5, 0))])
    call = Call("zigzag", documents=cu, mask=mask)
    truth = truth_of(call, x)
    assert not errors(on_ranks(3, call, x), truth, truth, torch.float64)


def test_many_slices_are_checked_and_cut_without_comparing_all_with_all(monkeypatch):
    asked = {"_shared": 0, "_meeting": 0}
    for module, name in ((slices, "_shared"), (masks, "_meeting")):
        inner = getattr(module, name)

        def counted(*args, name=name, inner=inner):
            asked[name] += 1
            return inner(*args)

        monkeypatch.setattr(module, name, counted)
    n, ranks = 64, 8
    for many, length in ((Slices.from_block_mask(np.indices((n, n)).sum(0) % 2, 16), 16 * n), (Slices.documents(range(0, 8001, 2)), 8000)):
        asked.update(dict.fromkeys(asked, 0))
        assert Slices(many.slices) == many and asked["_shared"] <= len(many)
        layout = LAYOUTS["contiguous"]((0, length), ranks)
        found = [tile for rank in range(ranks) for visit in plan(layout, many, orders(ranks)["ring"], rank) for tile in visit.tiles]
        assert sum(tile.area for tile in found) == many.area
        assert asked["_meeting"] <= 2 * len(many) + ranks * ranks  # one a tile, one a pair of ranks to learn, once, who needs whom


def test_borders_that_would_be_taken_for_others_are_refused():
    """Lengths for borders, or halves of a token, would leave tokens that see nothing."""
    same = Slices.documents([0, 3, 8])
    for borders in (torch.tensor([0, 3, 8]), (0, 3, 3, 8)):
        assert Slices.documents(borders) == same
    for borders in ([0, 2.5, 5], torch.tensor([0.0, 2.7, 5.0]), "05"):
        with pytest.raises(TypeError, match="cu_seqlens must hold integers, got"):
            Slices.documents(borders)
    for borders in ([4, 8], [0], []):
        with pytest.raises(ValueError, match=r"cu_seqlens must start at 0 .*, got .*: prepend 0"):
            Slices.documents(borders)
