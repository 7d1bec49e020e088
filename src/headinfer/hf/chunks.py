"""Cuts a long forward pass into chunks, in generate() and in other calls of a model.

A pass is cut only if it asks for the last logits alone (logits_to_keep). Logits, hidden states and other outputs of all
tokens take more memory than chunks save, so such a pass is not cut, and its outputs are complete.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from headinfer.hf.inputs import number_of_tokens, wants_more_than_logits

__all__ = ["chunks_of"]

_UNCUT_TOKENS = 16  # passes up to this length are never cut, so that decode steps need no plan
# The arguments that have an entry for each token of the pass, with the dimension of the tokens.
_TOKEN_DIMS = {
    "input_ids": 1,
    "inputs_embeds": 1,
    "position_ids": -1,
    "cache_position": -1,
    "token_type_ids": 1,
    "per_layer_inputs": 1,
}


def chunks_of(inputs: dict[str, Any], config: Any, chunk_tokens: Callable[[int], int]) -> Iterator[dict[str, Any]]:
    """Split a forward pass into the calls of its chunks.

    Args:
        inputs: the arguments of the pass by name.
        config: the config of the model.
        chunk_tokens: returns the tokens of a chunk, given the length of the context after the pass. It is called only
            for a pass that can be cut.

    Yields:
        The arguments of each call. The last call has at least as many tokens as logits are asked for. A pass that is
        short or cannot be cut is one call with `inputs` itself.
    """
    total = number_of_tokens(inputs)
    wanted_logits = inputs.get("logits_to_keep", 0)
    mask = inputs.get("attention_mask")
    can_be_cut = (
        total > _UNCUT_TOKENS
        and isinstance(wanted_logits, int)
        and 1 <= wanted_logits <= total
        and (mask is None or (isinstance(mask, torch.Tensor) and mask.ndim == 2))
        and not wants_more_than_logits(inputs, config)
    )
    if not can_be_cut:
        yield inputs
        return
    past = inputs.get("past_key_values")
    past_tokens = past.get_seq_length() if past is not None else 0
    size = chunk_tokens(past_tokens + total)
    if total <= size:
        yield inputs
        return
    last_start = min(total - wanted_logits, (total - 1) // size * size)
    edges = [*range(0, last_start, size), last_start, total]
    for start, stop in itertools.pairwise(edges):
        part = dict(inputs)
        for name, dim in _TOKEN_DIMS.items():
            whole = inputs.get(name)
            if isinstance(whole, torch.Tensor) and whole.shape[dim] == total:
                part[name] = whole.narrow(dim, start, stop - start)
        if mask is not None:
            part["attention_mask"] = mask[:, : mask.shape[1] - total + stop]
        if stop < total:
            part["logits_to_keep"] = 1
        yield part
