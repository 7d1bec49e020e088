"""The arguments of a forward pass: what they hold, and which of them are refused before any layer runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from headinfer.errors import UnsupportedError, UsageError
from headinfer.utils.values import shown

__all__ = [
    "check_attention_outputs",
    "check_no_images",
    "input_tokens",
    "number_of_positions",
    "number_of_tokens",
    "text_only",
    "unused_positions",
    "wants_more_than_logits",
]

# Arguments and fields of configs that ask for outputs of all tokens beside the logits.
_OUTPUTS = ("output_hidden_states", "output_router_logits")
# Arguments of multimodal models that mark the tokens of images, videos and audio; text has zeros.
_TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
# What the names of arguments with images, videos and audio begin with.
_MEDIA = ("pixel_", "image_", "video_", "audio_", "input_features", "mm_encoder_outputs")


def input_tokens(inputs: Mapping[str, Any]) -> torch.Tensor | None:
    """Return input_ids [B, T] or inputs_embeds [B, T, H] of a forward pass; None if neither is given.

    Args:
        inputs: the arguments by name.

    Raises:
        UsageError: it is no tensor, or has another number of dimensions.
    """
    for name, dims, shape in (("input_ids", 2, "[rows, tokens]"), ("inputs_embeds", 3, "[rows, tokens, hidden size]")):
        tokens = inputs.get(name)
        if tokens is None:
            continue
        if not isinstance(tokens, torch.Tensor) or tokens.ndim != dims:
            what = f"has shape {list(tokens.shape)}" if isinstance(tokens, torch.Tensor) else f"is {shown(tokens)}"
            raise UsageError(f"{name} {what}: it must be a tensor {shape}")
        return tokens
    return None


def number_of_tokens(inputs: Mapping[str, Any]) -> int:
    """Return the number of tokens of each row of a forward pass."""
    tokens = input_tokens(inputs)
    return tokens.shape[1] if tokens is not None else 0


def number_of_positions(inputs: Mapping[str, Any], past_tokens: int) -> int:
    """Return how many positions a model needs for a forward pass and the tokens before it. Padding needs none.

    Args:
        inputs: the arguments of the pass by name.
        past_tokens: tokens of the cache.
    """
    positions = inputs.get("position_ids")
    if isinstance(positions, torch.Tensor) and positions.numel():
        return int(positions.max()) + 1
    return past_tokens + number_of_tokens(inputs)


def unused_positions(inputs: Mapping[str, Any]) -> int:
    """Return how many tokens of the attention mask [B, T] are padding in each row, at least; 0 without a mask."""
    mask = inputs.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        return 0
    return int((mask == 0).sum(dim=1).min())


def wants_more_than_logits(inputs: Mapping[str, Any], config: Any) -> bool:
    """Return whether a forward pass asks for a loss, hidden states or router logits.

    Args:
        inputs: the arguments by name.
        config: the config of the model. Its flags count if the call does not set them.
    """
    return inputs.get("labels") is not None or any(_is_on(name, inputs, config) for name in _OUTPUTS)


def check_attention_outputs(inputs: Mapping[str, Any], config: Any) -> None:
    """Check that a forward pass, with or without a HeadCache, does not ask for attention weights.

    Raises:
        UnsupportedError: it does. Many models would return an empty tuple.
    """
    if _is_on("output_attentions", inputs, config):
        raise UnsupportedError(
            "output_attentions needs the whole attention matrix, which headinfer never holds: leave it out, also in "
            "the model's config, or use the model without headinfer"
        )


def check_no_images(inputs: Mapping[str, Any], config: Any) -> None:
    """Check that a forward pass or generate() with a HeadCache gets text only.

    Args:
        inputs: the arguments by name.
        config: the config of the model.

    Raises:
        UnsupportedError: there are images, videos or audio, or tokens that are marked as such.
    """
    if not _is_multimodal(config):
        return
    media = [name for name, value in inputs.items() if name.startswith(_MEDIA) and _has_content(value)]
    media += [name for name in _TOKEN_TYPES if _has_content(inputs.get(name)) and bool(inputs[name].any())]
    if media:
        raise UnsupportedError(
            f"{media[0]} contains images, videos or audio, whose tokens attend to later tokens or have positions of "
            f"their own: headinfer serves {config.model_type} with text only, so use the model without headinfer"
        )


def text_only(inputs: dict[str, Any], config: Any) -> dict[str, Any]:
    """Return the arguments of a forward pass without token types, which are all zeros in a pass with text only.

    With them, the model would make masks for images, which are larger and equal.
    """
    if not _is_multimodal(config):
        return inputs
    return {name: value for name, value in inputs.items() if name not in _TOKEN_TYPES}


def _is_on(name: str, inputs: Mapping[str, Any], config: Any) -> bool:
    """Return whether a flag is on: in the arguments, or, if they do not set it, in the config or its text config."""
    value = inputs.get(name)
    if value is not None:
        return value is not False
    if getattr(config, name, False):
        return True
    return _is_multimodal(config) and bool(getattr(config.get_text_config(decoder=True), name, False))


def _is_multimodal(config: Any) -> bool:
    """Return whether a config has a text config beside others."""
    return bool(config.sub_configs) and config.get_text_config(decoder=True) is not config


def _has_content(value: Any) -> bool:
    """Return whether an argument holds a tensor, itself or in a mapping or sequence."""
    if isinstance(value, Mapping):
        return any(_has_content(item) for item in value.values())
    if isinstance(value, list | tuple):
        return any(_has_content(item) for item in value)
    return isinstance(value, torch.Tensor)
