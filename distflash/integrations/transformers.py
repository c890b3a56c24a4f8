"""Transformers: `enable(model, sp)` makes a model's attention ours, `shard(batch, sp)` gives each rank its tokens of a batch.

Legend: B rows of a batch, S tokens a row, Q queries and K keys a row (without a cache S), H heads, Hk key/value heads, D head dim.

On one device, padding, packed documents, chunks and windows come from the model's own masks (transformers_masks). Across ranks the
documents are those of the batch (transformers_batch), whose `ShardedSequence` travels to the layers among the arguments of the
model's forward, so that a checkpointed layer that runs again gets the same one.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from distflash.api import attention
from distflash.integrations.transformers_arguments import check_borders, check_known
from distflash.integrations.transformers_batch import IGNORE, SEQUENCE, shard
from distflash.integrations.transformers_masks import Visible, read, unread
from distflash.kernels.select import KERNELS
from distflash.parallel.sequence import SequenceParallel, ShardedSequence

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["IGNORE", "SEQUENCE", "enable", "shard"]

RECURRENT = {"linear_attention", "mamba", "conv", "hybrid", "hybrid_sliding"}  # layer types whose tokens meet by other ways than attention


def enable(model: nn.Module, sp: SequenceParallel | None = None, *, kernel: str = "auto", deterministic: bool = False) -> None:
    """Replace all attention of a Transformers model by `distflash.attention`, on one device, or across the ranks of `sp`.

    Without `sp`, call the model as usual: padding, packed documents (positions that restart, or cu_seq_lens_q), windows, softcap,
    sinks, dropout, cross-attention, generation with a dynamic cache. With `sp`, call it with batches that come from `shard`;
    `enable(model)` returns it to whole sequences, say for generation. `kernel` and `deterministic` are those of `distflash.attention`.

    Layers that are not attention stay as they are: where there are such that mix tokens, packed documents are refused in the forward.
    Raises ValueError on models whose attention cannot be replaced, and with `sp` on models that would compute a shard of the tokens
    wrong: tokens mixed by other layers than attention, positions that the model makes itself, RoPE that depends on the longest
    position in the batch, a loss that is not the mean over next tokens, a router's loss.
    """
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

    inner = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)  # PEFT wraps models
    if inner is None:
        raise TypeError(f"model must be a transformers.PreTrainedModel, or hold one, got {type(model).__name__}")
    if kernel != "auto" and kernel not in KERNELS:
        raise ValueError(f"kernel={kernel!r} is not known: use 'auto' or one of {', '.join(map(repr, KERNELS))}")
    if sp is not None and (reason := _why_not(inner)):
        raise ValueError(f"{type(inner).__name__} cannot share a sequence between ranks: {reason}")
    # Transformers takes a name with "flash" in it for one of its own
    asked = _Asked(sp is not None, kernel, deterministic, hybrid=sp is None and _is_hybrid(inner))
    words = [word for word, true in (("deterministic", deterministic), ("hybrid", asked.hybrid)) if true]
    name = "_".join(["exact_sharded" if sp is not None else "exact", kernel, *words])
    AttentionInterface.register(name, partial(_attention, asked))
    AttentionMaskInterface.register(name, read)  # without one, Transformers drops padding and documents
    inner.set_attn_implementation(name)
    models = [m for m in inner.modules() if isinstance(m, PreTrainedModel)]
    kept = {type(m).__name__: m.config._attn_implementation for m in models if m.config._attn_implementation != name}
    if kept:
        raise ValueError(f"the attention of {', '.join(f'{m} is still {was!r}' for m, was in kept.items())}: it cannot be exchanged")


class _Asked(NamedTuple):
    """How a model was enabled."""

    sharded: bool
    kernel: str
    deterministic: bool
    hybrid: bool  # attention is not all that mixes tokens


def _attention(
    enabled: _Asked,
    module: nn.Module,
    query: Tensor,  # [B, H, Q, D]
    key: Tensor,  # [B, Hk, K, D]
    value: Tensor,
    attention_mask: Visible | Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,  # [H], attention sinks
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    sharded_sequence: ShardedSequence | None = None,
    deterministic: bool = False,
    **others: object,
) -> tuple[Tensor, None]:
    """What the layers of a model call; see AttentionInterface. Returns (B, Q, H, D)."""
    check_known(others, "use attn_implementation='eager'")
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x.to(dtype) for x in (query, key, value))  # RoPE may have widened q and k
    seen, causal = _visible(module, attention_mask, is_causal, sliding_window, query, key)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # [B, S, H, D]
    call = partial(
        attention, causal=causal is not False, window_size=seen.window_size(causal is not False), softmax_scale=scaling,
        softcap=softcap or 0.0, sinks=s_aux, dropout_p=dropout, deterministic=enabled.deterministic or deterministic, kernel=enabled.kernel,
    )  # fmt: skip
    if enabled.sharded:
        _check_sharded(sharded_sequence, causal, cu_seq_lens_q, others)
        seen.check_positions(position_ids, sharded=True)
        return _out(call(q, k, v, sharded_sequence)), None
    if sharded_sequence is not None:
        raise ValueError("the batch comes from shard(), but the model was enabled alone: use enable(model, sp)")
    if seen.lengths != (query.shape[2], key.shape[2]):  # across ranks DeepSpeed's Ulysses gathers tokens, and only the window counts
        raise ValueError(
            f"{type(module).__name__} attends with {query.shape[2]} queries to {key.shape[2]} keys, but the model's mask is of "
            f"{seen.lengths[0]} and {seen.lengths[1]}: use attn_implementation='sdpa'"
        )
    check_borders(cu_seq_lens_q, cu_seq_lens_k)
    if cu_seq_lens_q is None:  # those that are given say where documents begin, whatever the positions
        seen.check_positions(position_ids, sharded=False)
    if enabled.hybrid and ((cu_seq_lens_q is not None and len(cu_seq_lens_q) > 2) or seen.holds_documents()):
        raise ValueError(
            "attention would keep the packed documents of a row apart, but this model has linear attention, convolutions or other "
            "recurrent layers, which would mix them: give each document a row of its own, padded with attention_mask"
        )
    packed = seen.packed(cu_seq_lens_q)
    if packed is None:
        return _out(call(q, k, v)), None
    out = call(*packed.pack(q, k, v), cu_seqlens_q=packed.cu_q, cu_seqlens_k=packed.cu_k)
    return packed.pad(_out(out), len(q)), None


def _out(result: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    assert isinstance(result, Tensor)  # no lse was asked for
    return result


def _visible(
    module: nn.Module, mask: Visible | Tensor | None, is_causal: bool | None, window: int | None, query: Tensor, key: Tensor
) -> tuple[Visible, bool | None]:
    """What the tokens see, and whether that is none after them, None where it makes no difference to them and nobody says.

    Raises ValueError where the arguments contradict the mask.
    """
    if isinstance(mask, Tensor):
        raise ValueError(
            f"a mask of one's own, here {tuple(mask.shape)} {mask.dtype}, is not computed: give documents as position_ids that start "
            "anew and padding as attention_mask (batch, tokens), or use attn_implementation='sdpa'"
        )
    said = getattr(module, "is_causal", None) if is_causal is None else is_causal
    if mask is None:
        if said is None or (window is not None and not said):
            raise ValueError(f"{type(module).__name__} has neither a mask nor is_causal, or a window without either: what may it see?")
        return unread(said, window, query.shape[2], key.shape[2], rows=len(key)), said
    causal = said if mask.causal is None else mask.causal
    if is_causal is not None and is_causal != causal:
        raise ValueError(f"is_causal={is_causal} contradicts the model's mask, which is {'causal' if causal else 'bidirectional'}")
    if window is not None and causal and mask.local_size != window and not (mask.local_size is None and window >= key.shape[2]):
        raise ValueError(f"sliding_window={window} contradicts the model's mask, whose window is {mask.local_size or 'unlimited'}")
    return mask, causal


def _check_sharded(seq: ShardedSequence | None, causal: bool | None, cu_seq_lens_q: Tensor | None, others: Mapping[str, object]) -> None:
    if seq is None:
        raise ValueError(
            "the model was enabled across ranks, and this batch is not sharded, or the model does not hand its arguments to attention: "
            "call it with shard(batch, sp), or enable(model) for whole sequences"
        )
    if not causal:
        which = "is bidirectional" if causal is False else "has no two tokens of a document here, nor has its layer is_causal"
        raise ValueError(f"across ranks only causal models are computed, and this mask {which}")
    if cu_seq_lens_q is not None:
        raise ValueError("cu_seq_lens_q beside sharded_sequence: leave it out, shard() has read it")
    if others.get("output_router_logits"):
        raise ValueError("output_router_logits: each rank would balance its own tokens only; leave it out across ranks")


def _why_not(model: PreTrainedModel) -> str | None:
    """Why a model would compute a shard of the tokens wrong, None if it would not."""
    config = model.config.get_text_config()
    arguments = inspect.signature(model.forward).parameters
    layers = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    ropes = getattr(config, "rope_parameters", None) or {}
    kinds = {str(r.get("rope_type")) for r in [ropes, *ropes.values()] if isinstance(r, Mapping)} & {"dynamic", "longrope"}
    mixing = [type(m).__name__ for m in model.modules() if isinstance(m, nn.Conv1d) or getattr(m, "_is_stateful", False)]
    numbering = [type(m).__name__ for m in model.modules() if _numbers_positions(m)]
    if getattr(config, "is_encoder_decoder", False):
        return "it has an encoder and a decoder"
    if numbering:
        return f"{numbering[0]} numbers positions itself, from token numbers or padding, which a shard does not show"
    if layers or mixing or getattr(config, "attention_chunk_size", None) is not None:
        what = sorted(layers) or mixing[:1] or ["chunked attention"]
        return f"{', '.join(what)} would see only the tokens of its rank"
    if kinds:
        return f"RoPE of type {', '.join(sorted(kinds))} depends on the longest position at hand, which differs from rank to rank"
    if "position_ids" not in arguments or not any(a.kind is a.VAR_KEYWORD for a in arguments.values()):
        return "its forward does not take position_ids, or no further arguments"
    if getattr(model, "loss_type", None) not in (None, "ForCausalLM", "ForConditionalGeneration"):
        return f"its loss is {model.loss_type}, not that of next tokens"
    if getattr(config, "output_router_logits", False):
        return "config.output_router_logits: the router's loss is no sum over tokens, each rank would balance its own; set it to False"
    return None


def _is_hybrid(model: PreTrainedModel) -> bool:
    """Whether tokens also meet in layers that know nothing of the documents that attention is told: those of Qwen3-Next, LFM2, Bamba."""
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    return bool(kinds & RECURRENT) or any(getattr(m, "_is_stateful", False) for m in model.modules())


def _numbers_positions(module: nn.Module) -> bool:
    """Whether positions are made from numbers of tokens, as RoBERTa's are, or from the padding mask, as OPT's."""
    of_padding = isinstance(module, nn.Embedding) and "attention_mask" in inspect.signature(module.forward).parameters
    return of_padding or hasattr(module, "create_position_ids_from_input_ids")
