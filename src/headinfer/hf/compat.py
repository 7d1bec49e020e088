"""transformers' private names, and functions for what differs between its versions. Other files need neither."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
import transformers
from packaging.version import Version
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel, cache_utils
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
    QuantizedCache,
    StaticCache,
)
from transformers.distributed import DistributedConfig
from transformers.generation.candidate_generator import CandidateGenerator
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.logits_process import LogitsProcessor
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.streamers import BaseStreamer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    AttentionMaskInterface,
    causal_mask_function,
    flash_attention_mask,
    sdpa_mask,
)
from transformers.modeling_utils import AttentionInterface
from transformers.utils.hub import cached_file

from headinfer.errors import UnsupportedError

__all__ = [
    "AttentionInterface",
    "AttentionMaskInterface",
    "BaseStreamer",
    "Cache",
    "CacheLayerMixin",
    "CandidateGenerator",
    "DistributedConfig",
    "DynamicCache",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "EosTokenCriteria",
    "GenerationMode",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionCacheLayerMixin",
    "LinearAttentionLayer",
    "LogitsProcessor",
    "MaxLengthCriteria",
    "MaxTimeCriteria",
    "PreTrainedConfig",
    "PreTrainedModel",
    "StopStringCriteria",
    "StoppingCriteria",
    "after_prompt",
    "causal_mask_function",
    "check_version",
    "cuda_devices",
    "default_layers",
    "flash_attention_mask",
    "generation_config_path",
    "has_response_template",
    "is_constant_size",
    "is_unsupported_cache",
    "last_logits_only",
    "layer_device",
    "not_compiled",
    "parsed_events",
    "response_parser",
    "sdpa_attention_forward",
    "sdpa_mask",
    "shared_full_layers",
    "takes_attention_interface",
    "tensor_parallel_plan",
]

_OLDEST = "5.17"
_HAS_OLD_ASSISTANCE = Version(transformers.__version__) < Version("5.23")
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def not_compiled(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Let torch.compile() leave a function out. Outside of compiled code it is called directly.

    torch.compiler.disable() alone would run a wrapper in each call, also in models that are not compiled.
    """
    disabled: Callable[_Arguments, _Result] = torch.compiler.disable(function)

    @functools.wraps(function)
    def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        is_traced = torch.compiler.is_compiling() or get_eval_frame_callback() is not None
        return disabled(*args, **kwargs) if is_traced else function(*args, **kwargs)

    return call


def check_version() -> None:
    """Check that transformers is not too old.

    Raises:
        UnsupportedError: it is.
    """
    if Version(transformers.__version__) < Version(_OLDEST):
        raise UnsupportedError(
            f"transformers {transformers.__version__} is installed: headinfer needs {_OLDEST} or newer"
        )


def last_logits_only(model: PreTrainedModel, tokens: int = 1) -> dict[str, int]:
    """Return the arguments with which a forward pass computes the logits of its last tokens only.

    Empty if the model has no such argument.
    """
    return {"logits_to_keep": tokens} if model._supports_logits_to_keep() else {}


def layer_device(model: PreTrainedModel, index: int) -> torch.device:
    """Return the device that a decoder layer computes on, also if accelerate has split or offloaded the model."""
    layers = getattr(model.get_decoder(), "layers", None)
    layer = layers[index] if layers is not None and index < len(layers) else model
    for module in layer.modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", [hook]):
            device = getattr(one, "execution_device", None)
            if device is not None:
                return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    weight = next(layer.parameters(), None)
    found: torch.device = model.device if weight is None else weight.device
    return found


def cuda_devices(model: PreTrainedModel) -> list[torch.device]:
    """Return the CUDA devices that compute the layers of a model: several if device_map spreads it over them."""
    devices = getattr(model, "hf_device_map", None) or {"": layer_device(model, 0)}
    names = {f"cuda:{at}" if isinstance(at, int) else str(at) for at in devices.values()}  # may be "cpu" or "disk"
    return [torch.device(name) for name in sorted(names) if name.startswith("cuda")]


class _WindowLayer(DynamicSlidingWindowLayer):  # type: ignore[misc]
    """A window whose update() returns as many tokens as the mask has, also while it records the past.

    That of transformers 5.17 returns all that it records, if several passes run between two crop(), as those of a draft
    model do.
    """

    def update(self, key_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = super().update(key_states, *args, **kwargs)
        if not self.record_past:
            return k, v
        visible = self.sliding_window - 1 + key_states.shape[-2]
        return k[:, :, -visible:], v[:, :, -visible:]


if _HAS_OLD_ASSISTANCE:
    DynamicSlidingWindowLayer = _WindowLayer


def default_layers(config: PreTrainedConfig) -> list[Any]:
    """Return the empty cache layers that transformers itself would use for a model."""
    layers = list(DynamicCache(config=config).layers)
    for layer in layers:
        if _HAS_OLD_ASSISTANCE and type(layer) is cache_utils.DynamicSlidingWindowLayer:
            layer.__class__ = _WindowLayer
    return layers


class _AfterPrompt(StoppingCriteriaList):  # type: ignore[misc]
    """Stopping criteria that a prompt of some tokens does not meet."""

    prompt_tokens = 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if input_ids.shape[1] <= self.prompt_tokens:
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        ended: torch.Tensor = super().__call__(input_ids, scores, **kwargs)
        return ended


def after_prompt(criteria: StoppingCriteriaList, prompt_tokens: int) -> StoppingCriteriaList:
    """Return stopping criteria for assisted decoding that the prompt itself does not meet.

    The loop of transformers 5.17 applies them to the prompt if there is no guess, and writes nothing after one that
    ends with a token that ends answers.

    Args:
        criteria: the stopping criteria of a generate().
        prompt_tokens: tokens of its prompt.
    """
    if not _HAS_OLD_ASSISTANCE:
        return criteria
    after = _AfterPrompt(criteria)
    after.prompt_tokens = prompt_tokens
    return after


def generation_config_path(name: str) -> str | None:
    """Return the path of the generation_config.json of a model.

    Args:
        name: the folder or the hub name of the model.

    Returns:
        The path; None if the model has no such file, or if the hub cannot be reached and it was not downloaded.
    """
    path: str | None = cached_file(
        name,
        "generation_config.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return path


def is_constant_size(layer: object) -> bool:
    """Return whether a cache layer has no state, or a state that does not grow with the context, such as a window."""
    constant = (
        DynamicSlidingWindowLayer,
        LinearAttentionLayer,
        LinearAttentionAndSlidingWindowAttentionLayer,
        getattr(cache_utils, "DummyLayer", None),  # from 5.18 on, for layers without a cache
    )
    return type(layer) in constant


def shared_full_layers(config: PreTrainedConfig) -> int:
    """Return the number of full-attention layers that use the K and V of an earlier layer (Gemma 3n and 4)."""
    text = config.get_text_config(decoder=True)
    modes = getattr(text, "kv_sharing_modes", None)
    kinds = getattr(text, "layer_types", None)
    if modes is None and kinds is not None:  # older versions have the number of the last layers that share
        count = getattr(text, "num_kv_shared_layers", None) or 0
        modes = ["reuse" if index >= len(kinds) - count else None for index in range(len(kinds))]
    if modes is None or kinds is None:
        return 0
    return sum(mode == "reuse" and kind == "full_attention" for mode, kind in zip(modes, kinds, strict=True))


def takes_attention_interface(model: PreTrainedModel) -> bool:
    """Return whether a model calls transformers' attention interface. If not, set_attn_implementation() only warns."""
    return bool(model._can_set_attn_implementation())


def tensor_parallel_plan(config: PreTrainedConfig) -> dict[str, str]:
    """Return how transformers shards a model: a style for each module by name; empty if it cannot shard it."""
    return getattr(config.get_text_config(decoder=True), "base_model_tp_plan", None) or {}


def has_response_template(tokenizer: Any, model: PreTrainedModel) -> bool:
    """Return whether a model has a template for reasoning and tool calls in its answers."""
    from transformers.cli.serving.utils import get_response_template  # loads much, and only a server needs it

    return get_response_template(tokenizer, model) is not None


def response_parser(tokenizer: Any, model: PreTrainedModel, prompt_ids: list[int], tools: list[Any]) -> Any:
    """Return transformers' parser of an answer of a model with has_response_template(), for parsed_events().

    Args:
        tokenizer: the model's tokenizer.
        model: the model.
        prompt_ids: the token ids of the prompt.
        tools: the tools of the request.
    """
    from transformers.cli.serving.utils import build_response_parser

    return build_response_parser(tokenizer, model, prompt_ids, tools=tools or None)


def parsed_events(events: list[Any]) -> list[tuple[str, str, str]]:
    """Return what the events of a response_parser() say, in order.

    Returns:
        ("text", text, ""), ("reasoning", text, "") or ("tool", name, arguments as JSON) each.
    """
    from transformers.cli.serving.utils import ReasoningText, ToolCall, response_events_to_chunks

    found = []
    for chunk in response_events_to_chunks(events):
        if isinstance(chunk, ToolCall):
            found.append(("tool", chunk.name, chunk.arguments))
        else:
            found.append(("reasoning" if isinstance(chunk, ReasoningText) else "text", str(chunk), ""))
    return found


def is_unsupported_cache(cache: object) -> bool:
    """Return whether headinfer's attention cannot use a cache: fixed-size, quantized and encoder-decoder ones."""
    return isinstance(cache, StaticCache | QuantizedCache | EncoderDecoderCache)
