"""The loss of a sharded sequence: one token-weighted mean over all ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from distflash.parallel.agreement import nothing
from distflash.parallel.autograd import needs_gradients
from distflash.parallel.sequence import ShardedSequence, refusing

Reduce = Callable[[Tensor], Tensor]


def token_mean(
    per_token_loss: Tensor, seq: ShardedSequence | None = None, *, ignore: Tensor | None = None, group: dist.ProcessGroup | None = None
) -> Tensor:
    """The mean of `per_token_loss` over the valid tokens of all ranks: a scalar, the same on every rank. A collective.

    Args:
        per_token_loss: (..., T) losses of the local tokens, any shape.
        seq: whose ranks share the mean; None is one device.
        ignore: True where a token does not count (what the loss holds there, NaN too, is not read). A rank without a valid
            token contributes 0; if no rank has one, the mean is 0.
        group: the ranks over which the mean is taken, where those are more than `seq`'s: data x sequence parallel ranks.

    How gradients reduce: every collective of this library, this one too, has its exact adjoint as gradient, so the gradients of
    parameters must be *averaged* over all ranks, data and sequence parallel alike. That is what DDP, FSDP2 and ZeRO do over one
    flattened group, and then one step equals that of one process that holds every token. Wrappers that sum over the sequence
    group instead need the loss divided by its size.

    Raises ValueError if the loss is a scalar, or `ignore` has another shape than it, TypeError if `seq` is no sequence.
    """
    if seq is not None and not isinstance(seq, ShardedSequence):
        raise TypeError(f"seq must come from SequenceParallel.sequence(), got {type(seq).__name__}")
    with refusing(seq if group is None else None, "token_mean"):
        if per_token_loss.dim() == 0:
            raise ValueError(
                "per_token_loss must hold a loss for each token, got a scalar: a mean of the ranks' means is not the mean of the tokens; "
                "compute it with reduction='none'"
            )
        if ignore is not None and (ignore.shape != per_token_loss.shape or ignore.dtype != torch.bool):
            expected, got = tuple(per_token_loss.shape), f"{ignore.dtype} {tuple(ignore.shape)}"
            raise ValueError(f"ignore must be a bool tensor of the loss's shape {expected}, got {got}")
    if seq is not None and group is None:
        seq.agree("token_mean", gradients=needs_gradients(per_token_loss))
    begin = seq.agreeing_on_gradient("token_mean") if seq is not None and group is None else nothing
    reduce = partial(_all_reduce, group) if group is not None else seq.sp.wire.all_reduce if seq is not None else Tensor.clone
    kept = per_token_loss if ignore is None else torch.where(ignore, 0.0, per_token_loss)
    count = kept.new_tensor(kept.numel(), dtype=torch.float64) if ignore is None else (~ignore).sum(dtype=torch.float64)
    total, count = _Sum.apply(torch.stack([kept.sum(dtype=torch.float64), count]), reduce, begin).unbind()
    return (total / count.detach().clamp(min=1.0)).to(torch.promote_types(kept.dtype, torch.float32))


def _all_reduce(group: dist.ProcessGroup, x: Tensor) -> Tensor:
    total = x.clone()
    dist.all_reduce(total, group=group)
    return total


class _Sum(torch.autograd.Function):
    """Over all ranks. Every rank gets the same sum: what flows into it on any rank flows into each term, so it is its own adjoint.
    A backward calls `begin` first.
    """

    @staticmethod
    def forward(ctx, x: Tensor, reduce: Reduce, begin: Callable[[], None]) -> Tensor:
        ctx.how = reduce, begin
        return reduce(x)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        _, begin = ctx.how
        begin()
        return _Sum.apply(grad, *ctx.how), None, None
