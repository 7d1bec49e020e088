"""HeadCache: a transformers Cache whose full-attention layers keep their KV per head in host memory (layers.py).

Layers whose state does not grow with the context (sliding windows, linear attention) stay with transformers' classes.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import torch

from headinfer.attention.backends import recorded
from headinfer.engine.engine import Engine
from headinfer.engine.options import OptionFields, Options
from headinfer.engine.run_plan import RunPlan
from headinfer.errors import StateError, UnsupportedError
from headinfer.hf.compat import (
    Cache,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    PreTrainedConfig,
    PreTrainedModel,
    check_version,
    default_layers,
    is_constant_size,
    layer_device,
    shared_full_layers,
)
from headinfer.hf.layers import HeadLayer, HybridHeadLayer, restore, state_of, uncroppable_reason
from headinfer.kv.layer_kv import LayerKV
from headinfer.sessions.cache import Saved
from headinfer.sessions.loader import load_cache
from headinfer.sessions.writer import save_cache

__all__ = ["HeadCache", "Stats"]


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
    device_resident_bytes: int
    host_kv_bytes: int
    host_kv_peak_bytes: int
    disk_kv_bytes: int
    disk_to_host_bytes: int
    link_to_device_bytes: int
    link_to_host_bytes: int
    tail_moved_bytes: int
    copies: int
    heads_per_group: int
    tile_tokens: int
    tile_reason: str
    attention_backends: tuple[str, ...]


class HeadCache(Cache):  # type: ignore[misc]
    """A KV cache for `model(...)` and `model.generate(...)` of an enabled model.

    Full-attention layers are kept per head on the host; layers whose state does not grow (sliding windows, chunked and
    linear attention) stay with transformers' own classes. Raises UnsupportedError for a config whose layers this
    version does not serve, and UsageError for options out of range.

        with headinfer.enable(model):
            cache = HeadCache(model.config, device_kv_budget_bytes=256 * 2**20)
            model.generate(**inputs, past_key_values=cache)
    """

    def __init__(self, config: PreTrainedConfig, **options: Unpack[OptionFields]) -> None:
        """options: the fields of `headinfer.Options`."""
        check_version()
        chosen = Options(**options)
        layers = default_layers(config)
        growing = [DynamicLayer, LinearAttentionAndFullAttentionLayer]
        full = [index for index, layer in enumerate(layers) if type(layer) in growing]
        for layer in layers:
            if type(layer) not in growing and not is_constant_size(layer):
                raise UnsupportedError(
                    f"{config.model_type} has a layer of type {type(layer).__name__}, which this version does not serve"
                )
        if not full:
            raise UnsupportedError(
                f"this {config.model_type} has no full-attention layer, only layers whose state does not grow with the "
                "context: there is nothing to offload, so use the model without headinfer"
            )
        self.engine = Engine(chosen, len(full))
        for index in full:
            hybrid = isinstance(layers[index], LinearAttentionAndFullAttentionLayer)
            states = layers[index].number_of_states if hybrid else 0
            leads = index == full[0]
            layers[index] = HybridHeadLayer(self.engine, leads, states) if hybrid else HeadLayer(self.engine, leads)
        self.attentions_per_forward = len(full) + shared_full_layers(config)
        self.copies = 1  # rows that one row of the layers stands for: see copies.py
        self.model: Callable[[], PreTrainedModel | None] = lambda: None  # who filled it: a weak reference
        self.saved: Saved | None = None
        self.run_plan: RunPlan | None = None  # of the generate() or forward pass that it was last planned for
        self.token_ids: torch.Tensor | None = None  # [rows, tokens]: those that load() found
        super().__init__(layers=layers)

    @property
    def head_layers(self) -> list[HeadLayer]:
        """The offloaded layers."""
        return [layer for layer in self.layers if isinstance(layer, HeadLayer)]

    def stats(self) -> Stats:
        """Bytes held and moved so far, and what was chosen for the last forward pass."""
        host, plan, counters = self.engine.counter, self.engine.plan, self.engine.counters

        def held(purpose: str) -> int:
            return sum(counter.device_bytes[purpose] for counter in counters)

        return Stats(
            tokens=self.head_layers[0].get_seq_length(),
            layers_offloaded=len(self.head_layers),
            layers_left_to_transformers=len(self.layers) - len(self.head_layers),
            device_kv_bytes=sum(sum(counter.device_bytes.values()) for counter in counters),
            device_kv_peak_bytes=sum(counter.device_peak_bytes for counter in counters),
            device_ring_bytes=held("ring"),
            device_tail_bytes=held("tail"),
            device_staging_bytes=held("staging"),
            device_resident_bytes=held("resident"),
            host_kv_bytes=host.host_bytes,
            host_kv_peak_bytes=host.host_peak_bytes,
            disk_kv_bytes=host.disk_bytes,
            disk_to_host_bytes=host.disk_to_host_bytes,
            link_to_device_bytes=sum(counter.host_to_device_bytes for counter in counters),
            link_to_host_bytes=sum(counter.device_to_host_bytes for counter in counters),
            tail_moved_bytes=sum(counter.tail_moved_bytes for counter in counters),
            copies=sum(counter.copies for counter in counters),
            heads_per_group=plan.heads_per_group if plan else 0,
            tile_tokens=plan.tile_tokens if plan else 0,
            tile_reason=plan.why if plan else "",
            attention_backends=recorded(self.engine.backends_used, self.engine.options.backend),
        )

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last -tokens_to_remove tokens; refused before it starts where a layer cannot."""
        for layer in self.layers:
            if reason := uncroppable_reason(layer):
                raise StateError(f"cannot crop: {reason}")
        super().crop(tokens_to_remove)

    def separate(self) -> None:
        """Give each of the rows that were equal so far a row of its own; they share what they hold."""
        if self.copies > 1:
            copies, self.copies = self.copies, 1
            if rows := self.head_layers[0].rows:
                self.reorder_cache(torch.arange(rows).repeat_interleave(copies))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i becomes row beam_idx[i]."""
        self.separate()
        super().reorder_cache(beam_idx.cpu())  # once, and not for each layer

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row becomes `repeats` rows."""
        self.separate()
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows that an index tensor or bool mask names."""
        self.separate()
        super().batch_select_indices(indices)

    def reset(self) -> None:
        """Forget everything and give the memory back."""
        with torch.inference_mode():  # before 5.23 a layer of transformers clears what it may have made in this mode
            super().reset()
        self.copies = 1

    def forget_recorded_past(self) -> None:
        """Between the chunks of one pass: layers that record their past (assisted decoding) keep their window only."""
        for layer in self.layers:
            if getattr(layer, "record_past", False) and not isinstance(layer, HeadLayer):
                layer.crop(0)

    def fork(self) -> HeadCache:
        """A second cache with the same content, which goes its own way; segments are shared, not copied."""
        twin = copy.copy(self)
        twin.layers = []
        for layer in self.layers:
            copied = copy.copy(layer)
            restore(copied, state_of(layer))
            if isinstance(layer, HeadLayer) and layer.layer_kv is not None:
                copied.layer_kv = layer.layer_kv.fork()
            twin.layers.append(copied)
        twin.saved = self.saved.copy() if self.saved is not None else None
        return twin

    def save(
        self, folder: str | Path, token_ids: torch.Tensor | None = None, about: Mapping[str, Any] | None = None
    ) -> None:
        """Save the cache to a folder. Saving again writes only what is new.

        Args:
            folder: A folder that does not exist, is empty, or holds the session that the cache goes on from.
            token_ids: The ids [rows, tokens] of all tokens in the cache, or more. load() gives them back.
            about: Facts of the caller, for JSON.

        Raises:
            SessionError: The folder holds another session or files that no session wrote, or another process writes
                it.
            CapacityError: The disk is full. The checkpoint before is still there.
            StateError: No enabled model has filled the cache, or it no longer exists.
        """
        model = self.model()
        if model is None:
            raise StateError("an enabled model must have filled the cache, and still be there, before it can be saved")
        save_cache(self, Path(folder), model, token_ids, about)

    @classmethod
    def load(cls, folder: str | Path, model: PreTrainedModel, **options: Unpack[OptionFields]) -> HeadCache:
        """Load a cache that save() wrote. K and V are read from the folder when they are first needed.

        Args:
            folder: The session's folder.
            model: The model that made the session.
            **options: Fields of `headinfer.Options` to change. Without any, the same machine computes the same bits
                as the cache that was saved.

        Returns:
            The cache. Its `token_ids` are those that save() was given.

        Raises:
            SessionError: There is no session, it is damaged, or another model made it.
        """

        def new_cache(kept: dict[str, Any]) -> HeadCache:
            cache = cls(model.config, **{**kept, **options})
            cache.model = weakref.ref(model)
            return cache

        return load_cache(Path(folder), model, new_cache, lambda index: layer_device(model, index))

    def layer_kvs(self) -> dict[int, LayerKV]:
        """The KV of each offloaded layer that has any, by the layer's index."""
        offloaded = {index: layer for index, layer in enumerate(self.layers) if isinstance(layer, HeadLayer)}
        return {index: layer.layer_kv for index, layer in offloaded.items() if layer.layer_kv is not None}

    def layer_fields(self) -> list[dict[str, Any]]:
        """The state of every layer but its offloaded KV, as attributes by name."""
        return [state_of(layer)["fields"] for layer in self.layers]

    def restore_fields(self, index: int, fields: dict[str, Any]) -> None:
        """Set the attributes of a layer that layer_fields() gave."""
        layer = self.layers[index]
        restore(layer, {"fields": layer.__dict__ | fields, "tokens": 0})

    def new_layer_kv(self, index: int, k: torch.Tensor, v: torch.Tensor) -> LayerKV:
        """Create the empty KV of an offloaded layer, shaped as k [B, Hkv, T, Dk] and v [B, Hkv, T, Dv]."""
        layer = self.layers[index]
        layer.lazy_initialization(k, v)
        created = layer.layer_kv
        assert isinstance(created, LayerKV)
        return created

    def checkpoint(self) -> list[dict[str, Any]]:
        """What rollback() needs: the length of each offloaded layer, references and small copies for the others."""
        return [state_of(layer) for layer in self.layers]

    def rollback(self, checkpoint: list[dict[str, Any]]) -> None:
        """Return every layer to what it was at the checkpoint, after an error in the middle of a forward pass."""
        self.engine.abandon()
        for layer, before in zip(self.layers, checkpoint, strict=True):
            restore(layer, before)
