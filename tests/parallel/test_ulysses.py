"""Heads that do not divide, and fewer key/value heads than ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distflash.parallel.ulysses import head_shards
from distflash.testing import check, errors
from tests.schemes import Call, inputs, on_ranks, truth_of


@given(groups=st.integers(1, 8), group=st.integers(1, 8), ranks=st.integers(1, 8))
def test_heads_are_dealt_out_in_order_with_the_key_heads_that_they_read(groups, group, ranks):
    heads = groups * group
    if heads < ranks:
        with pytest.raises(ValueError, match=f"ulysses={ranks} needs at least as many query heads, got {heads}"):
            head_shards(heads, groups, ranks)
        return
    q, kv = head_shards(heads, groups, ranks)
    assert [h for shard in q for h in shard] == list(range(heads)), "every query head once, in order"
    assert sorted({h for shard in kv for h in shard}) == list(range(groups)), "every key/value head somewhere"
    for mine, read in zip(q, kv, strict=True):
        assert len(mine) and len(mine) % len(read) == 0, "a rank's own heads are evenly grouped"
        assert [read[n // (len(mine) // len(read))] for n in range(len(mine))] == [h // group for h in mine], "h reads h // group"


@pytest.mark.parametrize(
    "heads, kv_heads, ranks, ulysses",
    [(6, 6, 4, 4), (6, 3, 4, 2), (4, 2, 4, 4), (8, 2, 4, 4), (6, 2, 3, 3), (6, 3, 2, 2), (5, 1, 4, 4), (9, 3, 4, 2), (7, 7, 6, 3)],
)
@pytest.mark.parametrize("layout", ["zigzag", "striped"])
def test_uneven_and_shared_heads_give_the_gradients_of_dense_attention(heads, kv_heads, ranks, ulysses, layout):
    x = inputs(29, heads=heads, kv_heads=kv_heads, dim=4, v_dim=3)
    for mask in ({"causal": True}, {"window_size": (3, 4), "documents": (0, 1, 1, 20, 29)}):
        call = Call(layout, ulysses=ulysses, **mask)
        truth = truth_of(call, x)
        broken = errors(on_ranks(ranks, call, x), truth, truth, torch.float64)
        assert not broken, f"{call}, {heads}/{kv_heads} heads on {ranks} ranks: {broken}"


def test_shared_key_heads_are_summed_in_fp32():
    x = inputs(96, batch=1, heads=16, kv_heads=1, dim=64, dtype=torch.bfloat16)
    call = Call(ulysses=8, causal=True, kernel="eager")
    truth, low = truth_of(call, x), truth_of(call, x, torch.bfloat16)
    found, one = on_ranks(8, call, x), on_ranks(1, call._replace(ulysses=1), x)
    check(found, truth, low, torch.bfloat16)
    for name in ("dk", "dv"):
        many, single = ((getattr(f, name).double() - getattr(truth, name)).norm() for f in (found, one))
        assert many <= 1.10 * single, f"{name}: 8 ranks err {many:.3e}, one {single:.3e}"


def test_empty_shards_take_part_in_the_all_to_all():
    for tokens in (1, 2, 3):
        x = inputs(tokens)
        call = Call(ulysses=4, causal=True)
        check(on_ranks(4, call, x), truth_of(call, x), truth_of(call, x), torch.float64)
