"""The shape of one decoder layer: what its KV takes, and how many operations its attention needs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from headinfer.utils.kv_format import pair_bytes

__all__ = ["WINDOW_SLACK_TOKENS", "LayerShape"]

WINDOW_SLACK_TOKENS = 256
"""Tokens that a streaming head keeps beside those that it sees, so that rejected tokens can be removed. It is that of
kv/head_window.py, which a test checks."""

_WINDOWS = 2  # while a pass runs, the window before it is kept, since an error returns to it


@dataclass(frozen=True)
class LayerShape:
    """One decoder layer.

    With a head pattern (utils/head_pattern.py) some of its KV heads are streaming: they see the first and the newest
    tokens only, which stay on the device. What follows counts the other heads, unless it says otherwise.

    Attributes:
        kind: transformers' layer type, such as full_attention, sliding_attention or hybrid.
        query_heads: query heads, with those of streaming KV heads.
        kv_heads: KV heads, with the streaming ones.
        key_dim: the dim Dk of a cached key.
        value_dim: the dim Dv of a cached value.
        window_tokens: tokens that a sliding or chunked layer sees; 0 for the whole context.
        shares_kv: whether the layer reads the K and V of an earlier layer.
        state_elements: elements of a linear layer's constant state, for each row.
        score_dims: dk + Dv of a query head if the cache holds something else; 0 otherwise. MLA caches its latents as
            one head with key_dim + value_dim elements.
        weights: weights of the matrices.
        active_weights: weights of the matrices that one token is multiplied with.
        mlp_width: the MLP's inner size for one token.
        streaming_heads: how many of the KV heads are streaming.
        sink_tokens: the first tokens, which streaming heads see.
        recent_tokens: the newest tokens that streaming heads see.
    """

    kind: str
    query_heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    window_tokens: int = 0
    shares_kv: bool = False
    state_elements: int = 0
    score_dims: int = 0
    weights: int = 0
    active_weights: int = 0
    mlp_width: int = 0
    streaming_heads: int = 0
    sink_tokens: int = 0
    recent_tokens: int = 0

    @cached_property
    def is_full(self) -> bool:
        """Whether the layer's attention sees the whole context."""
        return self.kind in ("full_attention", "hybrid")

    @cached_property
    def is_offloaded(self) -> bool:
        """Whether headinfer stores the layer's KV in host memory.

        It does so for full attention, whose KV grows with the context, unless all heads are streaming. transformers
        keeps the KV of layers without full attention.
        """
        return self.is_full and not self.shares_kv and self.full_heads > 0

    @cached_property
    def full_heads(self) -> int:
        """The KV heads that are not streaming."""
        return self.kv_heads - self.streaming_heads

    @cached_property
    def full_part(self) -> LayerShape:
        """The layer with its full heads only. It needs at least one."""
        if not self.streaming_heads:
            return self
        return self._part(self.full_heads)

    @cached_property
    def attention_parts(self) -> tuple[LayerShape, ...]:
        """The layer as layers whose heads are all alike: one for its full heads, and one for its streaming heads.

        The second has a window of as many tokens as a streaming head sees. Both repeat the weights of the layer.
        """
        if not self.streaming_heads:
            return (self,)
        seen = self.sink_tokens + self.recent_tokens
        streaming = replace(self._part(self.streaming_heads), kind="sliding_attention", window_tokens=seen)
        return (self.full_part, streaming) if self.full_heads else (streaming,)

    def _part(self, heads: int) -> LayerShape:
        """Return the layer with some of its KV heads, and none that is streaming."""
        queries = self.query_heads // self.kv_heads * heads
        return replace(self, query_heads=queries, kv_heads=heads, streaming_heads=0, sink_tokens=0, recent_tokens=0)

    @cached_property
    def flops_per_pair(self) -> int:
        """Floating-point operations for a pair of a query and a key token, over the query heads; 0 if linear."""
        if self.kind == "linear_attention":
            return 0
        queries = self.query_heads - self.query_heads // self.kv_heads * self.streaming_heads
        return 2 * queries * (self.score_dims or self.key_dim + self.value_dim)

    def kv_bytes_per_token(self, element_bytes: int) -> int:
        """Return the bytes of K and V that one token adds to one row of this layer's cache."""
        if self.shares_kv or self.kind == "linear_attention":
            return 0
        return self.full_heads * (self.key_dim + self.value_dim) * element_bytes

    def window_bytes(self, element_bytes: int) -> int:
        """Return the bytes of K and V of one row that the streaming heads keep on the device, at any context."""
        kept = self.sink_tokens + self.recent_tokens + WINDOW_SLACK_TOKENS
        return _WINDOWS * self.streaming_heads * (self.key_dim + self.value_dim) * element_bytes * kept

    def stored_bytes_per_token(self, element_bytes: int, bits: int) -> int:
        """Return the bytes of one token of one row where headinfer stores it: in host memory or on a disk.

        Args:
            element_bytes: bytes of an element in the model's dtype.
            bits: bits of an element of quantised KV; 0 for the model's dtype, which other layers than offloaded ones
                have in any case.
        """
        if not self.is_offloaded:
            return self.kv_bytes_per_token(element_bytes)
        return self.full_heads * pair_bytes(self.key_dim, self.value_dim, element_bytes, bits)

    def seen_tokens(self, past_tokens: int) -> int:
        """Return how many of the past tokens a query sees, at most."""
        return min(past_tokens, self.window_tokens) if self.window_tokens else past_tokens
