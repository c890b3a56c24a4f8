"""Arguments that Transformers' models hand to attention beside the ones it computes: those that ask nothing of it, and all others."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

CARRIED = {"output_hidden_states", "return_dict"}  # arguments of a forward that mean on a shard what they mean on the whole

# what belongs to the loss or to other layers, and what follows from others
_NOTHING = {
    *CARRIED, "cache_position", "labels", "logits_to_keep", "max_length_k", "max_length_q", "num_items_in_batch", "output_router_logits",
    "position_embeddings", "shift_labels", "token_type_ids", "use_cache",
}  # fmt: skip


def check_known(others: Mapping[str, object], cure: str) -> None:
    """Raise ValueError on an argument that would change what attention computes, or that nobody knows: it is not ignored."""
    if asked := sorted(name for name, x in others.items() if name not in _NOTHING and x is not None and x is not False):
        raise ValueError(f"attention was given {', '.join(asked)}, which it does not compute: {cure}")


def check_borders(of_queries: Tensor | None, of_keys: Tensor | None) -> None:
    """Raise ValueError where cu_seq_lens_k says anything that cu_seq_lens_q does not."""
    if of_keys is None or of_keys is of_queries:
        return
    if of_queries is None:
        raise ValueError("cu_seq_lens_k was given without cu_seq_lens_q: give both")
    if of_keys.shape != of_queries.shape or (of_keys != of_queries).any():
        raise ValueError("cu_seq_lens_q and cu_seq_lens_k differ: documents that attend to others are not computed")
