"""Every difference between transformers versions, and every private name of transformers that we use."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from packaging.version import Version
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
from transformers.generation.configuration_utils import GenerationMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    AttentionMaskInterface,
    causal_mask_function,
    flash_attention_mask,
    sdpa_mask,
)
from transformers.modeling_utils import AttentionInterface

from headinfer.errors import UnsupportedError

__all__ = [
    "AttentionInterface",
    "AttentionMaskInterface",
    "Cache",
    "CacheLayerMixin",
    "DistributedConfig",
    "DynamicCache",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "GenerationMode",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionCacheLayerMixin",
    "LinearAttentionLayer",
    "PreTrainedConfig",
    "PreTrainedModel",
    "causal_mask_function",
    "check_version",
    "cuda_devices",
    "default_layers",
    "flash_attention_mask",
    "is_constant_size",
    "last_logits_only",
    "layer_device",
    "sdpa_attention_forward",
    "sdpa_mask",
    "shared_full_layers",
    "takes_attention_interface",
    "tensor_parallel_plan",
    "unfit_cache",
]

_OLDEST = "5.17"


def check_version() -> None:
    """Raise UnsupportedError where transformers is older than what the seam was built on."""
    if Version(transformers.__version__) < Version(_OLDEST):
        raise UnsupportedError(
            f"transformers {transformers.__version__} is installed: headinfer needs {_OLDEST} or newer"
        )


def last_logits_only(model: PreTrainedModel) -> dict[str, int]:
    """Arguments of a forward pass of which only the last token's logits are wanted; none for models without them."""
    return {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}


def layer_device(model: PreTrainedModel, index: int) -> torch.device:
    """Where a decoder layer computes: its own weights' device, for a model that device_map spread over several."""
    layers = getattr(model.get_decoder(), "layers", None)
    weight = next(layers[index].parameters(), None) if layers is not None and index < len(layers) else None
    device: torch.device = model.device if weight is None or weight.device.type == "meta" else weight.device
    return device


def cuda_devices(model: PreTrainedModel) -> list[torch.device]:
    """The CUDA devices that compute its layers: one, or those that device_map spread it over."""
    devices = getattr(model, "hf_device_map", None) or {"": model.device}
    names = {f"cuda:{at}" if isinstance(at, int) else str(at) for at in devices.values()}  # others are "cpu", "disk"
    return [torch.device(name) for name in sorted(names) if name.startswith("cuda")]


def default_layers(config: PreTrainedConfig) -> list[Any]:
    """The cache layers that transformers itself would use for this model, empty, one per decoder layer."""
    return list(DynamicCache(config=config).layers)


def is_constant_size(layer: object) -> bool:
    """Whether a cache layer's state does not grow with the context, or it has none: transformers keeps those."""
    constant = (
        DynamicSlidingWindowLayer,
        LinearAttentionLayer,
        LinearAttentionAndSlidingWindowAttentionLayer,
        getattr(cache_utils, "DummyLayer", None),  # not before 5.18: layers without a cache have no entry at all
    )
    return type(layer) in constant


def shared_full_layers(config: PreTrainedConfig) -> int:
    """How many full-attention layers use the K and V of an earlier one (Gemma 3n and 4) and have no cache."""
    text = config.get_text_config(decoder=True)
    modes, kinds = getattr(text, "kv_sharing_modes", None), getattr(text, "layer_types", None)
    if modes is None and kinds is not None:  # older versions say how many of the last layers
        count = getattr(text, "num_kv_shared_layers", None) or 0
        modes = ["reuse" if index >= len(kinds) - count else None for index in range(len(kinds))]
    if modes is None or kinds is None:
        return 0
    return sum(mode == "reuse" and kind == "full_attention" for mode, kind in zip(modes, kinds, strict=True))


def takes_attention_interface(model: PreTrainedModel) -> bool:
    """Whether the model's attention calls the interface; set_attn_implementation only warns where it does not."""
    return bool(model._can_set_attn_implementation())


def tensor_parallel_plan(config: PreTrainedConfig) -> dict[str, str]:
    """How transformers splits the model over processes: styles by the names of modules; empty where it cannot."""
    return getattr(config.get_text_config(decoder=True), "base_model_tp_plan", None) or {}


def unfit_cache(cache: object) -> bool:
    """Whether a cache can not work under headinfer's attention: fixed-size, quantised or encoder-decoder."""
    return isinstance(cache, StaticCache | QuantizedCache | EncoderDecoderCache)
