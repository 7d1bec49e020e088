"""Rows that are copies of each other are read once, until they differ.

generate() repeats the prompt for every beam and every sequence to return, before it reads it. Here the cache holds one
of each group of equal rows, the model runs on one, and its logits are repeated; at the first call whose rows differ,
the cache's rows are repeated by table, so that they go on sharing the prompt's segments.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["one_of_each", "repeat_logits"]

_OTHER_OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")


def one_of_each(inputs: dict[str, Any], config: Any, copies: int) -> dict[str, Any] | None:
    """The call with one of each `copies` adjacent rows; None where they differ, or more than logits is asked for.

    inputs: the call's arguments by name; its batch is the first dimension of input_ids or inputs_embeds.
    """
    if any(inputs.get(name) or getattr(config, name, False) for name in _OTHER_OUTPUTS):
        return None
    tokens = next((inputs[name] for name in ("input_ids", "inputs_embeds") if inputs.get(name) is not None), None)
    if tokens is None or tokens.shape[0] % copies:
        return None
    one = dict(inputs)
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.ndim >= 2 and value.shape[0] == tokens.shape[0]:
            one[name] = value[::copies]
            if not torch.equal(one[name].repeat_interleave(copies, dim=0), value):
                return None
    return one


def repeat_logits(output: Any, copies: int) -> Any:
    """A model's output, its logits [B, T, V] repeated for the rows that were left out."""
    output.logits = output.logits.repeat_interleave(copies, dim=0)
    return output
