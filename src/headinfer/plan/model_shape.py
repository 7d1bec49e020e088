"""The shape of a decoder, read from a transformers config without importing transformers.

A shape holds what costs memory and time: the layers and their kinds, heads and dims, and the numbers of weights. Only
the weights of matrices are counted. Vectors (norms, biases, sinks) are far less than 1 % and are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from headinfer.errors import UnsupportedError, UsageError
from headinfer.plan.layer_shape import LayerShape
from headinfer.utils.head_pattern import HeadPattern
from headinfer.utils.kv_format import dims_refusal
from headinfer.utils.values import real_number

__all__ = ["MOST_LAYERS", "LayerShape", "ModelShape"]

MOST_LAYERS = 1000
"""More layers are a mistake. Without this limit, a config with a wrong number would be processed for hours."""

# Fields that a config.json may leave out, because the family's class has a default for them.
_GEMMA = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True}
_FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma": {"tie_word_embeddings": True},
    "gemma2": {**_GEMMA, "sliding_window": 4096, "sliding_window_pattern": 2},
    "gemma3_text": {**_GEMMA, "vocab_size": 262_208, "sliding_window": 4096, "max_position_embeddings": 131_072,
                    "sliding_window_pattern": 6},
    "gemma3n_text": {**_GEMMA, "num_key_value_heads": 2, "sliding_window": 512, "num_kv_shared_layers": 15,
                     "hidden_size_per_layer_input": 256, "vocab_size_per_layer_input": 262_144, "laurel_rank": 64,
                     "altup_num_inputs": 4, "sliding_window_pattern": 5, "max_position_embeddings": 32_768},
    "gemma4_text": {**_GEMMA, "sliding_window": 512, "hidden_size_per_layer_input": 256, "sliding_window_pattern": 6,
                    "vocab_size_per_layer_input": 262_144, "max_position_embeddings": 131_072},
    "gpt_oss": {"sliding_window_pattern": 2},
    "cohere2": {"sliding_window_pattern": 4, "tie_word_embeddings": True},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "llama4_text": {"attention_chunk_size": 8192},
}  # fmt: skip
# Families that look positions up in a table with an entry for each of max_position_embeddings.
_POSITION_TABLES = ("biogpt", "gpt2", "gpt_bigcode", "opt")
_LINEAR_FAMILIES = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")


@dataclass(frozen=True)
class ModelShape:
    """The layers of a decoder, and the sizes that its cost depends on.

    Attributes:
        layers: the layers.
        hidden_size: the hidden size H.
        intermediate_size: the largest inner size I of an MLP, for one token.
        vocab_size: tokens in the vocabulary.
        max_context_tokens: the longest context that the model was made for; 0 if the config does not say it.
        family: transformers' model_type.
        embedding_weights: weights of the embedding, which are looked up and not multiplied.
        head_weights: weights of the output head, which only the last token's state is multiplied with.
        is_tied: whether the head and the embedding are the same weights, stored once.
    """

    layers: tuple[LayerShape, ...]
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_context_tokens: int
    family: str = ""
    embedding_weights: int = 0
    head_weights: int = 0
    is_tied: bool = False

    @classmethod
    def from_config(cls, config: Any) -> ModelShape:
        """Read the shape from a config of transformers.

        Args:
            config: a `PreTrainedConfig`, or an object with its attributes. The text part of a larger model is used.

        Raises:
            ValueError: a field that is needed is missing or is not a positive number.
        """
        text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
        stored = text.to_dict() if hasattr(text, "to_dict") else {}  # values by layer are not attributes

        def get(name: str, default: Any = None) -> Any:
            return _or(stored[name] if name in stored else getattr(text, name, None), default)

        return _read(get)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> ModelShape:
        """Read the shape from the fields of a config.json.

        Args:
            config: the fields. The text part of a larger model is used.

        Raises:
            ValueError: a field that is needed is missing or is not a positive number.
        """
        text = config.get("text_config") or config
        defaults = _FAMILY_DEFAULTS.get(str(text.get("model_type")), {})
        return _read(lambda name, default=None: _or(text.get(name), defaults.get(name, default)))

    @cached_property
    def offloaded_layers(self) -> tuple[int, ...]:
        """Indices of the layers whose KV is stored in host memory."""
        return tuple(index for index, layer in enumerate(self.layers) if layer.is_offloaded)

    @cached_property
    def weights(self) -> int:
        """Stored weights."""
        head = 0 if self.is_tied else self.head_weights
        return sum(layer.weights for layer in self.layers) + self.embedding_weights + head

    @cached_property
    def active_weights(self) -> int:
        """Weights that one token is multiplied with in the layers, without embedding and head."""
        return sum(layer.active_weights for layer in self.layers)

    @property
    def has_position_table(self) -> bool:
        """Whether positions are looked up in a table, so that a context cannot be longer than max_context_tokens."""
        return self.family in _POSITION_TABLES and self.max_context_tokens > 0

    def check_positions(self, tokens: int) -> None:
        """Check that the model has a position for each token of a context.

        Raises:
            UsageError: its table of positions is shorter.
        """
        if self.has_position_table and tokens > self.max_context_tokens:
            raise UsageError(
                f"{tokens:,} tokens of prompt and answer exceed the {self.max_context_tokens:,} positions that this "
                f"{self.family} has learned: shorten the prompt, or ask for fewer new tokens"
            )

    def kv_bytes_per_token(self, element_bytes: int) -> int:
        """Return the bytes of host KV of one token of one row, over all offloaded layers."""
        return sum(layer.kv_bytes_per_token(element_bytes) for layer in self.layers if layer.is_offloaded)

    def stored_bytes_per_token(self, element_bytes: int, bits: int) -> int:
        """Return the bytes of one token of one row, over all offloaded layers, where headinfer stores it.

        Args:
            element_bytes: bytes of an element in the model's dtype.
            bits: bits of an element of quantised KV; 0 for the model's dtype.
        """
        return sum(layer.stored_bytes_per_token(element_bytes, bits) for layer in self.layers if layer.is_offloaded)

    def check_kv_bits(self, bits: int) -> None:
        """Check that the KV of all offloaded layers can be stored in so many bits; 0 stands for the model's dtype.

        Raises:
            UnsupportedError: a head dim does not fit.
        """
        for layer in self.layers:
            refusal = dims_refusal(layer.key_dim, layer.value_dim) if bits and layer.is_offloaded else ""
            if refusal:
                raise UnsupportedError(refusal)

    def local_kv_bytes(self, tokens: int, element_bytes: int) -> int:
        """Return the bytes of one row that the layers without full attention keep on the device.

        These are windows of K and V and the states of linear layers.
        """
        return sum(
            layer.kv_bytes_per_token(element_bytes) * layer.seen_tokens(tokens) + layer.state_elements * element_bytes
            for layer in self.layers
            if not layer.is_offloaded
        )

    def window_bytes(self, element_bytes: int) -> int:
        """Return the bytes of one row that streaming heads keep on the device, at any context."""
        return sum(layer.window_bytes(element_bytes) for layer in self.layers)

    @property
    def pattern_heads(self) -> tuple[int, ...]:
        """The KV heads for which a head pattern has values, by layer: those whose KV grows with the context."""
        return tuple(layer.kv_heads if layer.is_full and not layer.shares_kv else 0 for layer in self.layers)

    def check_pattern(self, pattern: HeadPattern) -> None:
        """Check that a head pattern fits the model.

        Raises:
            UnsupportedError: KV heads of this family cannot be streaming.
            UsageError: the pattern is for another model, or leaves no head full.
        """
        refusal = ""
        for layer in self.layers:
            if layer.kind == "hybrid":
                refusal = "its layers have full and linear attention together"
            elif layer.is_full and layer.shares_kv:
                refusal = "some of its layers share the K and V of others"
            elif layer.is_full and layer.score_dims:
                refusal = "its layers cache one latent for all heads (MLA)"
        if refusal:
            raise UnsupportedError(f"sparse_heads is not served for {self.family}, because {refusal}: leave it out")
        pattern.check(self.pattern_heads)

    def even_pattern(self, share: float) -> HeadPattern:
        """Return a head pattern for plans, in which the same share of the heads of each layer is streaming.

        It says how many heads are streaming, and not which ones can be. Its `info` has the field "assumed".

        Args:
            share: the share, 0 to 1. Over all layers, the number of streaming heads is rounded to the nearest.

        Raises:
            UnsupportedError: KV heads of this family cannot be streaming.
            UsageError: the share is out of range, or leaves no full head.
        """
        share = real_number(share, "the share of streaming heads", low=0.0, high=1.0)
        values = []
        heads = 0
        streaming = 0
        for count in self.pattern_heads:
            heads += count
            more = math.floor(share * heads + 0.5) - streaming
            streaming += more
            values.append((0.0,) * more + (1.0,) * (count - more))
        pattern = HeadPattern(tuple(values), info={"assumed": True})
        self.check_pattern(pattern)
        return pattern

    def with_pattern(self, pattern: HeadPattern | None) -> ModelShape:
        """Return the shape with the streaming heads of a head pattern; None for none.

        Raises:
            UnsupportedError: KV heads of this family cannot be streaming.
            UsageError: the pattern is for another model, or leaves no head full.
        """
        if pattern is None:
            if all(layer.streaming_heads == 0 for layer in self.layers):
                return self
            layers = (replace(one, streaming_heads=0, sink_tokens=0, recent_tokens=0) for one in self.layers)
            return replace(self, layers=tuple(layers))
        self.check_pattern(pattern)
        sink = pattern.sink_tokens
        recent = pattern.recent_tokens
        sparse = (
            replace(layer, streaming_heads=len(pattern.streaming_heads(i)), sink_tokens=sink, recent_tokens=recent)
            for i, layer in enumerate(self.layers)
        )
        return replace(self, layers=tuple(sparse))

    def shard(self, ranks: int) -> ModelShape:
        """Return the shape of one of `ranks` equal shards: its heads and its part of the weights."""
        layers = tuple(
            replace(
                layer,
                query_heads=layer.query_heads // ranks,
                kv_heads=layer.kv_heads // ranks,
                weights=layer.weights // ranks,
                active_weights=layer.active_weights // ranks,
                mlp_width=layer.mlp_width // ranks,
            )
            for layer in self.layers
        )
        return replace(
            self,
            layers=layers,
            intermediate_size=self.intermediate_size // ranks,
            embedding_weights=self.embedding_weights // ranks,
            head_weights=self.head_weights // ranks,
        )

    def prefill_flops(self, tokens: int) -> float:
        """Estimate the floating-point operations to read `tokens` tokens, in linear layers and causal attention.

        There are 2 FLOP for each weight and token, and 2 * Hq * (Dk + Dv) FLOP for each of the pairs of tokens that
        the causal mask leaves, as in section 4 of arXiv 2502.12574.
        """
        pairs = sum(part.flops_per_pair for layer in self.layers for part in layer.attention_parts if part.is_full)
        return 2.0 * self.active_weights * tokens + pairs / 2 * float(tokens) * tokens


_Get = Callable[..., Any]


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _whole(get: _Get, name: str, default: Any = None) -> int:
    value = get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"the config's {name} is {value!r}: it must be a positive number")
    return value


def _number(get: _Get, name: str, default: int = 0) -> int:
    """Return a field that is a whole number and not negative."""
    value = get(name, default)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or value < 0 or value != int(value):
        raise ValueError(f"the config's {name} is {value!r}: it must be a whole number that is not negative")
    return int(value)


def _read(get: _Get) -> ModelShape:
    """Read the shape with a function that returns a field of the config, or a default if it is missing."""
    hidden = _whole(get, "hidden_size")
    count = _whole(get, "num_hidden_layers")
    if count > MOST_LAYERS:
        raise ValueError(f"the config's num_hidden_layers is {count:,}: no model has more than {MOST_LAYERS:,} layers")
    vocab = _whole(get, "vocab_size")
    family = str(get("model_type", ""))
    kinds = _kinds(get, family, count)
    own_kv_layers = count - _number(get, "num_kv_shared_layers", 0)
    layers = tuple(_layer(get, family, index, kind, index >= own_kv_layers) for index, kind in enumerate(kinds))
    # Gemma 3n and 4 have a second, small embedding for each layer, and its projection. Gemma 3n also has the
    # projections of AltUp.
    per_layer = _number(get, "hidden_size_per_layer_input", 0) * count if family.startswith("gemma") else 0
    extra = per_layer * (_number(get, "vocab_size_per_layer_input", 0) + hidden)
    if family == "gemma3n_text":
        extra += 2 * (_number(get, "altup_num_inputs", 4) - 1) * hidden * hidden
    return ModelShape(
        layers=layers,
        hidden_size=hidden,
        intermediate_size=max(layer.mlp_width for layer in layers),
        vocab_size=vocab,
        max_context_tokens=_number(get, "max_position_embeddings", 0),
        family=family,
        embedding_weights=vocab * hidden + extra,
        head_weights=vocab * hidden,
        is_tied=bool(get("tie_word_embeddings", False)),
    )


def _kinds(get: _Get, family: str, count: int) -> list[str]:
    """Return transformers' layer_types. Older configs lack them, and other fields determine the types."""
    kinds = get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, (list, tuple)) or len(kinds) < count:
            named = len(kinds) if isinstance(kinds, (list, tuple)) else repr(kinds)
            raise ValueError(f"the config's layer_types names {named} layers, and num_hidden_layers is {count}")
        return [str(kind) for kind in kinds[:count]]
    if family == "llama4_text":
        rope = get("no_rope_layers") or [int((index + 1) % 4 != 0) for index in range(count)]
        return ["chunked_attention" if rope[index] else "full_attention" for index in range(count)]
    if family in _LINEAR_FAMILIES:
        every = _number(get, "full_attention_interval", 4)
        return ["full_attention" if (index + 1) % every == 0 else "linear_attention" for index in range(count)]
    if get("sliding_window") is None or not get("use_sliding_window", True):
        return ["full_attention"] * count
    every = _number(get, "sliding_window_pattern", 0)
    if every:
        full = {index for index in range(count) if (index + 1) % every == 0}
        full |= {count - 1} if family.startswith("gemma4") else set()
        return ["full_attention" if index in full else "sliding_attention" for index in range(count)]
    first = _number(get, "max_window_layers", 0) if family.startswith("qwen") else 0
    return ["sliding_attention" if index >= first else "full_attention" for index in range(count)]


def _layer(get: _Get, family: str, index: int, kind: str, shares_kv: bool) -> LayerShape:
    hidden = _whole(get, "hidden_size")
    query_heads = _whole(get, "num_attention_heads")
    kv_heads = 1 if get("multi_query", False) else _whole(get, "num_key_value_heads", query_heads)
    head_dim = _number(get, "head_dim", 0) or hidden // query_heads
    if head_dim < 1:
        raise ValueError(f"the config's hidden_size is {hidden} and its num_attention_heads {query_heads}: no head_dim")
    mlp_weights, mlp_active, mlp_width = _mlp(get, family, index, shares_kv)
    window = 0
    if kind == "sliding_attention":
        window = _number(get, "sliding_window", 0)
    elif kind == "chunked_attention":
        window = _number(get, "attention_chunk_size", 0)
    state = 0
    score_dims = 0
    if kind == "linear_attention":
        query_heads, state, attention = _linear_attention(get, hidden, query_heads)
        key_dim = value_dim = head_dim
    elif get("kv_lora_rank", 0):
        key_dim, value_dim, score_dims, attention = _latent_attention(get, hidden, query_heads)
        kv_heads = 1
    else:
        if family.startswith("gemma4") and kind == "full_attention":
            head_dim, kv_heads = _gemma4_full(get, index, kv_heads)
        key_dim = head_dim
        value_dim = _number(get, "v_head_dim", 0) or head_dim
        gate = 2 if family in _LINEAR_FAMILIES else 1  # a second half of q_proj gates the output of their full layers
        kv_sides = 0 if shares_kv else key_dim + value_dim
        if family.startswith("gemma4") and kind == "full_attention" and get("attention_k_eq_v", False):
            kv_sides = key_dim  # K and V have one projection
        attention = hidden * (query_heads * (gate * key_dim + value_dim) + kv_heads * kv_sides)
    extra = 0
    if family.startswith("gemma") and get("hidden_size_per_layer_input", 0):
        extra += 2 * hidden * _number(get, "hidden_size_per_layer_input", 0)
    if family == "gemma3n_text":
        extra += 2 * hidden * _number(get, "laurel_rank", 64)
    return LayerShape(
        kind=kind,
        query_heads=query_heads,
        kv_heads=kv_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        window_tokens=window,
        shares_kv=shares_kv,
        state_elements=state,
        score_dims=score_dims,
        weights=attention + mlp_weights + extra,
        active_weights=attention + mlp_active + extra,
        mlp_width=mlp_width,
    )


def _linear_attention(get: _Get, hidden: int, query_heads: int) -> tuple[int, int, int]:
    """Return the heads, the elements of the state and the weights of a gated delta-rule layer (Qwen3-Next)."""
    heads = _number(get, "linear_num_value_heads", query_heads)
    key_dim = _number(get, "linear_key_head_dim", 128)
    value_dim = _number(get, "linear_value_head_dim", 128)
    keys = _number(get, "linear_num_key_heads", heads) * key_dim
    values = heads * value_dim
    return heads, heads * key_dim * value_dim, hidden * (2 * keys + 3 * values + 2 * heads)


def _latent_attention(get: _Get, hidden: int, query_heads: int) -> tuple[int, int, int, int]:
    """Return the dims of MLA (multi-head latent attention) and its weights.

    Returns:
        The dims of the latent and of the rotary key, which the cache holds for each token, Dk + Dv of a query head,
        and the weights.
    """
    latent = _whole(get, "kv_lora_rank")
    rope = _whole(get, "qk_rope_head_dim")
    nope = _whole(get, "qk_nope_head_dim")
    value_dim = _whole(get, "v_head_dim")
    query_rank = _number(get, "q_lora_rank", 0)
    query = query_heads * (nope + rope)
    weights = query_rank * (hidden + query) if query_rank else hidden * query
    weights += hidden * (latent + rope) + latent * query_heads * (nope + value_dim) + query_heads * value_dim * hidden
    return latent, rope, nope + rope + value_dim, weights


def _gemma4_full(get: _Get, index: int, kv_heads: int) -> tuple[int, int]:
    """Return the head dim and the number of KV heads of a full layer of Gemma 4, which differ from other layers'."""
    layers = get("per_layer_config") or {}
    own: Mapping[str, Any] = layers.get(index) or layers.get(str(index)) or {}
    if get("attention_k_eq_v", False):
        kv_heads = int(own.get("num_key_value_heads") or get("num_global_key_value_heads", kv_heads))
    return int(own.get("head_dim") or get("global_head_dim", 512)), kv_heads


def _mlp(get: _Get, family: str, index: int, shares_kv: bool) -> tuple[int, int, int]:
    """Return the weights of an MLP, the weights for one token, and the inner size for one token."""
    hidden = _whole(get, "hidden_size")
    width = get("intermediate_size", 4 * hidden)
    width = int(width[index] if isinstance(width, (list, tuple)) else width)
    experts = next((_number(get, n) for n in ("num_local_experts", "n_routed_experts", "num_experts") if get(n)), 0)
    if not experts or not _is_sparse(get, family, index):
        if family == "llama4_text":
            width = _number(get, "intermediate_size_mlp", width)
        if shares_kv and get("use_double_wide_mlp", False):
            width *= 2
        return 3 * hidden * width, 3 * hidden * width, width
    expert = _number(get, "moe_intermediate_size", 0) or width
    chosen = _number(get, "num_experts_per_tok", 0) or _number(get, "top_k_experts", 1) or 1
    shared = _number(get, "n_shared_experts", 0) * expert + _number(get, "shared_expert_intermediate_size", 0)
    if family == "llama4_text" or get("enable_moe_block", False):
        shared += width
    router = hidden * experts
    active = chosen * expert + shared
    return 3 * hidden * (experts * expert + shared) + router, 3 * hidden * active + router, active


def _is_sparse(get: _Get, family: str, index: int) -> bool:
    """Return whether a layer of a mixture-of-experts model has experts."""
    if family == "llama4_text":
        step = _number(get, "interleave_moe_layer_step", 1)
        return index in get("moe_layers", range(step - 1, index + 1, step))
    if family.startswith("gemma4"):
        return bool(get("enable_moe_block", False))
    dense = index < _number(get, "first_k_dense_replace", 0) or index in get("mlp_only_layers", ())
    return not dense and (index + 1) % _number(get, "decoder_sparse_step", 1) == 0
