"""The public call: its conventions, and every kind of bad input refused before a byte is sent."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.distributed as dist

import distflash
from distflash.launch.environment import MPI_FAMILIES
from distflash.parallel.slices import Slices
from distflash.parallel.wire.local import LocalWire
from distflash.testing import Attention, check, errors, keep_mask, oracle, spmd
from tests.schemes import inputs

S = 12
INF, NAN = float("inf"), float("nan")


def made(tokens=S, heads=4, dim=8, dtype=torch.float32, batch=2, device="cpu"):
    return torch.zeros(batch, tokens, heads, dim, dtype=dtype, device=device)


Q, K = made(), made(heads=2)
HALVES = Slices.documents([0, 6, S])
NESTED = torch.nested.nested_tensor([made()[0], made(5)[0]], layout=torch.jagged)
HALF = made(heads=2, dtype=torch.float16)


def cu(*borders, dtype=torch.int32):
    return torch.tensor(borders, dtype=dtype)


# what is wrong: (arguments, options, exception, fragments of its message: value, expectation, cure)
BAD_CALLS = {
    "heads do not divide": ((Q, made(heads=3), made(heads=3)), {}, ValueError, ["multiple of key/value heads", "4 and 3"]),
    "more key heads than query heads": ((K, Q, Q), {}, ValueError, ["multiple of key/value heads", "2 and 4"]),
    "k and v disagree in tokens": ((Q, K, made(tokens=11, heads=2)), {}, ValueError, ["k and v must agree", "(2, 11, 2, 8)"]),
    "k and v disagree in heads": ((Q, K, Q), {}, ValueError, ["k and v must agree", "(2, 12, 4, 8)"]),
    "q and k disagree in head_dim": ((Q, *[made(heads=2, dim=6)] * 2), {}, ValueError, ["batch and head_dim", "(2, 12, 2, 6)"]),
    "q and k disagree in batch": ((Q, *[made(heads=2, batch=1)] * 2), {}, ValueError, ["batch and head_dim", "(1, 12, 2, 8)"]),
    "five dimensions": ((Q[None],) * 3, {}, ValueError, ["(batch, tokens, heads, head_dim)", "(1, 2, 12, 4, 8)"]),
    "two dimensions": ((Q[0, 0],) * 3, {}, ValueError, ["(batch, tokens, heads, head_dim)", "(4, 8)"]),
    "dimensions disagree": ((Q, K[0], K[0]), {}, ValueError, ["(tokens, heads, head_dim) each", "(12, 2, 8)"]),
    "no heads": ((Q[:, :, :0], K, K), {}, ValueError, ["must not be 0", "(2, 12, 0, 8)"]),
    "no head_dim": ((Q[..., :0], K[..., :0], K), {}, ValueError, ["must not be 0", "(2, 12, 4, 0)"]),
    "an empty batch": ((Q[:0], K[:0], K[:0]), {}, ValueError, ["must not be 0", "(0, 12, 4, 8)"]),
    "integers": ((Q.int(), K.int(), K.int()), {}, TypeError, ["fp16, bf16, fp32, fp64", "torch.int32", "cast"]),
    "mixed dtypes": ((Q, HALF, HALF), {}, TypeError, ["share one dtype", "q torch.float32, k torch.float16", "cast"]),
    "v of another dtype": ((Q, K, HALF), {}, TypeError, ["share one dtype", "v torch.float16"]),
    "mixed devices": ((Q, K.to("meta"), K.to("meta")), {}, ValueError, ["on one device", "q on cpu, k on meta", "move"]),
    "a nested tensor": ((NESTED,) * 3, {}, TypeError, ["q must be a dense tensor", "nested", "values()", "cu_seqlens_q"]),
    "a sparse tensor": ((Q, K.to_sparse(), K), {}, TypeError, ["k must be a dense tensor", "torch.sparse_coo"]),
    "causal that is text": ((Q, K, K), {"causal": "false"}, TypeError, ["causal='false'", "True or False"]),
    "causal that is None": ((Q, K, K), {"causal": None}, TypeError, ["causal=None", "True or False"]),
    "determinism that is a number": ((Q, K, K), {"deterministic": 1}, TypeError, ["deterministic=1", "True or False"]),
    "lse that is a list": ((Q, K, K), {"return_lse": [True]}, TypeError, ["return_lse=[True]", "True or False"]),
    "no tensor": ((Q.numpy(), K, K), {}, TypeError, ["q must be a tensor", "ndarray"]),
    "a window of one number": ((Q, K, K), {"window_size": (3,)}, ValueError, ["window_size=(3,)", "(left, right)", "-1 (unlimited)"]),
    "a window that is a number": ((Q, K, K), {"window_size": 3}, ValueError, ["window_size=3", "two integers"]),
    "a window below -1": ((Q, K, K), {"window_size": (-2, 0)}, ValueError, ["window_size=(-2, 0)", "-1 (unlimited) or more"]),
    "a window of floats": ((Q, K, K), {"window_size": (1.0, 0.0)}, ValueError, ["window_size=(1.0, 0.0)", "two integers"]),
    "a window of None": ((Q, K, K), {"window_size": None}, ValueError, ["window_size=None", "two integers"]),
    "scale is NaN": ((Q, K, K), {"softmax_scale": NAN}, TypeError, ["softmax_scale=nan", "finite number"]),
    "scale is infinite": ((Q, K, K), {"softmax_scale": INF}, TypeError, ["softmax_scale=inf", "finite number"]),
    "scale is a tensor": ((Q, K, K), {"softmax_scale": torch.ones(2)}, TypeError, ["softmax_scale=", "finite number"]),
    "an unknown kernel": ((Q, K, K), {"kernel": "fast"}, ValueError, ["kernel='fast'", "'eager'", "'reference'"]),
    "scale with a gradient": (
        (Q, K, K),
        {"softmax_scale": torch.ones((), requires_grad=True)},
        ValueError,
        ["softmax_scale gets no gradient", "detach()"],
    ),
    "scale is a tensor of NaN": ((Q, K, K), {"softmax_scale": torch.tensor(NAN)}, TypeError, ["softmax_scale=nan", "finite number"]),
    "a softcap below 0": ((Q, K, K), {"softcap": -30.0}, ValueError, ["softcap=-30.0", "0 (off) or more"]),
    "a softcap of None": ((Q, K, K), {"softcap": None}, ValueError, ["softcap=None", "0 (off) or more"]),
    "an infinite softcap": ((Q, K, K), {"softcap": INF}, ValueError, ["softcap=inf", "finite"]),
    "slopes of another number": (
        (Q, K, K),
        {"alibi_slopes": torch.ones(3)},
        ValueError,
        ["(4,) or (2, 4)", "each query head", "got (3,)"],
    ),
    "slopes of another batch": ((Q, K, K), {"alibi_slopes": torch.ones(1, 4)}, ValueError, ["(4,) or (2, 4)", "got (1, 4)"]),
    "slopes in 16 bits": ((Q, K, K), {"alibi_slopes": torch.ones(4).half()}, TypeError, ["alibi_slopes", "torch.float32", "float16"]),
    "slopes that are a list": ((Q, K, K), {"alibi_slopes": [1.0] * 4}, TypeError, ["alibi_slopes", "torch.float32", "list"]),
    "slopes that are learned": (
        (Q, K, K),
        {"alibi_slopes": torch.ones(4, requires_grad=True)},
        ValueError,
        ["no gradient", "alibi_slopes.detach()"],
    ),
    "sinks of another number": ((Q, K, K), {"sinks": torch.ones(3)}, ValueError, ["each of the 4 query heads", "got (3,)"]),
    "sinks that are integers": ((Q, K, K), {"sinks": torch.ones(4, dtype=torch.long)}, TypeError, ["floating-point", "int64"]),
    "a sink that is a number": ((Q, K, K), {"sinks": 1.0}, TypeError, ["floating-point tensor", "float"]),
    "dropout of everything": ((Q, K, K), {"dropout_p": 1.0}, ValueError, ["dropout_p=1.0", "less than 1"]),
    "dropout below 0": ((Q, K, K), {"dropout_p": -0.1}, ValueError, ["dropout_p=-0.1", "at least 0"]),
    "dropout that is a bool": ((Q, K, K), {"dropout_p": True}, ValueError, ["dropout_p=True", "a number"]),
    "a mask that is a tensor": ((Q, K, K), {"mask": torch.ones(S, S)}, TypeError, ["distflash.Slices", "Tensor", "from_block_mask"]),
    "a mask and causal": ((Q, K, K), {"mask": HALVES, "causal": True}, ValueError, ["Slices(2 slices", "causal=True", "leave"]),
    "a mask and a window": ((Q, K, K), {"mask": HALVES, "window_size": (3, 0)}, ValueError, ["(3, 0)", "kind 'causal' or 'band'"]),
    "a mask past the end": ((Q, K, K), {"mask": Slices([((0, 4), (0, 40))])}, ValueError, ["slice 0", "k=(0, 40)", "keys", "cut it"]),
}
# only without a sequence: documents are the sequence's otherwise
BAD_DOCUMENTS = {
    "falling": ((Q, K, K), {"cu_seqlens_q": cu(0, 8, 5, S)}, ValueError, ["never decrease", "5 after 8 at index 2", "cumulative"]),
    "not from 0": ((Q, K, K), {"cu_seqlens_q": cu(1, 8, S)}, ValueError, ["start at 0", "[1, 8, 12]", "prepend 0"]),
    "below 0": ((Q, K, K), {"cu_seqlens_q": cu(0, -3, S)}, ValueError, ["never decrease", "-3 after 0"]),
    "short of the end": ((Q, K, K), {"cu_seqlens_q": cu(0, 8, 11)}, ValueError, ["cu_seqlens_q must end at", "12, got 11", "undefined"]),
    "past the end": ((Q, K, K), {"cu_seqlens_q": cu(0, 8, 13)}, ValueError, ["must end at the number of tokens", "12, got 13"]),
    "keys past the end": (
        (Q, K, K), {"cu_seqlens_q": cu(0, S), "cu_seqlens_k": cu(0, 20)}, ValueError, ["cu_seqlens_k must end at", "got 20"],
    ),
    "a single border": ((Q, K, K), {"cu_seqlens_q": cu(0)}, ValueError, ["one border more than documents", "[0]"]),
    "no border": ((Q, K, K), {"cu_seqlens_q": cu()}, ValueError, ["start at 0", "[]"]),
    "floats": ((Q, K, K), {"cu_seqlens_q": cu(0.0, 12.0, dtype=torch.float32)}, TypeError, ["int32 or int64", "torch.float32"]),
    "a matrix": ((Q, K, K), {"cu_seqlens_q": cu(0, S)[None]}, TypeError, ["1-D", "2-D"]),
    "a list of floats": ((Q, K, K), {"cu_seqlens_q": [0, 2.5, S]}, TypeError, ["cu_seqlens", "2.5"]),
    "keys alone": ((Q, K, K), {"cu_seqlens_k": cu(0, S)}, ValueError, ["cu_seqlens_k was given without cu_seqlens_q"]),
    "unequal numbers": (
        (Q, K, K), {"cu_seqlens_q": cu(0, S), "cu_seqlens_k": cu(0, 5, S)}, ValueError, ["as many documents", "1 and 2"],
    ),
    "a slice across documents": (
        (Q, K, K), {"cu_seqlens_q": cu(0, 5, S), "mask": HALVES}, ValueError, ["slice 0", "crosses a border of documents", "cut it there"],
    ),
    "no tokens at all": ((Q[:, :0], K, K), {}, ValueError, ["at least one query and one key", "0 and 12"]),
    "no keys": ((Q, K[:, :0], K[:, :0]), {}, ValueError, ["at least one query and one key", "12 and 0"]),
}  # fmt: skip
# with a sequence of 24 tokens on two ranks, 12 each
BAD_SHARDS = {
    "documents given twice": ((Q, K, K), {"cu_seqlens_q": cu(0, S)}, ValueError, ["do not go with seq", "SequenceParallel.sequence"]),
    "documents of keys": ((Q, K, K), {"cu_seqlens_k": cu(0, S)}, ValueError, ["do not go with seq", "SequenceParallel.sequence"]),
    "not sharded": ((made(24),) * 3, {}, ValueError, ["q has 24 tokens", "holds 12 of the sequence's 24", "seq.shard()"]),
    "keys not sharded": ((Q, *[made(24, heads=2)] * 2), {}, ValueError, ["k has 24 tokens", "seq.shard()"]),
}
# arguments of SequenceParallel
BAD_GROUPS = {
    "an unknown layout": ({"layout": "diagonal"}, ValueError, ["layout='diagonal'", "'zigzag'", "'striped'"]),
    "an unknown order": ({"order": "spiral"}, ValueError, ["order='spiral'", "'double_ring'"]),
    "an unknown wire": ({"wire": "string"}, ValueError, ["wire='string'", "'p2p'"]),
    "ulysses does not divide": ({"ulysses": 3}, ValueError, ["ulysses=3 must divide the 2 ranks", "[1, 2]"]),
    "ulysses of 0": ({"ulysses": 0}, ValueError, ["ulysses=0 must", "[1, 2]"]),
    "ulysses below 0": ({"ulysses": -1}, ValueError, ["ulysses=-1 must", "[1, 2]"]),
    "ulysses is no number": ({"ulysses": "two"}, TypeError, ["ulysses='two'", "integer or 'auto'"]),
    "ulysses is a bool": ({"ulysses": True}, TypeError, ["ulysses=True", "integer or 'auto'"]),
}
BAD_SEQUENCES = {
    "no length": ({}, TypeError, ["either length or cu_seqlens"]),
    "both": ({"length": 3, "cu_seqlens": [0, 3]}, TypeError, ["either length or cu_seqlens"]),
    "a length of 0": ({"length": 0}, ValueError, ["length=0", "positive integer"]),
    "a length that is no integer": ({"length": 2.0}, ValueError, ["length=2.0", "positive integer"]),
    "a length that is a tensor of floats": ({"length": torch.tensor(2.0)}, ValueError, ["length=tensor(2.)", "positive integer"]),
    "a length that is a bool": ({"length": True}, ValueError, ["length=True", "positive integer"]),
    "borders that fall": ({"cu_seqlens": [0, 5, 3]}, ValueError, ["never decrease", "3 after 5"]),
    "borders of floats": ({"cu_seqlens": [0, 2.5]}, TypeError, ["cu_seqlens", "2.5"]),
    "a mask that the layout does not look at": (
        {"length": S, "mask": HALVES},
        ValueError,
        ["'zigzag'", "layout='balanced'", "attention()"],
    ),
    "a mask that is no mask": ({"length": S, "mask": [((0, 4), (0, 4))]}, TypeError, ["distflash.Slices", "list"]),
    "borders without tokens": ({"cu_seqlens": [0, 0]}, ValueError, ["ends at 0"]),
}


@pytest.fixture
def sent(monkeypatch):
    """How many exchanges were started, by any rank."""
    count = []
    exchange = LocalWire.exchange

    def counted(self, sends, recvs):
        count.append(self.rank)
        return exchange(self, sends, recvs)

    monkeypatch.setattr(LocalWire, "exchange", counted)
    return count


def refused(call, kind, fragments):
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind, f"a {type(caught.value).__name__}: {caught.value}"
    missing = [fragment for fragment in fragments if fragment not in str(caught.value)]
    assert not missing, f"the message {str(caught.value)!r} does not say {missing}"


@pytest.mark.parametrize("case", BAD_CALLS | BAD_DOCUMENTS)
def test_a_bad_call_on_one_device_says_what_is_wrong_and_what_to_do(case):
    tensors, options, kind, fragments = (BAD_CALLS | BAD_DOCUMENTS)[case]
    refused(lambda: distflash.attention(*tensors, **options), kind, fragments)


@pytest.mark.parametrize("case", BAD_CALLS | BAD_SHARDS)
def test_a_bad_call_is_refused_on_every_rank_before_anything_is_sent(case, sent):
    tensors, options, kind, fragments = (BAD_CALLS | BAD_SHARDS)[case]

    def work(group):
        seq = distflash.SequenceParallel(group).sequence(2 * S)
        refused(lambda: distflash.attention(*tensors, seq, **options), kind, fragments)

    spmd(2, work)
    assert not sent


@pytest.mark.parametrize("case", BAD_GROUPS)
def test_a_bad_way_to_share_is_refused_on_every_rank(case, sent):
    options, kind, fragments = BAD_GROUPS[case]
    spmd(2, lambda group: refused(lambda: distflash.SequenceParallel(group, **options), kind, fragments))
    assert not sent


@pytest.mark.parametrize("case", BAD_SEQUENCES)
def test_a_bad_sequence_is_refused(case):
    options, kind, fragments = BAD_SEQUENCES[case]
    refused(lambda: distflash.SequenceParallel().sequence(**options), kind, fragments)


@pytest.mark.parametrize("group", [dist.GroupMember.NON_GROUP_MEMBER, "world", 0, object()], ids=["not a member", "str", "int", "object"])
def test_a_group_that_this_rank_is_not_in_is_refused(group):
    refused(lambda: distflash.SequenceParallel(group), TypeError, ["None, a ProcessGroup or a DeviceMesh", "belongs to"])


STARTED = {
    "torchrun": dict(TORCHELASTIC_RUN_ID="a", RANK="1", WORLD_SIZE="4", LOCAL_RANK="1", LOCAL_WORLD_SIZE="4"),
    "mpirun": dict(zip(MPI_FAMILIES[0][1:], ("1", "4", "1", "4"), strict=True)),
}


@pytest.mark.parametrize("launcher", STARTED)
def test_started_processes_without_a_group_are_told_to_make_one(launcher, monkeypatch):
    for name, value in STARTED[launcher].items():
        monkeypatch.setenv(name, value)
    refused(distflash.SequenceParallel, RuntimeError, ["4 processes were started, but there is no process group", "distflash.init()"])
    assert distflash.SequenceParallel.single().size == 1
    assert spmd(2, lambda group: distflash.SequenceParallel(group).size) == [2, 2]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert distflash.SequenceParallel().size == 1
    finally:
        dist.destroy_process_group()


def test_one_process_needs_no_group_whatever_is_left_in_the_environment(monkeypatch):
    assert distflash.SequenceParallel().size == 1
    monkeypatch.setenv("RANK", "nonsense")
    assert distflash.SequenceParallel().size == 1


@pytest.mark.parametrize("ranks, per_node, ulysses", [(3, 2, 1), (6, 3, 2), (20, 5, 2)])
def test_a_double_ring_that_hosts_cannot_form_is_refused(sent, ranks, per_node, ulysses):
    def work(group):
        fragments = ["double_ring", f"{group.size} on hosts of {group.per_node}, ulysses={ulysses}", "use ring"]
        refused(lambda: distflash.SequenceParallel(group, order="double_ring", ulysses=ulysses), ValueError, fragments)

    spmd(ranks, work, per_node=per_node)


def test_more_ulysses_ranks_than_heads_are_refused_on_every_rank(sent):
    q = torch.zeros(1, 2, 3, 8)

    def work(group):
        seq = distflash.SequenceParallel(group, ulysses=4).sequence(8)
        refused(lambda: distflash.attention(q, q, q, seq), ValueError, ["ulysses=4", "got 3", "use ulysses<=3"])

    spmd(4, work)
    assert not sent


def test_shards_of_the_wrong_length_are_refused(sent):
    def work(group):
        seq = distflash.SequenceParallel(group).sequence(7)
        refused(lambda: seq.shard(torch.zeros(2, 6)), ValueError, ["7 tokens", "dim 1", "(2, 6)"])
        refused(lambda: seq.unshard(torch.zeros(9), dim=0), ValueError, [f"{seq.local_length} tokens", "dim 0", "(9,)"])

    spmd(2, work)
    assert not sent


def test_seq_must_be_a_sequence():
    refused(
        lambda: distflash.attention(Q, K, K, distflash.SequenceParallel()),
        TypeError,
        ["SequenceParallel.sequence()", "got SequenceParallel"],
    )


def test_variants_at_their_defaults_are_no_variants():
    out = distflash.attention(Q, K, K, softcap=0, dropout_p=0, alibi_slopes=None, sinks=None, mask=None)
    assert torch.equal(out, distflash.attention(Q, K, K))


# conventions


def found_by(x, *, kernel="eager", dlse=True, **options):
    leaves = [t.detach().requires_grad_() for t in x[:3]]
    out, lse = distflash.attention(*leaves, return_lse=True, kernel=kernel, **options)
    target = (out * x.dout).sum()
    if dlse:
        target = target + (torch.where(lse > -INF, lse, 0.0) * x.dlse).sum()
    target.backward()
    return Attention(out.detach(), lse.detach(), *(leaf.grad for leaf in leaves))


def rectangle(q_len, k_len, **options):
    x, y = inputs(q_len, **options), inputs(k_len, **options)
    return x._replace(k=y.k, v=y.v)


@pytest.mark.parametrize("kernel", ["eager", "reference"])
@pytest.mark.parametrize("q_len, k_len", [(5, 9), (9, 5), (1, 7), (7, 1), (6, 6)])
@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"window_size": (2, 1)},
        {"window_size": (0, -1)},
        {"window_size": (-1, 3)},
        {"causal": True, "window_size": (3, 7)},
    ],
    ids=str,
)
def test_masks_are_aligned_at_the_last_key_and_rows_that_see_nothing_are_zero(options, q_len, k_len, kernel):
    x = rectangle(q_len, k_len)
    keep = keep_mask(q_len, k_len, **options)
    truth = oracle(x.q, x.k, x.v, x.dout, keep, dlse=x.dlse)
    found = found_by(x, kernel=kernel, **options)
    check(found, truth, truth, torch.float64)
    blind = ~keep.any(1)
    assert (found.out[:, blind] == 0).all() and (found.lse[:, :, blind] == -INF).all() and (found.dq[:, blind] == 0).all()


@pytest.mark.parametrize("causal", [False, True])
def test_packed_documents_of_queries_and_keys_equal_separate_calls(causal):
    cu_q, cu_k = (0, 3, 3, 8, 9, 12), (0, 5, 7, 7, 8, 10)  # some without queries, some without keys, some with more of either
    x = rectangle(12, 10)
    whole = found_by(x, causal=causal, cu_seqlens_q=cu(*cu_q), cu_seqlens_k=cu(*cu_k))
    keep = keep_mask(12, 10, causal=causal, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    truth = oracle(x.q, x.k, x.v, x.dout, keep, dlse=x.dlse)
    check(whole, truth, truth, torch.float64)
    for (q0, q1), (k0, k1) in zip(pairwise(cu_q), pairwise(cu_k), strict=True):
        if q0 < q1 and k0 < k1:
            out, lse = distflash.attention(x.q[:, q0:q1], x.k[:, k0:k1], x.v[:, k0:k1], causal=causal, return_lse=True)
            assert (whole.out[:, q0:q1] - out).abs().max() < 1e-13
            assert torch.allclose(whole.lse[:, :, q0:q1], lse, rtol=1e-13)


def test_without_a_batch_dimension_results_have_none_either():
    x = inputs(S)
    out, lse = distflash.attention(x.q[0], x.k[0], x.v[0], causal=True, return_lse=True, cu_seqlens_q=cu(0, 5, S))
    batched, batched_lse = distflash.attention(x.q, x.k, x.v, causal=True, return_lse=True, cu_seqlens_q=cu(0, 5, S))
    assert out.shape == (S, 4, 8) and lse.shape == (4, S)
    assert torch.equal(out, batched[0]) and torch.equal(lse, batched_lse[0])

    def work(group):
        seq = distflash.SequenceParallel(group).sequence(S)
        local, local_lse = distflash.attention(*(seq.shard(t[0], dim=0) for t in x[:3]), seq, return_lse=True)
        return local.shape == (seq.local_length, 4, 8) and local_lse.shape == (4, seq.local_length)

    assert all(spmd(2, work))


def test_lse_is_the_natural_log_of_the_sum_of_exponentials_in_fp32():
    x = inputs(S, dtype=torch.bfloat16)
    _, lse = distflash.attention(*x[:3], return_lse=True, softmax_scale=0.5)
    scores = 0.5 * torch.einsum("bihd,bjhd->bhij", x.q.double(), x.k.double().repeat_interleave(2, 2))
    assert lse.dtype == torch.float32 and lse.shape == (2, 4, S)
    assert (lse - scores.exp().sum(-1).log()).abs().max() < 1e-5


def test_query_head_h_reads_key_head_h_over_the_group():
    x = inputs(S, heads=6, kv_heads=3)
    out = distflash.attention(*x[:3])
    for h in range(6):
        alone = distflash.attention(x.q[:, :, h : h + 1], x.k[:, :, h // 2 : h // 2 + 1], x.v[:, :, h // 2 : h // 2 + 1])
        assert (out[:, :, h : h + 1] - alone).abs().max() < 1e-14, h


def test_the_scale_is_one_over_the_root_of_head_dim_unless_given():
    q, k, v = inputs(S, dim=16, v_dim=4)[:3]
    assert torch.equal(distflash.attention(q, k, v), distflash.attention(q, k, v, softmax_scale=0.25))


def test_a_scale_may_be_a_tensor_without_dimensions():
    x = inputs(S)
    expected = distflash.attention(*x[:3], softmax_scale=0.5)
    for scale in (torch.tensor(0.5), torch.tensor(0.5, dtype=torch.float64)):
        assert torch.equal(distflash.attention(*x[:3], softmax_scale=scale), expected)
    assert torch.equal(distflash.attention(*x[:3], softmax_scale=torch.tensor(2)), distflash.attention(*x[:3], softmax_scale=2))


def test_numbers_of_numpy_are_numbers():
    x = inputs(S, dtype=torch.float32)
    given = {"softmax_scale": np.float32(0.5), "softcap": np.float32(2.0), "dropout_p": np.float32(0.0), "window_size": (np.int64(3), 0)}
    plain = {"softmax_scale": 0.5, "softcap": 2.0, "window_size": (3, 0)}
    assert torch.equal(distflash.attention(*x[:3], **given), distflash.attention(*x[:3], **plain))

    def work(group):  # and alike
        seq = distflash.SequenceParallel(group).sequence(S)
        return distflash.attention(*(seq.shard(t) for t in x[:3]), seq, **(given if group.rank else plain))

    spmd(2, work)


def test_a_window_is_never_dropped_by_any_scheme():
    x = inputs(40)
    for window in ((3, -1), (-1, 2), (5, 1), (0, 0)):
        for causal in (False, True):
            keep = keep_mask(40, 40, causal=causal, window_size=window)
            truth = oracle(x.q, x.k, x.v, x.dout, keep, dlse=x.dlse)
            broken = errors(found_by(x, causal=causal, window_size=window), truth, truth, torch.float64)
            assert not broken, f"window {window}, causal {causal}: {broken}"


def test_calls_that_ask_for_determinism_are_bit_equal():
    x = inputs(S, dtype=torch.bfloat16)
    first, second = (found_by(x, deterministic=True, causal=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_borders_may_be_int32_int64_or_a_list():
    x = inputs(S)
    given = [cu(0, 5, S), cu(0, 5, S, dtype=torch.int64), [0, 5, S]]
    outs = [distflash.attention(*x[:3], cu_seqlens_q=borders) for borders in given]
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
