"""The attention and mask functions that enable() registers with transformers under the name "headinfer".

Layers of a HeadCache arrive with tagged K and V and are streamed. All others (sliding windows, a DynamicCache, no
cache at all) arrive with their whole K and V and go to transformers' sdpa, or, for soft caps and sinks, which
sdpa does not know, to plain matrix products in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from headinfer.engine.streaming import AttentionSpec
from headinfer.errors import StateError, UnsupportedError
from headinfer.hf.compat import (
    AttentionInterface,
    AttentionMaskInterface,
    causal_mask_function,
    flash_attention_mask,
    sdpa_attention_forward,
    sdpa_mask,
)
from headinfer.hf.layers import Tag
from headinfer.kv.layer_kv import TokenRanges

__all__ = ["NAME", "headinfer_attention", "headinfer_mask", "register", "visible_token_ranges"]

NAME = "headinfer"
_LARGEST_MASK_BYTES = 2**31


def register() -> None:
    """Make the name known to transformers; harmless to repeat."""
    AttentionInterface.register(NAME, headinfer_attention)
    AttentionMaskInterface.register(NAME, headinfer_mask)


def visible_token_ranges(mask: torch.Tensor) -> list[TokenRanges]:
    """For each row of a 2D mask [B, Tk] (True: seen) the half-open ranges of tokens that are seen."""
    edges = torch.nn.functional.pad(mask.bool().cpu().to(torch.int8), (1, 1)).diff(dim=1)
    return [
        list(zip((row == 1).nonzero().flatten().tolist(), (row == -1).nonzero().flatten().tolist(), strict=True))
        for row in edges
    ]


def headinfer_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> torch.Tensor | None:
    """None where the mask is plainly causal, a padding mask [B, 1, 1, Tk] with its token ranges, or sdpa's [B, 1, Tq, Tk].

    The last serves windows and overlays, which stay with transformers' layers. A padding mask has four dims since
    Gemma 4 slices the queries of its masks.
    """
    common = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        **kwargs,
    }
    if local_size is not None or not allow_is_causal_skip or mask_function is not causal_mask_function:
        if batch_size * q_length * kv_length > _LARGEST_MASK_BYTES:
            raise UnsupportedError(
                f"this model asks for an attention mask of {batch_size} x {q_length} x {kv_length} bytes: "
                "use a smaller chunk_tokens"
            )
        mask: torch.Tensor = sdpa_mask(**common, local_size=local_size, allow_is_causal_skip=False)
        return mask
    padding: torch.Tensor | None = flash_attention_mask(**common)
    if padding is not None:
        if padding.shape[1] != kv_length:
            raise StateError(
                f"the attention mask covers {padding.shape[1]} tokens and the cache and input have {kv_length}: "
                "pass the mask of all tokens, old and new"
            )
        token_ranges = visible_token_ranges(padding)
        padding = padding[:, None, None, :]
        padding._headinfer_token_ranges = token_ranges  # type: ignore[attr-defined]
    return padding


@torch.compiler.disable  # type: ignore[untyped-decorator]
def headinfer_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function: query [B, Hq, T, Dk]; key [B, Hkv, Tk, Dk] and value [B, Hkv, Tk, Dv].

    Returns [B, T, Hq, Dv] and no attention weights.
    """
    tag, value_tag = getattr(key, "_headinfer", None), getattr(value, "_headinfer", None)
    if tag is not value_tag:
        raise UnsupportedError(
            f"{type(module).__name__} changes K or V between the cache and the attention, so its KV cannot stay on the "
            "host: use the model without headinfer"
        )
    if dropout:
        raise UnsupportedError("attention dropout is on: headinfer is for inference, so call model.eval() first")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if tag is None:
        return _dense(module, query, key, value, attention_mask, scale, softcap, s_aux, **kwargs), None
    assert isinstance(tag, Tag)
    shares = tag.is_stored and getattr(module, "is_kv_shared_layer", False)
    _check_streamable(module, query, key, attention_mask, kwargs, shares=shares)
    token_ranges: Sequence[TokenRanges] | None = None
    if attention_mask is not None:
        token_ranges = getattr(attention_mask, "_headinfer_token_ranges", None)
        token_ranges = visible_token_ranges(attention_mask.flatten(1)) if token_ranges is None else token_ranges
    spec = AttentionSpec(scale, softcap, s_aux, token_ranges)
    with torch.no_grad():
        if shares:
            return tag.layer.attend_shared(query, key, value, spec, tag.past_tokens), None
        return tag.layer.attend(query, key, value, spec), None


def _check_streamable(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    options: dict[str, Any],
    *,
    shares: bool,
) -> None:
    """Raise UnsupportedError for what the loop would silently get wrong."""
    name = type(module).__name__
    causal = options.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise UnsupportedError(f"{name} is not causal: headinfer serves causal language models")
    if mask is not None and not _is_padding(mask):
        raise UnsupportedError(
            f"{name} brings an attention mask of shape {tuple(mask.shape)} to a full-attention layer: headinfer serves "
            "causal masks with padding (a 2D attention_mask)"
        )
    if options.get("sliding_window") is not None or options.get("position_bias") is not None:
        raise UnsupportedError(f"{name} asks for a window or a position bias in a layer that its config calls full")
    if module.training:
        raise UnsupportedError("the model is in training mode: headinfer is for inference, so call model.eval() first")
    if options.get("output_attentions"):
        raise UnsupportedError("output_attentions needs the whole attention matrix: headinfer never has it")
    if query.shape[2] != key.shape[2] and not shares:
        raise UnsupportedError(f"{name} attends with {query.shape[2]} queries to a chunk of {key.shape[2]} tokens")


def _is_padding(mask: torch.Tensor) -> bool:
    """Whether a mask says only which keys a row sees: [B, Tk] or [B, 1, 1, Tk] of bool or whole numbers."""
    return not mask.is_floating_point() and (mask.ndim == 2 or (mask.ndim == 4 and mask.shape[1:3] == (1, 1)))


def _dense(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
    **kwargs: Any,
) -> torch.Tensor:
    """Attention of a layer that brings its whole K and V; the oracle is transformers' eager attention."""
    queries, keys = query.shape[2], key.shape[2]
    if mask is None or _is_padding(mask):
        mask = mask.flatten(1) if mask is not None else None
        causal = kwargs.get("is_causal")
        if getattr(module, "is_causal", True) if causal is None else causal:
            positions = torch.arange(keys, device=query.device)
            seen = positions[None, :] <= positions[keys - queries :, None]  # lower-right aligned
            if mask is not None:
                mask = seen & mask[:, None, None, :].bool()
            elif queries != keys:
                mask = seen[None, None]
        elif mask is not None:
            mask = mask[:, None, None, :].bool()
    if softcap is None and sinks is None:
        kwargs.pop("sliding_window", None)  # the mask has it
        out: torch.Tensor = sdpa_attention_forward(module, query, key, value, mask, scaling=scale, **kwargs)[0]
    else:
        out = _dense_eager(query, key, value, mask, scale, softcap, sinks)
    if mask is not None and mask.dtype == torch.bool:
        out = out.masked_fill(~mask.any(dim=-1).transpose(1, 2).unsqueeze(-1), 0.0)  # rows that see no key
    return out


def _dense_eager(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """softmax over [scores, sink] without the sink's column; scores capped. mask bool (True: seen) or additive."""
    groups = query.shape[1] // key.shape[1]
    k, v = key.float().repeat_interleave(groups, dim=1), value.float().repeat_interleave(groups, dim=1)
    scores = (query.float() @ k.mT) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is None:
        positions = torch.arange(scores.shape[-1], device=scores.device)
        scores = scores.masked_fill(positions[None, :] > positions[:, None], -torch.inf)
    elif mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    else:
        scores = scores + mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1).nan_to_num(0.0)[..., : k.shape[2]]
    return (weights @ v).to(query.dtype).transpose(1, 2).contiguous()
