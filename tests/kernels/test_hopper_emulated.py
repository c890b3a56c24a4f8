"""The Hopper backward's own source, kernels and host side, run on a CPU by gluon_on_cpu against fp64 dense attention: what it computes,
and that no barrier, buffer or copy is used in an order that only luck keeps right."""

import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from distflash import testing
from distflash.kernels.reference import ReferenceKernel
from distflash.parallel.mask import Mask, packed
from distflash.tile import Band, Tile, Tiles
from tests.kernels import gluon_on_cpu

FAR = 1 << 20
TABLES = {
    "causal": packed((0, 200), (0, 200), Mask(right=0)),
    "full": Tiles((Tile.whole(slice(0, 128), slice(0, 300)),), 128, 300),
    "window": packed((0, 333), (0, 333), Mask(left=90, right=35)),
    "documents": packed((0, 1, 131, 208, 270), (0, 1, 131, 208, 270), Mask(right=0)),
    "empty rows": packed((0, 300), (0, 200), Mask(right=0)),
    "idle rows": Tiles((Tile(slice(130, 290), slice(7, 222), Band(-FAR, FAR)),), 400, 300),
    "two entries": Tiles(
        (Tile(slice(0, 320), slice(0, 190), Band(-FAR, FAR)), Tile(slice(64, 320), slice(250, 500), Band(-FAR, 20))), 320, 512
    ),
    "one pair": Tiles((Tile.whole(slice(0, 1), slice(0, 1)),), 1, 1),
}
BUDGET = {torch.bfloat16: 4e-3, torch.float16: 6e-4}


def inputs(tiles: Tiles, head_dim: int, v_head_dim: int, dtype: torch.dtype, heads: int = 4, kv_heads: int = 2, batch: int = 1):
    generator = torch.Generator().manual_seed(head_dim)
    draw = lambda *shape: torch.randn(batch, *shape, generator=generator).to(dtype)  # noqa: E731
    q, k = draw(tiles.q_len, heads, head_dim), draw(tiles.kv_len, kv_heads, head_dim)
    return q, k, draw(tiles.kv_len, kv_heads, v_head_dim), draw(tiles.q_len, heads, v_head_dim)


def truth(q, k, v, dout, tiles: Tiles, scale: float):
    """lse and delta in fp32, and the gradients in fp64."""
    kernel = ReferenceKernel()
    q, k, v, dout = (x.double() for x in (q, k, v, dout))
    out, lse = kernel.forward(q, k, v, tiles, scale)
    delta = kernel.delta(out, dout)
    return lse.float(), delta.float(), kernel.backward(dout, q, k, v, lse, delta, tiles, scale)


def backward(q, k, v, dout, lse, delta, tiles, scale, *, deterministic, variant=None, seed=0, programs=132, grids=None, **options):
    """`programs` run at a time; grids: a list that gets those of all launches."""
    with gluon_on_cpu.gradients(seed, programs) as gradients:
        if grids is not None:
            launch = gradients.launch
            gradients.launch = lambda kernel, grid, *args, **more: (grids.append(grid), launch(kernel, grid, *args, **more))
        configs = sys.modules["distflash.kernels.hopper.configs"]
        sides = configs.fit(configs.BACKWARD, q.shape[-1], v.shape[-1])
        config = configs.BACKWARD_VARIANTS[sides][variant] if variant else configs.BACKWARD[sides]
        config = replace(config, one_pass=None) if deterministic else config
        return gradients.backward(config, sides, dout, q, k, v, lse, delta, tiles, scale, **options)


def judge(found, want, dtype):
    for x, y, name in zip(found, want, ("dq", "dk", "dv"), strict=True):
        assert x.shape == y.shape and x.is_contiguous() and torch.isfinite(x).all(), name
        assert (x.double() - y).norm() <= BUDGET[dtype] * y.norm().clamp(min=1e-2), name
        slope, chance = testing._scale(x.double(), y) if y.norm() > 1e-2 else (1.0, 0.0)
        assert abs(slope - 1) <= 4 * chance, f"{name}: scale {slope:.6f}, expected 1: roundings go one way"
        assert (x[y == 0] == 0).all() or x[y == 0].abs().max() < 1e-5, name  # where nothing is seen, nothing is written but zeros


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize(("head_dim", "deterministic"), [(64, False), (64, True), (256, True)])
def test_every_kind_of_mask(head_dim, deterministic, table):
    tiles, scale = TABLES[table], head_dim**-0.5
    tensors = inputs(tiles, head_dim, head_dim, torch.bfloat16)
    lse, delta, want = truth(*tensors, tiles, scale)
    judge(backward(*tensors, lse, delta, tiles, scale, deterministic=deterministic), want, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("head_dim", "v_head_dim", "deterministic"),
    [(128, 128, False), (128, 128, True), (80, 80, False), (96, 96, True), (59, 59, False), (33, 20, True), (48, 64, False),
     (192, 128, True), (192, 192, True), (200, 72, True)],
)  # fmt: skip
def test_every_head_size_with_a_running_dq(head_dim, v_head_dim, deterministic, dtype):
    tiles, scale = TABLES["empty rows"], head_dim**-0.5
    tensors = inputs(tiles, head_dim, v_head_dim, dtype)
    lse, delta, (dq, dk, dv) = truth(*tensors, tiles, scale)
    before = torch.randn(dq.shape, generator=torch.Generator().manual_seed(1))
    found = backward(*tensors, lse, delta, tiles, scale, deterministic=deterministic, dq=before.clone(), dkv_dtype=dtype)
    assert [x.dtype for x in found] == [torch.float32, dtype, dtype]
    assert torch.equal(found[0][:, :100], before[:, :100])  # queries that see no key
    judge((found[0] - before, *found[1:]), (dq, dk, dv), dtype)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_two_passes_are_bit_equal_whatever_comes_first(head_dim):
    tiles, scale = TABLES["causal"], head_dim**-0.5
    tensors = inputs(tiles, head_dim, head_dim, torch.bfloat16, heads=2, kv_heads=1, batch=2)
    lse, delta, _ = truth(*tensors, tiles, scale)
    first = backward(*tensors, lse, delta, tiles, scale, deterministic=True, dq_dtype=torch.bfloat16)
    assert first[0].dtype == torch.bfloat16
    for seed in (100, 200):
        again = backward(*tensors, lse, delta, tiles, scale, deterministic=True, dq_dtype=torch.bfloat16, seed=seed)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(("head_dim", "deterministic"), [(64, False), (64, True), (128, False), (256, True)])
def test_a_nan_stays_in_its_batch_element(head_dim, deterministic):
    """The last tile of queries passes the end of the sequence, where the statistics of the next line would begin."""
    tiles, scale = packed((0, 100), (0, 100), Mask(right=0)), head_dim**-0.5
    tensors = inputs(tiles, head_dim, head_dim, torch.bfloat16, heads=1, kv_heads=1, batch=2)
    lse, delta, want = truth(*tensors, tiles, scale)
    poisoned = delta.clone()
    poisoned[1, 0] = float("nan")
    found = backward(*tensors, lse, poisoned, tiles, scale, deterministic=deterministic)
    judge([x[:1] for x in found], [x[:1] for x in want], torch.bfloat16)


@pytest.mark.parametrize(
    ("q", "kv", "batch", "heads", "kv_heads", "head_dim", "programs", "grids"),
    [
        ((0, 512), (0, 200), 3, 8, 2, 64, 5, [(10,), (4,)]),  # 2 blocks, the second a short one; 2 pieces of the last's two heads
        ((100, 612), (60, 460), 1, 8, 2, 128, 7, [(7,), (2,)]),  # one head of two; what lies around the rectangle is left alone
        ((0, 512), (0, 640), 1, 8, 2, 33, 4, [(8,), (4,)]),  # lines that TMA reads of a copy
        ((0, 500), (0, 200), 2, 8, 2, 64, 3, [(8,)]),  # no pieces of whole tiles
        ((0, 256), (0, 200), 2, 8, 2, 64, 3, [(8,)]),  # too short
    ],
    ids=["short last block", "inside", "copied lines", "no pieces", "short"],
)  # fmt: skip
def test_the_last_round_of_a_rectangle_is_split_by_queries(q, kv, batch, heads, kv_heads, head_dim, programs, grids):
    tiles = Tiles((Tile.whole(slice(*q), slice(*kv)),), q[1] + 30, kv[1] + 20)
    scale, found = head_dim**-0.5, []
    tensors = inputs(tiles, head_dim, head_dim, torch.bfloat16, heads, kv_heads, batch)
    lse, delta, want = truth(*tensors, tiles, scale)
    for dtype in (torch.bfloat16, torch.float32):
        grads = backward(
            *tensors, lse, delta, tiles, scale, deterministic=False, programs=programs, grids=found, dq_dtype=dtype, dkv_dtype=dtype
        )
        judge(grads, want, torch.bfloat16)
    assert [grid for grid in found if len(grid) == 1] == 2 * grids  # the statistics' have two dimensions


@pytest.mark.parametrize("scale", [-0.125, 0.0])
def test_scales_that_are_not_positive(scale):
    tiles = TABLES["causal"]
    tensors = inputs(tiles, 64, 64, torch.bfloat16)
    lse, delta, want = truth(*tensors, tiles, scale)
    for deterministic in (False, True):
        before = torch.ones(want[0].shape)
        dq, dk, dv = backward(*tensors, lse, delta, tiles, scale, deterministic=deterministic, dq=before)
        judge((dq - 1, dk, dv), want, torch.bfloat16)


@pytest.mark.parametrize(
    ("head_dim", "variant"),
    [(64, "kv_in_memory"), (64, "simple"), (64, "nb4"), (128, "early"),
     (64, "prompt"), (64, "named"), (64, "named_early"), (64, "named_simple"), (128, "prompt"), (128, "prompt_early"),
     (128, "named"),
     (64, "staged"), (64, "late"), (128, "late"), (128, "staged"), (128, "overlap_named"), (64, "k_in_registers"), (128, "two_hide")],
)  # fmt: skip
def test_variants_of_the_one_pass(head_dim, variant):
    tiles, scale = TABLES["documents"], head_dim**-0.5
    tensors = inputs(tiles, head_dim, head_dim, torch.bfloat16)
    lse, delta, want = truth(*tensors, tiles, scale)
    options = {"variant": variant, "seed": 3, "dkv_dtype": torch.bfloat16}  # as staged ones must have it
    judge(backward(*tensors, lse, delta, tiles, scale, deterministic=False, **options), want, torch.bfloat16)
