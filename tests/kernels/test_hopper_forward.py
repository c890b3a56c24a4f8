"""The Hopper forward's own source, kernel and host side, run on a CPU by gluon_on_cpu against fp64 dense attention: every mask, head size
and way to store, and that no barrier, buffer or copy is used in an order that only luck keeps right."""

import sys

import pytest
import torch

pytest.importorskip("triton")

from distflash import testing
from distflash.kernels.base import Partial
from distflash.kernels.reference import ReferenceKernel
from distflash.parallel.mask import Mask, packed
from distflash.tile import Band, Tile, Tiles
from tests.kernels import gluon_on_cpu
from tests.kernels.test_hopper_emulated import BUDGET, TABLES, inputs


def forward(q, k, v, tiles, scale, *, variant=None, seed=0, programs=3, **options):
    with gluon_on_cpu.emulated("host", seed, programs) as host:
        configs = sys.modules["distflash.kernels.hopper.configs"]
        chosen = dict(configs.FORWARD)
        if variant:
            sides = configs.fit(chosen, q.shape[-1], v.shape[-1])
            chosen[sides] = configs.FORWARD_VARIANTS[sides][variant]
        return host.HopperKernel(chosen).forward(q, k, v, tiles, scale, **options)


def judge(found, q, k, v, tiles, scale, dtype, before=None):
    q, k, v = (x.double() for x in (q, k, v))
    before = Partial(*(x.double() for x in before)) if before else None
    out, lse = ReferenceKernel().forward(q, k, v, tiles, scale, acc=before)
    assert found.out.shape == out.shape and found.out.is_contiguous() and found.lse.dtype == torch.float32
    assert (found.out.double() - out).norm() <= BUDGET[dtype] * out.norm()
    slope, chance = testing._scale(found.out.double(), out)
    assert abs(slope - 1) <= 4 * chance, f"scale {slope:.6f}, expected 1: roundings go one way"
    torch.testing.assert_close(found.lse.double(), lse, atol=1e-4, rtol=1e-5)
    assert (found.out[out == 0] == 0).all()  # rows that see nothing


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize(("head_dim", "variant"), [(64, None), (128, None), (192, None), (64, "named")])
def test_every_kind_of_mask(head_dim, variant, table):
    tiles, scale = TABLES[table], head_dim**-0.5
    q, k, v, _ = inputs(tiles, head_dim, head_dim, torch.bfloat16)
    judge(forward(q, k, v, tiles, scale, variant=variant, dtype=torch.bfloat16), q, k, v, tiles, scale, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("head_dim", "v_head_dim"),
    [(8, 8), (59, 59), (64, 64), (72, 48), (80, 80), (96, 96), (100, 36), (128, 128), (128, 64), (192, 128), (130, 20), (192, 192),
     (256, 256), (255, 1), (65, 200)],
)  # fmt: skip
def test_every_head_size_alone_and_onto_a_running_partial(head_dim, v_head_dim, dtype):
    tiles, scale = TABLES["empty rows"], head_dim**-0.5
    q, k, v, like = inputs(tiles, head_dim, v_head_dim, dtype)
    judge(forward(q, k, v, tiles, scale, dtype=dtype), q, k, v, tiles, scale, dtype)
    generator = torch.Generator().manual_seed(1)
    before = Partial(*(torch.randn(shape, generator=generator) for shape in (like.shape, (1, 4, 300))))
    before.lse[..., 50:150] = float("-inf")
    before.out[:, 50:150] = 0
    for stored in (None, dtype):
        acc = Partial(before.out.clone(), before.lse.clone())
        judge(forward(q, k, v, tiles, scale, acc=acc, dtype=stored), q, k, v, tiles, scale, dtype, before)


@pytest.mark.parametrize(
    ("head_dim", "variant"),
    [(64, "wg2"), (64, "wg3nb3"), (64, "simple"), (64, "plain"), (64, "two_q"), (64, "ahead"), (96, "simple"),
     (96, "ahead_staged"), (128, "ahead"), (128, "two_q"), (128, "one_q"), (128, "ahead_staged"), (192, "ahead"), (256, "one_q"),
     (256, "ahead"), (256, "staged"), (64, "alone"), (96, "alone"), (128, "alone"), (128, "pingpong_ahead"), (192, "pingpong"),
     (256, "pingpong"), (64, "named"), (128, "named"), (128, "pingpong"), (256, "named"), (128, "held64"), (256, "held32"),
     (256, "not_held"), (256, "anew"), (64, "wg2pingpong"), (64, "named_anew")],
)  # fmt: skip
def test_variants_with_many_items_a_program(head_dim, variant):
    tiles, scale = TABLES["documents"], head_dim**-0.5
    q, k, v, _ = inputs(tiles, head_dim, head_dim, torch.bfloat16, batch=2)
    for programs in (1, 5):
        found = forward(q, k, v, tiles, scale, variant=variant, programs=programs, seed=programs)
        judge(found, q, k, v, tiles, scale, torch.bfloat16)


@pytest.mark.parametrize("scale", [-0.125, 0.0])
def test_scales_that_are_not_positive(scale):
    q, k, v, _ = inputs(TABLES["causal"], 80, 80, torch.bfloat16)
    judge(forward(q, k, v, TABLES["causal"], scale), q, k, v, TABLES["causal"], scale, torch.bfloat16)


def test_rows_that_share_a_box_of_out_with_another_document_are_left_alone():
    """Documents end inside a box of 64 rows, and so does the sequence: out goes by TMA where a box is one document's, else row by row."""
    tiles = packed((0, 64, 150, 310, 500), (0, 64, 150, 310, 500), Mask(right=0))
    for head_dim in (96, 128, 256):
        q, k, v, _ = inputs(tiles, head_dim, head_dim, torch.float16)
        for programs in (1, 3, 40):
            found = forward(q, k, v, tiles, 0.1, dtype=torch.float16, programs=programs, seed=programs)
            judge(found, q, k, v, tiles, 0.1, torch.float16)


def test_a_mask_cuts_the_first_tile_only_where_there_is_one_to_cut():
    tiles = Tiles(
        (Tile(slice(0, 192), slice(0, 384), Band(-1000, 1000)), Tile(slice(192, 320), slice(130, 258), Band(-1000, 1000))), 320, 384
    )
    for head_dim in (64, 128, 256):
        q, k, v, _ = inputs(tiles, head_dim, head_dim, torch.bfloat16)
        judge(forward(q, k, v, tiles, 0.1, dtype=torch.bfloat16), q, k, v, tiles, 0.1, torch.bfloat16)


@pytest.mark.parametrize("step", [0.02, 0.3], ids=["creeps", "leaps"])
def test_a_maximum_that_every_tile_raises(step):
    """Scores rise from key to key: by half of 2^8 a tile of 64 keys, or by many times that."""
    tiles = Tiles((Tile(slice(0, 130), slice(0, 400), Band(-400, 400)),), 130, 400)
    q, k, v, _ = inputs(tiles, 256, 256, torch.bfloat16)
    k[..., 0] = step * torch.arange(400)[None, :, None]
    q[..., 0] = 5.0
    masked = Tiles((Tile(slice(0, 130), slice(0, 400), Band(-130, 270)),), 130, 400)
    for seen in (tiles, masked):
        judge(forward(q, k, v, seen, 0.5, dtype=torch.bfloat16), q, k, v, seen, 0.5, torch.bfloat16)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_row_that_meets_a_nan_says_so_in_its_lse(head_dim):
    """-inf is the word for a row that saw no key, and its out is 0."""
    tiles, scale = TABLES["empty rows"], head_dim**-0.5
    q, k, v, _ = inputs(tiles, head_dim, head_dim, torch.bfloat16)
    k[:, 120] = float("nan")
    sees, sees_it = torch.arange(300) >= 100, torch.arange(300) >= 220
    for acc in (None, Partial(torch.zeros(q.shape), torch.zeros(1, 4, 300))):
        found = forward(q, k, v, tiles, scale, acc=acc)
        assert found.lse[..., sees_it].isnan().all() and found.out[:, sees_it].isnan().all()
        assert found.lse[..., sees & ~sees_it].isfinite().all()  # scores are masked before they are summed
        assert (found.lse[..., ~sees] == (float("-inf") if acc is None else 0)).all()
