"""The model of benchmarks/paper/context.py on all ranks: steps, held-out losses, features.

Legend: N tokens of a row, T local tokens, C model width, L bytes of the longest context.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import distflash
from benchmarks.paper.texts import windows
from distflash.train.data import IGNORE
from distflash.train.loop import Mesh
from distflash.train.model import ModelConfig
from distflash.train.optimize import clip_gradients, make_optimizer, set_learning_rate
from distflash.train.placement import build


@dataclass(frozen=True)
class Size:
    """How large an experiment is; `steps` None: as many as the budget has room for."""

    contexts: tuple[int, ...]
    model: ModelConfig
    rate: float  # peak learning rate
    row: int  # tokens a step: `row` / L crops of L
    crops: tuple[int, int]  # of the classification: training, test
    most: int  # bytes of a held-out document that are predicted
    edges: tuple[int, ...]  # bytes before a byte: borders of the buckets
    steps: tuple[int, int] | None = None  # of the common phase and of each run
    held: int = 10**9  # held-out documents that are predicted
    before: int = 2  # steps of the common phase for each step of a run


class Learner:
    """A model on all ranks, and what is done with it; every sequence is shared by all of them."""

    def __init__(self, size: Size, world: Any, dtype: torch.dtype):
        self.size, self.device = size, world.device
        mesh = Mesh.make(world, world.size)
        self.group, self.parallel = mesh.group, distflash.SequenceParallel(mesh.cp_mesh, layout="zigzag")
        self.placement = build(size.model, world.device, seed=0, dtype=dtype, kernel="auto", recompute=False, group=mesh.group)
        self.model = self.placement.model
        self.optimizer = make_optimizer(self.model, size.rate, 0.1)
        self.sequence = cache(self._sequence)

    def _sequence(self, tokens: int, context: int) -> Any:
        model = self.size.model
        cu_seqlens = torch.arange(0, tokens + 1, context, dtype=torch.int32)
        return self.parallel.sequence(cu_seqlens=cu_seqlens, heads=(model.heads, model.kv_heads, model.head_dim))

    def sums(self, x: Tensor) -> Tensor:
        """Over the ranks, fp64."""
        total = x.double()
        if self.group is not None:
            dist.all_reduce(total, group=self.group)
        return total

    def agreed(self, seconds: float) -> float:
        """The mean over ranks, so that all decide alike."""
        return self.sums(torch.tensor([seconds], device=self.device)).item() / self.parallel.size

    def losses(self, tokens: Tensor, labels: Tensor, context: int) -> tuple[Tensor, Tensor, Any]:
        """(nats [1, T], labels [1, T], sequence) of tokens and labels [N], attention inside pieces of `context`."""
        seq = self.sequence(len(tokens), context)
        mine = seq.shard(labels.to(self.device)[None])
        logits = self.placement.forward(seq.shard(tokens.to(self.device)[None]), seq)  # [1, T, V]
        return F.cross_entropy(logits.flatten(0, 1), mine.flatten(), ignore_index=IGNORE, reduction="none")[None], mine, seq

    def step(self, pieces: Tensor, context: int, rate: float) -> float:
        """One of the optimizer, on crops [count, length + 1]; the loss, nats a byte."""
        tokens, labels = pieces[:, :-1].flatten(), pieces[:, 1:].flatten()
        per_token, mine, seq = self.losses(tokens, labels, context)
        loss = distflash.token_mean(per_token, seq, ignore=mine == IGNORE, group=self.group)
        loss.backward()
        self.placement.average_gradients()
        clip_gradients(self.placement, 1.0)
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def state(self) -> tuple[Any, Any]:
        return copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()))

    def restore(self, state: tuple[Any, Any]) -> None:
        self.model.load_state_dict(state[0])
        self.optimizer.load_state_dict(copy.deepcopy(state[1]))

    @torch.no_grad()
    def held_out(self, texts: Sequence[bytes], context: int, alive: Callable[[], None]) -> np.ndarray:
        """[documents, buckets, 2]: nats and bytes."""
        edges, row = torch.tensor(self.size.edges), self.size.row
        found = torch.zeros(len(texts) * len(edges), 2, dtype=torch.float64, device=self.device)
        pieces = [(n, *one) for n, text in enumerate(texts) for one in windows(len(text), context)]
        for first in range(0, len(pieces), row // context):
            tokens, labels = torch.zeros(row, dtype=torch.int64), torch.full((row,), IGNORE)
            bins = torch.zeros(row, dtype=torch.int64)  # of each token: document and bucket
            for at, (n, start, counted) in zip(range(0, row, context), pieces[first : first + row // context], strict=False):
                text = torch.from_numpy(np.frombuffer(texts[n], np.uint8, context + 1, start).astype(np.int64))
                tokens[at : at + context], labels[at + counted : at + context] = text[:-1], text[counted + 1 :]
                before = torch.arange(start + 1, start + context + 1)  # bytes of the document before the one that is predicted
                bins[at : at + context] = n * len(edges) + torch.bucketize(before, edges, right=True) - 1
            nats, mine, seq = self.losses(tokens, labels, context)
            both = torch.stack([nats[0], (mine[0] != IGNORE).float()], 1).double()  # [T, 2]
            found.index_add_(0, seq.shard(bins.to(self.device)[None])[0], both)
            alive()
        return self.sums(found).view(len(texts), len(edges), 2).cpu().numpy()

    @torch.no_grad()
    def features(self, pieces: Tensor, context: int, alive: Callable[[], None]) -> Tensor:
        """[crops, C] fp64 on the CPU: the mean of the last hidden states over the first `context` bytes of crops [crops, L + 1]."""
        at_once, found = self.size.row // context, []
        seq = self.sequence(self.size.row, context)
        crop = seq.indices.to(self.device) // context  # [T]
        hidden: list[Tensor] = []
        hook = self.model.norm.register_forward_hook(lambda module, args, out: hidden.append(out[0].float()))
        for some in pieces[:, :context].split(at_once):
            tokens = F.pad(some.flatten(), (0, self.size.row - some.numel()))
            self.placement.forward(seq.shard(tokens.to(self.device)[None]), seq)
            means = torch.zeros(at_once, self.size.model.dim, device=self.device).index_add_(0, crop, hidden.pop() / context)
            found.append(self.sums(means)[: len(some)].cpu())
            alive()
        hook.remove()
        return torch.cat(found)
