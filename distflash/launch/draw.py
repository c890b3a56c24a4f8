"""Random problems of attention, each made from its seed alone: what `distflash verify --fuzz` asks.

Legend: P ranks, S tokens, Sk keys where their number differs, H query heads, Hk key/value heads, D head dim, Dv value head dim.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distflash.kernels.base import Problem
from distflash.kernels.select import ADAPTED, BY_NAME_ONLY, candidates
from distflash.launch.trial import STRIDES, Call, Inputs, inputs, keep_of
from distflash.parallel.layout import LAYOUTS
from distflash.parallel.plan import ORDERS, unequal
from distflash.parallel.slices import KINDS, Slice, Slices

RANKS = (1, 1, 2, 2, 2, 3, 3, 4, 4, 4, 5, 6, 8)
LONGEST = {"cpu": 500, "cuda": 3000}  # tokens; lengths are drawn evenly by their logarithm
SCORES = {"cpu": 300_000, "cuda": 20_000_000}  # at most so many in all heads: the oracle holds them
SAME_FORM = 100  # seeds on end that share what their kernels are compiled for, on a GPU: compiling takes longer than all else
DIMS = {  # few on a GPU, where each compiles kernels of its own
    "cpu": (1, 8, 8, 16, 16, 32, 59, 64, 64, 96, 128, 256),
    "cuda": (16, 59, 64, 64, 64, 64, 128, 128, 128, 128, 192, 256),
}
SAME_V_DIM = {"cpu": 0.75, "cuda": 0.95}  # chance of values of the same head size
PLACED = {  # strides, by name: where they are not a multiple of 16 whatever the length, a kernel is compiled for each way they fall
    "cpu": ("contiguous", *STRIDES),
    "cuda": ("contiguous", "contiguous", "heads first", "heads first", "tokens first", *STRIDES),
}
DTYPES = {  # in fp64 PyTorch computes, on a GPU too
    "cpu": (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    "cuda": (torch.float64, torch.float32, torch.bfloat16, torch.bfloat16, torch.float16, torch.float16),
}


class Case(NamedTuple):
    """One problem, and what must be said of it."""

    seed: int
    ranks: int
    per_node: int
    alone: bool  # on one device, without a sequence: queries and keys may differ in number
    call: Call
    x: Inputs
    values: str  # by the names of VALUES
    refusals: tuple[str, ...]  # the library must refuse with one of these; nothing: it must serve

    @property
    def asked(self) -> dict[str, object]:
        """What of the call is not the default."""
        given = self.call._asdict()
        return {name: x for name, x in given.items() if isinstance(x, Tensor) or x != self.call._field_defaults[name]}

    def __str__(self) -> str:
        x = self.x
        shape = f"B={x.q.shape[0]} S={x.q.shape[1]} Sk={x.k.shape[1]} H={x.q.shape[2]}:{x.k.shape[2]} D={x.q.shape[3]},{x.v.shape[3]}"
        asked = (f"{name}={_short(value)}" for name, value in self.asked.items())
        how = "alone" if self.alone else f"P={self.ranks} per_node={self.per_node}"
        return f"{how} {str(x.q.dtype).removeprefix('torch.')} {shape} {self.values} {' '.join(asked)}"


def _short(value: object) -> object:
    return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}" if isinstance(value, Tensor) else value


def _unseen(x: Inputs, keep: Tensor) -> Inputs:
    """NaN in keys and values that no query sees."""
    blank = ~keep.any(0).to(x.k.device)[:, None, None]
    return x._replace(k=x.k.masked_fill(blank, float("nan")), v=x.v.masked_fill(blank, float("nan")))


VALUES: dict[str, Callable[[Inputs, Tensor], Inputs]] = {
    "normal": lambda x, keep: x,
    "large scores": lambda x, keep: x._replace(q=8 * x.q),
    "equal keys": lambda x, keep: x._replace(k=x.k[:, :1].expand_as(x.k).contiguous()),
    "one hot key": lambda x, keep: x._replace(k=torch.cat([8 * x.k[:, :1], x.k[:, 1:]], dim=1)),
    "zero values": lambda x, keep: x._replace(v=torch.zeros_like(x.v)),
    "zero dout": lambda x, keep: x._replace(dout=torch.zeros_like(x.dout)),
    "sparse dout": lambda x, keep: x._replace(dout=x.dout * (x.dlse.transpose(1, 2).unsqueeze(-1) > 1)),
    "huge dout": lambda x, keep: x._replace(dout=32 * x.dout, dlse=32 * x.dlse),
    "small": lambda x, keep: Inputs._make(t / 64 for t in x),
    "unseen keys are NaN": _unseen,
}


def draw(seed: int, device: torch.device, sizes: Sequence[int] = RANKS, *, kernel: str | None = None, longest: int | None = None) -> Case:
    """The case of a seed, its ranks drawn from `sizes`."""
    kind = device.type
    rng, form = _generators(seed, kind)

    def chance(p: float) -> bool:
        return rng.random() < p

    ranks = rng.choice(sizes)
    alone = ranks == 1 and sizes is RANKS and chance(0.6)
    batch, kv_heads, dim = rng.choice((1, 1, 2, 3)), form.choice((1, 1, 2, 2, 3, 4)), form.choice(DIMS[kind])
    dtype = form.choice(DTYPES[kind])
    heads, v_dim = kv_heads * form.choice((1, 1, 2, 3, 4)), dim if form.random() < SAME_V_DIM[kind] else form.choice(DIMS[kind])
    most = min(longest or LONGEST[kind], math.isqrt(SCORES[kind] // (batch * heads)))

    def length() -> int:
        return 0 if chance(0.004) else int(math.exp(rng.uniform(0.0, math.log(most + 1))))

    tokens = length()
    k_tokens = length() if alone and chance(0.6) else tokens
    documents = k_documents = None
    if chance(0.5):
        count = rng.randint(1, 8)
        documents = tuple(range(tokens + 1)) if chance(0.1) and 0 < tokens <= 48 else _borders(rng, tokens, count)
        k_documents = None if k_tokens == tokens else _borders(rng, k_tokens, len(documents) - 1)
    visible = _visible(rng, form, documents or (0, tokens), k_documents or documents or (0, k_tokens))
    generator = torch.Generator(device).manual_seed(rng.getrandbits(63))
    variants = _variants(form, generator, (batch, heads))
    layout, few = rng.choice((*LAYOUTS, "auto")), chance(0.05)  # few: there may be fewer heads than Ulysses ranks
    call = Call(
        layout=layout,
        order=rng.choice((*ORDERS, "auto")),
        ulysses=rng.choice([u for u in range(1, ranks + 1) if ranks % u == 0 and (u <= heads or few)]),
        documents=documents,
        k_documents=k_documents,
        scale=None if chance(0.8) else rng.choice((0.3, 1.0, -0.5, 0.0)),
        deterministic=form.random() < 0.15,
        wanted="qkv" if chance(0.85) else rng.choice(("", "q", "k", "v", "qk", "qv", "kv")),
        strides=form.choice(PLACED[kind]),
        batched=batch > 1 or chance(0.7),
        balance=visible.get("mask") if layout == "balanced" and chance(0.7) else None,
        **visible,
        **variants,
    )
    if chance(0.12):
        # the parts of several ranks are rounded before they are summed: judged where that is not much
        own = dtype if dtype == torch.float64 or (ranks == 1 and chance(0.5)) else torch.float32
        call = call._replace(sinks=torch.randn(heads, generator=generator, device=device).to(own))
    per_node = rng.choice([n for n in range(1, ranks + 1) if ranks % n == 0])
    if call.order == "double_ring" and unequal(ranks, per_node, call.ulysses):
        per_node = ranks
    asked = tuple({"slopes": "alibi_slopes"}.get(name, name) for name in variants)
    problem = Problem(device, dtype, heads, kv_heads, dim, v_dim, call.deterministic, asked)
    call = call._replace(kernel=kernel or _kernel(rng, form, problem))
    shape = {"batch": batch, "heads": heads, "kv_heads": kv_heads, "dim": dim, "v_dim": v_dim}
    x = inputs(tokens, k_tokens=k_tokens, dtype=dtype, generator=generator, **shape)
    values = rng.choice(("normal",) * 8 + tuple(VALUES))
    if tokens and k_tokens:
        x = VALUES[values](x, keep_of(call, tokens, k_tokens))
    call = call._replace(wire=rng.choice(("p2p", "symmetric")))
    return Case(seed, ranks, per_node, alone, call, x, values, _refusals(call, problem, tokens and k_tokens))


def _generators(seed: int, kind: str) -> tuple[random.Random, random.Random]:
    """(of all that costs no compiling, of the form of kernels): on a CPU, which compiles none, one and the same."""
    rng = random.Random(seed)
    return rng, rng if kind == "cpu" else random.Random(f"form {seed // SAME_FORM}")


def _visible(rng: random.Random, form: random.Random, cu_q: Sequence[int], cu_k: Sequence[int]) -> dict[str, Any]:
    """What each query sees: causal, a window, both, or slices."""
    kind, found = form.choice(("full", "causal", "causal", "window", "causal window", "slices")), {}
    if "causal" in kind:
        found["causal"] = True
    if "window" in kind:
        found["window_size"] = tuple(rng.choice((-1, 0, 1, rng.randint(0, 9), rng.randint(0, cu_q[-1] + 2))) for _ in range(2))
    return {"mask": _slices(rng, cu_q, cu_k)} if kind == "slices" else found


def _variants(rng: random.Random, generator: torch.Generator, shape: tuple[int, int]) -> dict[str, Any]:
    """Which of softcap, ALiBi and dropout are asked for."""
    found: dict[str, Any] = {}
    if rng.random() < 0.12:
        found["softcap"] = rng.choice((0.5, 2.0, 30.0))
    if rng.random() < 0.12:
        found["slopes"] = torch.rand(rng.choice((shape, shape[1:])), generator=generator, device=generator.device) / 4
    if rng.random() < 0.12:
        found["dropout_p"] = rng.choice((0.1, 0.5, 0.9))
    return found


def _borders(rng: random.Random, tokens: int, count: int) -> tuple[int, ...]:
    """Of `count` documents, some of which may be empty."""
    return (0, *sorted(rng.randint(0, tokens) for _ in range(count - 1)), tokens)


def _slices(rng: random.Random, cu_q: Sequence[int], cu_k: Sequence[int]) -> Slices:
    """Any disjoint slices inside each document, or what a constructor makes of a square."""
    n, maker = cu_q[-1], rng.choice(("prefix_lm", "sinks_and_window", "from_block_mask", "", "", "", ""))
    if not maker or len(cu_q) > 2 or cu_q[-1] != cu_k[-1]:
        return Slices(s for q, k in zip(pairwise(cu_q), pairwise(cu_k), strict=True) for s in _cut(rng, q, k, 3))
    if maker == "from_block_mask":
        size = rng.randint(1, max(1, n))
        side = range(max(1, -(-n // size)))
        blocks = [[rng.randint(0, 1) for _ in side] for _ in side]
        return Slices.from_block_mask(blocks, size, (n, n) if n else None, causal=rng.random() < 0.5)
    return (
        Slices.prefix_lm(n, rng.randint(0, n)) if maker == "prefix_lm" else Slices.sinks_and_window(n, rng.randint(0, n), rng.randint(0, n))
    )


def _cut(rng: random.Random, q: tuple[int, int], k: tuple[int, int], depth: int) -> list[Slice]:
    """A rectangle cut in two at random, again and again; some of the parts are left out."""
    if depth == 0 or rng.random() < 0.25:
        kind = rng.choice(KINDS)
        window = (rng.randint(-1, 9), rng.randint(-1, 9)) if kind == "band" else (-1, -1)
        return [] if rng.random() < 0.3 else [Slice(q, k, kind, window)]
    if rng.random() < 0.5:
        at = rng.randint(*q)
        return _cut(rng, (q[0], at), k, depth - 1) + _cut(rng, (at, q[1]), k, depth - 1)
    at = rng.randint(*k)
    return _cut(rng, q, (k[0], at), depth - 1) + _cut(rng, q, (at, k[1]), depth - 1)


def _able(problem: Problem) -> dict[str, bool]:
    """By kernel: whether it says that it can serve here when it is asked for by name."""
    return {name: reason is None or reason == BY_NAME_ONLY.get(name) for name, reason in candidates(problem)}


def _kernel(rng: random.Random, form: random.Random, problem: Problem) -> str:
    """Mostly "auto" or one of our own that can serve; now and then one that cannot."""
    able = _able(problem)
    ours = [name for name in able if able[name] and name not in ADAPTED]
    others = [name for name in able if not able[name]] or ours
    return rng.choices(("auto", form.choice(ours), rng.choice(others)), (50, 48, 2))[0]


def _refusals(call: Call, problem: Problem, tokens: int) -> tuple[str, ...]:
    """With what the library must refuse, as docs/features.md says."""
    return tuple(
        words
        for words, true in {
            "length=0 must be a positive integer": not tokens,
            "there are no tokens to attend to": not tokens,
            "there must be at least one query and one key": not tokens,
            "needs at least as many query heads": call.ulysses > problem.heads,
            "cannot serve this problem": call.kernel != "auto" and not _able(problem)[call.kernel],
        }.items()
        if true
    )
