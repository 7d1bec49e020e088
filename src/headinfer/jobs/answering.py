"""Generates an answer on a cache, and makes the cache hold what was shown."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from headinfer.hf.batch import AnswerStreamer
from headinfer.hf.cache import HeadCache
from headinfer.hf.compat import PreTrainedModel, StoppingCriteria, last_logits_only
from headinfer.hf.enable import enabled_on
from headinfer.hf.layers import uncroppable_reason
from headinfer.jobs.answer_text import AnswerText
from headinfer.jobs.generate import Streamer, Summary
from headinfer.jobs.prompts import pad_id, text_ids
from headinfer.jobs.sampling import Sampling

__all__ = ["Checkpoint", "answer", "can_remove", "decode", "read_missing", "remove_after", "shown_ids"]

Checkpoint = list[dict[str, Any]]
"""The state of a cache, as HeadCache.checkpoint() returns it."""


def answer(
    model: Any,
    tokenizer: Any,
    cache: HeadCache,
    prompt_ids: torch.Tensor,
    sampling: Sampling,
    *,
    max_new_tokens: int,
    summary: Summary,
    on_text: Callable[[str], None],
    draft: PreTrainedModel | None = None,
) -> AnswerText:
    """Generate an answer. Ctrl-C ends it, and sets `interrupted` in the summary.

    Args:
        model: the enabled model.
        tokenizer: its tokenizer.
        cache: holds the KV of the first tokens of the prompt.
        prompt_ids: [1, T] int64.
        sampling: how tokens are chosen. Its seed is set.
        max_new_tokens: tokens of the answer, at most.
        summary: gets tokens, times and bytes.
        on_text: called with each part of the answer.
        draft: a model that guesses, enabled.
    """
    start = time.perf_counter()
    streamer = Streamer(tokenizer, on_text, summary, start, sampling.stop)
    try:
        decode(model, tokenizer, cache, prompt_ids, sampling, streamer, max_new_tokens=max_new_tokens, draft=draft)
    except KeyboardInterrupt:
        summary.interrupted = True
        streamer.end()
    summary.total_s = time.perf_counter() - start
    summary.note_guesses(enabled_on(model))
    summary.stats = cache.stats()
    return streamer.answer


def decode(
    model: Any,
    tokenizer: Any,
    cache: HeadCache,
    prompt_ids: torch.Tensor,
    sampling: Sampling,
    streamer: AnswerStreamer,
    *,
    max_new_tokens: int,
    draft: PreTrainedModel | None = None,
    ends: Sequence[StoppingCriteria] = (),
    answered_tokens: int = 0,
) -> None:
    """Generate an answer, and give its tokens to a streamer.

    Args:
        model: the enabled model.
        tokenizer: its tokenizer.
        cache: holds the KV of the first tokens of the prompt.
        prompt_ids: [1, T] int64.
        sampling: how tokens are chosen. Its seed is set.
        streamer: gets the tokens.
        max_new_tokens: tokens of the answer, at most.
        draft: a model that guesses, enabled.
        ends: further criteria that end the answer.
        answered_tokens: tokens at the end of the prompt that belong to the answer already.
    """
    torch.manual_seed(sampling.seed)
    arguments = sampling.arguments(
        tokenizer,
        prompt_tokens=prompt_ids.shape[1],
        max_new_tokens=max_new_tokens,
        ends=ends,
        answered_tokens=answered_tokens,
    )
    model.generate(
        prompt_ids.to(model.device),
        attention_mask=torch.ones_like(prompt_ids, device=model.device),
        past_key_values=cache,
        streamer=streamer,
        tokenizer=tokenizer,  # for stop_strings in the model's generation config
        pad_token_id=pad_id(tokenizer),
        assistant_model=draft,
        **arguments,
    )


def shown_ids(model: Any, tokenizer: Any, found: AnswerText) -> tuple[list[int], int]:
    """Return the tokens of an answer as it was shown, without those of a stop string and the end of the sequence.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        found: the answer.

    Returns:
        The tokens, and how many of them were generated. The others are those of the beginning of a token of which a
        stop string is the end.
    """
    ends = model.generation_config.eos_token_id
    kept, rest = found.kept()
    if kept and kept[-1] in (ends if isinstance(ends, list) else [ends]):
        kept = kept[:-1]
    return [*kept, *text_ids(tokenizer, rest)], len(kept)


def can_remove(cache: HeadCache, tokens: int) -> bool:
    """Return whether a cache can remove so many of its newest tokens."""
    return not any(uncroppable_reason(layer, tokens) for layer in cache.layers)


def remove_after(cache: HeadCache, tokens: int, before: Checkpoint) -> None:
    """Remove all but the first tokens of a cache, and more of them if a layer cannot do that.

    Args:
        cache: the cache.
        tokens: how many tokens to keep, at most.
        before: an earlier checkpoint with no more tokens. The cache returns to it if a layer cannot remove its newest
            tokens.
    """
    if cache.get_seq_length() <= tokens:
        return
    if can_remove(cache, cache.get_seq_length() - tokens):
        cache.crop(tokens)
    else:
        cache.rollback(before)


def read_missing(model: Any, cache: HeadCache, ids: torch.Tensor) -> None:
    """Read the tokens that a cache lacks.

    Args:
        model: the enabled model.
        cache: a cache of one row that holds a beginning of the tokens.
        ids: the tokens [1, T], int64.
    """
    missing = ids.shape[1] - cache.get_seq_length()
    if not missing:
        return
    inputs = model.prepare_inputs_for_generation(
        ids.to(model.device),
        next_sequence_length=missing,
        past_key_values=cache,
        use_cache=True,
        is_first_iteration=False,
        **last_logits_only(model),
    )
    model(**inputs)
