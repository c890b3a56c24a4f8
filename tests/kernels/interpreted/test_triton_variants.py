"""Softcap, ALiBi and dropout in the Triton kernels: equal to the fp64 oracle, the dropped probabilities bit for bit.

Legend: B batch, Tq / Tk local queries / keys, H query heads, Hk key/value heads, D / Dv head dims.
"""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from cases import KERNEL, Case, assert_close, banded, causal, documents, full, keeps

from distflash import testing
from distflash.kernels.base import Dropout, Scores
from distflash.kernels.eager import EagerKernel
from distflash.kernels.scores import weights
from distflash.kernels.triton.configs import PASSES, Config
from distflash.kernels.triton.kernel import TritonKernel
from distflash.testing import Attention, Variants
from distflash.tile import Tile, Tiles

bf16, fp32 = torch.bfloat16, torch.float32
SEED = 0x123456789ABCDEF0
SLOPES = torch.tensor([[0.5, 0.1], [0.3, 0.0]])
ALL = {"softcap": 2.0, "slopes": SLOPES, "p": 0.3}
CASES = [
    (Case("softcap", causal(70, 70), B=2, H=2, Hk=1, D=32), {"softcap": 1.5}),
    (Case("a large softcap", causal(70, 70), B=2, H=2, Hk=1, D=32), {"softcap": 1e4}),
    (Case("ALiBi", causal(90, 130), B=2, H=2, Hk=2, D=24), {"slopes": SLOPES}),
    (Case("ALiBi both ways", full(65, 130), B=2, H=2, Hk=1, D=16), {"slopes": SLOPES}),
    (Case("dropout", full(70, 129), B=2, H=2, Hk=1, D=16), {"p": 0.4}),
    (Case("all, causal", causal(130, 129), B=2, H=2, Hk=1, D=24, Dv=40), ALL),
    (Case("all, a band", banded(70, 100, -20, 30), B=2, H=2, Hk=1, D=16), ALL),
    (Case("all, documents", documents(0, 7, 90, 131), B=2, H=2, Hk=1, D=16), ALL),
    (Case("all, one token", full(1, 1), B=2, H=2, Hk=1, D=16), ALL),
    (Case("all, more keys than queries in no tile", Tiles((Tile.whole(slice(10, 50), slice(20, 70)),), 80, 110), B=2, H=2, Hk=1), ALL),
    (Case("all, a scale below 0", causal(70, 70), B=2, H=2, Hk=1, D=32, scale=-0.7), ALL),
    (Case("all, a scale of 0", causal(30, 30), B=2, H=2, Hk=1, D=32, scale=0.0), ALL),
    (Case("all, 16 bits", causal(90, 130), B=2, H=2, Hk=1, D=64, dtype=bf16), ALL),
    (Case("all, fp16", full(90, 65), B=2, H=2, Hk=1, D=64, dtype=torch.float16), ALL),
]


def asked(case, softcap=0.0, slopes=None, p=0.0, head=0, q_at=None, k_at=None):
    Tq, Tk = case.tiles.q_len, case.tiles.kv_len
    q_at = torch.arange(Tk - Tq, Tk, dtype=torch.int32) if q_at is None else q_at
    k_at = torch.arange(Tk, dtype=torch.int32) if k_at is None else k_at
    return Scores(q_at, k_at, softcap, slopes, Dropout(p, SEED, head) if p else None)


def computed(case, scores, q, k, v, dout, kernel=KERNEL):
    scale = case.softmax_scale
    out, lse = kernel.forward(q, k, v, case.tiles, scale, scores=scores)
    delta = kernel.delta(out, dout)
    return Attention(out, lse, *kernel.backward(dout, q, k, v, lse, delta, case.tiles, scale, scores=scores))


def oracle(case, q, k, v, dout, softcap=0.0, slopes=None, p=0.0):
    return testing.oracle(q, k, v, dout, keeps(case.tiles), scale=case.softmax_scale, variants=Variants(softcap, slopes, p, SEED))


@pytest.mark.parametrize("case, options", CASES, ids=[case.name for case, _ in CASES])
def test_forward_and_gradients_equal_the_oracle(case, options):
    tensors = case.tensors()
    assert_close(case, computed(case, asked(case, **options), *tensors), oracle(case, *tensors, **options))


@pytest.mark.parametrize("boxes", [0, 1, 2])
def test_other_tile_sizes_and_ways_to_load_give_the_same_answer(boxes):
    kernel = TritonKernel({name: Config(32, 32, 4, 1, boxes, overlap=True) for name in PASSES})
    case, options = Case("small tiles", banded(40, 75, -20, 30), H=2, D=24), {**ALL, "slopes": SLOPES[:1]}
    tensors = case.tensors()
    assert_close(case, computed(case, asked(case, **options), *tensors, kernel=kernel), oracle(case, *tensors, **options))


@pytest.mark.parametrize("size", [100.0, 1e4])
def test_large_scores_saturate_and_stay_finite(size):
    case = Case("large", causal(70, 70), D=16)
    q, k, v, dout = case.tensors()
    found = computed(case, asked(case, softcap=5.0), size * q, k, v, dout)
    assert all(torch.isfinite(t).all() for t in found)
    eager = computed(case, asked(case, softcap=5.0), size * q, k, v, dout, kernel=EagerKernel())
    assert (found.out - eager.out).norm() < 1e-3 * eager.out.norm()


def test_the_derivative_of_softcap_is_exact_where_all_scores_saturate():
    case = Case("saturated", full(40, 40), D=16)
    q, k, v, dout = (t.abs() + 0.5 if n < 2 else t for n, t in enumerate(case.tensors()))
    true = oracle(case, q, k, v, dout, softcap=0.6)
    found = computed(case, asked(case, softcap=0.6), q, k, v, dout)
    assert true.dq.norm() < 1e-2 * true.dv.norm()  # 1 - tanh² is about 1e-3 everywhere
    for name in ("dq", "dk"):
        assert (getattr(found, name) - getattr(true, name)).norm() < 1e-4 * getattr(true, name).norm()


@pytest.mark.parametrize("step", [1, 3])
def test_visits_of_keys_that_lie_anywhere_equal_one_and_heads_count_from_the_first(step):
    """What a ring does: keys in several blocks, each with its own positions; the heads of a Ulysses rank."""
    case = Case("visits", full(40, 90), B=2, H=2, Hk=1, D=16)
    q, k, v, dout = case.tensors()
    head = 3
    whole = asked(case, **ALL, head=head)
    eager = computed(case, whole, q, k, v, dout, kernel=EagerKernel())
    order = torch.cat([torch.arange(start, 90, step) for start in range(step)])
    acc, scale, blocks = None, case.softmax_scale, [order[a:b] for a, b in pairwise((0, 41, 60, 90))]
    parts = [(k[:, at], v[:, at], full(40, len(at)), replace(whole, k_positions=at.to(torch.int32))) for at in blocks]
    for k_b, v_b, tiles, scores in parts:
        acc = KERNEL.forward(q, k_b, v_b, tiles, scale, acc=acc, scores=scores)
    delta, dq, dkv = KERNEL.delta(acc.out, dout), None, []
    for k_b, v_b, tiles, scores in parts:
        dq, *rest = KERNEL.backward(dout, q, k_b, v_b, acc.lse, delta, tiles, scale, dq=dq, scores=scores)
        dkv.append(rest)
    back = torch.argsort(order)
    dk, dv = (torch.cat(list(parts), 1)[:, back] for parts in zip(*dkv, strict=True))
    assert_close(case, Attention(acc.out, acc.lse, dq, dk, dv), Attention(*(t.double() for t in eager)))


@pytest.mark.parametrize("transposed", [False, True])
def test_the_dropped_probabilities_are_those_of_the_pytorch_kernels_bit_for_bit(transposed):
    """Read off the output, and off the gradient of v, which the kernel with rows of keys computes."""
    case = Case("bits", full(50, 64), B=2, H=4, Hk=4, D=16, Dv=64)
    q, k, _, _ = case.tensors()
    q_at, k_at = (torch.arange(start, start + n, dtype=torch.int32) for start, n in ((-20, 50), (1 << 30, 64)))
    scores = asked(case, p=0.4, head=5, q_at=q_at, k_at=k_at)
    expected = weights(torch.zeros(2, 4, 50, 64), scores, slice(None), slice(None)) > 0
    q = torch.zeros_like(q)
    if transposed:
        dout = torch.eye(50, 64)[None, :, None].expand(2, 50, 4, 64).contiguous()
        v = torch.zeros(2, 64, 4, 64)
        found = computed(case, scores, q, k, v, dout).dv[..., :50].permute(0, 2, 3, 1) > 0  # dv[j, i] = weight of (i, j)
    else:
        v = torch.eye(64)[None, :, None].expand(2, 64, 4, 64).contiguous()
        found = KERNEL.forward(q, k, v, case.tiles, 1.0, scores=scores).out.transpose(1, 2) > 0
    assert torch.equal(found, expected)


def test_the_largest_probability_of_a_row_is_not_rounded_after_it_grows():
    """1 / (1 - p) has more than the 8 bits of bf16 here: rounded, it is 0.2 % too large, in every row the same way."""
    case, p = Case("a key a row", documents(*range(51)), D=16, dtype=bf16), 0.25
    q, k, v, dout = case.tensors()
    scores = asked(case, p=p)
    found = computed(case, scores, q, k, v, dout)
    kept = weights(torch.zeros(1, case.H, 50, 50), scores, slice(None), slice(None)).diagonal(dim1=2, dim2=3).mT[..., None]
    assert 0 < kept.count_nonzero() < kept.numel()
    for x, y in ((found.out, kept * v.float()), (found.dv, kept * dout.float())):
        assert torch.allclose(x, y, rtol=1e-6, atol=0)


@pytest.mark.parametrize("p", [1 - 2.0**-33, 1 - 2.0**-50])
def test_a_p_next_to_1_drops_all(p):
    case = Case("nearly 1", full(40, 64), D=16)
    found = computed(case, asked(case, p=p), *case.tensors())
    assert not found.out.any() and not found.dv.any()
