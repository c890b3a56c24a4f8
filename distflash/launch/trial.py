"""One problem of attention: carried out over any number of ranks, put together again, and what the oracle says of it.

`distflash verify` and multi-rank tests stand on it.

Legend: B batch, S global tokens, Sk keys where their number differs, H query heads, Hk key/value heads, D head dim, Dv value head dim.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import distflash
from distflash.kernels.base import accumulator
from distflash.parallel.slices import Slices
from distflash.testing import Attention, Variants, keep_mask, oracle, spmd

START = 20
SEED = random.Random(START).getrandbits(63)  # of the first call after seed_dropout(START)


class Inputs(NamedTuple):
    """What attention forward and backward is fed with; dlse is the gradient of lse."""

    q: Tensor  # [B, S, H, D]
    k: Tensor  # [B, Sk, Hk, D]
    v: Tensor  # [B, Sk, Hk, Dv]
    dout: Tensor  # [B, S, H, Dv]
    dlse: Tensor  # [B, H, S]


class WithSinks(NamedTuple):
    """What attention with sinks gave: `distflash.testing.Attention`, and the sinks' gradient."""

    out: Tensor  # [B, S, H, Dv]
    lse: Tensor  # [B, H, S]
    dq: Tensor
    dk: Tensor
    dv: Tensor
    dsinks: Tensor  # [H]


Results = Attention | WithSinks  # None in place of a gradient that was not asked for


class Call(NamedTuple):
    """How attention is called, and what the ranks share."""

    layout: str = "zigzag"
    order: str = "ring"
    ulysses: int = 1
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    documents: tuple[int, ...] | None = None
    kernel: str = "auto"
    scale: float | None = None
    mask: Slices | None = None
    softcap: float = 0.0
    slopes: Tensor | None = None  # [H] or [B, H]
    dropout_p: float = 0.0
    deterministic: bool = False
    sinks: Tensor | None = None  # [H]
    wanted: str = "qkv"  # the inputs that get a gradient
    strides: str = "contiguous"  # of local q, k, v and dout, by the names of STRIDES
    batched: bool = True  # False: without a batch dimension
    balance: Slices | None = None  # what the layout "balanced" is told
    k_documents: tuple[int, ...] | None = None  # of keys, where they are others: on one device only
    wire: str = "auto"

    @property
    def options(self) -> dict[str, Any]:
        window = {"causal": self.causal, "window_size": self.window_size}
        variants = {"softcap": self.softcap, "alibi_slopes": self.slopes, "dropout_p": self.dropout_p, "deterministic": self.deterministic}
        return window | variants | {"kernel": self.kernel, "softmax_scale": self.scale, "mask": self.mask}


def _inside(x: Tensor, before: int, after: int) -> Tensor:
    """A copy of x as part of rows that are longer."""
    room = x.new_full((*x.shape[:-1], before + x.shape[-1] + after), float("nan"))
    room[..., before : before + x.shape[-1]] = x
    return room[..., before : before + x.shape[-1]]


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "tokens first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "inside longer rows": lambda x: _inside(x, 8, 16),
    "at odd addresses": lambda x: _inside(x, 1, 2),
    "last dim strided": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
}


def inputs(
    tokens: int,
    *,
    k_tokens: int | None = None,
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 8,
    v_dim: int | None = None,
    dtype: torch.dtype = torch.float64,
    generator: torch.Generator | None = None,
) -> Inputs:
    """Normal random numbers, rounded to `dtype`, on the generator's device."""
    device = None if generator is None else generator.device
    keys, v_dim = tokens if k_tokens is None else k_tokens, v_dim or dim
    shapes = ((tokens, heads, dim), (keys, kv_heads, dim), (keys, kv_heads, v_dim), (tokens, heads, v_dim))
    normal = partial(torch.randn, dtype=torch.float64, generator=generator, device=device)
    return Inputs._make([*(normal(batch, *shape).to(dtype) for shape in shapes), normal(batch, heads, tokens)])


def keep_of(call: Call, tokens: int, k_tokens: int | None = None) -> Tensor:
    """Which pairs of queries and keys may meet, bool [S, Sk]."""
    documents = {"cu_seqlens_q": call.documents, "cu_seqlens_k": call.k_documents}
    return keep_mask(
        tokens, tokens if k_tokens is None else k_tokens, causal=call.causal, window_size=call.window_size, mask=call.mask, **documents
    )


def truth_of(call: Call, x: Inputs, dtype: torch.dtype = torch.float64, seed: int = SEED) -> Results:
    """What the oracle says, computed in `dtype`; `seed` is that of dropout."""
    keep = keep_of(call, x.q.shape[1], x.k.shape[1])
    documents = (call.documents, call.k_documents or call.documents) if call.documents else None
    variants = Variants(call.softcap, call.slopes, call.dropout_p, seed, documents)
    sinks = None if call.sinks is None else call.sinks.detach().to(dtype, copy=True).requires_grad_()
    found = oracle(x.q, x.k, x.v, x.dout, keep, scale=call.scale, dlse=x.dlse, dtype=dtype, variants=variants, sinks=sinks)
    return found if sinks is None else WithSinks(*found, sinks.grad)  # type: ignore[arg-type]


def noise_of(call: Call, x: Inputs, truth: Results, kept: torch.dtype, seed: int = SEED) -> Results:
    """By element, how far rounding alone may move exact results: the largest of several random roundings, all carried through fp64.

    Budgets say what is usual; where results cancel (one-hot softmax, two keys, scores of 50) an error that is no bug is larger. Here
    inputs are rounded as sums of products are in the accumulator's dtype, and those that probabilities are multiplied with as
    probabilities are in the dtype in which kernels have `kept` them; delta is of an output that was rounded to its dtype, and so are
    out before a sink and dout behind it; a row's probabilities are those of an lse that was rounded in the forward, of scores that the
    backward rounds otherwise.
    """
    # a dot product of n terms errs as sums do whose parts grow like sqrt(n)
    eps = torch.finfo(accumulator(x.q.dtype)).eps * max(1.0, max(x.q.shape[3], x.v.shape[3]) ** 0.5 / 4)
    cast, factor = (max(eps, torch.finfo(dtype).eps / 4) for dtype in (x.q.dtype, kept))  # eps / 2 at most, half of that as a rule
    q, k, v, dout, dlse = (t.double() for t in x)
    finite = torch.where(truth.lse > float("-inf"), truth.lse, 0.0)  # [B, H, S]
    delta = (truth.out * dout).norm(dim=-1).transpose(1, 2)
    generator, worst = torch.Generator(x.q.device).manual_seed(0), [torch.zeros_like(t) if t is not None else None for t in truth]

    def around(t: Tensor, size: Tensor | float) -> Tensor:
        return t + size * torch.randn(t.shape, dtype=t.dtype, device=t.device, generator=generator)

    forward = finite
    for _ in range(8):
        row = around(torch.exp(finite - forward), eps * (1 + finite.abs()))
        moved = Inputs(
            around(q, eps * q.abs()),
            around(k, eps * k.abs()),
            around(v, factor * v.abs()),
            around(dout, (factor if call.sinks is None else cast) * dout.abs()) * row.transpose(1, 2).unsqueeze(-1),
            around(dlse * row, cast * delta),
        )
        found = truth_of(call, moved, seed=seed)
        forward = torch.where(found.lse > float("-inf"), found.lse, 0.0)
        if call.sinks is not None:  # it shrinks an output that was rounded to its dtype
            found = found._replace(out=around(found.out, cast * found.out.abs()))
        worst = [w if w is None else torch.maximum(w, (a - b).abs().nan_to_num(0.0)) for w, a, b in zip(worst, found, truth, strict=True)]
    return type(truth)(*worst)  # type: ignore[arg-type]


def run_rank(call: Call, x: Inputs, group: Any = None) -> tuple[Tensor, Results]:
    """One rank's part: (global indices of its tokens, its results). A collective."""
    return run_sequence(call, x, sequence(call, x, group))


def sequence(call: Call, x: Inputs, group: Any = None) -> distflash.ShardedSequence:
    """The problem's tokens, shared as it says. A collective."""
    scheme: dict[str, Any] = {name: getattr(call, name) for name in ("layout", "order", "ulysses", "wire")}
    sp = distflash.SequenceParallel(group, **scheme)
    how: dict[str, Any] = {"length": x.q.shape[1]} if call.documents is None else {"cu_seqlens": call.documents}
    return sp.sequence(**how, mask=call.balance)


def run_sequence(call: Call, x: Inputs, seq: distflash.ShardedSequence) -> tuple[Tensor, Results]:
    """(global indices of this rank's tokens, its results). A collective."""
    seq.sp.seed_dropout(START)
    local = Inputs._make([*(seq.shard(t) for t in x[:4]), seq.shard(x.dlse, dim=2)])
    return seq.indices, _run(call, local, lambda q, k, v, **options: distflash.attention(q, k, v, seq, return_lse=True, **options))


def run_alone(call: Call, x: Inputs) -> tuple[int, Results]:
    """On one device, without a sequence: (the seed of dropout, results)."""
    seed = torch.randint((1 << 63) - 1, (), generator=torch.Generator().manual_seed(START))
    torch.manual_seed(START)
    cu = (None if cu is None else torch.tensor(cu, dtype=torch.int32) for cu in (call.documents, call.k_documents))
    borders = dict(zip(("cu_seqlens_q", "cu_seqlens_k"), cu, strict=True))
    return int(seed), _run(call, x, lambda q, k, v, **options: distflash.attention(q, k, v, return_lse=True, **borders, **options))


def _run(call: Call, x: Inputs, attend: Callable[..., Any]) -> Results:
    placed = (STRIDES[call.strides](t) for t in x[:4])
    q, k, v, dout = (t if call.batched else t.squeeze(0) for t in placed)
    sinks = None if call.sinks is None else call.sinks.detach().requires_grad_(call.wanted != "")
    named = {"q": q.detach(), "k": k.detach(), "v": v.detach()}
    leaves = {name: named[name].requires_grad_() for name in call.wanted} | ({} if sinks is None or not call.wanted else {"sinks": sinks})
    out, lse = attend(*named.values(), sinks=sinks, **call.options)
    grads: Sequence[Tensor] = ()
    if leaves:
        dlse = torch.where(lse > float("-inf"), (x.dlse if call.batched else x.dlse.squeeze(0)).to(lse.dtype), 0.0)
        grads = torch.autograd.grad((out, lse), tuple(leaves.values()), (dout, dlse))
    found = {"out": out.detach(), "lse": lse.detach()} | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    whole = {name: t if call.batched or name == "dsinks" else t.unsqueeze(0) for name, t in found.items()}
    kind = Attention if sinks is None else WithSinks
    return kind(*(whole.get(name) for name in kind._fields))  # type: ignore[arg-type]


def whole(results: Sequence[tuple[Tensor, Results]]) -> Any:
    """The results of all ranks in global order, sinks' gradients summed; asserts that every token is held by exactly one rank."""
    index = torch.cat([indices for indices, _ in results])
    assert sorted(index.tolist()) == list(range(len(index))), "a token is held twice, or by nobody"
    back, first = torch.argsort(index), results[0][1]

    def joined(name: str) -> Tensor | None:
        parts = [getattr(found, name) for _, found in results]
        if parts[0] is None:
            return None
        if name == "dsinks":
            return torch.stack(parts).sum(0)
        return torch.cat(parts, dim=DIMS[name]).index_select(DIMS[name], back)

    return type(first)(*map(joined, first._fields))  # type: ignore[arg-type]


DIMS = {"out": 1, "lse": 2, "dq": 1, "dk": 1, "dv": 1}  # where the tokens are


def on_ranks(processes: int, ranks: int, call: Call, x: Inputs, per_node: int | None = None) -> Any:
    """Whole results: of the processes that were started, on each of them, or if this is the only one of `ranks` threads on x's device."""
    if processes == 1:
        return whole(spmd(ranks, lambda group: run_rank(call, x, group), device=x.q.device, per_node=per_node))
    seq = sequence(call, x)
    _, mine = run_sequence(call, x, seq)

    def joined(name: str) -> Tensor | None:
        part = getattr(mine, name)
        return part if part is None else seq.sp.wire.all_reduce(part) if name == "dsinks" else seq.unshard(part, DIMS[name])

    return type(mine)(*map(joined, mine._fields))  # type: ignore[arg-type]
