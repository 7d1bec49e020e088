"""Checks the arguments of generate(), above all a cache that is not empty.

generate() skips as many tokens of the prompt as the cache holds. If the cache holds all of them, transformers reads the
whole prompt again on top of itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from headinfer.errors import UnsupportedError, UsageError
from headinfer.hf.cache import HeadCache
from headinfer.hf.inputs import check_no_images, input_tokens
from headinfer.hf.layers import uncroppable_reason
from headinfer.utils.stacklevel import stacklevel_of_user

__all__ = ["check_generate"]


def check_generate(given: Mapping[str, Any], config: Any) -> bool:
    """Check the arguments of generate() before transformers does anything with them.

    Args:
        given: the arguments by name.
        config: the config of the model.

    Returns:
        Whether the cache holds exactly the prompt. Its last token must then be removed, since generate() reads it.

    Raises:
        UsageError: the prompt is no tensor of the right shape. The cache holds more tokens than the prompt, or is known
            to hold other ones, or must not be used.
        UnsupportedError: there are images, or the cache holds the whole prompt, whose last token cannot be removed.
    """
    embeds = given.get("inputs_embeds")
    prompt = input_tokens({"input_ids": given.get("input_ids")} if embeds is None else {"inputs_embeds": embeds})
    cache = given.get("past_key_values")
    if cache is not None and not isinstance(cache, HeadCache):
        return False
    own_config = given.get("generation_config")
    use_cache = given.get("use_cache")
    if use_cache is None and own_config is not None:
        use_cache = own_config.use_cache
        if use_cache is False and cache is None:
            warnings.warn(
                "the generation_config has use_cache=False, so each new token computes the whole context again and "
                "headinfer offloads nothing: set it to True, or pass use_cache=False if you mean it",
                stacklevel=stacklevel_of_user(),
            )
    if use_cache is not False:
        check_no_images(given, config)
    if cache is None or prompt is None:
        return False
    if use_cache is False:
        raise UsageError("use_cache=False contradicts past_key_values: leave out one of them")
    return _holds_the_prompt(cache, prompt, given.get("attention_mask"), is_embeds=embeds is not None)


def _holds_the_prompt(cache: HeadCache, prompt: torch.Tensor, mask: torch.Tensor | None, *, is_embeds: bool) -> bool:
    """Return whether a cache holds exactly the prompt of generate(). Raise an error if the two do not fit.

    Args:
        cache: the cache.
        prompt: token ids [B, T], or embeddings [B, T, H].
        mask: the padding mask [B, T], or [B, the cache's tokens + T]. The prompt then has the new tokens only.
        is_embeds: whether the prompt consists of embeddings.
    """
    held = cache.get_seq_length()
    tokens = prompt.shape[1]
    if not held:
        return False
    if mask is not None and mask.shape[1] != tokens:
        if not is_embeds:
            return False
        raise UsageError(
            f"the attention mask covers {mask.shape[1]} tokens and inputs_embeds has {tokens}: generate() takes the "
            "embeddings of all tokens, also of those in the cache, with a mask that covers them"
        )
    if not is_embeds:
        _check_same_tokens(cache, prompt, held)
    if tokens < held:
        raise UsageError(
            f"the cache holds {held} tokens and the prompt has only {tokens}: pass all tokens from the beginning, or "
            "the new ones with an attention_mask that covers the cache too, or crop the cache"
        )
    if tokens == held:
        reason = next(filter(None, map(uncroppable_reason, cache.layers)), "")
        if reason:
            raise UnsupportedError(
                f"the cache holds all {held} tokens of the prompt, and generate() must read the last one again, which "
                f"cannot be removed: {reason}"
            )
    return bool(tokens == held)


def _check_same_tokens(cache: HeadCache, ids: torch.Tensor, held: int) -> None:
    """Raise UsageError if the cache is known to hold other tokens than the prompt begins with."""
    known = cache.token_ids
    if known is None or known.shape[0] != ids.shape[0]:
        return
    both = min(known.shape[1], ids.shape[1], held)
    differs = (known[:, :both].to(ids.device) != ids[:, :both]).any(dim=0).nonzero()
    if differs.numel():
        raise UsageError(
            f"the cache holds other tokens than the prompt begins with, from token {int(differs[0])} on: pass the "
            "tokens of the cache before the new ones, or the new ones alone with an attention_mask that covers the "
            "cache too"
        )
