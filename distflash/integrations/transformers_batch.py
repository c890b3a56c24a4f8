"""A batch of Transformers, dealt out to the ranks that share it.

Legend: B rows of a batch, S tokens a row, T tokens of this rank, P ranks.

The batch becomes one row of packed documents without padding: `sp.sequence(cu_seqlens=...)` says who holds which of its tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distflash.integrations.transformers_arguments import CARRIED, check_borders
from distflash.parallel.documents import borders
from distflash.parallel.sequence import SequenceParallel
from distflash.ragged import Ragged

IGNORE = -100  # the label of a token that has none, in Transformers' losses
SEQUENCE = "sharded_sequence"  # the argument of a model's forward under which the ShardedSequence travels to its layers


def shard(batch: Mapping[str, Any], sp: SequenceParallel, *, group: dist.ProcessGroup | None = None) -> dict[str, Any]:
    """This rank's tokens of a batch that is the same on all ranks of `sp`, as arguments for a model that was enabled with it.

    Args:
        batch: input_ids (B, S) or inputs_embeds (B, S, ...); if there are any, attention_mask (B, S), 0 at padding; position_ids
            (B or 1, S), which start anew where a document begins; cu_seq_lens_q with B = 1; labels (B, S), or shift_labels that
            are shifted already, those of padding do not count; num_items_in_batch, if more than this batch makes one step: the
            labels of all ranks of `group`, which has to be given where it is more than `sp`'s.
        sp: what the model was enabled with.
        group: the ranks over which gradients are averaged, where those are more than `sp`'s: data x sequence parallel ranks.

    Returns:
        input_ids and position_ids (1, T), rows one after the other and without padding; labels and shift_labels (1, T), shifted
        before tokens were dealt out; num_items_in_batch; use_cache, False; and sharded_sequence, the `ShardedSequence`:
        its `unshard(logits)` are those of all tokens.

    num_items_in_batch is the number of all labels that count, of all ranks, divided by the number of ranks: each rank's loss is
    then its share times P, the mean of these losses is the loss of the whole batch, and gradients are *averaged* over all ranks,
    as DDP, FSDP2 and ZeRO do (see `distflash.token_mean`). A rank without labels has loss 0.

    A collective. Raises ValueError on what a batch holds and ranks cannot share, and RuntimeError if ranks hold different batches.
    """
    tokens = _tokens(batch)
    rows = tokens.shape[:2]
    mask = batch.get("attention_mask")
    kept = _kept(mask, rows)
    position_ids = batch.get("position_ids")
    if position_ids is None:
        position_ids = torch.arange(rows[1], device=tokens.device)[None]
    if position_ids.dim() != 2 or position_ids.shape[1] != rows[1]:
        raise ValueError(f"position_ids must be (batch or 1, {rows[1]}), got {tuple(position_ids.shape)}")
    position_ids = position_ids.expand(rows)
    flat = {"position_ids": position_ids, "inputs_embeds" if tokens.is_floating_point() else "input_ids": tokens}
    labels = _shifted(batch)
    if labels is not None:
        flat |= {"labels": labels, "shift_labels": labels}
    flat = {name: kept.pack(x) for name, x in flat.items()}  # [tokens, ...]
    seq = sp.sequence(cu_seqlens=_documents(flat["position_ids"], kept, mask is not None, batch.get("cu_seq_lens_q")))
    if 0 in seq.lengths:
        raise ValueError(
            f"{seq.length} tokens leave rank {seq.lengths.index(0)} of {sp.size} without one, but models need one: use larger batches"
        )
    seq.agree("shard", tokens=_digest(flat))
    local: dict[str, Any] = {name: seq.shard(x, dim=0)[None] for name, x in flat.items()}
    if labels is not None:
        local["num_items_in_batch"] = _share(batch.get("num_items_in_batch"), flat["labels"], local["labels"], sp, group)
    return local | {name: batch[name] for name in CARRIED if name in batch} | {"use_cache": False, SEQUENCE: seq}


def _tokens(batch: Mapping[str, Any]) -> Tensor:
    """input_ids or inputs_embeds; raises ValueError on what shard does not know how to share."""
    known = {
        "input_ids", "inputs_embeds", "attention_mask", "position_ids", "labels", "shift_labels", "num_items_in_batch", "use_cache",
        "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", *CARRIED,
    }  # fmt: skip
    if unknown := sorted(name for name, x in batch.items() if name not in known and x is not None):
        raise ValueError(f"shard() does not know how ranks share {', '.join(unknown)}: take it out of the batch, or give it to the model")
    if batch.get("use_cache"):
        raise ValueError("use_cache=True: a cache is not shared between ranks, leave it out")
    check_borders(batch.get("cu_seq_lens_q"), batch.get("cu_seq_lens_k"))
    given = [batch[name] for name in ("input_ids", "inputs_embeds") if batch.get(name) is not None]
    if len(given) != 1 or not isinstance(given[0], Tensor) or given[0].dim() < 2:
        raise ValueError(f"batch must hold input_ids (batch, tokens), or inputs_embeds (batch, tokens, ...), got {sorted(batch)}")
    return given[0]


def _kept(mask: Tensor | None, rows: torch.Size) -> Ragged:
    """Where the tokens are that are no padding."""
    if mask is not None and mask.shape != rows:
        raise ValueError(f"attention_mask must be {tuple(rows)}, 0 at padding, got {tuple(mask.shape)}: give documents as position_ids")
    return Ragged(torch.ones(rows, dtype=torch.bool) if mask is None else mask)


def _shifted(batch: Mapping[str, Any]) -> Tensor | None:
    """The label of each token's next one (B, S), as Transformers' losses shift them: within rows, over the borders of documents."""
    if batch.get("shift_labels") is not None:
        return batch["shift_labels"]
    labels = batch.get("labels")
    return None if labels is None else nn.functional.pad(labels, (0, 1), value=IGNORE)[:, 1:]


def _documents(positions: Tensor, kept: Ragged, masked: bool, cu_seq_lens: Tensor | None) -> list[int]:
    """Borders of documents: of rows, where positions (tokens,) do not follow each other, and those that are given."""
    cu, total = kept.cu_seqlens.tolist(), len(positions)
    starts = {0, *((positions.diff() != 1).nonzero().squeeze(1) + 1).tolist()}
    if masked and (inside := sorted(starts - set(cu))):
        raise ValueError(
            f"position_ids start anew inside a row, at token {inside[0]} of those that are no padding, and there is an attention_mask: "
            "Transformers keeps documents apart only without one; leave it out of packed batches"
        )
    given = set(borders(cu_seq_lens)) if cu_seq_lens is not None else {0, total}
    if max(given) != total or (len(cu) > 2 and cu_seq_lens is not None):
        raise ValueError(f"cu_seq_lens_q ends at {max(given)}: it must end at the {total} tokens of a batch of one row")
    return sorted({*cu, *starts, *given})


def _digest(flat: Mapping[str, Tensor]) -> str:
    """Of what ranks must hold alike; embeddings may differ in their last bit."""
    told = (x for name, x in sorted(flat.items()) if name != "inputs_embeds")
    return blake2b(b"".join(x.detach().cpu().contiguous().numpy().tobytes() for x in told), digest_size=16).hexdigest()


def _share(given: Tensor | float | None, labels: Tensor, local: Tensor, sp: SequenceParallel, group: dist.ProcessGroup | None) -> float:
    """Labels that count, of all ranks over which gradients are averaged, divided by the number of these ranks."""
    if given is not None:
        total = float(given)
    elif group is None:
        total = float((labels != IGNORE).sum())
    else:
        count = (local != IGNORE).sum()
        dist.all_reduce(count, group=group)
        total = float(count)
    return max(total, 1.0) / (sp.size if group is None else group.size())
