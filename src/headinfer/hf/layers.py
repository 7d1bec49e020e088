"""The layers of a HeadCache: HeadLayer for full attention, and what is the same for all kinds of layers.

`update()` does not return the whole K and V, as transformers' own layers do. It returns the chunk's K and V,
tagged with the layer; the attention function "headinfer" (attention.py) reads the tag and streams the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from headinfer.engine.engine import Engine
from headinfer.engine.streaming import AttentionSpec
from headinfer.errors import StateError
from headinfer.hf.compat import (
    CacheLayerMixin,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)
from headinfer.kv.layer_kv import LayerKV

__all__ = ["HeadLayer", "HybridHeadLayer", "Tag", "restore", "state_of", "uncroppable_reason"]


@dataclass
class Tag:
    """What update() leaves on the K and V that it returns, for the attention function to find.

    past_tokens: the layer's length before the chunk. is_stored: the chunk has been attended to and kept; what comes
    again with the same K and V is a layer that shares them.
    """

    layer: HeadLayer
    past_tokens: int
    is_stored: bool = False


class HeadLayer(CacheLayerMixin):  # type: ignore[misc]
    """One full-attention layer of a HeadCache."""

    is_croppable = True
    is_sliding = False

    def __init__(self, engine: Engine, leads: bool) -> None:
        """leads: this is the first offloaded layer, whose update begins a forward pass."""
        super().__init__()
        self.engine, self.leads = engine, leads
        self.layer_kv: LayerKV | None = None
        self.pending: Tag | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Create the store with the batch, heads, dims, dtype and device of the first chunk."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.layer_kv = self.engine.new_layer_kv(key_states, value_states)
        self.is_initialized = True

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tag the chunk's K [B, Hkv, T, Dk] and V [B, Hkv, T, Dv] and return them; attend() stores them."""
        if self.engine.awaiting is not None:
            raise StateError(
                "a HeadCache layer was updated and its attention never ran through headinfer: enable the model with "
                "headinfer.enable(model) before you pass it a HeadCache (or, if it is enabled, this model changes "
                "K and V on the way and cannot be served)"
            )
        if self.layer_kv is None:
            self.lazy_initialization(key_states, value_states)
        assert self.layer_kv is not None
        if key_states.shape[0] != self.layer_kv.rows:
            raise StateError(f"the cache holds {self.layer_kv.rows} rows and the model was given {key_states.shape[0]}")
        self.pending = self.engine.awaiting = Tag(self, self.layer_kv.tokens)
        key_states._headinfer = value_states._headinfer = self.pending  # type: ignore[attr-defined]
        return key_states, value_states

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
        """Attention of the chunk on all tokens up to it. Then the chunk is appended to the layer's KV.

        Args:
            q: [B, Hq, T, Dk].
            k: [B, Hkv, T, Dk], as update() returned it.
            v: [B, Hkv, T, Dv], as update() returned it.
            spec: What the model asks for.

        Returns:
            [B, T, Hq, Dv].
        """
        if self.pending is None or self.layer_kv is None:
            raise StateError("the attention of a HeadCache layer ran twice, or without an update before it")
        if self.leads:
            self.engine.begin(self.layer_kv, q.shape[1], q.shape[2])
        out = self.engine.attend(q, k, v, self.layer_kv, spec)
        self.layer_kv.append(k, v)
        self.pending.is_stored = True
        self.pending = None
        self.engine.awaiting = None
        return out

    def attend_shared(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, past_tokens: int
    ) -> torch.Tensor:
        """Attention of another layer that shares this layer's K and V, which contain the chunk already.

        Args:
            q: [B, Hq, T, Dk]. T may be fewer tokens than the chunk has, its last ones (Gemma 4). The earlier tokens
                of the chunk are past tokens then.
            k: The chunk's keys [B, Hkv, Tk, Dk].
            v: The chunk's values [B, Hkv, Tk, Dv].
            spec: What the model asks for.
            past_tokens: Tokens before the chunk.

        Returns:
            [B, T, Hq, Dv].
        """
        assert self.layer_kv is not None
        past_tokens += k.shape[2] - q.shape[2]
        k = k[:, :, -q.shape[2] :]
        v = v[:, :, -q.shape[2] :]
        return self.engine.attend(q, k, v, self.layer_kv, spec, past_tokens)

    @property
    def rows(self) -> int:
        """Rows of the batch; 0 before the first chunk."""
        return self.layer_kv.rows if self.layer_kv is not None else 0

    def get_seq_length(self) -> int:
        """Tokens of each row."""
        return self.layer_kv.tokens if self.layer_kv is not None else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask covers: all tokens, from the first."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def get_max_cache_shape(self) -> int:
        """No limit (the name that older versions use)."""
        return -1

    def reset(self) -> None:
        """Forget everything and give the memory back."""
        if self.layer_kv is not None:
            self.layer_kv.close()
            self.engine.drop_prefetched()
        if self.pending is not None:
            self.engine.awaiting = None
        self.layer_kv, self.pending, self.is_initialized = None, None, False

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last -tokens_to_remove tokens (a negative number); a positive number is the length to keep."""
        if self.layer_kv is not None:
            length = self.layer_kv.tokens
            self.layer_kv.crop(
                max(length + tokens_to_remove, 0) if tokens_to_remove <= 0 else min(tokens_to_remove, length)
            )

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i becomes row beam_idx[i]: table entries move, segments do not."""
        if self.layer_kv is not None:
            self.layer_kv.select_rows(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row becomes `repeats` rows that share its segments."""
        if self.layer_kv is not None:
            self.layer_kv.select_rows([row for row in range(self.layer_kv.rows) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows that an index tensor or bool mask names."""
        if self.layer_kv is not None:
            self.layer_kv.select_rows(torch.arange(self.layer_kv.rows)[indices.cpu()].tolist())

    def offload(self) -> None:
        """Nothing to do: the KV lies on the host."""

    def prefetch(self) -> None:
        """Nothing to do: the ring fetches what is needed."""


class HybridHeadLayer(HeadLayer, LinearAttentionAndFullAttentionLayer):  # type: ignore[misc]
    """A layer with full attention, kept on the host, and a linear-attention state, which does not grow (Falcon-H1)."""

    def __init__(self, engine: Engine, leads: bool, number_of_states: int) -> None:
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)
        HeadLayer.__init__(self, engine, leads)

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """As far as the linear state is."""
        return bool(LinearAttentionLayer.is_croppable.fget(self))

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """K and V come as two positional arguments, linear states by name: transformers' own convention."""
        (HeadLayer if args else LinearAttentionLayer).lazy_initialization(self, *args, **kwargs)

    def reset(self) -> None:
        """Forget everything."""
        HeadLayer.reset(self)
        LinearAttentionLayer.reset(self)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last -tokens_to_remove tokens."""
        LinearAttentionLayer.crop(self, tokens_to_remove)
        HeadLayer.crop(self, tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i becomes row beam_idx[i]."""
        HeadLayer.reorder_cache(self, beam_idx)
        LinearAttentionLayer.reorder_cache(self, beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row becomes `repeats` rows."""
        self.reorder_cache(torch.arange(self.rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows that an index tensor or bool mask names."""
        self.reorder_cache(torch.arange(self.rows)[indices.cpu()])


def state_of(layer: Any) -> dict[str, Any]:
    """What restore() needs to bring a layer back: its length where it is offloaded, else its fields.

    Linear-attention states are written in place by transformers, so they are copied; windows are replaced, not written.
    """
    fields = {name: _copied(value) for name, value in layer.__dict__.items() if name not in _NOT_STATE}
    return {"fields": fields, "tokens": layer.layer_kv.tokens if isinstance(layer, HeadLayer) and layer.layer_kv else 0}


def restore(layer: Any, state: dict[str, Any]) -> None:
    """Make a layer what it was when `state` was taken."""
    kept = {name: value for name, value in layer.__dict__.items() if name in _NOT_STATE}
    layer.__dict__.clear()
    layer.__dict__.update(state["fields"])
    layer.__dict__.update(kept)
    if isinstance(layer, HeadLayer):
        layer.pending = None
        if layer.layer_kv is not None:
            layer.layer_kv.crop(state["tokens"])


def uncroppable_reason(layer: Any) -> str:
    """Why a layer cannot give up its newest tokens; empty where it can."""
    advice = "call activate_past_recording() on the cache before generating"
    if isinstance(layer, DynamicSlidingWindowLayer):
        if layer.get_seq_length() >= layer.sliding_window and not layer.record_past:
            return f"a sliding-window layer has dropped the tokens before its last {layer.sliding_window}; {advice}"
    elif isinstance(layer, LinearAttentionCacheLayerMixin):
        if any(layer.is_recurrent_states_initialized.values()):
            return "a linear-attention layer keeps one running state, which cannot go back; fork() the cache instead"
        if any(layer.is_conv_states_initialized.values()) and not layer.record_past:
            return f"a convolution layer has dropped its older states; {advice}"
    return ""


_NOT_STATE = ("engine", "layer_kv", "pending")  # of a HeadLayer: shared, or brought back by length


def _copied(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: item.clone() if isinstance(item, torch.Tensor) else item for key, item in value.items()}
