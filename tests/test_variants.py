"""Softcap, ALiBi and dropout, under every scheme: equal to the fp64 oracle, forward and every gradient, or refused.

Legend: B batch, S global tokens, H query heads, Hk key/value heads, D head dim, P ranks, U ranks of a Ulysses group.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import distflash
from distflash.cost.traffic import Shape
from distflash.kernels import adapters
from distflash.kernels.base import Problem
from distflash.kernels.scores import philox
from distflash.kernels.select import candidates
from distflash.parallel.agreement import Disagreement
from distflash.parallel.layout import LAYOUTS
from distflash.parallel.plan import ORDERS
from distflash.parallel.slices import Slices
from distflash.testing import Attention, Variants, check, dense, dropout_weights, errors, keep_mask, oracle, spmd, spmd_processes
from tests.schemes import SEED, START, Call, inputs, on_ranks, run_rank, truth_of, whole

S = 37
B, H = 2, 4
SINGLE = int(torch.randint((1 << 63) - 1, (), generator=torch.Generator().manual_seed(START)))  # of a call after manual_seed(START)
RAGGED = (0, 7, 8, 8, 30, S)
SLOPES = torch.tensor([0.5, 0.25, 0.7, 0.1])
EACH = torch.tensor([[0.5, 0.25, 0.7, 0.1], [0.3, 0.9, 0.05, 0.0]])  # by batch element
VARIANTS = {
    "softcap": {"softcap": 1.5},
    "ALiBi": {"slopes": SLOPES},
    "ALiBi a batch element": {"slopes": EACH},
    "dropout": {"dropout_p": 0.3},
    "all of them": {"softcap": 2.0, "slopes": EACH, "dropout_p": 0.2},
}
MASKS = [
    {"causal": True},
    {"causal": False},
    {"causal": True, "documents": RAGGED},
    {"window_size": (3, 2), "documents": RAGGED},
    {"mask": Slices.prefix_lm(S, 11)},
    {"mask": Slices([((30, S), (0, 7), "full"), ((0, 9), (20, 36), "causal"), ((9, 29), (11, S), "band", (4, 2))])},
]


def agree(ranks, call, x, per_node=None):
    truth = truth_of(call, x)
    broken = errors(on_ranks(ranks, call, x, per_node), truth, truth, torch.float64)
    assert not broken, f"P={ranks}, {call}: {broken}"


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_scheme_gives_the_gradients_of_dense_attention(layout, order, ranks):
    x = inputs(S)
    for ulysses in (u for u in (1, 2, 3, 4) if ranks % u == 0):
        for mask in MASKS:
            agree(ranks, Call(layout, order, ulysses, **mask, **VARIANTS["all of them"]), x, per_node=2 if ranks == 4 else None)


@pytest.mark.parametrize("kernel", ["eager", "reference"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_each_variant_alone_with_grouped_heads_and_other_value_dims(variant, kernel):
    for heads, kv_heads, dim, v_dim in ((4, 1, 8, 8), (4, 2, 8, 3), (4, 4, 1, 5)):
        x = inputs(S, heads=heads, kv_heads=kv_heads, dim=dim, v_dim=v_dim)
        for ranks, layout, ulysses in ((1, "zigzag", 1), (2, "zigzag", 2), (3, "striped", 1), (4, "zigzag", 2)):
            agree(ranks, Call(layout, ulysses=ulysses, causal=True, documents=RAGGED, kernel=kernel, **VARIANTS[variant]), x)


@pytest.mark.parametrize("tokens", [1, 2, 3, 5])
def test_empty_and_uneven_shards(tokens):
    for ranks, ulysses in ((2, 1), (4, 1), (4, 4), (6, 2)):
        agree(ranks, Call(ulysses=ulysses, causal=True, **VARIANTS["all of them"]), inputs(tokens))


@pytest.mark.parametrize("ranks", [3, 4])
def test_uneven_heads_take_their_own_slopes_and_masks(ranks):
    x = inputs(S, heads=6, kv_heads=2)
    slopes = torch.tensor([0.5, 0.25, 0.7, 0.1, 0.9, 0.02])
    agree(ranks, Call(ulysses=ranks, causal=True, slopes=slopes, dropout_p=0.3, softcap=3.0), x)


# conventions on one device


def attend(x, kernel="eager", **options):
    """Forward and gradients on one device; dropout runs with SINGLE."""
    leaves = [t.detach().requires_grad_() for t in x[:3]]
    torch.manual_seed(START)
    out, lse = distflash.attention(*leaves, return_lse=True, kernel=kernel, **options)
    finite = torch.where(lse > float("-inf"), lse, 0.0)
    ((out * x.dout).sum() + (finite * x.dlse).sum()).backward()
    return Attention(out.detach(), lse.detach(), *(leaf.grad for leaf in leaves))


def rectangle(q_len, k_len, **options):
    x, y = inputs(q_len, **options), inputs(k_len, **options)
    return x._replace(k=y.k, v=y.v)


@pytest.mark.parametrize("kernel", ["eager", "reference"])
@pytest.mark.parametrize("q_len, k_len", [(5, 9), (9, 5), (1, 7), (7, 1)])
@pytest.mark.parametrize("causal", [False, True])
def test_queries_and_keys_of_different_number_are_aligned_at_the_last(q_len, k_len, causal, kernel):
    x = rectangle(q_len, k_len)
    truth = oracle(x.q, x.k, x.v, x.dout, keep_mask(q_len, k_len, causal=causal), dlse=x.dlse, variants=Variants(0.0, EACH, 0.3, SINGLE))
    check(attend(x, kernel, causal=causal, alibi_slopes=EACH, dropout_p=0.3), truth, truth, torch.float64)


@pytest.mark.parametrize("kernel", ["eager", "reference"])
def test_documents_count_for_themselves(kernel):
    cu_q, cu_k = (0, 3, 3, 8, 9, 12), (0, 5, 7, 7, 8, 10)
    x = rectangle(12, 10)
    borders = {"cu_seqlens_q": torch.tensor(cu_q), "cu_seqlens_k": torch.tensor(cu_k)}
    keep = keep_mask(12, 10, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    variants = Variants(2.0, SLOPES, 0.2, SINGLE, (cu_q, cu_k))
    truth = oracle(x.q, x.k, x.v, x.dout, keep, dlse=x.dlse, variants=variants)
    check(attend(x, kernel, **borders, softcap=2.0, alibi_slopes=SLOPES, dropout_p=0.2), truth, truth, torch.float64)
    whole = distflash.attention(*x[:3], **borders, alibi_slopes=SLOPES)
    for (q0, q1), (k0, k1) in zip(pairwise(cu_q), pairwise(cu_k), strict=True):
        if q0 < q1 and k0 < k1:
            alone = distflash.attention(x.q[:, q0:q1], x.k[:, k0:k1], x.v[:, k0:k1], alibi_slopes=SLOPES)
            assert (whole[:, q0:q1] - alone).abs().max() < 1e-13


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size, cap", [(1.0, 30.0), (10.0, 30.0), (1.0, 1e4), (1e4, 5.0), (3.0, 0.1)])
def test_softcap_of_large_and_small_scores(size, cap, dtype):
    x = inputs(S, dtype=dtype, dim=16)
    x = x._replace(q=(x.q * size).to(dtype))
    keep = keep_mask(S, S, causal=True)
    truth, low = (oracle(x.q, x.k, x.v, x.dout, keep, dlse=x.dlse, dtype=d, variants=Variants(cap)) for d in (torch.float64, dtype))
    for kernel in ("eager", "reference"):
        found = attend(x, kernel, causal=True, softcap=cap)
        assert all(torch.isfinite(t).all() for t in found)
        if size < 1e4 or dtype == torch.float64:  # there the rounding of q·k alone is as large as the cap
            check(found, truth, low, dtype)


def test_softcap_without_bound_is_no_softcap():
    x = inputs(S)
    check(attend(x, softcap=1e9), attend(x), attend(x), torch.float64)


def test_lse_is_that_of_the_softmax_before_dropout():
    x = inputs(S)
    assert torch.equal(attend(x, "reference", causal=True, dropout_p=0.5).lse, attend(x, "reference", causal=True).lse)


def test_gradcheck():
    x = inputs(7, batch=1, heads=2, kv_heads=1, dim=3, v_dim=2)

    def run(*leaves):
        torch.manual_seed(0)
        options = {"softcap": 0.8, "alibi_slopes": SLOPES[:2], "dropout_p": 0.4}
        return distflash.attention(*leaves, causal=True, return_lse=True, **options)

    assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in x[:3]])


def test_sinks_join_the_denominator_before_dropout():
    x, sinks = inputs(S), torch.randn(H, dtype=torch.float64)
    torch.manual_seed(START)
    out, lse = distflash.attention(*x[:3], causal=True, sinks=sinks, dropout_p=0.3, softcap=2.0, alibi_slopes=SLOPES, return_lse=True)
    true, true_lse = dense(*x[:3], keep_mask(S, S, causal=True), sinks=sinks, variants=Variants(2.0, SLOPES, 0.3, SINGLE))
    assert (out - true).abs().max() < 1e-13 and (lse - true_lse).abs().max() < 1e-13


def test_the_operator_passes_pytorchs_own_checks_with_slopes_and_a_seed():
    x = inputs(7)
    seq = distflash.SequenceParallel().sequence(7)
    mask = distflash.parallel.mask.Mask(None, 0, seq.cu_seqlens)
    kernel = distflash.kernels.select.select("eager", Problem(x.q.device, x.q.dtype, 4, 2, 8, 8, variants=("softcap",)))
    scheme = seq.scheme(mask, kernel, 0.3, Shape(4, 2, 8, 8), (1.0, 0.5))
    leaves = [t.requires_grad_() for t in x[:3]]
    torch.library.opcheck(torch.ops.distflash.attention.default, (*leaves, scheme.ticket(), None, EACH, torch.tensor(5), None))


# dropout


def mask_of(x, ranks, **options):
    """Which probabilities are kept, [B, H, S, S], read off the output: the values are a unit matrix, and all scores are 0."""
    unit = torch.eye(S, dtype=x.q.dtype)[None, :, None].expand(B, S, 2, S)
    x = x._replace(q=torch.zeros_like(x.q), v=unit.contiguous(), dout=torch.zeros(B, S, H, S, dtype=x.q.dtype))
    return on_ranks(ranks, Call(dropout_p=0.4, **options), x).out.transpose(1, 2) > 0


def test_the_same_probabilities_are_dropped_on_any_number_of_ranks_in_any_layout_and_order_by_any_kernel():
    x = inputs(S)
    expected = dropout_weights(SEED, 0.4, B, H, torch.arange(S), S) > 0
    assert torch.equal(mask_of(x, 1), expected)
    for ranks in (2, 3, 4):
        for layout in LAYOUTS:
            for order in ORDERS:
                assert torch.equal(mask_of(x, ranks, layout=layout, order=order), expected), f"{layout}, {order}, P={ranks}"
            if ranks == 4:
                assert torch.equal(mask_of(x, ranks, layout=layout, ulysses=2), expected), f"{layout}, Ulysses"
    assert torch.equal(mask_of(x, 3, kernel="reference"), expected)


def test_philox_gives_the_published_words():
    """Known answers of Random123 (kat_vectors): all bits 0, all 1, and those of pi."""
    ones, pi = [(1 << 32) - 1] * 6, [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0]
    known = {
        (2, 7): (0x257A3673, 0xAB302C4D, 0xBEDBBE6B),
        (2, 10): (0xFF1DAE59, 0x2C3F628B, 0xDD7CE038),
        (4, 10): (0x6627E8D5, 0x408F276D, 0xD16CFE09),
    }
    for (size, rounds), published in known.items():
        for words, word in zip(([0] * 6, ones, pi), published, strict=True):
            counter, key = words[:size], words[size : size + size // 2]
            assert philox(rounds, key, [torch.tensor(c) for c in counter]).item() == word
            assert philox(rounds, [torch.tensor(k) for k in key], counter).item() == word


def test_as_many_are_dropped_as_asked_for_and_none_look_alike():
    kept = dropout_weights(3, 0.3, 2, 2, torch.arange(200), 200) > 0
    assert abs(kept.double().mean() - 0.7) < 5e-3  # 4 standard deviations of 80,000 coins
    flat = kept.flatten(0, 1).flatten(1).double()
    assert (torch.corrcoef(flat) - torch.eye(4)).abs().max() < 0.03
    assert torch.equal(dropout_weights(3, 0.0, 1, 1, torch.arange(9), 9), torch.ones(1, 1, 9, 9, dtype=torch.float64))


def test_calls_differ_and_begin_anew_from_a_seed():
    x = inputs(S)

    def work(group):
        sp = distflash.SequenceParallel(group)
        seq = sp.sequence(S)
        local = [seq.shard(t) for t in x[:3]]
        sp.seed_dropout(4)
        first, second = (distflash.attention(*local, seq, dropout_p=0.5) for _ in range(2))
        sp.seed_dropout(4)
        return not torch.equal(first, second), torch.equal(first, distflash.attention(*local, seq, dropout_p=0.5))

    assert spmd(2, work) == [(True, True)] * 2


def test_without_a_seed_rank_0_says_where_to_begin_and_later_calls_send_nothing_for_it():
    def work(group):
        seq = distflash.SequenceParallel(group).sequence(S)
        first = seq.sp.seeds.draw()
        sent = sum(group.group.sent.values())
        return int(first), int(seq.sp.seeds.draw()), sum(group.group.sent.values()) - sent

    results = spmd(3, work)
    assert len(set(results)) == 1 and results[0][0] != results[0][1] and results[0][2] == 0


def layer_gradients(seq, context=None, reentrant=False, preserve=True, checkpointed=True):
    """Two layers with attention and other dropout, checkpointed: the gradient of the weights."""
    make = torch.Generator().manual_seed(5)
    x = torch.randn(1, S, 8, dtype=torch.float64, generator=make)
    weight = torch.randn(8, 24, dtype=torch.float64, generator=make, requires_grad=True)

    def layer(h):
        q, k, v = (t.unflatten(-1, (2, 4)) for t in (h @ weight).chunk(3, dim=-1))
        h = distflash.attention(q, k, v, seq, causal=True, dropout_p=0.4).flatten(-2)
        return torch.nn.functional.dropout(torch.tanh(h), 0.2)

    h = (x if seq is None else seq.shard(x)).requires_grad_()
    torch.manual_seed(6)
    for _ in range(2):
        if not checkpointed:
            h = layer(h)
        elif context:
            h = checkpoint(layer, h, use_reentrant=False, context_fn=context)
        else:
            h = checkpoint(layer, h, use_reentrant=reentrant, preserve_rng_state=preserve)
    (h**2).sum().backward()
    return weight.grad


def keep_attention(ctx, op, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if op is torch.ops.distflash.attention.default else CheckpointPolicy.PREFER_RECOMPUTE


WAYS = [{"reentrant": False}, {"reentrant": True}, {"context": partial(create_selective_checkpoint_contexts, keep_attention)}]


@pytest.mark.parametrize("way", WAYS, ids=["non-reentrant", "reentrant", "selective"])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_checkpointed_layer_drops_the_same_again(way, sharded):
    seq = distflash.SequenceParallel().sequence(S) if sharded else None

    def run(**options):
        if seq is not None:
            seq.sp.seed_dropout(7)
        return layer_gradients(seq, **options)

    assert torch.equal(run(**way), run(checkpointed=False))


def _checkpointed_ranks():
    seq = distflash.SequenceParallel(ulysses=1).sequence(S)
    grads = []
    for checkpointed in (False, True):
        seq.sp.seed_dropout(7)
        grads.append(layer_gradients(seq, checkpointed=checkpointed))
    return torch.equal(*grads)


def test_a_checkpointed_layer_drops_the_same_again_on_two_processes():
    assert spmd_processes(2, _checkpointed_ranks) == [True, True]


def test_a_checkpoint_that_does_not_keep_the_state_is_refused():
    seq = distflash.SequenceParallel().sequence(S)
    with pytest.raises(RuntimeError, match="preserve_rng_state=True"):
        layer_gradients(seq, preserve=False)


def checkpointed_calls(seq, q):
    """Two calls of a checkpointed layer in one state of torch's default generator, and what came of each."""
    for n in (1, 2):
        torch.manual_seed(7)
        yield checkpoint(lambda q, n=n: distflash.attention(n * q, q, q, seq, dropout_p=0.5), q, use_reentrant=False).square().sum()


def test_a_checkpoint_that_cannot_tell_two_calls_apart_is_refused():
    seq, q = distflash.SequenceParallel().sequence(S), inputs(S).v.requires_grad_()
    total = sum(checkpointed_calls(seq, q))
    with pytest.raises(RuntimeError, match="in the state of two calls of the forward"):
        total.backward()


def test_the_same_state_may_come_again_once_a_call_was_run_again_or_seeds_begin_anew():
    seq, q = distflash.SequenceParallel().sequence(S), inputs(S).v.requires_grad_()
    grads = []
    for _ in range(2):  # a step that is compared with itself
        seq.sp.seed_dropout(3)
        found = []
        for loss in checkpointed_calls(seq, q):
            found += torch.autograd.grad(loss, q)
        grads.append(found)
    first, second = grads
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    calls = checkpointed_calls(seq, q)
    next(calls)
    seq.sp.seed_dropout(4)
    next(calls).backward()


def test_ranks_with_other_seeds_of_dropout_are_stopped():
    x = inputs(S)

    def work(group, seed):
        sp = distflash.SequenceParallel(group)
        if seed is not None:
            sp.seed_dropout(seed)
        seq = sp.sequence(S)
        local = [seq.shard(t) for t in x[:3]]
        distflash.attention(*local, seq)  # the seed is none of its business
        with pytest.raises(Disagreement) as caught:
            distflash.attention(*local, seq, dropout_p=0.5)
        return str(caught.value).partition("\n  ")[2]

    assert spmd(2, lambda group: work(group, 1 + group.rank)) == ["seed_dropout: rank 0 says 1; rank 1 says 2"] * 2
    assert spmd(2, lambda group: work(group, None if group.rank else 3)) == ["seed_dropout: rank 0 says 3; rank 1 says not called"] * 2


@pytest.mark.parametrize("seed", [None, 3.5, "x", True])
def test_a_seed_is_an_integer(seed):
    with pytest.raises(TypeError, match=r"seed=.* must be an integer"):
        distflash.SequenceParallel.single().seed_dropout(seed)


def test_two_processes_drop_what_one_does():
    x = inputs(S)
    call = Call(causal=True, **VARIANTS["all of them"])
    truth = truth_of(call, x)
    check(whole(spmd_processes(2, partial(run_rank, call, x))), truth, truth, torch.float64)


# kernels


@pytest.mark.parametrize("variants", [("softcap",), ("alibi_slopes",), ("dropout_p",), ("softcap", "dropout_p")])
def test_kernels_that_do_not_compute_a_variant_say_so_and_auto_takes_the_next(variants, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    plain = Problem(torch.device("cuda:0"), torch.bfloat16, 4, 2, 128, 128)
    free = [name for name, reason in candidates(plain) if reason is None]
    assert free == ["hopper", "triton", "eager"]
    found = candidates(replace(plain, variants=variants))
    assert [name for name, reason in found if reason is None] == ["triton", "eager"]
    assert all(variant in dict(found)["hopper"] for variant in variants)
    for name in ("cudnn", "fa2", "fa3", "fa4"):
        reason = getattr(adapters, f"{name.capitalize()}Kernel")().supports(replace(plain, variants=variants))
        assert all(variant in reason for variant in variants), reason


def test_explain_names_the_kernel_that_would_compute_them():
    found = distflash.explain((1, S, H, 8), (1, S, 2, 8), softcap=2.0, alibi_slopes=SLOPES, dropout_p=0.1, device="cpu")
    assert found.kernel == "eager"
    with pytest.raises(ValueError, match=r"dropout_p=1\.0"):
        distflash.explain((1, S, H, 8), (1, S, 2, 8), dropout_p=1.0)


def test_eager_and_reference_agree_bit_for_bit_on_what_is_dropped():
    x = inputs(S)
    found = [attend(x._replace(v=torch.ones_like(x.v)), kernel, dropout_p=0.5).out == 0 for kernel in ("eager", "reference")]
    assert torch.equal(*found)
