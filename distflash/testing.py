"""For tests, the library's and its users': an fp64 oracle, error budgets, and ranks without a cluster.

Legend: B batch, Sq / Sk queries / keys, H query heads, Hk key/value heads, D head dim, Dv value head dim, P ranks.

The oracle is written from the definition, apart from everything it judges: no tiles, no plan, no kernel of the library.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from itertools import pairwise
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as any_ready
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from distflash.kernels.base import accumulator
from distflash.parallel.slices import Slices
from distflash.parallel.wire.local import LocalGroup, LocalWire, RankLost


class Attention(NamedTuple):
    """Results of attention forward and backward, whoever computed them."""

    out: Tensor  # [B, Sq, H, Dv]
    lse: Tensor  # [B, H, Sq]
    dq: Tensor
    dk: Tensor
    dv: Tensor


def keep_mask(
    q_len: int,
    k_len: int,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    cu_seqlens_q: Sequence[int] | None = None,
    cu_seqlens_k: Sequence[int] | None = None,
    mask: Slices | None = None,
) -> Tensor:
    """Which pairs (query, key) may meet, bool [Sq, Sk], by the words of `distflash.attention`'s docstring."""
    if mask is not None:
        return _keep_slices(q_len, k_len, mask)
    cu_q = cu_seqlens_q or (0, q_len)
    cu_k = cu_seqlens_k or cu_seqlens_q or (0, k_len)
    keep = torch.zeros(q_len, k_len, dtype=torch.bool)
    left, right = window_size
    for (q0, q1), (k0, k1) in zip(pairwise(cu_q), pairwise(cu_k), strict=True):
        distance = torch.arange(k1 - k0) - (torch.arange(q1 - q0) + (k1 - k0) - (q1 - q0)).unsqueeze(1)  # j - aligned i
        inside = torch.ones_like(distance, dtype=torch.bool)
        if causal:
            inside &= distance <= 0
        if left >= 0:
            inside &= distance >= -left
        if right >= 0:
            inside &= distance <= right
        keep[q0:q1, k0:k1] = inside
    return keep


def _keep_slices(q_len: int, k_len: int, mask: Slices) -> Tensor:
    """By the words of `distflash.Slice`'s docstring."""
    keep = torch.zeros(q_len, k_len, dtype=torch.bool)
    for s in mask.slices:
        rows, columns = slice(*s.q), slice(*s.k)
        i, j = torch.arange(q_len)[rows, None], torch.arange(k_len)[columns]
        inside = torch.ones_like(keep[rows, columns])
        if s.kind == "causal":
            inside &= s.k[1] - j >= s.q[1] - i
        if s.kind == "inverse-causal":
            inside &= j - s.k[0] >= i - s.q[0]
        if s.kind == "band" and s.window_size[0] >= 0:
            inside &= j - i >= -s.window_size[0]
        if s.kind == "band" and s.window_size[1] >= 0:
            inside &= j - i <= s.window_size[1]
        keep[rows, columns] |= inside
    return keep


class Variants(NamedTuple):
    """What is asked beyond a scale and a mask, in the words of `distflash.attention`; `seed` is what its dropout runs with.

    `cu_seqlens` (queries, keys) are the documents in which ALiBi counts, None is one.
    """

    softcap: float = 0.0
    alibi_slopes: Tensor | None = None  # [H] or [B, H]
    dropout_p: float = 0.0
    seed: int = 0
    cu_seqlens: tuple[Sequence[int], Sequence[int]] | None = None


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    scale: float | None = None,
    sinks: Tensor | None = None,
    variants: Variants = Variants(),  # noqa: B008  immutable
) -> tuple[Tensor, Tensor]:
    """(out, lse) by the definition, in the inputs' dtype: softmax(scale * q k^T, -inf where not kept) v. Differentiable.

    `sinks` [H] are the logits of one more key a head, which every query sees and whose value is 0.
    """
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    used, sees = keep.any(0), keep.any(1)
    k, v = (torch.where(used[:, None, None], x, 0.0) for x in (k, v))
    s = torch.einsum("bihd,bjhd->bhij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if variants.softcap:
        s = variants.softcap * torch.tanh(s / variants.softcap)
    batch, heads, q_len, k_len = s.shape
    aligned = _aligned(q_len, k_len, variants.cu_seqlens)
    if variants.alibi_slopes is not None:
        slopes = variants.alibi_slopes.to(s.dtype).expand(batch, heads)
        distance = (aligned[:, None] - torch.arange(k_len)).abs().to(s.device)
        s = s - slopes[:, :, None, None] * distance
    s = s.masked_fill(~keep, float("-inf"))
    weight = torch.ones((), dtype=s.dtype, device=s.device)
    if variants.dropout_p:
        weight = dropout_weights(variants.seed, variants.dropout_p, batch, heads, aligned.to(s.device), k_len).to(s.dtype)
    if sinks is not None:
        column = sinks[:, None, None].expand(*s.shape[:3], 1)
        s = torch.cat([s, column], dim=-1)
        return torch.einsum("bhij,bjhd->bihd", torch.softmax(s, dim=-1)[..., :-1] * weight, v), torch.logsumexp(s, dim=-1)
    # a row that sees nothing: give it finite scores, then take its results away
    s = torch.where(sees[:, None], s, 0.0)
    lse = torch.where(sees, torch.logsumexp(s, dim=-1), float("-inf"))
    p = torch.where(sees[:, None], torch.softmax(s, dim=-1), 0.0)
    return torch.einsum("bhij,bjhd->bihd", p * weight, v), lse


def _aligned(q_len: int, k_len: int, cu_seqlens: tuple[Sequence[int], Sequence[int]] | None) -> Tensor:
    """The key position [Sq] that each query is aligned with: the last ones of a document meet."""
    cu_q, cu_k = cu_seqlens or ((0, q_len), (0, k_len))
    return torch.cat([torch.arange(q1 - q0) + k1 - (q1 - q0) for (q0, q1), (_, k1) in zip(pairwise(cu_q), pairwise(cu_k), strict=True)])


def dropout_weights(seed: int, p: float, batch: int, heads: int, queries: Tensor, k_len: int) -> Tensor:
    """0 or 1 / (1 - p) for each probability, fp64 [B, H, Sq, Sk] where `queries` are: Philox (Salmon et al., SC 2011) in numpy.

    Word 0 of 2x32-7 of the counter (query, key) is compared with p * 2^32. Its key is that of 4x32-10 of (head, batch, 0, 0) under `seed`.
    """
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    element, head = np.meshgrid(np.arange(batch, dtype=np.uint64), np.arange(heads, dtype=np.uint64), indexing="ij")
    c, k = [head, element, 0 * head, 0 * head], [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        first, second = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [second >> shift ^ c[1] ^ np.uint64(k[0]), second & low, first >> shift ^ c[3] ^ np.uint64(k[1]), first & low]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    key, mask = torch.from_numpy(c[0].astype(np.int64)).to(queries.device)[:, :, None, None], 0xFFFFFFFF
    i, j = queries.long()[:, None] & mask, torch.arange(k_len, device=queries.device)
    for _ in range(7):  # on the device, in int64: a product wraps, and its bits are those of the unsigned one
        product = i * 0xD256D193
        i, j, key = (product >> 32) & mask ^ key ^ j, product & mask, (key + 0x9E3779B9) & mask
    return (i >= round(p * 2**32)).double() / (1 - p)


def oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    keep: Tensor,
    *,
    scale: float | None = None,
    dlse: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    variants: Variants = Variants(),  # noqa: B008  immutable
    sinks: Tensor | None = None,
) -> Attention:
    """Dense attention and its gradients in `dtype` (fp64: the truth; a low dtype: what such an eager formula errs).

    `sinks` [H] of that dtype find their gradient in sinks.grad, if they require one.
    """
    leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    keep = keep.to(q.device)
    out, lse = dense(leaves[0], leaves[1], leaves[2], keep, scale, sinks, variants)
    target = (out * dout.to(dtype)).sum()
    if dlse is not None:
        target = target + (torch.where(lse > float("-inf"), lse, 0.0) * dlse.to(dtype)).sum()
    target.backward()
    dq, dk, dv = (x.grad for x in leaves)
    assert dq is not None and dk is not None and dv is not None
    return Attention(out.detach(), lse.detach(), dq, dk, dv)


# relative error of a tensor as a whole, by dtype: (out and lse, gradients)
_NORM_BUDGET = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (1e-5, 1e-5),
    torch.bfloat16: (3.5e-3, 7e-3),
    torch.float16: (4.5e-4, 9e-4),
}


def errors(found: Any, truth: Any, low: Any, dtype: torch.dtype) -> dict[str, str]:
    """What breaks the error budget, by tensor: an empty dict is a pass. Of named tuples like `Attention`; what is None is not judged.

    A budget is no worse than twice what the dense formula in the same dtype errs against fp64 (mean: 1.5 times), plus a rounding;
    the norm of the error within what the dtype allows; the scale <found, truth> / <truth, truth> within 1e-3 of 1 (fp64 1e-10), twice
    what the dense formula is off, or what errors of rows that are independent of each other come to: a factor would show.
    """
    broken = {}
    for name in (name for name in found._fields if getattr(found, name) is not None):
        k, r, lo = (getattr(x, name).detach().double() for x in (found, truth, low))
        reason = _error(k, r, lo, dtype, _NORM_BUDGET[dtype][name not in ("out", "lse")])
        if reason:
            broken[name] = reason
    return broken


def _error(k: Tensor, r: Tensor, lo: Tensor, dtype: torch.dtype, norm_budget: float) -> str | None:
    if k.shape != r.shape:
        return f"shape {tuple(k.shape)}, expected {tuple(r.shape)}"
    seen = r > float("-inf")  # lse of rows that see nothing
    if not torch.equal(k == float("-inf"), ~seen) or not torch.isfinite(k[seen]).all():
        return "NaN or inf in the wrong place"
    k, r, lo = (torch.where(seen, x, 0.0) for x in (k, r, lo))
    if r.numel() == 0:
        return None
    rounding = 2 * ((r + 0.3).to(dtype).double() - 0.3 - r).abs().max().item() if dtype != torch.float64 else 1e-12
    # dS = P * (dP - delta) cancels where a row sees one key, and the dense formula errs nothing there: what accumulating costs
    rounding += 16 * torch.finfo(accumulator(dtype)).eps * r.abs().max().item()
    worst, allowed = (k - r).abs().max().item(), 2 * (lo - r).abs().max().item() + rounding
    if worst > allowed:
        return f"max error {worst:.2e}, allowed {allowed:.2e}"
    mean, allowed = (k - r).abs().mean().item(), 1.5 * (lo - r).abs().mean().item() + rounding
    if mean > allowed:
        return f"mean error {mean:.2e}, allowed {allowed:.2e}"
    natural = r.numel() ** 0.5  # a tensor whose true value is 0 everywhere has no relative error: compare with its size
    relative = ((k - r).norm() / max(r.norm(), 1e-3 * natural)).item()
    if relative > norm_budget:
        return f"relative error {relative:.2e}, allowed {norm_budget:.0e}"
    power = (r * r).sum().item()
    if power > 1e-6 * natural:
        (slope, chance), (usual, _) = (_scale(x, r) for x in (k, lo))
        allowed = max(1e-10 if dtype == torch.float64 else 1e-3, 2 * abs(usual - 1))
        if abs(slope - 1) > max(allowed, 5 * chance):
            return f"scale {slope:.6f}, expected 1"
    return None


def _scale(found: Tensor, true: Tensor) -> tuple[float, float]:
    """<found, true> / <true, true>, and how far from 1 the errors of rows that know nothing of each other take it."""
    power = (true * true).sum()
    rows = (true * true).sum(-1) if true.dim() == 4 else true * true  # the elements of a row may err together
    return ((found * true).sum() / power).item(), ((found - true).norm() / true.norm() * rows.norm() / power).item()


def check(found: Attention, truth: Attention, low: Attention, dtype: torch.dtype) -> None:
    """Raise AssertionError that names every tensor out of its error budget."""
    broken = errors(found, truth, low, dtype)
    assert not broken, "; ".join(f"{name}: {reason}" for name, reason in broken.items())


def spmd(size: int, fn: Callable[[LocalWire], Any], *, device: torch.device | str = "cpu", per_node: int | None = None) -> list[Any]:
    """Run fn(group) as `size` ranks, threads of this process; their results in rank order. `group` goes to SequenceParallel.

    If a rank raises, its error is raised here and the others are woken.
    """
    group = LocalGroup(size, device, per_node)
    results: list[Any] = [None] * size
    failures: dict[int, BaseException] = {}

    def work(rank: int) -> None:
        try:
            # backward runs in this thread: the engine's one thread a GPU would wait for itself
            with torch.autograd.set_multithreading_enabled(False):
                results[rank] = fn(group.wire(rank))
        except BaseException as error:  # handed to the caller below
            failures[rank] = error
            group.fail()

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise min(failures.values(), key=lambda error: isinstance(error, RankLost))
    return results


def spmd_processes(size: int, fn: Callable[[], Any], *, backend: str = "gloo", timeout: float = 60.0) -> list[Any]:
    """Run fn() in `size` forked processes of one initialised process group; their results in rank order: tensors, those
    of floats as fp64, also in lists, tuples and dicts.

    Forking takes a tenth of a second where a launcher takes ten. If ranks raise, the first traceback that is not about a lost
    connection is raised here; processes alive after `timeout` seconds are killed.
    """
    import torch.distributed.tensor  # loaded once here, not once a child

    context = mp.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes, workers = [], []
        for rank in range(size):
            here, there = context.Pipe(duplex=False)
            args = (rank, size, fn, backend, f"file://{folder}/store", timeout, there)
            workers.append(context.Process(target=_child, args=args, daemon=True))
            workers[-1].start()
            there.close()
            pipes.append(here)
        replies = _collect(pipes, time.monotonic() + timeout)
        for worker in workers:
            worker.join(timeout=5.0 if all(replies) else 0.1)
            if worker.is_alive():
                worker.kill()
                worker.join()
    failures = [text for kind, text in filter(None, replies) if kind == "error"]
    failures.sort(key=lambda text: "onnection" in text)
    if failures:
        raise RuntimeError(f"a rank failed:\n{failures[0]}")
    silent = [rank for rank, reply in enumerate(replies) if reply is None]
    if silent:
        raise TimeoutError(f"ranks {silent} did not finish within {timeout:.0f} s")
    return [_mapped(value, np.ndarray, torch.from_numpy) for _, value in replies]  # type: ignore[misc]


def _collect(pipes: list[Connection], deadline: float) -> list[tuple[str, Any] | None]:
    replies: list[tuple[str, Any] | None] = [None] * len(pipes)
    waiting: dict[Any, int] = {pipe: rank for rank, pipe in enumerate(pipes)}
    while waiting and time.monotonic() < deadline:
        for pipe in any_ready(list(waiting), timeout=max(0.0, deadline - time.monotonic())):
            rank = waiting.pop(pipe)
            try:
                replies[rank] = pipes[rank].recv()
            except EOFError:
                replies[rank] = ("error", f"rank {rank} died without a word (connection closed)")
        if any(reply and reply[0] == "error" for reply in replies):
            deadline = min(deadline, time.monotonic() + 1.0)  # the others can only wait for it: a moment for their own words
    return replies


def _child(rank: int, size: int, fn: Callable[[], Any], backend: str, store: str, timeout: float, pipe) -> None:
    import datetime

    import torch.distributed as dist

    torch.set_num_threads(1)  # first: OpenMP's threads did not survive the fork
    try:
        dist.init_process_group(backend, init_method=store, rank=rank, world_size=size, timeout=datetime.timedelta(seconds=timeout / 2))
        value = fn()
        dist.barrier()
        pipe.send(("value", _plain(value)))
    except BaseException:  # handed to the parent as text
        pipe.send(("error", traceback.format_exc()))
    finally:
        pipe.close()
        os._exit(0)  # no destructors of a forked parent's state


def _plain(value: Any) -> Any:
    """Tensors leave as numpy arrays (floats as float64): handles to shared memory would not outlive the process."""
    return _mapped(value, Tensor, lambda x: (x.detach().double() if x.is_floating_point() else x.detach()).cpu().numpy())


def _mapped(value: Any, kind: type, change: Callable) -> Any:
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, dict):
        return {name: _mapped(x, kind, change) for name, x in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_mapped(x, kind, change) for x in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value
