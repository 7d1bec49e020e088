"""The attention function of the training: fast on a CPU, with extra keys that simulate a long context."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

__all__ = ["NAME", "ExtraKeys"]

NAME = "training"


class ExtraKeys:
    """Settings of the extra keys, which simulate a context longer than the samples in layers without positions.

    In these layers the score of a key does not depend on its distance. Each query therefore also attends to `count`
    keys of another sample. A bias of ln(weight) on the score counts each of them `weight` times, so that they have the
    effect of count x weight more tokens of context.

    Attributes:
        count: the number of extra keys. 0 switches them off.
        weight: how many tokens each extra key represents.
    """

    count = 0
    weight = 1.0


def attention(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float, dropout: float = 0.0,
    sliding_window: int | None = None, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Compute causal attention in float32, as an attention function of transformers.

    Args:
        module: the attention layer. It is not used.
        query: [B, H, T, D].
        key: [B, Hkv, T, D].
        value: [B, Hkv, T, D].
        attention_mask: not used. The mask is always causal.
        scaling: the factor on the scores.
        dropout: not used.
        sliding_window: the number of newest tokens that a query attends to; None for all tokens.

    Returns:
        The output [B, T, H, D] and None instead of the attention weights.
    """
    query = query.float()
    key = key.float()
    value = value.float()
    if sliding_window and query.shape[2] > sliding_window:
        out = _windowed(query * scaling, key, value, sliding_window)
    else:
        group = query.shape[1] // key.shape[1]
        key = key.repeat_interleave(group, 1)
        value = value.repeat_interleave(group, 1)
        if sliding_window or not ExtraKeys.count:
            out = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        else:
            out = _with_extra_keys(query, key, value, scaling)
    return out.transpose(1, 2).contiguous(), None


def _windowed(query: Any, key: Any, value: Any, window: int) -> torch.Tensor:
    """Attention in blocks of `window` queries. Each block sees its own block of keys and the one before it."""
    rows, heads, tokens, width = query.shape
    kv_heads = key.shape[1]
    pad = -tokens % window
    blocks = (tokens + pad) // window
    group = heads // kv_heads
    q = torch.arange(window)[:, None] + window
    k = torch.arange(2 * window)
    bias = torch.where((k <= q) & (k > q - window), 0.0, -math.inf).repeat(blocks, 1, 1)
    bias[0, :, :window] = -math.inf
    query = functional.pad(query, (0, 0, 0, pad)).view(rows, kv_heads, group, blocks, window, width).transpose(2, 3)

    def pairs_of_blocks(x: torch.Tensor) -> torch.Tensor:
        return functional.pad(x, (0, 0, window, pad)).unfold(2, 2 * window, window).reshape(-1, width, 2 * window)

    key = pairs_of_blocks(key)
    value = pairs_of_blocks(value)
    scores = torch.bmm(query.reshape(-1, group * window, width), key)
    scores = scores.view(rows, kv_heads, blocks, group, window, 2 * window) + bias[:, None]
    out = torch.bmm(scores.softmax(-1).view(-1, group * window, 2 * window), value.transpose(1, 2))
    out = out.view(rows, kv_heads, blocks, group, window, width).transpose(2, 3)
    return out.reshape(rows, heads, blocks * window, width)[:, :, :tokens]


def _with_extra_keys(query: Any, key: Any, value: Any, scaling: float) -> torch.Tensor:
    tokens = key.shape[2]
    # The extra keys of a row come from the next row, so that the row's own needles are not among them.
    chosen = torch.randint(tokens, (ExtraKeys.count,))
    extra_key = key.roll(-1, 0)[:, :, chosen]
    extra_value = value.roll(-1, 0)[:, :, chosen]
    bias = torch.full((tokens, ExtraKeys.count + tokens), math.log(ExtraKeys.weight))
    bias[:, ExtraKeys.count :] = torch.full((tokens, tokens), -math.inf).triu(1)
    return functional.scaled_dot_product_attention(
        query, torch.cat([extra_key, key], 2), torch.cat([extra_value, value], 2), attn_mask=bias, scale=scaling
    )


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, lambda **_: None)
