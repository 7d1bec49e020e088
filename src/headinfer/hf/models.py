"""What MODEL means on the command line: a local folder, a hub name, `embedded`, or `random:NAME?layers=2&...`.

`embedded` is the small model that ships with headinfer (see src/headinfer/embedded).

Random models have a well-known model's shape and seeded random weights, so that any shape can be run on any
machine without a download. They read and write bytes (a tokenizer of 256 bytes and 3 special tokens), and their
vocabulary is that small unless `vocab=` says otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from headinfer.embedded import EMBEDDED, embedded_model
from headinfer.errors import UsageError
from headinfer.hf.cache import HeadCache
from headinfer.hf.compat import PreTrainedConfig, PreTrainedModel
from headinfer.hf.families import check_family

__all__ = ["RANDOM_CONFIGS", "ModelSource", "byte_tokenizer", "resolve"]

_PREFIX = "random:"
_SHORT_NAMES = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "vocab": "vocab_size",
    "context": "max_position_embeddings",
}


def _llama(layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, context: int, **more: Any) -> Any:
    names = (*(_SHORT_NAMES[name] for name in ("layers", "hidden", "intermediate", "heads", "kv_heads", "context")),)
    return dict(zip(names, (layers, hidden, intermediate, heads, kv_heads, context), strict=True), **more)


RANDOM_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-2-7b": ("llama", _llama(32, 4096, 11008, 32, 32, 4096)),
    "llama-3-8b": ("llama", _llama(32, 4096, 14336, 32, 8, 8192)),
    "llama-3-70b": ("llama", _llama(80, 8192, 28672, 64, 8, 8192)),
    "mistral-7b": ("mistral", _llama(32, 4096, 14336, 32, 8, 32768, sliding_window=None)),
    "qwen2-7b": ("qwen2", _llama(28, 3584, 18944, 28, 4, 131072)),
    "qwen3-8b": ("qwen3", _llama(36, 4096, 12288, 32, 8, 40960, head_dim=128)),
    "gemma-3-4b": ("gemma3_text", _llama(34, 2560, 10240, 8, 4, 131072, head_dim=256, sliding_window=1024)),
    "tiny-llama": ("llama", _llama(4, 256, 512, 8, 4, 1048576)),
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of bytes: ids 0 to 255 are the bytes, then <|bos|>, <|eos|> and <|pad|>; any text round-trips."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|pad|>"
    )


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from, with its config; nothing heavy is loaded yet."""

    name: str
    config: PreTrainedConfig
    is_random: bool

    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        if self.is_random:
            return byte_tokenizer()
        try:
            return AutoTokenizer.from_pretrained(self.name)
        except (OSError, ValueError) as error:
            raise UsageError(f"{self.name} has no usable tokenizer: {_first_line(error)}") from error

    def weight_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the weights in a dtype, counted on the meta device."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config, dtype=dtype)
        return sum(math.prod(p.shape) * p.element_size() for p in model.parameters())

    def load(self, *, dtype: torch.dtype, device: str, seed: int) -> PreTrainedModel:
        """The model in eval mode on a device. Random weights depend on the seed only."""
        if self.is_random:
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(self.config, dtype=dtype).to(device)
        else:
            disable_progress_bar()  # its bar is for files that come over a network
            try:
                model = AutoModelForCausalLM.from_pretrained(self.name, dtype=dtype).to(device)
            except (OSError, ValueError) as error:
                raise UsageError(f"{self.name} can not be loaded: {_first_line(error)}") from error
        return model.eval()


def resolve(spec: str) -> ModelSource:
    """Read the config that a MODEL argument names and check that headinfer serves it.

    Raises UsageError where there is no such model, UnsupportedError where its family or layers are not served.
    """
    source = _random(spec) if spec.startswith(_PREFIX) else _stored(spec)
    check_family(source.config)
    HeadCache(source.config)
    return source


def _random(spec: str) -> ModelSource:
    name, _, query = spec.removeprefix(_PREFIX).partition("?")
    if name not in RANDOM_CONFIGS:
        raise UsageError(f"there is no built-in config {name!r}: choose one of {', '.join(RANDOM_CONFIGS)}")
    family, fields = RANDOM_CONFIGS[name]
    changes: dict[str, Any] = {"vocab_size": len(byte_tokenizer())}
    for key, text in parse_qsl(query, keep_blank_values=True):
        try:
            value = int(text)
        except ValueError:
            raise UsageError(f"{spec}: {key}={text} is no whole number") from None
        if value < 1:
            raise UsageError(f"{spec}: {key}={text} must be positive")
        changes[_SHORT_NAMES.get(key, key)] = value
    own = AutoConfig.for_model(family).to_dict()
    whole = {key for key, value in own.items() if value is None or type(value) is int}
    if unknown := [key for key in changes if key not in whole]:
        raise UsageError(
            f"{spec}: {family} has no field {unknown[0]} for a whole number: use {', '.join(_SHORT_NAMES)} or a "
            "config field"
        )
    # The tokenizer knows the special tokens; a small vocabulary may not have them.
    chosen = {**fields, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **changes}
    hidden, heads, kv_heads = (chosen[_SHORT_NAMES[name]] for name in ("hidden", "heads", "kv_heads"))
    if heads % kv_heads or hidden % heads or (hidden // heads) % 2:
        raise UsageError(f"{spec}: hidden {hidden} must be an even multiple of heads {heads}, and heads of kv_heads")
    return ModelSource(spec, AutoConfig.for_model(family, **chosen), is_random=True)


def _stored(spec: str) -> ModelSource:
    if spec == EMBEDDED:
        spec = str(embedded_model())
    folder = Path(spec)
    if folder.exists() and not (folder / "config.json").is_file():
        raise UsageError(f"{spec} is no model folder: it has no config.json")
    try:
        config = AutoConfig.from_pretrained(spec)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"there is no model {spec!r}: it is no local folder, and the hub does not give it ({_first_line(error)}); "
            f"try a folder, a hub name, or {_PREFIX}{next(iter(RANDOM_CONFIGS))}?layers=2"
        ) from error
    return ModelSource(spec, config, is_random=False)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
