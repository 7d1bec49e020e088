"""HeadCache: a transformers Cache that keeps the KV of full-attention layers in host memory.

layers.py has the offloaded layers, engine/ decides what is on the device, and sessions/ saves and loads a cache.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Unpack

import torch

from headinfer.attention.backends import recorded
from headinfer.engine.device_kv import HeadCounts
from headinfer.engine.engine import Engine
from headinfer.engine.options import OptionFields, Options, merged
from headinfer.engine.run_plan import RunPlan
from headinfer.errors import ApproximationWarning, StateError, UnsupportedError, UsageError
from headinfer.hf.compat import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    PreTrainedConfig,
    PreTrainedModel,
    check_version,
    default_layers,
    is_constant_size,
    layer_device,
    shared_full_layers,
)
from headinfer.hf.layers import HeadLayer, HybridHeadLayer, PaddedWindowLayer, restore, state_of, uncroppable_reason
from headinfer.hf.sparse_layers import SparseHeadLayer, StreamingHeads, check_approximations
from headinfer.hf.stats import Stats
from headinfer.hf.wrappers import unwrapped
from headinfer.kv.layer_kv import LayerKV
from headinfer.plan.model_shape import ModelShape
from headinfer.sessions.cache import Saved
from headinfer.sessions.loader import load_cache
from headinfer.sessions.weights import adapter_layers, applied_adapters
from headinfer.sessions.writer import save_cache
from headinfer.utils.approximation import short_form
from headinfer.utils.stacklevel import stacklevel_of_user
from headinfer.utils.tensors import integer_tensor
from headinfer.utils.values import json_object, path_text, shown, whole_number

__all__ = ["HeadCache", "Stats"]


class HeadCache(Cache):  # type: ignore[misc]
    """A KV cache for `model(...)` and `model.generate(...)` of an enabled model.

    Full-attention layers keep their KV in host memory. Layers whose state does not grow with the context (sliding
    windows, chunked and linear attention) stay with transformers' own classes.

        with headinfer.enable(model):
            cache = HeadCache(model.config, device_kv_budget_bytes=256 * 2**20)
            model.generate(**inputs, past_key_values=cache)

    Args:
        config: the config of the model.
        **options: fields of `headinfer.Options`.

    Attributes:
        engine: what the offloaded layers share: options, memory and transfers.
        attentions_per_forward: number of full attentions in a forward pass. It is more than the number of offloaded
            layers if layers share K and V.
        copies: number of equal rows of the batch that each row of the layers represents (copies.py).
        model: a weak reference to the model that filled the cache: a call returns the model, or None.
        saved: the session that the cache was saved to or loaded from.
        adapters: which adapters of peft computed the KV (sessions/weights.py).
        rotary_min_tokens: the option expected_tokens, if the user gave it: models whose rotary frequencies depend on
            the length of the context use those of this length from the first token (rotary.py).
        chunk_tokens: tokens of a prefill chunk with this cache; None if the model's enable() or a plan chooses them.
        run_plan: the last plan of a generate() or a forward pass with this cache.
        no_plan_for: tokens and rows for which no plan fits the free memory; None if that is unknown.
        is_in_forward: whether a forward pass of an enabled model is running. Only such a pass can add tokens.
        token_ids: the token ids [rows, tokens] that load() found and the cache still holds; int64.
        shares_rows: whether fork_rows() made it. Its rows share a chunk's tokens, and no plan is made for them.

    Raises:
        UnsupportedError: the config has a layer that is not served, or no full-attention layer.
        UsageError: an option is unknown, of another type or out of range.
    """

    def __init__(self, config: PreTrainedConfig, **options: Unpack[OptionFields]) -> None:
        check_version()
        chosen = Options.from_fields(options, "HeadCache()")
        if not isinstance(config, PreTrainedConfig):
            raise UsageError(f"config is {shown(config)}: it must be the config of a model, such as model.config")
        layers = default_layers(config)
        full_attention = (DynamicLayer, LinearAttentionAndFullAttentionLayer)
        full = [index for index, layer in enumerate(layers) if type(layer) in full_attention]
        for layer in layers:
            if type(layer) not in full_attention and not is_constant_size(layer):
                raise UnsupportedError(
                    f"{config.model_type} has a cache layer of type {type(layer).__name__}, which this version does "
                    "not serve: use the model without headinfer"
                )
        if not full:
            raise UnsupportedError(
                f"this {config.model_type} has no full-attention layer, only layers whose state does not grow with the "
                "context: there is nothing to offload, so use the model without headinfer"
            )
        if chosen.is_approximate:
            check_approximations(chosen, ModelShape.from_config(config))
        pattern = chosen.sparse_heads
        sparse = {index: StreamingHeads.of_layer(pattern, index) for index in full if pattern is not None}
        stored = [index for index in full if index not in sparse or sparse[index].full]
        counts = [HeadCounts(len(heads.full), len(heads.streaming)) for heads in sparse.values()]
        self.engine = Engine(chosen, len(stored), counts or None)
        for index in full:
            layer = layers[index]
            is_first = index == stored[0]
            if isinstance(layer, LinearAttentionAndFullAttentionLayer):
                layers[index] = HybridHeadLayer(self.engine, is_first, layer.number_of_states)
            elif index in sparse and sparse[index].streaming:
                layers[index] = SparseHeadLayer(self.engine, is_first, sparse[index])
            else:
                layers[index] = HeadLayer(self.engine, is_first)
        self.attentions_per_forward = len(full) + shared_full_layers(config)
        self.copies = 1
        self.model: Callable[[], PreTrainedModel | None] = lambda: None
        self.saved: Saved | None = None
        self.adapters: tuple[tuple[Any, ...], ...] = ()
        self.rotary_min_tokens = chosen.expected_tokens
        self.chunk_tokens: int | None = None
        self.run_plan: RunPlan | None = None
        self.no_plan_for: tuple[int, int] | None = None
        self.is_in_forward = False
        self.token_ids: torch.Tensor | None = None
        self.shares_rows = False
        super().__init__(layers=layers)

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the K and V of a chunk to a layer. transformers' models call this.

        Raises:
            StateError: no forward pass of an enabled model is running.
        """
        self._check_in_forward()
        updated: tuple[torch.Tensor, torch.Tensor] = super().update(*args, **kwargs)
        return updated

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Return the keys of a mask and the position of the first. Models call this before their layers.

        Raises:
            StateError: no forward pass of an enabled model is running.
        """
        self._check_in_forward()
        sizes: tuple[int, int] = super().get_mask_sizes(*args, **kwargs)
        return sizes

    def _check_in_forward(self) -> None:
        if not self.is_in_forward:
            raise StateError(
                "a HeadCache works only in model(...) and model.generate(...) of a model that headinfer is enabled on: "
                "call headinfer.enable(model) first, and use the cache before its with block ends"
            )

    @property
    def head_layers(self) -> list[HeadLayer]:
        """The offloaded layers."""
        return [layer for layer in self.layers if isinstance(layer, HeadLayer)]

    def stats(self) -> Stats:
        """Return the bytes that the cache holds and has moved, and what was chosen for the last forward pass."""
        host = self.engine.counter
        plan = self.engine.plan
        counters = self.engine.counters

        def device_bytes(purpose: str) -> int:
            return sum(counter.device_bytes[purpose] for counter in counters)

        return Stats(
            tokens=self.head_layers[0].get_seq_length(),
            layers_offloaded=len(self.head_layers),
            layers_left_to_transformers=len(self.layers) - len(self.head_layers),
            device_kv_bytes=sum(sum(counter.device_bytes.values()) for counter in counters),
            device_kv_peak_bytes=sum(counter.device_peak_bytes for counter in counters),
            device_ring_bytes=device_bytes("ring"),
            device_tail_bytes=device_bytes("tail"),
            device_staging_bytes=device_bytes("staging") + device_bytes("exchange"),
            device_resident_bytes=device_bytes("resident"),
            device_window_bytes=device_bytes("window"),
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
            cpu_share=plan.cpu_share if plan else 0.0,
            cpu_attended_bytes=sum(counter.cpu_attended_bytes for counter in counters),
            attention_backends=recorded(self.engine.backends_used, self.engine.options.backend),
            oom_retries=self.engine.shortage.retries,
            oom_given_back_bytes=self.engine.shortage.given_back_bytes,
            oom_chunk_tokens=self.engine.shortage.chunk_tokens,
            kv_dtype=self.engine.options.kv_dtype,
            approximation=short_form(self.engine.options.kv_dtype, self.engine.options.sparse_heads),
        )

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens of every row.

        Args:
            tokens_to_remove: a negative number removes that many tokens. A positive number is the length to keep.

        Raises:
            UsageError: it is not a whole number.
            StateError: a layer of transformers has dropped the older states that this needs. No layer is changed.
        """
        tokens_to_remove = whole_number(tokens_to_remove, "tokens_to_remove", low=-(2**63))
        if tokens_to_remove > 0:  # layers of transformers take only a number of tokens to remove
            tokens_to_remove = min(tokens_to_remove - self.get_seq_length(), 0)
        for layer in self.layers:
            reason = uncroppable_reason(layer, -tokens_to_remove)
            if reason:
                raise StateError(f"cannot crop: {reason}")
        super().crop(tokens_to_remove)
        if self.token_ids is not None:
            self.token_ids = self.token_ids[:, : self.get_seq_length()]

    def separate(self) -> None:
        """Make each row `copies` rows, which share their segments, so that they can differ from here on."""
        if self.copies > 1:
            copies = self.copies
            self.copies = 1
            rows = self.head_layers[0].rows
            if rows:
                self.reorder_cache(torch.arange(rows).repeat_interleave(copies))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Replace each row i by row beam_idx[i]; beam_idx is [rows], int64."""
        rows = integer_tensor(beam_idx, "beam_idx", (1,)).cpu()  # one copy to the host instead of one per layer
        self.separate()
        self._check_rows(rows, "beam_idx")
        super().reorder_cache(rows)
        self._select_ids(rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Replace each row by `repeats` rows, which share its segments."""
        count = whole_number(repeats, "repeats")
        self.separate()
        super().batch_repeat_interleave(count)
        if self.token_ids is not None:
            self.token_ids = self.token_ids.repeat_interleave(count, dim=0)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows that a tensor of indices or a bool mask selects."""
        selected = integer_tensor(indices, "indices", (1,), allows_mask=True)
        self.separate()
        self._check_rows(selected, "indices")
        super().batch_select_indices(selected)
        self._select_ids(selected)

    def _check_rows(self, selected: torch.Tensor, name: str) -> None:
        """Check that the rows that a tensor of indices or a bool mask selects exist. Any row of an empty cache does."""
        rows = self.head_layers[0].rows
        is_mask = selected.dtype == torch.bool
        is_wrong = selected.numel() != rows if is_mask else bool(((selected < 0) | (selected >= rows)).any())
        if rows and is_wrong:
            raise UsageError(f"{name} is {shown(selected.tolist())}, and the cache holds {rows} rows, from 0")

    def _select_ids(self, rows: torch.Tensor) -> None:
        """Keep the token ids of the rows that a tensor of indices or a bool mask selects."""
        if self.token_ids is not None:
            self.token_ids = self.token_ids[rows.to(self.token_ids.device)]

    def reset(self) -> None:
        """Empty the cache and free its memory."""
        with torch.inference_mode():  # before 5.23, layers of transformers zero tensors that they may have made in it
            super().reset()
        self.copies = 1
        self.token_ids = None

    def park(self) -> None:
        """Free the device memory of a cache that is not used for a while, but for its newest tokens.

        The next pass makes it anew, and copies as many of the first tokens to the device as the budget allows.
        """
        self.engine.park()
        for layer_kv in self.layer_kvs().values():
            layer_kv.is_promoted = False

    def crop_recorded_past(self) -> None:
        """Cut transformers' layers that record their past (assisted decoding) to their window, between two chunks."""
        for layer in self.layers:
            if getattr(layer, "record_past", False) and not isinstance(layer, HeadLayer):
                layer.crop(0)

    def fork(self) -> HeadCache:
        """Create an independent cache with the same content. Both share the segments, which are not copied.

        copy.copy() and copy.deepcopy() of a cache do the same.
        """
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.is_in_forward = False
        twin.layers = []
        for layer in self.layers:
            copied = copy.copy(layer)
            restore(copied, state_of(layer))
            if isinstance(layer, HeadLayer) and layer.layer_kv is not None:
                copied.layer_kv = layer.layer_kv.fork()
            twin.layers.append(copied)
        twin.saved = self.saved.copy() if self.saved is not None else None
        return twin

    def fork_rows(self, rows: torch.Tensor, padding: int = 0) -> HeadCache:
        """Create an independent cache whose row i has the content of row rows[i] of this one.

        Rows with the same content share their segments. The fork holds no token ids.

        Args:
            rows: [N], int64.
            padding: tokens of padding that a row may get, at most.
        """
        layer_kvs = list(self.layer_kvs().values())
        for layer_kv in layer_kvs:
            layer_kv.promote()
        self.engine.make_room_for_rows(layer_kvs, rows.shape[0])
        forked = self.fork()
        forked.token_ids = None
        forked.shares_rows = True
        if forked.get_seq_length():
            forked.reorder_cache(rows)
            for layer in forked.layers:
                if padding and type(layer) is DynamicSlidingWindowLayer:
                    PaddedWindowLayer.extend(layer, padding)
        return forked

    def __copy__(self) -> HeadCache:
        return self.fork()

    def __reduce__(self) -> str:
        raise UnsupportedError("a HeadCache cannot be pickled: use its save(), and HeadCache.load()")

    def __deepcopy__(self, memo: dict[int, Any]) -> HeadCache:
        return self.fork()

    def take_back(self, before: HeadCache) -> None:
        """Return to the content of a fork, after an error in a forward pass that emptied the cache."""
        self.engine.abandon()
        self.layers: list[Any] = before.layers
        self.copies = before.copies

    def save(
        self, folder: str | Path, token_ids: torch.Tensor | None = None, about: Mapping[str, Any] | None = None
    ) -> None:
        """Save the cache to a folder. Saving again writes only what is new.

        Args:
            folder: a folder that does not exist, is empty, or holds the session that the cache goes on from.
            token_ids: the ids [rows, tokens] of all tokens in the cache, or more, as a tensor or lists; those of a
                single row may be [tokens]. load() gives them back.
            about: facts of the caller, for JSON.

        Raises:
            SessionError: the folder holds another session or files that no session wrote, or another process writes
                it.
            CapacityError: the disk is full. The checkpoint before is still there.
            StateError: no enabled model has filled the cache, it no longer exists, or other adapters are active now.
            UsageError: an argument is of another type, or token_ids has another shape than the cache or a negative id.
        """
        path = Path(path_text(folder, "folder"))
        ids = integer_tensor(token_ids, "token_ids", (1, 2)) if token_ids is not None else None
        if ids is not None and bool((ids < 0).any()):
            raise UsageError(f"token_ids has the negative number {int(ids.min())}: give the ids of the tokenizer")
        facts = json_object(about, "about") if about is not None else None
        model = self.model()
        if model is None:
            raise StateError(
                "an enabled model must have filled the cache, and must still exist, before the cache can be saved"
            )
        self.check_adapters(applied_adapters(adapter_layers(model)))
        save_cache(self, path, model, ids.view(1, -1) if ids is not None and ids.dim() == 1 else ids, facts)

    @classmethod
    def load(cls, folder: str | Path, model: PreTrainedModel, **options: Unpack[OptionFields]) -> HeadCache:
        """Load a cache that save() wrote. K and V are read from the folder when they are first needed.

        Args:
            folder: the session's folder.
            model: the model that made the session.
            **options: fields of `headinfer.Options` to change. Without any, the same machine computes the same bits
                as the cache that was saved.

        Returns:
            The cache. Its `token_ids` are those that save() was given.

        Raises:
            SessionError: there is no session, it is damaged, or another model made it.
            UsageError: an argument is of another type, or kv_dtype is not that of the session.

        Warns:
            ApproximationWarning: the session was read approximately, and `options` does not name its kv_dtype.
        """
        path = Path(path_text(folder, "folder"))
        if not isinstance(getattr(model, "config", None), PreTrainedConfig):
            raise UsageError(f"model is {shown(model)}: it must be the model that made the session")
        model = unwrapped(model)

        def new_cache(kept: dict[str, Any]) -> HeadCache:
            cache = cls(model.config, **merged(kept, options))
            chosen = cache.engine.options
            named = (chosen.kv_dtype == "auto" or "kv_dtype" in options) and (
                chosen.sparse_heads is None or "sparse_heads" in options
            )
            if not named:
                message = f"of the session {path}, {chosen.approximation}"
                warnings.warn(message, ApproximationWarning, stacklevel=stacklevel_of_user())
            cache.model = weakref.ref(model)
            cache.adapters = applied_adapters(adapter_layers(model))
            return cache

        return load_cache(path, model, new_cache, lambda index: layer_device(model, index))

    def check_adapters(self, adapters: tuple[tuple[Any, ...], ...]) -> None:
        """Check that the KV was computed with certain adapters of peft, as applied_adapters() returns them.

        Raises:
            StateError: it was not.
        """
        if self.get_seq_length() and adapters != self.adapters:
            there, here = (_names(found) for found in (self.adapters, adapters))
            raise StateError(
                f"the cache was filled with {there} active, and the model has {here} active now: activate the same "
                "ones, or begin with an empty cache"
            )

    def layer_kvs(self) -> dict[int, LayerKV]:
        """Return the KV of each offloaded layer that has any, by the layer's index."""
        offloaded = {index: layer for index, layer in enumerate(self.layers) if isinstance(layer, HeadLayer)}
        return {index: layer.layer_kv for index, layer in offloaded.items() if layer.layer_kv is not None}

    def layer_fields(self) -> list[dict[str, Any]]:
        """Return the state of every layer but its offloaded KV, as attributes by name."""
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
        """Return the state of each layer, for rollback(): the length of an offloaded layer, the fields of any other."""
        return [state_of(layer) for layer in self.layers]

    def rollback(self, checkpoint: list[dict[str, Any]]) -> None:
        """Return every layer to the state at a checkpoint, after an error in a forward pass."""
        self.engine.abandon()
        for layer, before in zip(self.layers, checkpoint, strict=True):
            restore(layer, before)


def _names(adapters: tuple[tuple[Any, ...], ...]) -> str:
    """Return the names of adapters, for a message."""
    names = sorted({str(name) for layer in adapters for name, _ in layer})
    return f"the adapter {' and '.join(names)}" if names else "no adapter"
