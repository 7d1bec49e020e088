"""The layers of a HeadCache: HeadLayer for full attention, HybridHeadLayer for full and linear attention.

The update() of transformers' own layers returns the complete K and V. A HeadLayer returns those of the chunk, tagged
with the layer. The attention function (attention.py) reads the tag and calls attend(), which streams the past.

state_of(), restore() and uncroppable_reason() serve layers of any class, transformers' own included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from headinfer.engine.engine import Engine
from headinfer.engine.layer_pass import AttentionSpec
from headinfer.errors import StateError
from headinfer.hf.compat import (
    CacheLayerMixin,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
    not_compiled,
)
from headinfer.kv.layer_kv import LayerKV

__all__ = ["HeadLayer", "HybridHeadLayer", "PaddedWindowLayer", "Tag", "restore", "state_of", "uncroppable_reason"]


@dataclass
class Tag:
    """The attribute that update() sets on the K and V of a chunk, for the attention function.

    Attributes:
        layer: the layer that was updated.
        past_tokens: tokens of the layer before the chunk.
        is_stored: whether the chunk has been appended to the layer's KV. A later attention with the same K and V then
            belongs to a layer that shares them.
    """

    layer: HeadLayer
    past_tokens: int
    is_stored: bool = False


class HeadLayer(CacheLayerMixin):  # type: ignore[misc]
    """A full-attention layer of a HeadCache.

    Args:
        engine: the engine of the cache.
        is_first: whether this is the first offloaded layer, with whose attention a forward pass begins.

    Attributes:
        layer_kv: the KV of the layer; None before the first chunk.
        pending: the tag of a chunk whose attention has not run yet.
        rotary_tokens: the context length whose rotary frequencies the keys have (rotary.py); 0 if that is unknown or
            does not matter. Only the first offloaded layer of a cache has another value.
        rotary_min_tokens: the context length whose rotary frequencies are used for shorter contexts as well.
    """

    is_croppable = True
    is_sliding = False
    rotary_tokens = 0
    rotary_min_tokens = 0

    def __init__(self, engine: Engine, is_first: bool) -> None:
        super().__init__()
        self.engine = engine
        self.leads = is_first  # sessions keep this attribute under this name
        self.layer_kv: LayerKV | None = None
        self.pending: Tag | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Create the layer's KV, with the batch, heads, dims, dtype and device of the first chunk."""
        self.dtype = key_states.dtype
        self.device = key_states.device
        self.layer_kv = self.engine.new_layer_kv(key_states, value_states)
        self.is_initialized = True

    @not_compiled
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tag the K and V of a chunk. attend() appends them to the layer's KV later.

        Args:
            key_states: [B, Hkv, T, Dk].
            value_states: [B, Hkv, T, Dv].
            *args: ignored.
            **kwargs: ignored.

        Returns:
            The same two tensors.

        Raises:
            StateError: the attention of the previous update did not run, or the batch has another number of rows.
        """
        if self.engine.awaiting is not None:
            raise StateError(
                "the attention of a HeadCache layer did not run through headinfer, because the model changes K and V "
                "before the attention: use the model without headinfer"
            )
        self._begin_if_empty(key_states, value_states)
        if key_states.shape[0] != self.rows:
            raise StateError(
                f"the cache holds {self.rows} rows, but the model was given {key_states.shape[0]}: pass as "
                "many rows as the cache holds, or an empty cache"
            )
        tag = Tag(self, self.get_seq_length())
        self.pending = tag
        self.engine.awaiting = tag
        key_states._headinfer = tag  # type: ignore[attr-defined]
        value_states._headinfer = tag  # type: ignore[attr-defined]
        return key_states, value_states

    def _begin_if_empty(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Create the layer's KV for the first chunk."""
        if self.layer_kv is None:
            self.lazy_initialization(key_states, value_states)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
        """Attend from the chunk to all tokens up to it, then append the chunk to the layer's KV.

        Args:
            q: [B, Hq, T, Dk].
            k: [B, Hkv, T, Dk], as update() returned it.
            v: [B, Hkv, T, Dv], as update() returned it.
            spec: what the model asks for.

        Returns:
            [B, T, Hq, Dv].
        """
        if self.pending is None or self.layer_kv is None:
            raise StateError("the attention of a HeadCache layer ran without an update: each needs one of its own")
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
        """Compute attention of another layer that shares this layer's K and V, which contain the chunk already.

        Args:
            q: [B, Hq, T, Dk]. T may be fewer tokens than the chunk has, its last ones (Gemma 4). The earlier tokens
                of the chunk are past tokens then.
            k: the chunk's keys [B, Hkv, Tk, Dk].
            v: the chunk's values [B, Hkv, Tk, Dv].
            spec: what the model asks for.
            past_tokens: tokens before the chunk.

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
        """Return the number of tokens of each row."""
        return self.layer_kv.tokens if self.layer_kv is not None else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of keys that a mask covers, and the position of the first one: all tokens, from 0."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: there is no limit."""
        return -1

    def get_max_cache_shape(self) -> int:
        """Return -1: there is no limit. This is the name in older versions of transformers."""
        return -1

    def reset(self) -> None:
        """Empty the layer and free its memory."""
        if self.layer_kv is not None:
            self.layer_kv.close()
            self.engine.drop_prefetched()
        if self.pending is not None:
            self.engine.awaiting = None
        self.layer_kv = None
        self.pending = None
        self.is_initialized = False
        for name in ("rotary_tokens", "rotary_min_tokens"):
            self.__dict__.pop(name, None)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens: a negative number is how many, a positive number is the length to keep."""
        if self.layer_kv is None:
            return
        tokens_to_remove = int(tokens_to_remove)  # assisted decoding passes a tensor in some versions
        length = self.layer_kv.tokens
        if tokens_to_remove <= 0:
            self.layer_kv.crop(max(length + tokens_to_remove, 0))
        else:
            self.layer_kv.crop(min(tokens_to_remove, length))

    def crop_refusal(self, tokens: int) -> str:
        """Return why the newest `tokens` tokens cannot be removed; empty if they can."""
        return ""

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Replace each row i by row beam_idx[i]; beam_idx is [rows], int64. Segments are shared, not copied."""
        self._select_rows(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Replace each row by `repeats` rows, which share its segments."""
        self._select_rows(torch.arange(self.rows).repeat_interleave(repeats).tolist())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows that a tensor of indices or a bool mask selects."""
        if self.rows:
            self._select_rows(torch.arange(self.rows)[indices.cpu()].tolist())

    def _select_rows(self, rows: list[int]) -> None:
        """Replace each row i by row rows[i]. The number of rows may change."""
        if self.layer_kv is not None:
            self.layer_kv.select_rows(rows)

    def offload(self) -> None:
        """Do nothing. The KV is in host memory already."""

    def prefetch(self) -> None:
        """Do nothing. The ring fetches what is needed."""


class HybridHeadLayer(HeadLayer, LinearAttentionAndFullAttentionLayer):  # type: ignore[misc]
    """A layer with full attention, whose KV is offloaded, and linear attention, whose state does not grow (Falcon-H1).

    Args:
        engine: the engine of the cache.
        is_first: whether this is the first offloaded layer.
        number_of_states: number of linear-attention states, as transformers' layer has it.
    """

    def __init__(self, engine: Engine, is_first: bool, number_of_states: int) -> None:
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)
        HeadLayer.__init__(self, engine, is_first)

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether the linear-attention state can be cropped. The KV always can."""
        return bool(LinearAttentionLayer.is_croppable.fget(self))

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Create the layer's KV from positional arguments, or the linear-attention state from keyword arguments.

        transformers calls it in these two ways.
        """
        if args:
            HeadLayer.lazy_initialization(self, *args, **kwargs)
        else:
            LinearAttentionLayer.lazy_initialization(self, *args, **kwargs)

    def reset(self) -> None:
        """Empty the layer and free its memory."""
        HeadLayer.reset(self)
        LinearAttentionLayer.reset(self)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens: a negative number is how many, a positive number is the length to keep."""
        LinearAttentionLayer.crop(self, tokens_to_remove)
        HeadLayer.crop(self, tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Replace each row i by row beam_idx[i]; beam_idx is [rows], int64."""
        HeadLayer.reorder_cache(self, beam_idx)
        LinearAttentionLayer.reorder_cache(self, beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Replace each row by `repeats` rows."""
        self.reorder_cache(torch.arange(self.rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows that a tensor of indices or a bool mask selects."""
        self.reorder_cache(torch.arange(self.rows)[indices.cpu()])


class PaddedWindowLayer(DynamicSlidingWindowLayer):  # type: ignore[misc]
    """A sliding-window layer of transformers with rows that have padding behind their first tokens.

    It keeps `padding` tokens more than its window, so that each row has its whole window beside the padding.
    """

    @classmethod
    def extend(cls, layer: DynamicSlidingWindowLayer, padding: int) -> None:
        """Make a layer keep `padding` tokens more than its window."""
        layer.__class__ = cls
        layer.sliding_window += padding

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of keys that a mask covers, and the position of the first one: all that the layer has."""
        held = self.keys.shape[-2]
        return held + query_length, self.cumulative_length - held


_NOT_IN_STATE = ("engine", "layer_kv", "pending", "heads")


def state_of(layer: Any) -> dict[str, Any]:
    """Return the state of a cache layer of any class, for restore().

    transformers writes linear-attention states in place, so these are copied. It replaces the tensors of windows, so
    references to them suffice.

    Returns:
        "fields", the layer's attributes by name without the offloaded KV, and "tokens", the length of the offloaded
        KV; 0 if the layer has none.
    """
    fields = layer.__dict__.copy()
    tokens = 0
    if isinstance(layer, HeadLayer):
        tokens = layer.get_seq_length()
        for name in _NOT_IN_STATE:
            fields.pop(name, None)
    if type(layer) is not HeadLayer:  # a plain HeadLayer has no dicts
        fields = {name: _copied(value) for name, value in fields.items()}
    return {"fields": fields, "tokens": tokens}


def restore(layer: Any, state: dict[str, Any]) -> None:
    """Return a layer to a state that state_of() took. Offloaded KV is cropped to its length at that time."""
    kept = {name: value for name, value in layer.__dict__.items() if name in _NOT_IN_STATE}
    layer.__dict__.clear()
    # The state may be restored again, after a pass has written to these tensors.
    layer.__dict__.update({name: _copied(value) for name, value in state["fields"].items()})
    layer.__dict__.update(kept)
    if isinstance(layer, HeadLayer):
        layer.pending = None
        if layer.layer_kv is not None:  # it may have been created since
            layer.dtype = layer.layer_kv.dtype
            layer.device = layer.layer_kv.device
            layer.is_initialized = True
            layer.layer_kv.crop(state["tokens"])


def uncroppable_reason(layer: Any, tokens: int = 1) -> str:
    """Return why the newest tokens of a layer cannot be removed; empty if they can.

    Layers that record their past keep what a pass needs and its own tokens until the next crop. They cannot remove
    more than that, and transformers itself does not check it.

    Args:
        layer: the layer.
        tokens: how many tokens are removed.
    """
    advice = "call activate_past_recording() on the cache before generating"
    if isinstance(layer, HeadLayer) and layer.crop_refusal(tokens):
        return layer.crop_refusal(tokens)
    if isinstance(layer, DynamicSlidingWindowLayer):
        held = layer.get_seq_length()
        needed = min(layer.sliding_window - 1, held - tokens) + tokens
        if held >= layer.sliding_window and (not layer.record_past or layer.keys.shape[-2] < needed):
            return f"a sliding-window layer keeps only its last {layer.sliding_window} tokens, so {advice}"
    elif isinstance(layer, LinearAttentionCacheLayerMixin):
        if any(layer.is_recurrent_states_initialized.values()):
            return "a linear-attention layer keeps only its newest state, so keep a fork() of the cache instead"
        states = [layer.conv_states[at] for at, has_state in layer.is_conv_states_initialized.items() if has_state]
        sizes = [layer.conv_kernel_size[at] for at, has_state in layer.is_conv_states_initialized.items() if has_state]
        is_short = any(state.shape[-1] < size + tokens for state, size in zip(states, sizes, strict=True))
        if states and (not layer.record_past or is_short):
            return f"a convolution layer keeps only its newest states, so {advice}"
    return ""


def _copied(value: Any) -> Any:
    """Return a copy of a dict and of the tensors in it; any other value itself."""
    if not isinstance(value, dict):
        return value
    return {key: item.clone() if isinstance(item, torch.Tensor) else item for key, item in value.items()}
