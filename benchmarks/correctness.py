"""Is a kernel right? Held against fp64 by the library's own oracle and error budgets, before it is timed.

`small` puts every mask, odd sizes and running results through the Kernel protocol, each case over all of its rows. `sampled`
takes a cell of any size: some rows of some heads. With dout zero in all other rows, dk and dv of the whole kernel are those of the
sampled rows alone, so that all of dk and dv of those heads is compared too.

Legend: B batch, T queries, S keys, H query heads, Hk key/value heads, D head dim.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import Cell, Prepare
from distflash.parallel.mask import Mask, packed
from distflash.testing import Attention, errors, keep_mask, oracle
from distflash.tile import Tiles

ROWS = 256
# (B, T, H, Hk, keys of each visit, mask as keep_mask has it)
CASES: dict[str, tuple[int, int, int, int, tuple[int, ...], dict[str, Any]]] = {
    "full": (1, 256, 2, 2, (256,), {}),
    "causal": (2, 384, 2, 2, (384,), {"causal": True}),
    "causal odd": (1, 257, 3, 3, (257,), {"causal": True}),
    "short": (1, 1, 2, 2, (5,), {}),
    "cross": (1, 100, 2, 2, (333,), {"causal": True}),
    "window": (1, 515, 2, 2, (515,), {"window_size": (100, 17)}),
    "grouped heads": (2, 300, 6, 2, (300,), {"causal": True}),
    "rows that see nothing": (1, 300, 2, 2, (150,), {"causal": True}),
    "documents": (1, 513, 2, 2, (513,), {"causal": True, "cu_seqlens_q": (0, 1, 131, 131, 208, 508, 513)}),
    "many programs": (2, 1500, 16, 4, (1500,), {"causal": True}),
    "visits": (1, 320, 2, 1, (190, 64, 301), {}),
    "visits, causal": (1, 320, 4, 2, (320, 77, 512), {"causal": True}),
}


def tiles_of(q_len: int, k_len: int, mask: dict[str, Any]) -> Tiles:
    """The tile table of a mask given in the words of `keep_mask`."""
    left, right = mask.get("window_size", (-1, -1))
    documents = mask.get("cu_seqlens_q")
    limits = Mask(None if left < 0 else left, 0 if mask.get("causal") else None if right < 0 else right)
    return packed(documents or (0, q_len), documents or (0, k_len), limits)


def small(kernel: Any, D: int, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> dict[str, str]:
    """What breaks the error budget, by case: an empty dict is a pass."""
    found = {case: _visited(kernel, D, dtype, device, *numbers) for case, numbers in CASES.items()}
    return {case: text for case, text in found.items() if text}


def _visited(
    kernel: Any, D: int, dtype: torch.dtype, device: str, B: int, T: int, H: int, Hk: int, visits: tuple[int, ...], mask: dict[str, Any]
) -> str:
    """Attention visit by visit with the running (out, lse) and dq, against dense attention over all keys."""
    generator = torch.Generator(device).manual_seed(T)
    draw = lambda n, h: torch.randn(B, n, h, D, device=device, generator=generator).to(dtype)  # noqa: E731
    S, scale = sum(visits), D**-0.5
    q, k, v, dout = draw(T, H), draw(S, Hk), draw(S, Hk), draw(T, H)
    keep = torch.cat([keep_mask(T, n, **mask) for n in visits], dim=1)
    blocks = [(slice(sum(visits[:i]), sum(visits[: i + 1])), tiles_of(T, n, mask)) for i, n in enumerate(visits)]
    acc = dq = None
    dk, dv = (torch.zeros(x.shape, dtype=torch.float32, device=device) for x in (k, v))
    for n, (part, tiles) in enumerate(blocks, 1):
        acc = kernel.forward(q, k[:, part], v[:, part], tiles, scale, acc=acc, dtype=dtype if n == len(blocks) else None)
    assert acc is not None
    delta = kernel.delta(acc.out, dout)
    for part, tiles in blocks:
        dq, dk[:, part], dv[:, part] = kernel.backward(dout, q, k[:, part], v[:, part], acc.lse, delta, tiles, scale, dq=dq)
    assert dq is not None
    truth, low = (oracle(q, k, v, dout, keep, dtype=kind) for kind in (torch.float64, dtype))
    return _text(errors(Attention(acc.out, acc.lse, dq, dk, dv), truth, low, dtype))


def kept(tiles: Tiles, rows: Tensor) -> Tensor:
    """Which keys each of `rows` sees, bool [len(rows), S]."""
    keep = torch.zeros(len(rows), tiles.kv_len, dtype=torch.bool, device=rows.device)
    for tile in tiles:
        inside = (rows >= tile.q.start) & (rows < tile.q.stop)
        offset = torch.arange(tile.columns, device=rows.device) - (rows[inside] - tile.q.start).unsqueeze(1)
        keep[inside, tile.kv] |= (offset >= tile.band.lo) & (offset <= tile.band.hi)
    return keep


def sampled(prepare: Prepare, cell: Cell, inputs: tuple[Tensor, Tensor, Tensor, Tensor], *, backward: bool) -> str:
    """What breaks the error budget in the first and the last group of heads of the cell; "" is a pass."""
    q, k, v, dout = inputs
    rows = torch.tensor(sorted({0, cell.S - 1, *random.Random(cell.S).sample(range(cell.S), min(ROWS, cell.S))}), device=q.device)
    alone = torch.zeros_like(dout)
    alone[:, rows] = dout[:, rows]
    forward, gradients = prepare(cell, q, k, v, alone)
    out = forward()
    grads = gradients() if backward and gradients is not None else None
    keep, group, wrong = kept(cell.tiles, rows), cell.H // cell.Hk, []
    for b, head in {(0, 0), (cell.B - 1, cell.Hk - 1)}:
        mine, theirs, one = slice(head * group, (head + 1) * group), slice(head, head + 1), slice(b, b + 1)
        local = (q[one, rows][:, :, mine], k[one, :, theirs], v[one, :, theirs], dout[one, rows][:, :, mine])
        truth, low = (oracle(*local, keep, dtype=kind) for kind in (torch.float64, q.dtype))
        found = truth._replace(out=out[one, rows][:, :, mine])
        if grads is not None:
            dq, dk, dv = grads
            found = found._replace(dq=dq[one, rows][:, :, mine], dk=dk[one, :, theirs], dv=dv[one, :, theirs])
        wrong.append(_text(errors(found, truth, low, q.dtype)))
    return "; ".join(filter(None, wrong))


def _text(broken: dict[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in broken.items())
