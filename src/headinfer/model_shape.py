"""The shape of a decoder's attention, read from a transformers config without importing transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["LayerShape", "ModelShape"]


@dataclass(frozen=True)
class LayerShape:
    """One decoder layer. `kind` is transformers' layer type, e.g. full_attention or sliding_attention."""

    kind: str
    query_heads: int
    kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def is_offloaded(self) -> bool:
        """Only full-attention layers grow with the context; the others stay with transformers."""
        return self.kind == "full_attention"

    def kv_bytes_per_token(self, element_bytes: int) -> int:
        """Bytes of K and V that one token adds to one row of this layer."""
        return self.kv_heads * (self.key_dim + self.value_dim) * element_bytes


@dataclass(frozen=True)
class ModelShape:
    """All layers of a decoder, and the widths that its cost depends on."""

    layers: tuple[LayerShape, ...]
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_context_tokens: int

    @classmethod
    def from_config(cls, config: Any) -> ModelShape:
        """Read a `PreTrainedConfig` (or anything with its attributes); takes the text part of a larger model."""
        text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
        count = int(text.num_hidden_layers)
        kinds = getattr(text, "layer_types", None)
        if kinds is None:
            windowed = getattr(text, "sliding_window", None) is not None
            kinds = ["sliding_attention" if windowed else "full_attention"] * count
        query_heads = int(text.num_attention_heads)
        kv_heads = int(getattr(text, "num_key_value_heads", None) or query_heads)
        head_dim = int(getattr(text, "head_dim", None) or text.hidden_size // query_heads)
        value_dim = int(getattr(text, "v_head_dim", None) or head_dim)
        return cls(
            layers=tuple(LayerShape(kind, query_heads, kv_heads, head_dim, value_dim) for kind in kinds),
            hidden_size=int(text.hidden_size),
            intermediate_size=int(getattr(text, "intermediate_size", 4 * text.hidden_size)),
            vocab_size=int(text.vocab_size),
            max_context_tokens=int(getattr(text, "max_position_embeddings", 0) or 0),
        )

    @property
    def offloaded_layers(self) -> tuple[int, ...]:
        """Indices of the layers whose KV goes to the host."""
        return tuple(index for index, layer in enumerate(self.layers) if layer.is_offloaded)

    def kv_bytes_per_token(self, element_bytes: int) -> int:
        """Bytes of host KV that one token of one row needs, over all offloaded layers."""
        return sum(layer.kv_bytes_per_token(element_bytes) for layer in self.layers if layer.is_offloaded)

    def prefill_flops(self, tokens: int) -> float:
        """Floating-point operations to read `tokens` tokens: linear layers plus causal attention.

        An estimate for progress displays: 2 FLOP per weight and token, and 2 * Hq * (Dk + Dv) FLOP per pair
        of tokens, half of the pairs (arXiv 2502.12574, section 4, counts the same way).
        """
        weights, pairs = 0.0, 0.0
        for layer in self.layers:
            q_and_o = self.hidden_size * layer.query_heads * (layer.key_dim + layer.value_dim)
            k_and_v = self.hidden_size * layer.kv_heads * (layer.key_dim + layer.value_dim)
            weights += q_and_o + k_and_v + 3 * self.hidden_size * self.intermediate_size
            if layer.is_offloaded:
                pairs += layer.query_heads * (layer.key_dim + layer.value_dim)
        return 2.0 * weights * tokens + pairs * float(tokens) * tokens
