"""The attention and mask functions that enable() registers with transformers under the name "headinfer".

headinfer_attention() gets Q, K and V of every attention of an enabled model:

- K and V that a HeadCache layer has tagged (layers.py) are those of the chunk. The layer's past is streamed.
- Other K and V are complete: those of sliding windows, of a DynamicCache, or of a call without a cache. The function
  calls transformers' sdpa, or uses matrix products in float32 if there is a soft cap or sinks, which sdpa lacks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch

from headinfer.engine.layer_pass import AttentionSpec
from headinfer.errors import StateError, UnsupportedError
from headinfer.hf.compat import (
    AttentionInterface,
    AttentionMaskInterface,
    causal_mask_function,
    flash_attention_mask,
    not_compiled,
    sdpa_attention_forward,
    sdpa_mask,
)
from headinfer.hf.layers import Tag
from headinfer.kv.layer_kv import TokenRanges

__all__ = ["NAME", "headinfer_attention", "headinfer_mask", "register", "visible_token_ranges", "windows_skip_padding"]

NAME = "headinfer"
_LARGEST_MASK_BYTES = 2**31
_NO_CONTEXT = contextlib.nullcontext()
_SKIPS_PADDING = ContextVar("_SKIPS_PADDING", default=False)


def register() -> None:
    """Register both functions with transformers. Calling it again does nothing."""
    AttentionInterface.register(NAME, headinfer_attention)
    AttentionMaskInterface.register(NAME, headinfer_mask)


def visible_token_ranges(mask: torch.Tensor) -> list[TokenRanges]:
    """Return the tokens that a padding mask lets each row see, as half-open ranges.

    Args:
        mask: [B, Tk], bool or integer. True or nonzero if the token is seen.

    Returns:
        For each row, its ranges (start, stop) in ascending order.
    """
    edges = torch.nn.functional.pad(mask.bool().cpu().to(torch.int8), (1, 1)).diff(dim=1)
    token_ranges: list[TokenRanges] = []
    for row in edges:
        starts = (row == 1).nonzero().flatten().tolist()
        stops = (row == -1).nonzero().flatten().tolist()
        token_ranges.append(list(zip(starts, stops, strict=True)))
    return token_ranges


@contextlib.contextmanager
def windows_skip_padding() -> Iterator[None]:
    """Within the block, windows and attention chunks do not count padding that follows other tokens of its row.

    transformers counts it. The rows of a batch of questions have such padding (batch.py).
    """
    token = _SKIPS_PADDING.set(True)
    try:
        yield
    finally:
        _SKIPS_PADDING.reset(token)


def _skipping_padding(mask_function: Callable[..., Any], mask: torch.Tensor) -> Callable[..., Any]:
    """Return a mask function for which padding behind the first token of a row takes no positions.

    Args:
        mask_function: the function of indices of the batch, head, query and key.
        mask: the padding mask [B, Tk].
    """
    counted = mask.bool() | (mask.cumsum(dim=1) == 0)
    positions = counted.cumsum(dim=1) - 1

    def skipping(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> Any:
        return mask_function(batch, head, positions[batch, query], positions[batch, key])

    return skipping


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
    """Make a mask. transformers calls this function once for each kind of layer before a forward pass.

    Args:
        batch_size: B.
        q_length: tokens of the chunk, Tq.
        kv_length: tokens of the cache and the chunk, Tk.
        q_offset: position of the first query.
        kv_offset: position of the first key.
        mask_function: decides which key a query sees.
        attention_mask: the padding mask [B, Tk] that the model was called with.
        local_size: tokens of a sliding window or an attention chunk.
        allow_is_causal_skip: whether the mask may be left out if it is causal.
        **kwargs: further arguments of transformers' mask functions.

    Returns:
        None if the mask is causal without padding. A padding mask [B, 1, 1, Tk], bool, with its token ranges as an
        attribute, if it is causal with padding; it has four dims because Gemma 4 slices the queries of its masks. In
        all other cases, such as sliding windows, sdpa's mask [B, 1, Tq, Tk].

    Raises:
        UnsupportedError: the mask [B, 1, Tq, Tk] would be too large.
        StateError: the padding mask covers another number of tokens than the cache and the input have.
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
                f"this model needs an attention mask of {batch_size} x {q_length} x {kv_length} bytes, which is more "
                f"than {_LARGEST_MASK_BYTES:,}: use a smaller chunk_tokens"
            )
        if attention_mask is not None and _SKIPS_PADDING.get():
            common["mask_function"] = _skipping_padding(mask_function, attention_mask)
        mask: torch.Tensor = sdpa_mask(**common, local_size=local_size, allow_is_causal_skip=False)
        return mask
    padding: torch.Tensor | None = flash_attention_mask(**common)
    if padding is not None:
        if padding.shape[1] != kv_length:
            raise StateError(
                f"the attention mask covers {padding.shape[1]} tokens, but the cache and the input have {kv_length}: "
                "pass a mask that covers all of them"
            )
        token_ranges = visible_token_ranges(padding)
        padding = padding[:, None, None, :]
        padding._headinfer_token_ranges = token_ranges  # type: ignore[attr-defined]
    return padding


@not_compiled
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
    """Compute attention. transformers calls this function for each attention of an enabled model.

    Args:
        module: the attention module.
        query: [B, Hq, T, Dk].
        key: [B, Hkv, Tk, Dk]. With a HeadCache layer these are the keys of the chunk only.
        value: [B, Hkv, Tk, Dv].
        attention_mask: what headinfer_mask() returned, or a mask of the model's own.
        dropout: must be 0.
        scaling: factor of the scores; None is Dk ** -0.5.
        softcap: soft cap c of the scores: tanh(score / c) * c. None applies no cap.
        s_aux: sinks [Hq], one more score per query head of a key with value 0 (gpt-oss).
        **kwargs: further arguments of the model, such as is_causal and sliding_window.

    Returns:
        The output [B, T, Hq, Dv], and None in place of attention weights.

    Raises:
        UnsupportedError: the module asks for something that headinfer does not compute exactly.
    """
    tag = getattr(key, "_headinfer", None)
    value_tag = getattr(value, "_headinfer", None)
    if tag is not value_tag:
        raise UnsupportedError(
            f"{type(module).__name__} changes K or V between the cache and the attention, so its KV cannot be "
            "offloaded: use the model without headinfer"
        )
    if dropout:
        raise UnsupportedError("attention dropout is on: headinfer is for inference, so call model.eval() first")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if tag is None:
        return _dense_attention(module, query, key, value, attention_mask, scale, softcap, s_aux, **kwargs), None
    assert isinstance(tag, Tag)
    shares = tag.is_stored and getattr(module, "is_kv_shared_layer", False)
    _check_streamable(module, query, key, attention_mask, kwargs, shares=shares)
    token_ranges: Sequence[TokenRanges] | None = None
    if attention_mask is not None:
        token_ranges = getattr(attention_mask, "_headinfer_token_ranges", None)
        if token_ranges is None:
            token_ranges = visible_token_ranges(attention_mask.flatten(1))
    spec = AttentionSpec(scale, softcap, s_aux, token_ranges)
    with torch.no_grad() if torch.is_grad_enabled() else _NO_CONTEXT:
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
    """Raise UnsupportedError for everything that streaming would compute wrongly without notice.

    Args:
        module: the attention module.
        query: [B, Hq, T, Dk].
        key: the keys of the chunk [B, Hkv, Tk, Dk].
        mask: the attention mask, if there is one.
        options: the other arguments of the call.
        shares: whether the layer uses the K and V of an earlier layer. It may then have fewer queries than keys.
    """
    name = type(module).__name__
    if not _is_causal(module, options):
        raise UnsupportedError(f"{name} is not causal: headinfer serves causal language models")
    if mask is not None and not _is_padding(mask):
        raise UnsupportedError(
            f"{name} uses an attention mask of shape {tuple(mask.shape)} in a full-attention layer, and headinfer "
            "serves causal masks with padding only: pass a 2D attention_mask"
        )
    if options.get("sliding_window") is not None or options.get("position_bias") is not None:
        raise UnsupportedError(
            f"{name} uses a window or a position bias in a layer that its config lists as full attention: use the "
            "model without headinfer"
        )
    if module.training:
        raise UnsupportedError("the model is in training mode: headinfer is for inference, so call model.eval() first")
    if options.get("output_attentions"):
        raise UnsupportedError(
            "output_attentions needs the whole attention matrix, which headinfer never holds: leave it out"
        )
    if query.shape[2] != key.shape[2] and not shares:
        raise UnsupportedError(
            f"{name} has {query.shape[2]} queries for a chunk of {key.shape[2]} tokens, and headinfer needs one query "
            "for each token: use the model without headinfer"
        )


def _is_causal(module: torch.nn.Module, options: dict[str, Any]) -> bool:
    """Return whether an attention is causal: by the call's own option, or else by the module's attribute."""
    causal = options.get("is_causal")
    return bool(getattr(module, "is_causal", True) if causal is None else causal)


def _is_padding(mask: torch.Tensor) -> bool:
    """Return whether a mask is a padding mask: [B, Tk] or [B, 1, 1, Tk], bool or integer."""
    return not mask.is_floating_point() and (mask.ndim == 2 or (mask.ndim == 4 and mask.shape[1:3] == (1, 1)))


def _dense_attention(
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
    """Compute attention on complete K and V. It gives the results of transformers' eager attention."""
    queries = query.shape[2]
    keys = key.shape[2]
    if mask is None or _is_padding(mask):
        padding = mask.flatten(1)[:, None, None, :].bool() if mask is not None else None
        mask = padding
        if _is_causal(module, kwargs):
            positions = torch.arange(keys, device=query.device)
            seen = positions[None, :] <= positions[keys - queries :, None]  # the last query sees all keys
            if padding is not None:
                mask = seen & padding
            elif queries != keys:
                mask = seen[None, None]
    if softcap is None and sinks is None:
        kwargs.pop("sliding_window", None)  # it is in the mask
        out: torch.Tensor = sdpa_attention_forward(module, query, key, value, mask, scaling=scale, **kwargs)[0]
    else:
        out = _eager_attention(query, key, value, mask, scale, softcap, sinks)
    if mask is not None and mask.dtype == torch.bool:
        sees_no_key = ~mask.any(dim=-1)  # [B, 1, Tq]
        out = out.masked_fill(sees_no_key.transpose(1, 2).unsqueeze(-1), 0.0)
    return out


def _eager_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Compute attention with a soft cap or sinks, in float32. The output [B, T, Hq, Dv] has the dtype of query.

    A sink is one more column of the scores, in the softmax only. A mask is bool (True: seen) or additive; None is
    causal, with as many keys as queries.
    """
    group_queries = query.shape[1] // key.shape[1]
    k = key.float().repeat_interleave(group_queries, dim=1)
    v = value.float().repeat_interleave(group_queries, dim=1)
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
        sink_column = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink_column], dim=-1)
    weights = torch.softmax(scores, dim=-1).nan_to_num(0.0)[..., : k.shape[2]]
    return (weights @ v).to(query.dtype).transpose(1, 2).contiguous()
