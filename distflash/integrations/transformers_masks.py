"""What a Transformers model lets its tokens see, as documents and a window: read off the model's own mask function.

Legend: B rows of the batch, Q queries a row, K keys a row (the last Q of them are the queries'), H heads, D head dim.

Transformers hands a mask function mask(row, head, query, key) -> bool to whoever registered under the attention's name: causal,
windowed, chunked or bidirectional, packed documents included, padding beside it. Nothing here looks inside it. The token before
says where documents begin, `local_size` how wide the window is, and the ends of every query's keys are asked whether that is so:
what is no window inside documents is refused, never dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distflash.parallel.documents import borders
from distflash.ragged import Ragged


@dataclass(eq=False)
class Visible:
    """Which keys each query sees: a window inside documents."""

    window_size: tuple[int, int]  # as in distflash.attention
    joined: Tensor  # bool [B, K] on the CPU: this token and the one before it are of one document
    valid: Tensor | None  # bool [B, K] on the CPU, False is padding; None: no padding
    queries: int
    k_rows: Ragged | None = None  # of valid
    _checked: list[Tensor] = field(default_factory=list, repr=False)
    _packed: dict[int, Packed | None] = field(default_factory=dict, repr=False)

    def check_positions(self, position_ids: Tensor | None, sharded: bool) -> None:
        """Raise ValueError where positions say other documents than the mask.

        Alone the mask decides: tokens must not see across a border that positions make. Sharded, the sequence has the documents:
        the mask must not part tokens whose positions follow each other.
        """
        if position_ids is None or position_ids.dim() != 2 or position_ids.shape[1] != self.joined.shape[1]:
            return
        if any(position_ids is done for done in self._checked):
            return
        follows = position_ids.detach().diff(dim=1).cpu() == 1
        joined = self.joined[:, 1:]
        both = torch.ones_like(joined) if self.valid is None else self.valid[:, 1:] & self.valid[:, :-1]
        wrong = both & (~joined & follows if sharded else joined & ~follows)
        if wrong.any():
            row, token = wrong.nonzero()[0].tolist()
            told = f"token {token + 1} of row {row}"
            if sharded:
                raise ValueError(f"the model's mask parts {told} from the one before, which only documents can do across ranks")
            raise ValueError(
                f"position_ids start anew at {told}, as packed documents do, but the model's mask lets it see the tokens before: "
                "Transformers keeps documents apart without attention_mask, with use_cache=False and in most models; elsewhere give "
                "cu_seq_lens_q and cu_seq_lens_k"
            )
        self._checked.append(position_ids)

    def packed(self, cu_seqlens: Tensor | None) -> Packed | None:
        """The documents, with those of `cu_seqlens` if given; None if every row is one document without padding."""
        key = id(cu_seqlens)
        if key not in self._packed:
            self._packed[key] = self._pack(cu_seqlens)
            self._checked += [] if cu_seqlens is None else [cu_seqlens]  # kept alive, so that nothing else gets its id
        return self._packed[key]

    def _pack(self, cu_seqlens: Tensor | None) -> Packed | None:
        whole = self.valid is None and bool(self.joined[:, 1:].all())
        if whole and cu_seqlens is None:
            return None
        rows, keys = self.joined.shape
        q_rows = None if self.valid is None else Ragged(self.valid[:, keys - self.queries :])
        is_query = torch.arange(keys) >= keys - self.queries
        valid = torch.ones(rows, keys, dtype=torch.bool) if self.valid is None else self.valid
        begins = ~self.joined[valid]  # [T]
        if cu_seqlens is not None:
            cu = borders(cu_seqlens)
            if cu[-1] != len(begins) or self.queries != keys:
                raise ValueError(
                    f"cu_seq_lens_q ends at {cu[-1]}, but there are {len(begins)} keys and {rows * self.queries} queries: it must "
                    "cover all tokens, without padding and without a cache"
                )
            begins[[c for c in cu if c < cu[-1]]] = True
        documents = begins.cumsum(0) - 1  # [T]
        mine = documents[is_query.expand(rows, -1)[valid]]
        counts = [x.bincount(minlength=int(documents[-1]) + 1).cumsum(0).tolist() for x in (mine, documents)]
        cu_q, cu_k = (torch.tensor([0, *count], dtype=torch.int32) for count in counts)
        return Packed(cu_q, cu_k, q_rows, self.k_rows)


@dataclass(eq=False)
class Packed:
    """Documents of queries and keys, and where they are in the padded batch (None: nothing is padding)."""

    cu_q: Tensor
    cu_k: Tensor
    q_rows: Ragged | None
    k_rows: Ragged | None

    def pack(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, S, H, D) -> (T, H, D)."""
        if self.q_rows is None or self.k_rows is None:
            return q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
        return self.q_rows.pack(q), self.k_rows.pack(k), self.k_rows.pack(v)

    def pad(self, out: Tensor, rows: int) -> Tensor:
        """(T, H, D) -> (B, Q, H, D), 0 at padding."""
        return out.unflatten(0, (rows, -1)) if self.q_rows is None else self.q_rows.pad(out)


def read(
    *,
    batch_size: int,
    kv_length: int,
    mask_function: Callable[..., Tensor],
    q_length: int = 0,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    cache_position: Tensor | None = None,  # what q_length and q_offset were in Transformers 5.0
    device: torch.device | str | None = None,
    **_: object,  # dtype, config and hints for other attentions
) -> Visible:
    """What Transformers calls to make a mask; see AttentionMaskInterface. Raises ValueError on what is no window inside documents."""
    if use_vmap:
        raise ValueError(
            "the model adds a mask function of its own (images or prefixes that see forward): this attention computes causal, "
            "bidirectional, windowed and chunked masks with documents and padding; use attn_implementation='sdpa' for others"
        )
    if cache_position is not None:
        q_length, q_offset, device = len(cache_position), int(cache_position[0]), cache_position.device
    q_offset = int(q_offset)
    if q_offset + q_length != kv_offset + kv_length:
        raise ValueError(
            f"queries end at token {q_offset + q_length} and keys at {kv_offset + kv_length}: cross-attention and caches of a fixed "
            "size are not computed; use a dynamic cache, or attn_implementation='sdpa'"
        )
    if attention_mask is not None:
        if attention_mask.dim() != 2:
            raise ValueError(f"attention_mask must be (batch, tokens), 0 at padding, got {attention_mask.dim()}-D {attention_mask.dtype}")
        device = attention_mask.device
    row = torch.arange(batch_size, device=device)[:, None]  # [B, 1]
    at = torch.arange(kv_length, device=device)[None]  # [1, K]

    def sees(key: Tensor) -> Tensor:
        """bool [B, K]: the query at each token sees the key [1 or B, K]; both are counted from the first key."""
        kept = mask_function(row, torch.zeros_like(row), at + kv_offset, key.clamp(0, kv_length - 1) + kv_offset)
        return torch.as_tensor(kept, device=at.device).bool().expand(batch_size, kv_length)

    is_query = at >= kv_length - q_length
    valid = _valid(attention_mask, kv_offset, kv_length, at.expand(batch_size, -1))
    whole = bool(valid.all())
    k_rows = None if whole else Ragged(valid)
    joined = (sees(at - 1) | ~is_query) & (at > 0) & valid & valid.roll(1, 1)
    causal = not (sees(at + 1) & is_query & joined.roll(-1, 1) & (at < kv_length - 1)).any()
    wide = kv_length if local_size is None else local_size - 1 if causal else local_size
    first = torch.where(joined, 0, at).cummax(1).values  # [B, K] of the token's document
    last = torch.where(joined.roll(-1, 1) & (at < kv_length - 1), kv_length, at).flip(1).cummin(1).values.flip(1)
    low = torch.maximum(first, at - wide)
    high = at.expand(batch_size, -1) if causal else torch.minimum(last, at + wide)
    wrong = torch.zeros_like(valid)
    for key in (low, high, (low + high) // 2, at, low - 1, high + 1, at * 0, at * 0 + kv_length - 1, first - 1, last + 1):
        there = (key >= 0) & (key < kv_length) & valid.gather(1, key.expand(batch_size, -1).clamp(0, kv_length - 1))
        wrong |= there & (sees(key) != ((low <= key) & (key <= high)))
    wrong &= valid & is_query
    if wrong.any():
        r, token = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"the model's mask for token {token} of row {r} is no window inside a document "
            f"({'causal' if causal else 'bidirectional'}, local size {local_size}): use attn_implementation='sdpa'"
        )
    left = -1 if local_size is None else wide
    return Visible((left, 0 if causal else left), joined.cpu(), None if whole else valid.cpu(), q_length, k_rows)


def _valid(attention_mask: Tensor | None, kv_offset: int, kv_length: int, at: Tensor) -> Tensor:
    """bool [B, K], False at padding."""
    if attention_mask is None:
        return torch.ones_like(at, dtype=torch.bool)
    kept = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    return torch.nn.functional.pad(kept, (0, kv_length - kept.shape[1]))


def unread(causal: bool, sliding_window: int | None, queries: int, keys: int, rows: int) -> Visible:
    """What a layer sees whose model made no mask."""
    left = -1 if sliding_window is None else sliding_window - 1
    joined = torch.ones(rows, keys, dtype=torch.bool)
    joined[:, 0] = False
    return Visible((left, 0 if causal else left), joined, None, queries)
