"""HeadCache: a transformers Cache whose full-attention layers keep their KV per head in host memory.

`update()` does not return the whole K and V, as transformers' own layers do. It returns the chunk's K and V,
tagged with the layer; the attention function "headinfer" (attention.py) reads the tag and streams the rest.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from headinfer.engine import Engine, Options
from headinfer.errors import StateError, UnsupportedError
from headinfer.hf.compat import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    PreTrainedConfig,
    check_version,
    default_layers,
)
from headinfer.kv.head_store import HeadStore, Runs

__all__ = ["HeadCache", "HeadLayer", "Stats", "Tag"]


@dataclass(frozen=True)
class Stats:
    """Bytes and choices of a cache; device bytes are what the KV cache holds on the compute device."""

    tokens: int
    layers_offloaded: int
    layers_left_to_transformers: int
    device_kv_bytes: int
    device_kv_peak_bytes: int
    device_ring_bytes: int
    device_tail_bytes: int
    device_staging_bytes: int
    host_kv_bytes: int
    host_kv_peak_bytes: int
    link_to_device_bytes: int
    link_to_host_bytes: int
    tail_moved_bytes: int
    copies: int
    heads_per_group: int
    tile_tokens: int
    tile_reason: str
    attention_backends: tuple[str, ...]


@dataclass(frozen=True)
class Tag:
    """What update() leaves on the K and V it returns, for the attention function to find."""

    layer: HeadLayer


class HeadLayer(CacheLayerMixin):  # type: ignore[misc]
    """One full-attention layer of a HeadCache."""

    is_croppable = True
    is_sliding = False

    def __init__(self, engine: Engine, leads: bool) -> None:
        """leads: this is the first offloaded layer, whose update begins a forward pass."""
        super().__init__()
        self.engine, self.leads = engine, leads
        self.store: HeadStore | None = None
        self.pending: Tag | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Create the store with the batch, heads, dims, dtype and device of the first chunk."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.store = self.engine.new_store(key_states, value_states)
        self.is_initialized = True

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
        if self.store is None:
            self.lazy_initialization(key_states, value_states)
        assert self.store is not None
        if key_states.shape[0] != self.store.rows:
            raise StateError(f"the cache holds {self.store.rows} rows and the model was given {key_states.shape[0]}")
        self.pending = self.engine.awaiting = Tag(self)
        key_states._headinfer = value_states._headinfer = self.pending  # type: ignore[attr-defined]
        return key_states, value_states

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        scale: float,
        softcap: float | None,
        sinks: torch.Tensor | None,
        runs: Sequence[Runs] | None,
    ) -> torch.Tensor:
        """Attention of the chunk on all tokens so far, then keep the chunk. Returns [B, T, Hq, Dv]."""
        if self.pending is None or self.store is None:
            raise StateError("the attention of a HeadCache layer ran twice, or without an update before it")
        if self.leads:
            self.engine.begin(self.store, q.shape[1], q.shape[2])
        out = self.engine.attend(q, k, v, self.store, scale=scale, softcap=softcap, sinks=sinks, runs=runs)
        self.store.append(k, v)
        self.pending = self.engine.awaiting = None
        return out

    def get_seq_length(self) -> int:
        """Tokens of each row."""
        return self.store.tokens if self.store is not None else 0

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
        if self.store is not None:
            self.store.close()
        if self.pending is not None:
            self.engine.awaiting = None
        self.store, self.pending, self.is_initialized = None, None, False

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last -tokens_to_remove tokens (a negative number); a positive number is the length to keep."""
        if self.store is not None:
            length = self.store.tokens
            self.store.crop(
                max(length + tokens_to_remove, 0) if tokens_to_remove <= 0 else min(tokens_to_remove, length)
            )

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row i becomes row beam_idx[i]: table entries move, segments do not."""
        if self.store is not None:
            self.store.select_rows(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row becomes `repeats` rows that share its segments."""
        if self.store is not None:
            self.store.select_rows([row for row in range(self.store.rows) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows that an index tensor or bool mask names."""
        if self.store is not None:
            self.store.select_rows(torch.arange(self.store.rows)[indices.cpu()].tolist())

    def offload(self) -> None:
        """Nothing to do: the KV lies on the host."""

    def prefetch(self) -> None:
        """Nothing to do: the ring fetches what is needed."""


class HeadCache(Cache):  # type: ignore[misc]
    """A KV cache for `model(...)` and `model.generate(...)` of an enabled model.

    Full-attention layers are kept per head on the host; sliding-window and chunked layers, which do not grow, stay
    with transformers' own classes. Raises UnsupportedError for a config whose layers this version does not serve,
    and UsageError for options out of range.

        with headinfer.enable(model):
            cache = HeadCache(model.config, device_kv_budget=256 * 2**20)
            model.generate(**inputs, past_key_values=cache)
    """

    def __init__(self, config: PreTrainedConfig, **options: Any) -> None:
        """options: the fields of `headinfer.Options`."""
        check_version()
        chosen = Options(**options)
        layers = default_layers(config)
        full = [index for index, layer in enumerate(layers) if type(layer) is DynamicLayer]
        for layer in layers:
            if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
                raise UnsupportedError(
                    f"{config.model_type} has a layer of type {type(layer).__name__}, which this version does not serve"
                )
        if not full:
            raise UnsupportedError(
                f"this {config.model_type} has sliding-window layers only, whose KV does not grow with the context: "
                "there is nothing to offload, so use the model without headinfer"
            )
        self.engine = Engine(chosen, len(full))
        for index in full:
            layers[index] = HeadLayer(self.engine, leads=index == full[0])
        super().__init__(layers=layers)

    @property
    def head_layers(self) -> list[HeadLayer]:
        """The offloaded layers."""
        return [layer for layer in self.layers if isinstance(layer, HeadLayer)]

    def stats(self) -> Stats:
        """Bytes held and moved so far, and what was chosen for the last forward pass."""
        ledger, plan = self.engine.ledger, self.engine.plan
        return Stats(
            tokens=self.head_layers[0].get_seq_length(),
            layers_offloaded=len(self.head_layers),
            layers_left_to_transformers=len(self.layers) - len(self.head_layers),
            device_kv_bytes=sum(ledger.device_bytes.values()),
            device_kv_peak_bytes=ledger.device_peak_bytes,
            device_ring_bytes=ledger.device_bytes["ring"],
            device_tail_bytes=ledger.device_bytes["tail"],
            device_staging_bytes=ledger.device_bytes["staging"],
            host_kv_bytes=ledger.host_bytes,
            host_kv_peak_bytes=ledger.host_peak_bytes,
            link_to_device_bytes=ledger.host_to_device_bytes,
            link_to_host_bytes=ledger.device_to_host_bytes,
            tail_moved_bytes=ledger.tail_moved_bytes,
            copies=ledger.copies,
            heads_per_group=plan.heads_per_group if plan else 0,
            tile_tokens=plan.tile_tokens if plan else 0,
            tile_reason=plan.why if plan else "",
            attention_backends=tuple(sorted(self.engine.backends_used)),
        )

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last -tokens_to_remove tokens; refused before it starts where a layer cannot."""
        for layer in self.layers:
            full = isinstance(layer, DynamicSlidingWindowLayer) and layer.get_seq_length() >= layer.sliding_window
            if full and not layer.record_past:
                raise StateError(
                    f"cannot crop: a sliding-window layer has dropped the tokens before its last "
                    f"{layer.sliding_window}; call activate_past_recording() on the cache before generating"
                )
        super().crop(tokens_to_remove)

    def fork(self) -> HeadCache:
        """A second cache with the same content, which goes its own way; segments are shared, not copied."""
        twin = copy.copy(self)
        twin.layers = []
        for layer in self.layers:
            copied = copy.copy(layer)
            if isinstance(layer, HeadLayer) and layer.store is not None:
                copied.store = layer.store.fork()
            twin.layers.append(copied)
        return twin

    def checkpoint(self) -> list[dict[str, Any] | int]:
        """What rollback() needs: the length of each offloaded layer, references for the others."""
        return [
            layer.get_seq_length() if isinstance(layer, HeadLayer) else dict(layer.__dict__) for layer in self.layers
        ]

    def rollback(self, checkpoint: list[dict[str, Any] | int]) -> None:
        """Return every layer to what it was at the checkpoint, after an error in the middle of a forward pass."""
        self.engine.abandon()
        for layer, before in zip(self.layers, checkpoint, strict=True):
            if isinstance(before, dict):
                layer.__dict__.clear()
                layer.__dict__.update(before)
            else:
                layer.pending = None
                if layer.store is not None:
                    layer.store.crop(before)
