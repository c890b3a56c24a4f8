"""Problems for the Triton kernels, and how far an answer may be from the oracle's.

Legend: B batch, Tq / Tk local queries / keys, H query heads, Hk key/value heads, D / Dv head dims.
"""

from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from distflash import testing
from distflash.kernels.triton import TritonKernel
from distflash.testing import Attention
from distflash.tile import Band, Tile, Tiles

KERNEL = TritonKernel()
# hazards.md section 2: relative Frobenius error of out and of gradients
BUDGET = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (3.5e-3, 7e-3), torch.float16: (4.5e-4, 9e-4)}


@dataclass(frozen=True)
class Case:
    name: str
    tiles: Tiles
    D: int = 16
    Dv: int | None = None
    B: int = 1
    H: int = 1
    Hk: int = 1
    dtype: torch.dtype = torch.float32
    scale: float | None = None
    seed: int = field(default=0, compare=False)

    def __str__(self) -> str:
        return self.name

    @property
    def softmax_scale(self) -> float:
        return self.D**-0.5 if self.scale is None else self.scale

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v, dout in the case's dtype."""
        make = torch.Generator().manual_seed(self.seed)
        Tq, Tk, Dv = self.tiles.q_len, self.tiles.kv_len, self.Dv or self.D
        shapes = (Tq, self.H, self.D), (Tk, self.Hk, self.D), (Tk, self.Hk, Dv), (Tq, self.H, Dv)
        return tuple(torch.randn(self.B, *shape, generator=make).to(self.dtype) for shape in shapes)


def causal(Tq: int, Tk: int) -> Tiles:
    return Tiles((Tile(slice(0, Tq), slice(0, Tk), Band(1 - Tq - Tk, Tk - Tq)),), Tq, Tk)


def full(Tq: int, Tk: int) -> Tiles:
    return Tiles((Tile.whole(slice(0, Tq), slice(0, Tk)),), Tq, Tk)


def banded(Tq: int, Tk: int, lo: int, hi: int) -> Tiles:
    return Tiles((Tile(slice(0, Tq), slice(0, Tk), Band(lo, hi)),), Tq, Tk)


def documents(*edges: int) -> Tiles:
    spans = [slice(a, b) for a, b in pairwise(edges) if b > a]
    return Tiles(tuple(Tile(s, s, Band(s.start - s.stop, 0)) for s in spans), edges[-1], edges[-1])


def keeps(tiles: Tiles) -> Tensor:
    """[Tq, Tk] bool: the pairs that the tiles keep, straight from the definition of Band."""
    keep = torch.zeros(tiles.q_len, tiles.kv_len, dtype=torch.bool)
    for tile in tiles:
        ahead = torch.arange(tile.columns)[None, :] - torch.arange(tile.rows)[:, None]
        keep[tile.q, tile.kv] |= (ahead >= tile.band.lo) & (ahead <= tile.band.hi)
    return keep


def oracle(case: Case, q, k, v, dout) -> Attention:
    """The truth: dense attention in fp64, gradients by autograd."""
    return testing.oracle(q, k, v, dout, keeps(case.tiles), scale=case.softmax_scale)


def computed(case: Case, q, k, v, dout, kernel=KERNEL) -> Attention:
    """The kernel's forward, delta and backward, each result fp32."""
    out, lse = kernel.forward(q, k, v, case.tiles, case.softmax_scale)
    delta = kernel.delta(out, dout)
    return Attention(out, lse, *kernel.backward(dout, q, k, v, lse, delta, case.tiles, case.softmax_scale))


def relative(found: Tensor, true: Tensor, floor: float = 1e-3) -> float:
    """Frobenius error relative to the truth, or to `floor` an element where the truth is smaller."""
    assert found.shape == true.shape
    return float((found.double() - true).norm() / max(float(true.norm()), floor * max(true.numel(), 1) ** 0.5))


def assert_close(case: Case, found: Attention, true: Attention) -> None:
    out_budget, grad_budget = BUDGET[case.dtype]
    seen = true.lse > float("-inf")
    assert torch.equal(found.lse == float("-inf"), ~seen)
    assert not torch.isnan(found.lse).any()
    torch.testing.assert_close(found.lse[seen].double(), true.lse[seen], rtol=1e-5, atol=1e-5)
    for name in ("out", "dq", "dk", "dv"):
        # where the true dq is 0, fp32 leaves dP - delta = 1e-7 * |dP|: an absolute error, whatever the size of dq
        floor = 1e-1 if name != "out" and case.dtype == torch.float32 else 1e-3
        error = relative(getattr(found, name), getattr(true, name), floor)
        budget = out_budget if name == "out" else grad_budget
        assert error <= budget, f"{name}: relative error {error:.2e}, budget {budget:.1e}"
        if case.dtype != torch.float32 and getattr(true, name).any():
            slope, chance = testing._scale(getattr(found, name).double(), getattr(true, name))
            assert abs(slope - 1) <= 4 * chance, f"{name}: scale {slope:.6f}, expected 1: roundings go one way"
    assert not found.out.transpose(1, 2)[~seen].any(), "rows that see nothing give 0"
    assert not found.dq.transpose(1, 2)[~seen].any(), "rows that see nothing have no gradient"
