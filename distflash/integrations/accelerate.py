"""Accelerate and Transformers' Trainer: the ranks that share a sequence get the same batches, and of each batch their tokens.

Accelerate has no slot for another way to share sequences, so this works on what it hands out: `same_batches(loader, sp)` makes
its data loaders count groups of ranks instead of ranks, `SequenceParallelTrainer` does the rest in Trainer's public methods.
With Accelerate alone no more is needed than `enable`, `shard`, and batches that are the same on the ranks of a group.

Legend: P ranks share a sequence, W ranks in all, W / P groups with batches of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from distflash.integrations.transformers import IGNORE, enable, shard
from distflash.parallel.sequence import SequenceParallel
from distflash.parallel.wire.p2p import P2PWire

if TYPE_CHECKING:
    from transformers import Trainer

    _Base = Trainer  # a mixin, but of nothing else
else:
    _Base = object


def same_batches(loader: DataLoader, sp: SequenceParallel, *, rank: int, size: int) -> DataLoader:
    """Let a loader that Accelerate prepared for `size` ranks yield the same batches on the ranks of each of their groups.

    Groups are neighbours: ranks 0 .. P - 1 share the first batch, P .. 2 P - 1 the second. The loader is changed and returned; once is as
    good as twice, for a Trainer keeps the loaders of persistent workers.
    With one group, no sample of a dataset that has a length is repeated to fill the last batch: there is none beside it.

    Raises ValueError if the ranks are no such groups, and for loaders that deal out samples in another way.
    """
    from accelerate.data_loader import BatchSamplerShard, IterableDatasetShard

    members = dist.get_process_group_ranks(sp.wire.group) if isinstance(sp.wire, P2PWire) else [rank]
    first = rank - rank % sp.size
    if size % sp.size or members != list(range(first, first + sp.size)):
        raise ValueError(f"ranks that share a sequence must be neighbours, as many in each group, got ranks {members} of {size}")
    if size == 1:
        return loader
    parts = (loader.batch_sampler, loader.sampler, loader.dataset)
    dealers = [part for part in parts if isinstance(part, (BatchSamplerShard, IterableDatasetShard))]
    groups = size // sp.size, rank // sp.size
    if len(dealers) != 1 or (dealers[0].num_processes, dealers[0].process_index) not in ((size, rank), groups):
        raise ValueError(
            f"{type(loader).__name__} does not deal out batches to {size} ranks: leave samplers that know of ranks out, and set "
            "dispatch_batches to False for an iterable dataset"
        )
    (dealer,) = dealers
    dealer.num_processes, dealer.process_index = groups
    if dealer.num_processes == 1 and isinstance(dealer, BatchSamplerShard):
        dealer.even_batches = False
    return loader


class SequenceParallelTrainer(_Base):
    """A mixin: `class Mine(SequenceParallelTrainer, Trainer): ...` is a Trainer whose ranks share sequences.

    `Mine(..., sp=sp)` enables the model with `sp` (None: all ranks share each sequence); `attention` holds further arguments of
    `enable`. One update is that of one process with the batches of all groups: the loss is the mean over all labels that count,
    of all ranks and of all batches that are accumulated, and DDP averages gradients. per_device_train_batch_size counts the
    samples of a group. Evaluation gives the loss.

    Raises ValueError on settings that would compute something else: label smoothing, NEFTune, a loss function of one's own, counting
    labels by rank, models that do not take a count of labels, or are made anew for each trial, predictions instead of the loss.
    """

    def __init__(self, *args: Any, sp: SequenceParallel | None = None, attention: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sp = SequenceParallel() if sp is None else sp  # the process group exists: TrainingArguments made it
        ranks, processes = dist.get_world_size() if dist.is_initialized() else 1, self.accelerator.num_processes
        wrong = {
            f"an Accelerator of {processes} processes among {ranks} ranks (on CPUs set use_cpu=True)": processes != ranks,
            "neftune_noise_alpha, noise that differs with the length of a shard": self.args.neftune_noise_alpha is not None,
            "label_smoothing_factor": self.args.label_smoothing_factor != 0,
            "compute_loss_func": self.compute_loss_func is not None,
            "average_tokens_across_devices=False": not self.args.average_tokens_across_devices,
            "a model whose forward takes no num_items_in_batch": not self.model_accepts_loss_kwargs,
            "model_init": self.model_init is not None,
            "several GPUs a process": self.args.n_gpu > 1,
        }
        if asked := [name for name, is_so in wrong.items() if is_so]:
            raise ValueError(f"ranks that share sequences do not go with {', '.join(asked)}")
        assert self.model is not None
        enable(self.model, self.sp, **(attention or {}))

    def get_train_dataloader(self) -> DataLoader:
        return self._same_batches(super().get_train_dataloader())

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        return self._same_batches(super().get_eval_dataloader(*args, **kwargs))

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        return self._same_batches(super().get_test_dataloader(*args, **kwargs))

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Tensor | None]:
        """This rank's tokens of the batches of one update, and the number of labels in them that count, of all ranks."""
        batches = [shard(batch, self.sp) for batch in islice(epoch_iterator, num_batches)]
        if not batches or "labels" not in batches[0]:
            return batches, None
        count = sum((batch["labels"] != IGNORE).sum() for batch in batches)
        assert isinstance(count, Tensor)
        total = self.accelerator.reduce(count.to(device), "sum")
        assert isinstance(total, Tensor)
        return batches, total.clamp(min=1)

    def get_total_train_batch_size(self, args: Any) -> int:
        """Samples of one update: the ranks of a group see the same ones."""
        return super().get_total_train_batch_size(args) // self.sp.size

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self.gather_function = self._gather_groups
        return super().evaluation_loop(*args, **kwargs)

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> tuple:
        """The loss of a batch, the same on all ranks of a group."""
        if not prediction_loss_only:
            raise ValueError("ranks that share sequences evaluate the loss: leave compute_metrics out, set prediction_loss_only=True")
        loss, *rest = super().prediction_step(model, shard(inputs, self.sp), prediction_loss_only, ignore_keys)
        return (None if loss is None else self.sp.wire.all_reduce(loss) / self.sp.size, *rest)

    def _gather_groups(self, losses: Tensor) -> Tensor:
        """What accelerator.gather_for_metrics gathers, of groups instead of ranks: one entry a sample, of the samples there are."""
        found = self.accelerator.gather(losses)
        assert isinstance(found, Tensor)
        found = found.unflatten(0, (-1, len(losses)))[:: self.sp.size].flatten()
        state = self.accelerator.gradient_state
        return found[: state.remainder] if state.end_of_dataloader and state.remainder > 0 else found

    def _same_batches(self, loader: DataLoader) -> DataLoader:
        return same_batches(loader, self.sp, rank=self.accelerator.process_index, size=self.accelerator.num_processes)
