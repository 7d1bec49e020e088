"""Cuts one long forward pass into chunks, where a caller reads a prompt at once: assisted decoding, or a bare call.

generate()'s own prefill_chunk_size does not serve these. Only the last logits may be asked for (logits_to_keep), since
all of them would be larger than what chunks save.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch

__all__ = ["chunks_of"]

_FEW_TOKENS = 16  # such passes are never cut, and decode must not pay for a plan
# How inputs over the tokens of one call are cut: name -> the dimension of its tokens.
_TOKEN_DIMS = {
    "input_ids": 1,
    "inputs_embeds": 1,
    "position_ids": -1,
    "cache_position": -1,
    "token_type_ids": 1,
    "mm_token_type_ids": 1,
}
_WHOLE_PASS = ("output_hidden_states", "output_attentions", "output_router_logits", "labels")


def chunks_of(inputs: dict[str, Any], chunk_tokens: Callable[[int], int]) -> Iterator[dict[str, Any]]:
    """The calls that a forward pass becomes: one with the same arguments where it is short or can not be cut.

    inputs: the call's arguments by name. chunk_tokens: of a chunk, given how many tokens there are after the call;
    asked for passes over more than 16 only. The last chunk has at least as many tokens as logits are asked for.
    """
    tokens = next((inputs[name] for name in ("input_ids", "inputs_embeds") if inputs.get(name) is not None), None)
    kept, mask = inputs.get("logits_to_keep", 0), inputs.get("attention_mask")
    total = tokens.shape[1] if isinstance(tokens, torch.Tensor) else 0
    if (
        total <= _FEW_TOKENS
        or not (isinstance(kept, int) and 1 <= kept <= total)
        or not (mask is None or (isinstance(mask, torch.Tensor) and mask.ndim == 2))
        or any(inputs.get(name) for name in _WHOLE_PASS)
    ):
        yield inputs
        return
    past = inputs.get("past_key_values")
    size = chunk_tokens(total + (past.get_seq_length() if past is not None else 0))
    if total <= size:
        yield inputs
        return
    last = min(total - kept, (total - 1) // size * size)
    edges = [*range(0, last, size), last, total]
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
