"""Every difference between transformers versions, and every private name of transformers that we use."""

from __future__ import annotations

from typing import Any

import transformers
from packaging.version import Version
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    QuantizedCache,
    StaticCache,
)
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
    "DynamicCache",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "PreTrainedConfig",
    "PreTrainedModel",
    "causal_mask_function",
    "check_version",
    "default_layers",
    "flash_attention_mask",
    "sdpa_attention_forward",
    "sdpa_mask",
    "takes_attention_interface",
    "unfit_cache",
]

_OLDEST = "5.17"


def check_version() -> None:
    """Raise UnsupportedError where transformers is older than what the seam was built on."""
    if Version(transformers.__version__) < Version(_OLDEST):
        raise UnsupportedError(
            f"transformers {transformers.__version__} is installed: headinfer needs {_OLDEST} or newer"
        )


def default_layers(config: PreTrainedConfig) -> list[Any]:
    """The cache layers that transformers itself would use for this model, empty, one per decoder layer."""
    return list(DynamicCache(config=config).layers)


def takes_attention_interface(model: PreTrainedModel) -> bool:
    """Whether the model's attention calls the interface; set_attn_implementation only warns where it does not."""
    return bool(model._can_set_attn_implementation())


def unfit_cache(cache: object) -> bool:
    """Whether a cache can not work under headinfer's attention: fixed-size, quantised or encoder-decoder."""
    return isinstance(cache, StaticCache | QuantizedCache | EncoderDecoderCache)
