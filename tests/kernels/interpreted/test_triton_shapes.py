"""Every shape of problem, forward and backward, against fp64 dense attention."""

import pytest
import torch
from cases import Case, assert_close, banded, causal, computed, documents, full, oracle

from distflash.tile import Band, Tile, Tiles

fp16, bf16, fp32 = torch.float16, torch.bfloat16, torch.float32
SEVERAL = Tiles(  # the ring's last hop of a zigzag rank: two row ranges, several tiles a row, holes between columns
    (
        Tile(slice(0, 50), slice(0, 50), Band(-49, 0)),
        Tile(slice(50, 100), slice(0, 30), Band(-49, 29)),
        Tile(slice(50, 100), slice(40, 90), Band(-49, 0)),
        Tile(slice(50, 70), slice(95, 120), Band(-3, 5)),
    ),
    110,
    130,
)
CASES = [
    *(Case(f"causal S={s}", causal(s, s)) for s in (1, 2, 17, 64, 127, 129)),
    *(Case(f"full S={s}", full(s, s), dtype=bf16) for s in (1, 2, 17, 64, 127, 129)),
    *(Case(f"causal D={d}", causal(70, 70), D=d, dtype=t) for d, t in zip((1, 8, 59, 64, 96), (fp32, fp16, bf16, fp16, bf16), strict=True)),
    Case("causal fp16", causal(129, 129), D=64, dtype=fp16),
    Case("causal bf16", causal(129, 129), D=64, dtype=bf16),
    Case("large D", full(20, 70), D=256, dtype=bf16),
    Case("Dv > D", causal(66, 66), D=16, Dv=40),
    Case("Dv < D", causal(66, 66), D=48, Dv=8, dtype=bf16),
    Case("GQA", causal(70, 70), H=4, Hk=2, B=2, D=32),
    Case("MQA", full(30, 66), H=3, Hk=1, D=8, dtype=fp16),
    Case("fewer queries than keys", causal(33, 130)),
    Case("more queries than keys: rows that see nothing", causal(130, 33)),
    Case("window", banded(140, 140, -20, 0)),
    Case("window both ways", banded(140, 140, -70, 70), dtype=bf16, D=32),
    Case("wide window: masked, clear, masked", banded(64, 400, 5, 300)),
    Case("band shifted up: late keys only", banded(70, 140, 60, 80)),
    Case("band beside the rectangle", banded(70, 70, 200, 210)),
    Case("band of one diagonal", banded(65, 65, -1, -1)),
    Case("some rows of a block see nothing", banded(64, 64, 10, 20)),
    Case("several tiles a row", SEVERAL, H=2, D=32),
    Case("documents", documents(0, 1, 1, 20, 85, 150), H=2),
    Case("no tiles", Tiles((), 20, 30)),
    Case("no keys", Tiles((), 20, 0)),
    Case("no queries", Tiles((), 0, 20)),
    Case("no batch", full(20, 20), B=0),
    Case("negative scale", causal(66, 66), scale=-0.3),
    Case("scale zero", causal(66, 66), scale=0.0),
    Case("large logits", causal(66, 66), scale=100.0, dtype=fp32),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_backward_equal_dense_attention(case):
    tensors = case.tensors()
    if case.name == "large logits":  # about 1e3, of which fp32 keeps 1e-4
        found, true = computed(case, *tensors), oracle(case, *tensors)
        torch.testing.assert_close(found.lse.double(), true.lse, rtol=1e-6, atol=0)
        torch.testing.assert_close(found.out.double(), true.out, rtol=0, atol=1e-3)
        assert all(torch.isfinite(t).all() for t in (found.dq, found.dk, found.dv))
        return
    assert_close(case, computed(case, *tensors), oracle(case, *tensors))
