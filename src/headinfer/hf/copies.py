"""Computes equal rows of a batch once, for beam search and num_return_sequences.

generate() repeats the prompt for each beam and each returned sequence before the model reads it. While these rows are
equal, the model runs on one of them (distinct_rows()) and its logits are repeated (repeat_logits()). At the first call
whose rows differ, HeadCache.separate() gives each its own row, which shares the segments of the prompt.
"""

from __future__ import annotations

from typing import Any

import torch

from headinfer.hf.inputs import input_tokens, wants_more_than_logits

__all__ = ["distinct_rows", "repeat_logits"]


def distinct_rows(inputs: dict[str, Any], config: Any, copies: int) -> dict[str, Any] | None:
    """Take one row of each group of equal rows of a forward pass.

    Args:
        inputs: the arguments of the pass by name. The batch is the first dimension of input_ids or inputs_embeds.
        config: the config of the model.
        copies: rows of a group. They are adjacent.

    Returns:
        The arguments with one row of each group. None if the rows of a group differ, or if the pass asks for outputs
        other than logits, or for a tuple.
    """
    wants_tuple = not (config.return_dict if inputs.get("return_dict") is None else inputs["return_dict"])
    if wants_tuple or wants_more_than_logits(inputs, config):
        return None
    tokens = input_tokens(inputs)
    if tokens is None or tokens.shape[0] % copies:
        return None
    distinct = dict(inputs)
    for name, value in inputs.items():
        # position_ids may be [3, B, T], with a position in time, height and width
        dim = value.ndim - 2 if name == "position_ids" and value is not None else 0
        if isinstance(value, torch.Tensor) and value.ndim >= 2 and value.shape[dim] == tokens.shape[0]:
            kept = torch.arange(0, tokens.shape[0], copies, device=value.device)
            distinct[name] = value.index_select(dim, kept)
            if not torch.equal(distinct[name].repeat_interleave(copies, dim=dim), value):
                return None
    return distinct


def repeat_logits(output: Any, copies: int) -> Any:
    """Repeat each row of a model's logits [B, T, V], in place of the rows that were left out. Changes the output."""
    output.logits = output.logits.repeat_interleave(copies, dim=0)
    return output
