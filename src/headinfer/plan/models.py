"""Look up the shape of a model: a built-in config, a folder, a config.json or a downloaded hub model."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from headinfer.embedded import EMBEDDED, embedded_model
from headinfer.errors import UsageError
from headinfer.plan.families import check_family
from headinfer.plan.model_shape import ModelShape

__all__ = ["BUILT_IN_CONFIGS", "find_shape"]


def _config(
    family: str, layers: int, hidden: int, inner: int, heads: int, kv_heads: int, vocab: int, context: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": family,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        **more,
    }


_QWEN3_MOE = {"head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
_GPT_OSS = {"head_dim": 64, "sliding_window": 128, "num_local_experts": 32, "num_experts_per_tok": 4}

# The fields of each model's published config.json that determine its shape.
BUILT_IN_CONFIGS: dict[str, dict[str, Any]] = {
    "llama-2-7b": _config("llama", 32, 4096, 11008, 32, 32, 32_000, 4096),
    "llama-3-8b": _config("llama", 32, 4096, 14336, 32, 8, 128_256, 8192),
    "llama-3-70b": _config("llama", 80, 8192, 28672, 64, 8, 128_256, 8192),
    "llama-3.1-8b": _config("llama", 32, 4096, 14336, 32, 8, 128_256, 131_072),
    "llama-3.1-70b": _config("llama", 80, 8192, 28672, 64, 8, 128_256, 131_072),
    "llama-3.2-1b": _config("llama", 16, 2048, 8192, 32, 8, 128_256, 131_072, head_dim=64, tie_word_embeddings=True),
    "llama-3.2-3b": _config("llama", 28, 3072, 8192, 24, 8, 128_256, 131_072, head_dim=128, tie_word_embeddings=True),
    "mistral-7b": _config("mistral", 32, 4096, 14336, 32, 8, 32_768, 32_768),
    "qwen2-7b": _config("qwen2", 28, 3584, 18944, 28, 4, 152_064, 131_072),
    "qwen3-4b": _config("qwen3", 36, 2560, 9728, 32, 8, 151_936, 40_960, head_dim=128, tie_word_embeddings=True),
    "qwen3-8b": _config("qwen3", 36, 4096, 12288, 32, 8, 151_936, 40_960, head_dim=128),
    "qwen3-30b-a3b": _config("qwen3_moe", 48, 2048, 6144, 32, 4, 151_936, 40_960, **_QWEN3_MOE),
    "gemma-2-9b": _config("gemma2", 42, 3584, 14336, 16, 8, 256_000, 8192, head_dim=256),
    "gemma-3-4b": _config("gemma3_text", 34, 2560, 10240, 8, 4, 262_208, 131_072, sliding_window=1024),
    "gemma-3-12b": _config("gemma3_text", 48, 3840, 15360, 16, 8, 262_208, 131_072, sliding_window=1024),
    "gpt-oss-20b": _config("gpt_oss", 24, 2880, 2880, 64, 8, 201_088, 131_072, **_GPT_OSS),
}


def find_shape(model: str) -> ModelShape:
    """Return the shape of a model, without the network.

    Args:
        model: a built-in config's name, a folder, a config.json, or a hub name in the local hub cache.

    Raises:
        UsageError: there is no such model, and the message names the nearest built-in ones; or its config.json is not
            the config of a decoder.
        UnsupportedError: the family of the model is not served.
    """
    path = embedded_model() if model == EMBEDDED else Path(model)
    built_in = BUILT_IN_CONFIGS.get(_short(model))
    if os.path.isdir(path):
        path = path / "config.json"
        if not os.path.isfile(path):
            raise UsageError(f"{model} is not a model folder: it has no config.json")
    elif not os.path.isfile(path):
        cached = _in_hub_cache(model)
        if cached is None and built_in is not None:
            return ModelShape.from_dict(built_in)
        if cached is None:
            near = difflib.get_close_matches(_short(model), BUILT_IN_CONFIGS, n=3, cutoff=0.4) or BUILT_IN_CONFIGS
            raise UsageError(
                f"there is no model {model!r}: give a folder, a config.json, a downloaded hub name, or a built-in "
                f"config such as {', '.join(near)}"
            )
        path = cached
    with _decoder_config(path):
        config = json.loads(path.read_text(encoding="utf-8"))
        family = str(config.get("model_type"))
        text = config.get("text_config")
        text_family = str(text.get("model_type", f"{family}_text")) if text else family
    if "model_type" in config:
        check_family(family, text_family)
    with _decoder_config(path):
        shape = ModelShape.from_dict(config)
    check_family(family, text_family)
    return shape


@contextmanager
def _decoder_config(path: Path) -> Iterator[None]:
    """Turn an error about the content of a config.json into one sentence."""
    try:
        yield
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"{path} is not the config of a decoder: {error}") from error


def _short(model: str) -> str:
    """Shorten a hub name: meta-llama/Meta-Llama-3-8B-Instruct becomes llama-3-8b."""
    name = model.rstrip("/").rpartition("/")[2].lower().removeprefix("meta-")
    return re.sub(r"-(instruct|chat|base|hf|it|pt|v0\.[0-9])\b", "", name)


def _in_hub_cache(model: str) -> Path | None:
    """Return the config.json of a hub name that was downloaded to Hugging Face's cache, or None."""
    if "/" not in model:
        return None
    # Imported here, since it takes 0.1 s that a built-in config does not need.
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, "config.json")
    except HFValidationError:  # a hub name cannot be written like this
        return None
    return Path(found) if isinstance(found, str) else None
