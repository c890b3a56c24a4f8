"""Our attention beneath DeepSpeed's Ulysses: DeepSpeed exchanges heads among U ranks, ring attention works over the R that are left.

Legend: U ranks of Ulysses (adjacent), R of a ring; B batch, S global tokens, T local tokens, H heads, D head dim.

After DeepSpeed's all-to-all a rank holds the tokens of its U ranks one after the other, which is what one rank of a ring of R holds in
the same layout (`parallel.layout.split`), and H / U heads.
"""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

import distflash
from distflash.parallel.layout import gathered
from distflash.parallel.sequence import SequenceParallel, ShardedSequence

if TYPE_CHECKING:
    from deepspeed.sequence.layer import DistributedAttention

    from distflash.integrations.deepspeed import Mpu

_NUMBER = count()


class Beneath:
    """From what all ranks of `sp` share to what attention sees on those of `ring`, and what cannot go that way."""

    def __init__(self, sp: SequenceParallel, ring: SequenceParallel):
        self.sp, self.ring = sp, ring
        self._sequences: WeakKeyDictionary[ShardedSequence, ShardedSequence] = WeakKeyDictionary()

    def sequence(self, seq: Any) -> ShardedSequence:
        """`seq`, which is one of `sp`, as the ring shares it.

        Raises ValueError, on every rank, where some that exchange heads hold different numbers of tokens: DeepSpeed's must be equal.
        """
        if not isinstance(seq, ShardedSequence) or seq.sp.wire is not self.sp.wire:
            raise TypeError(f"attention needs a sequence made by mpu.sp.sequence(), got {seq!r}")
        if self.sp.ulysses == 1:
            return seq
        if seq not in self._sequences:
            u = self.sp.ulysses
            if any(seq.lengths[i : i + u] != seq.lengths[i : i + 1] * u for i in range(0, self.sp.size, u)):
                raise ValueError(
                    f"{u} ranks that exchange heads by DeepSpeed's Ulysses must hold as many tokens each, got {seq.lengths} for "
                    f"{seq.length}: pad the sequence, or call distflash.attention with seq, which needs no padding"
                )
            self._sequences[seq] = ShardedSequence(self.ring, seq.cu_seqlens, seq.balanced_for, gathered(seq.layout, u), seq.why)
        return self._sequences[seq]

    def check_shards(self, seq: Any, tokens: int) -> None:
        """Raise unless `seq` can go through DeepSpeed's Ulysses, and this rank's shard of it has so many tokens."""
        self.sequence(seq)
        if tokens != seq.local_length:
            raise ValueError(
                f"attention was given {tokens} tokens, but this rank holds {seq.local_length} of {seq.length}: use seq.shard()"
            )

    def check_dropout(self, dropout_p: float) -> None:
        """Raise on dropout: which of all heads a rank works on is not known beneath DeepSpeed's Ulysses."""
        if dropout_p and self.sp.ulysses > 1:
            raise ValueError(
                f"dropout_p={dropout_p} beneath DeepSpeed's Ulysses would drop the same of every rank's heads: "
                "set ulysses to 1, or call distflash.attention with seq"
            )

    def heads(self, x: Tensor | None, heads: int, name: str) -> Tensor | None:
        """Of one value for each head (..., H) those of this rank's `heads`."""
        if x is None or self.sp.ulysses == 1:
            return x
        if x.shape[-1] != heads * self.sp.ulysses:
            raise ValueError(f"{name} must hold one value for each of {self.sp.ulysses} x {heads} heads, got shape {tuple(x.shape)}")
        return x.narrow(-1, self.sp.rank % self.sp.ulysses * heads, heads)


class LocalAttention(nn.Module):
    """Our attention as the `local_attn` of DeepSpeed's `DistributedAttention`: ring attention over the ranks that its Ulysses leaves.

    `batch_dim` is 0 for q, k, v of shape (B, S, H, D), 1 for (S, B, H, D). What follows them in a call of `DistributedAttention` is
    passed on: `seq`, of `mpu.sp`, and the options of `distflash.attention`. alibi_slopes and sinks are those of all heads.
    """

    def __init__(self, mpu: Mpu, *, batch_dim: int = 0):
        super().__init__()
        if batch_dim not in (0, 1):
            raise ValueError(f"batch_dim={batch_dim!r} must be 0 for (batch, tokens, heads, head_dim), or 1 for (tokens, batch, ...)")
        self.beneath, self.batch_dim = mpu.beneath, batch_dim

    def forward(self, q: Tensor, k: Tensor, v: Tensor, seq: ShardedSequence, **options: Any) -> Tensor:
        """Gathered tokens and local heads (B, S / R, H / U, D), or batch second, to the same of v's head dim."""
        if options.get("return_lse"):
            raise ValueError("return_lse=True, but DistributedAttention passes on one tensor: call distflash.attention for lse")
        self.beneath.check_dropout(options.get("dropout_p", 0.0))
        for name in ("alibi_slopes", "sinks"):
            options[name] = self.beneath.heads(options.get(name), q.shape[2], name)
        q, k, v = (x.transpose(0, self.batch_dim) for x in (q, k, v))
        out = distflash.attention(q, k, v, self.beneath.sequence(seq), **options)
        assert isinstance(out, Tensor)
        return out.transpose(0, self.batch_dim)


def distributed_attention(mpu: Mpu, *, batch_dim: int = 0) -> DistributedAttention:
    """DeepSpeed's `DistributedAttention` over the mpu's Ulysses ranks, `LocalAttention` inside; with U = 1 it is ring attention alone.

    Call it as DeepSpeed's, with a sequence: `attn(q, k, v, batch_dim_idx=batch_dim, seq=seq, causal=True)`, q (B, T, H, D) if batch_dim
    is 0, (T, B, H, D) if 1. Before anything is sent it raises ValueError or TypeError on a `seq` that DeepSpeed's all-to-all cannot serve.
    """
    from deepspeed.sequence.layer import DistributedAttention
    from deepspeed.utils import groups

    def check(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        named = dict(zip(("query", "key", "value", "batch_dim_idx", "rotary_pos_emb", "seq"), args, strict=False)) | kwargs
        if named.get("batch_dim_idx") != batch_dim:
            raise ValueError(f"batch_dim_idx={named.get('batch_dim_idx')!r}, but this attention was made with batch_dim={batch_dim}")
        for name in ("query", "key", "value"):
            mpu.beneath.check_shards(named.get("seq"), named[name].shape[1 - batch_dim])
        if named["key"].shape[2] % mpu.sp.ulysses and groups.mpu is not mpu:  # DeepSpeed asks it which heads are whose
            raise RuntimeError(
                f"{named['key'].shape[2]} key/value heads over {mpu.sp.ulysses} ranks: call deepspeed.initialize(mpu=mpu) first"
            )

    local = LocalAttention(mpu, batch_dim=batch_dim)
    group: Any = mpu.get_sequence_parallel_group()  # DeepSpeed annotates groups with a class of its own, and takes torch's
    attention = DistributedAttention(local, group, scatter_idx=2, gather_idx=1 - batch_dim)
    attention.register_forward_pre_hook(check, with_kwargs=True)
    return attention


def enable_ulysses(model: nn.Module, mpu: Mpu, **options: Any) -> None:
    """Let a Transformers model attend through DeepSpeed's `UlyssesSPAttentionHF`, with our attention as its core, over the mpu's ranks.

    The model is called with `distflash.integrations.transformers.shard(batch, mpu.sp, group=mpu.group)`; `options` are those of `enable`
    there, and what it refuses is refused here. Besides, before anything is sent, ValueError is raised on batches that DeepSpeed's
    all-to-all cannot serve, and on dropout. With U = 1 the core is called by itself.
    """
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

    from distflash.integrations.transformers import SEQUENCE, enable

    enable(model, mpu.sp, **options)
    if mpu.sp.ulysses == 1:
        return
    inner = next(m for m in model.modules() if isinstance(m, PreTrainedModel))
    config, name = inner.config.get_text_config(), inner.config._attn_implementation
    core, heads = AttentionInterface()[name], config.num_attention_heads
    group: Any = mpu.get_sequence_parallel_group()

    def beneath(module: nn.Module, q: Tensor, *args: Any, s_aux: Tensor | None = None, **options: Any):
        options |= {SEQUENCE: mpu.beneath.sequence(options[SEQUENCE]), "s_aux": mpu.beneath.heads(s_aux, q.shape[1], "s_aux")}
        return core(module, q, *args, **options)

    ulysses = UlyssesSPAttentionHF(
        attn=beneath,
        batch_size=1,  # what shard() makes of any batch
        attn_head_count=heads,
        attn_head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
        kv_head_count=config.num_key_value_heads,
        num_hidden_layers=config.num_hidden_layers,
        process_group=group,
        seq_length_is_variable=True,
    )

    def attention(module: nn.Module, q: Tensor, *args: Any, dropout: float = 0.0, **options: Any):
        mpu.beneath.check_dropout(dropout)
        mpu.beneath.check_shards(options.get(SEQUENCE), q.shape[2])
        return ulysses(module, q, *args, **options)

    through = f"{name}_ulysses_{next(_NUMBER)}"  # one for each model: it knows how many heads there are
    AttentionInterface.register(through, attention)
    AttentionMaskInterface.register(through, AttentionMaskInterface()[name])
    inner.set_attn_implementation(through)
