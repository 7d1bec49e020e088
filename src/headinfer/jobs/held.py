"""Makes a cache hold certain tokens, with as little to compute as possible."""

from __future__ import annotations

from typing import Any

import torch

from headinfer.hf.cache import HeadCache
from headinfer.hf.compat import last_logits_only
from headinfer.hf.layers import uncroppable_reason

__all__ = ["hold"]


def hold(model: Any, cache: HeadCache, ids: torch.Tensor, common: int, before: list[dict[str, Any]]) -> torch.Tensor:
    """Make a cache hold certain tokens: remove what differs from them, and read what is missing.

    If a layer cannot remove its newest tokens, the cache returns to an earlier checkpoint, and all tokens after it are
    read again.

    Args:
        model: the enabled model.
        cache: a cache of one row.
        ids: the tokens [1, T], int64.
        common: how many of the first tokens the cache holds, or a larger number if it holds no others.
        before: an earlier checkpoint of the cache, at which it held a beginning of the tokens.

    Returns:
        The tokens.
    """
    if cache.get_seq_length() > common:
        if any(uncroppable_reason(layer) for layer in cache.layers):
            cache.rollback(before)
        else:
            cache.crop(common)
    missing = ids.shape[1] - cache.get_seq_length()
    if missing:
        inputs = model.prepare_inputs_for_generation(
            ids.to(model.device),
            next_sequence_length=missing,
            past_key_values=cache,
            use_cache=True,
            is_first_iteration=False,
            **last_logits_only(model),
        )
        model(**inputs)
    return ids
