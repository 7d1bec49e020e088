"""The attention that training uses: as transformers' own, faster on a CPU, with keys that stand for a long context."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

__all__ = ["NAME", "FarKeys"]

NAME = "training"


class FarKeys:
    """A context that is longer than the samples, in the layers without positions.

    There a key is the same at any distance. So `count` keys of other samples, each counted `weight` times (a bias of
    ln(weight) on its score), act on a query as count x weight more tokens of context do.
    """

    count = 0
    weight = 1.0


def attention(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float, dropout: float = 0.0,
    sliding_window: int | None = None, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Causal attention [B, H, T, D] -> [B, T, H, D], of all tokens or of the newest `sliding_window`."""
    query, key, value = query.float(), key.float(), value.float()
    if sliding_window and query.shape[2] > sliding_window:
        out = _windowed(query * scaling, key, value, sliding_window)
    else:
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        if sliding_window or not FarKeys.count:
            out = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        else:
            out = _with_far_keys(query, key, value, scaling)
    return out.transpose(1, 2).contiguous(), None


def _windowed(query: Any, key: Any, value: Any, window: int) -> torch.Tensor:
    """Blocks of `window` queries, each with its own block of keys and the one before."""
    rows, heads, tokens, width = query.shape
    kv_heads, pad = key.shape[1], -tokens % window
    blocks, group = (tokens + pad) // window, heads // kv_heads
    q, k = torch.arange(window)[:, None] + window, torch.arange(2 * window)
    bias = torch.where((k <= q) & (k > q - window), 0.0, -math.inf).repeat(blocks, 1, 1)
    bias[0, :, :window] = -math.inf
    query = functional.pad(query, (0, 0, 0, pad)).view(rows, kv_heads, group, blocks, window, width).transpose(2, 3)
    key, value = (
        functional.pad(x, (0, 0, window, pad)).unfold(2, 2 * window, window).reshape(-1, width, 2 * window)
        for x in (key, value)
    )
    scores = torch.bmm(query.reshape(-1, group * window, width), key)
    scores = scores.view(rows, kv_heads, blocks, group, window, 2 * window) + bias[:, None]
    out = torch.bmm(scores.softmax(-1).view(-1, group * window, 2 * window), value.transpose(1, 2))
    out = out.view(rows, kv_heads, blocks, group, window, width).transpose(2, 3)
    return out.reshape(rows, heads, blocks * window, width)[:, :, :tokens]


def _with_far_keys(query: Any, key: Any, value: Any, scaling: float) -> torch.Tensor:
    tokens = key.shape[2]
    # A row takes its far keys from the next row, so that its own needles are not among them.
    chosen = torch.randint(tokens, (FarKeys.count,))
    far_key, far_value = (x.roll(-1, 0)[:, :, chosen] for x in (key, value))
    bias = torch.full((tokens, FarKeys.count + tokens), math.log(FarKeys.weight))
    bias[:, FarKeys.count :] = torch.full((tokens, tokens), -math.inf).triu(1)
    return functional.scaled_dot_product_attention(
        query, torch.cat([far_key, key], 2), torch.cat([far_value, value], 2), attn_mask=bias, scale=scaling
    )


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, lambda **_: None)
