"""What a Transformers model lets its tokens see, as documents and a window, from the model's own mask function.

Legend: B rows of the batch, Q queries a row, K keys a row (the last Q of them are the queries'), H heads, D head dim.

Transformers hands a mask function mask(row, head, query, key) -> bool to whoever registered under the attention's name: causal,
windowed, chunked or bidirectional, packed documents included, padding beside it. Nothing here looks inside it. The token before
says where documents begin, `local_size` how wide the window is, and the ends of every query's keys are asked whether that is so:
what is no window inside documents is refused, never dropped. Masks that hide nothing but padding are read first: their keys may
be those of an encoder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NoReturn

import torch
from torch import Tensor

from distflash.parallel.documents import borders
from distflash.ragged import Ragged


def _no_tensor() -> NoReturn:  # an AttributeError, so that hasattr says no
    raise AttributeError("the model calculates with its mask, which is no tensor here: use attn_implementation='sdpa'")


@dataclass(eq=False)
class Visible:
    """Which keys each query sees: a window inside documents."""

    causal: bool | None  # None: no query has a later key in its document, so that both are the same
    local_size: int | None  # keys that a query sees: itself and those before if causal, else so many on either side; None: all
    joined: Tensor  # bool [B, K] on the CPU: this token and the one before it are of one document
    valid: Tensor | None  # bool [B, K], False is padding; None: no padding
    queries: int
    _checked: list[Tensor] = field(default_factory=list, repr=False)
    _packed: dict[int, Packed | None] = field(default_factory=dict, repr=False)

    @property
    def lengths(self) -> tuple[int, int]:
        """Queries and keys of a row."""
        return self.queries, self.joined.shape[1]

    def window_size(self, causal: bool) -> tuple[int, int]:
        """As in `distflash.attention`."""
        left = -1 if self.local_size is None else self.local_size - causal  # itself counts if causal
        return left, 0 if causal else left

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # what copy and others look for
            raise AttributeError(name)
        _no_tensor()

    def __getitem__(self, _: object) -> NoReturn:
        _no_tensor()

    @classmethod
    def __torch_function__(cls, *_: object) -> NoReturn:
        _no_tensor()

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
        both = torch.ones_like(joined) if self.valid is None else (self.valid[:, 1:] & self.valid[:, :-1]).cpu()
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

    def holds_documents(self) -> bool:
        """Whether a row has two tokens beside each other, no padding, that are not of one document."""
        apart = ~self.joined[:, 1:]
        return bool((apart if self.valid is None else apart & (self.valid[:, 1:] & self.valid[:, :-1]).cpu()).any())

    def packed(self, cu_seqlens: Tensor | None) -> Packed | None:
        """The documents, with those of `cu_seqlens` if given; None if every row is one document without padding."""
        key = id(cu_seqlens)
        if key not in self._packed:
            self._packed[key] = self._pack(cu_seqlens)
            self._checked += [] if cu_seqlens is None else [cu_seqlens]  # kept alive, so that nothing else gets its id
        return self._packed[key]

    def _pack(self, cu_seqlens: Tensor | None) -> Packed | None:
        rows, keys = self.joined.shape
        if self.valid is None and cu_seqlens is None and bool(self.joined[:, 1:].all()):
            return None
        valid = torch.ones(rows, keys, dtype=torch.bool) if self.valid is None else self.valid
        of_keys, here = Ragged(valid), valid.cpu()
        begins = ~self.joined[here]  # [T]
        one_a_row = cu_seqlens is None and int(begins.sum()) == int(here.any(1).sum())
        if one_a_row and self.local_size is None and (self.causal is False or self.queries == 1):
            # each query sees all keys of its row, which may be an encoder's: their padding says nothing about queries
            return Packed(torch.arange(rows + 1, dtype=torch.int32) * self.queries, of_keys.cu_seqlens, None, of_keys)
        if cu_seqlens is not None:
            cu = borders(cu_seqlens)
            if cu[-1] != len(begins) or self.queries != keys:
                raise ValueError(
                    f"cu_seq_lens_q ends at {cu[-1]}, but there are {len(begins)} keys and {rows * self.queries} queries: it must "
                    "cover all tokens, without padding and without a cache"
                )
            begins[[c for c in cu if c < cu[-1]]] = True
        documents = begins.cumsum(0) - 1  # [T]
        is_query = torch.arange(keys) >= keys - self.queries
        mine = documents[is_query.expand(rows, -1)[here]]
        counts = [x.bincount(minlength=int(documents[-1]) + 1).cumsum(0).tolist() for x in (mine, documents)]
        cu_q, cu_k = (torch.tensor([0, *count], dtype=torch.int32) for count in counts)
        return Packed(cu_q, cu_k, Ragged(valid[:, keys - self.queries :]), of_keys)


@dataclass(eq=False)
class Packed:
    """Documents of queries and keys, and where these are in the padded batch."""

    cu_q: Tensor
    cu_k: Tensor
    q_rows: Ragged | None  # None: no query is left out
    k_rows: Ragged

    def pack(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, S, H, D) -> (T, H, D)."""
        return q.flatten(0, 1) if self.q_rows is None else self.q_rows.pack(q), self.k_rows.pack(k), self.k_rows.pack(v)

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
    if attention_mask is not None:
        if attention_mask.dim() != 2:
            raise ValueError(f"attention_mask must be (batch, tokens), 0 at padding, got {attention_mask.dim()}-D {attention_mask.dtype}")
        device = attention_mask.device
    row = torch.arange(batch_size, device=device)[:, None]  # [B, 1]
    at = torch.arange(kv_length, device=device)[None]  # [1, K]
    valid = _valid(attention_mask, kv_offset, kv_length, at.expand(batch_size, -1))
    padded = None if valid.all() else valid
    aligned = q_offset + q_length == kv_offset + kv_length  # queries are the last tokens of the keys
    if local_size is None and _hides_nothing(mask_function, row, torch.arange(q_length, device=device) + q_offset, at[0] + kv_offset):
        joined = valid & valid.roll(1, 1) & (at > 0)
        return Visible(None if aligned and q_length == 1 else False, None, joined.cpu(), padded, q_length)
    if not aligned:
        raise ValueError(
            f"queries end at token {q_offset + q_length} and keys at {kv_offset + kv_length}, and the mask hides some of them: caches "
            "of a fixed size are not computed; use a dynamic cache, or attn_implementation='sdpa'"
        )

    def sees(key: Tensor) -> Tensor:
        """bool [B, K]: the query at each token sees the key [1 or B, K]; both are counted from the first key."""
        kept = mask_function(row, torch.zeros_like(row), at + kv_offset, key.clamp(0, kv_length - 1) + kv_offset)
        return torch.as_tensor(kept, device=at.device).bool().expand(batch_size, kv_length)

    causal, joined = _window(sees, at, at >= kv_length - q_length, valid, local_size)
    return Visible(causal, local_size, joined.cpu(), padded, q_length)


def _window(
    sees: Callable[[Tensor], Tensor], at: Tensor, is_query: Tensor, valid: Tensor, local_size: int | None
) -> tuple[bool | None, Tensor]:
    """`causal` and `joined` of Visible, of a mask that sees(key) tells. Raises ValueError on what is no window inside documents."""
    kv_length = at.shape[1]
    joined = (sees(at - 1) | ~is_query) & (at > 0) & valid & valid.roll(1, 1)
    later = is_query & joined.roll(-1, 1) & (at < kv_length - 1)  # the next key is of the same document
    causal = not (sees(at + 1) & later).any() if later.any() else None
    wide = kv_length if local_size is None else local_size - (causal is not False)
    first = torch.where(joined, 0, at).cummax(1).values  # [B, K] of the token's document
    last = torch.where(joined.roll(-1, 1) & (at < kv_length - 1), kv_length, at).flip(1).cummin(1).values.flip(1)
    low = torch.maximum(first, at - wide)
    high = torch.minimum(last, at + wide) if causal is False else at.expand_as(valid)
    wrong = torch.zeros_like(valid)
    for key in (low, high, (low + high) // 2, at, low - 1, high + 1, at * 0, at * 0 + kv_length - 1, first - 1, last + 1):
        there = (key >= 0) & (key < kv_length) & valid.gather(1, key.expand_as(valid).clamp(0, kv_length - 1))
        wrong |= there & (sees(key) != ((low <= key) & (key <= high)))
    wrong &= valid & is_query
    if wrong.any():
        Ragged(valid)  # padding between tokens is wrong here too, and raises with its own words
        r, token = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"the model's mask for token {token} of row {r} is no window inside a document "
            f"({'bidirectional' if causal is False else 'causal'}, local size {local_size}): use attn_implementation='sdpa'"
        )
    return causal, joined


def _hides_nothing(mask_function: Callable[..., Tensor], row: Tensor, queries: Tensor, keys: Tensor) -> bool:
    """Whether every query sees every key: all queries and a few keys are asked, and a few queries and all keys."""

    def asked(queries: Tensor, keys: Tensor) -> bool:
        kept = mask_function(row[:, :, None], torch.zeros_like(row[:, :, None]), queries[None, :, None], keys[None, None, :])
        return bool(torch.as_tensor(kept).all())

    few_queries, few_keys = (x[[0, len(x) // 2, -1]] for x in (queries, keys))
    return asked(few_queries, few_keys) and asked(queries, few_keys) and asked(few_queries, keys)


def _valid(attention_mask: Tensor | None, kv_offset: int, kv_length: int, at: Tensor) -> Tensor:
    """bool [B, K], False at padding."""
    if attention_mask is None:
        return torch.ones_like(at, dtype=torch.bool)
    kept = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    return torch.nn.functional.pad(kept, (0, kv_length - kept.shape[1]))


def unread(causal: bool, sliding_window: int | None, queries: int, keys: int, rows: int) -> Visible:
    """What a layer sees whose model made no mask."""
    joined = torch.ones(rows, keys, dtype=torch.bool)
    joined[:, 0] = False
    return Visible(causal, sliding_window, joined, None, queries)
