"""Padded batches as packed documents: equal to dense attention with a key padding mask, and nothing for padding."""

from __future__ import annotations

import pytest
import torch

import distflash
from distflash.testing import dense, spmd
from tests.schemes import inputs

B, S = 4, 11
LENGTHS = (7, 0, 11, 1)
RIGHT = torch.arange(S) < torch.tensor(LENGTHS)[:, None]


def dense_rows(x, mask, causal):
    """Each row alone, by the definition: tokens see tokens of their row; padding is 0."""
    out = torch.zeros(B, S, 4, 8, dtype=torch.float64)
    for n in range(B):
        at = mask[n].nonzero().squeeze(1)
        keep = torch.ones(len(at), len(at), dtype=torch.bool)
        q, k, v = (t[n : n + 1, at] for t in x[:3])
        out[n, at] = dense(q, k, v, keep.tril() if causal else keep)[0][0]
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [RIGHT, RIGHT.flip(1), RIGHT.long()], ids=["right", "left", "0 and 1"])
def test_attention_over_the_tokens_is_that_of_each_row_and_padding_is_0(mask, causal):
    x, batch = inputs(S, batch=B), distflash.Ragged(mask)
    leaves = [t.detach().requires_grad_() for t in x[:3]]
    found = batch.pad(distflash.attention(*map(batch.pack, leaves), causal=causal, cu_seqlens_q=batch.cu_seqlens))
    assert (found - dense_rows(x, mask.bool(), causal)).abs().max() < 1e-13
    assert batch.cu_seqlens.tolist() == [0, 7, 7, 18, 19] and batch.cu_seqlens.dtype == torch.int32
    (found * x.dout).sum().backward()
    true = [t.detach().requires_grad_() for t in x[:3]]
    (dense_rows(true, mask.bool(), causal) * x.dout).sum().backward()
    for a, b in zip(leaves, true, strict=True):
        assert (a.grad - b.grad).abs().max() < 1e-13 and not a.grad[~mask.bool()].any()


def test_keys_may_be_padded_otherwise_than_queries():
    x, queries, keys = inputs(S, batch=B), distflash.Ragged(RIGHT), distflash.Ragged(RIGHT.flip(0))
    q, k, v = queries.pack(x.q), keys.pack(x.k), keys.pack(x.v)
    out = queries.pad(distflash.attention(q, k, v, cu_seqlens_q=queries.cu_seqlens, cu_seqlens_k=keys.cu_seqlens))
    for n in range(B):
        i, j = LENGTHS[n], LENGTHS[::-1][n]
        alone = dense(x.q[n : n + 1, :i], x.k[n : n + 1, :j], x.v[n : n + 1, :j], torch.ones(i, j, dtype=torch.bool))[0]
        assert torch.allclose(out[n : n + 1, :i], alone, atol=1e-13) and not out[n, i:].any()


def test_over_ranks_the_packed_tensors_are_sharded():
    x, batch = inputs(S, batch=B), distflash.Ragged(RIGHT)

    def work(group):
        seq = distflash.SequenceParallel(group).sequence(cu_seqlens=batch.cu_seqlens)
        local = [seq.shard(batch.pack(t), dim=0) for t in x[:3]]
        return batch.pad(seq.unshard(distflash.attention(*local, seq, causal=True), dim=0))

    for found in spmd(3, work):
        assert (found - dense_rows(x, RIGHT, True)).abs().max() < 1e-13


def test_pack_and_pad_are_inverse_and_keep_other_dimensions():
    batch = distflash.Ragged(RIGHT)
    x = torch.randn(B, S, 3, 5)
    assert batch.pack(x).shape == (19, 3, 5)
    assert torch.equal(batch.pad(batch.pack(x)), torch.where(RIGHT[..., None, None], x, 0.0))
    labels = torch.randint(9, (B, S))
    assert torch.equal(batch.pack(labels), labels[RIGHT])


BAD = {
    "additive": (torch.zeros(2, 3), TypeError, ["(2, 3) of torch.float32", "True at tokens"]),
    "four dimensions": (torch.ones(2, 1, 3, 3, dtype=torch.bool), TypeError, ["(batch, tokens)", "(2, 1, 3, 3)"]),
    "a list": ([[1]], TypeError, ["list"]),
    "segment numbers": (torch.tensor([[0, 1, 2]]), ValueError, ["0 and 1 only", "got 2"]),
    "a gap": (torch.tensor([[1, 1], [0, 1], [1, 1]]).repeat(1, 2), ValueError, ["row 1", "between its tokens"]),
    "nothing": (torch.zeros(2, 3, dtype=torch.bool), ValueError, ["(2, 3)", "no token"]),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_padding_mask_is_refused(case):
    mask, kind, fragments = BAD[case]
    with pytest.raises(kind) as caught:
        distflash.Ragged(mask)
    assert all(fragment in str(caught.value) for fragment in fragments), caught.value


def test_tensors_of_another_shape_are_refused():
    batch = distflash.Ragged(RIGHT)
    with pytest.raises(ValueError, match=r"\(4, 11\)"):
        batch.pack(torch.zeros(4, 10, 2))
    with pytest.raises(ValueError, match="19 tokens"):
        batch.pad(torch.zeros(18, 2))
