"""enable(model): offload the KV cache of everything that the model does, until it is switched off again.

Model classes are not patched. On this one model object it sets the attention implementation, the cache that
generate() prepares, and a forward that puts the cache right again after an error.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import weakref
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Any, Unpack

import torch

from headinfer.engine.options import OptionFields, Options
from headinfer.engine.run_plan import fixed_fields, plan_run, planned, tightest
from headinfer.errors import CapacityError, StateError, UnsupportedError, UsageError
from headinfer.hf.attention import NAME, register
from headinfer.hf.cache import HeadCache
from headinfer.hf.chunks import chunks_of
from headinfer.hf.compat import (
    GenerationMode,
    PreTrainedModel,
    check_version,
    cuda_devices,
    layer_device,
    takes_attention_interface,
    unfit_cache,
)
from headinfer.hf.copies import one_of_each, repeat_logits
from headinfer.hf.families import check_family
from headinfer.hf.layers import HeadLayer
from headinfer.kv.byte_counter import ByteCounter
from headinfer.plan.model_shape import ModelShape
from headinfer.plan.planner import Plan

__all__ = ["Enabled", "check_model", "enable"]

_UNPLANNED_CHUNK_TOKENS = 2048  # where no plan fits the memory that is free: the engine still tries
_OUR_CACHES = (None, "dynamic", "hybrid")  # "hybrid": older Gemma checkpoints name it; a HeadCache is one


def check_model(model: PreTrainedModel) -> None:
    """Raise UnsupportedError, before anything is changed, for a model that is not served exactly."""
    check_version()
    if not isinstance(model, PreTrainedModel) or not takes_attention_interface(model):
        family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise UnsupportedError(
            f"{family} does not use transformers' attention interface, so its KV cache can not be offloaded: "
            "docs/models.md lists the families that are served"
        )
    check_family(model.config)
    HeadCache(model.config)  # raises where the layers are not served


class Enabled:
    """A model with headinfer switched on; `disable()`, or leaving the `with` block, undoes it."""

    def __init__(
        self,
        model: PreTrainedModel,
        chunk_tokens: int | None,
        options: Options,
        on_forward: Callable[[HeadCache], None] | None,
    ) -> None:
        self.model, self.chunk_tokens, self.options, self.on_forward = model, chunk_tokens, options, on_forward
        self.last_cache: HeadCache | None = None
        self.plan: Plan | None = None
        self._attention_before = model.config._attn_implementation
        self._forward_before = model.__dict__.get("forward")
        register()
        model.set_attn_implementation(NAME)
        model.forward = self._forward(model.forward)
        model._prepare_cache_for_generation = self._prepare_cache
        model._headinfer = self

    def new_cache(self, expected_tokens: int = 0, rows: int = 1) -> HeadCache:
        """An empty cache with this model's options, to pass as past_key_values; what they leave open is planned."""
        self.plan = self._make_plan(expected_tokens, rows)
        options = dataclasses.replace(self.options, expected_tokens=expected_tokens)
        if self.plan is not None:
            options = planned(options, self.plan)
        return HeadCache(self.model.config, **vars(options))

    def _make_plan(self, tokens: int, rows: int, cache: HeadCache | None = None) -> Plan | None:
        """The plan for so many tokens, with the memory that is free now or held by the cache that is to hold them.

        None where none fits, since lengths are often only upper bounds here: what does not fit then fails when it is
        reached.
        """
        model = self.model
        shape = ModelShape.from_config(model.config).shard(getattr(model, "tp_size", None) or 1)
        device = tightest(cuda_devices(model)) or torch.device("cpu")
        fixed = fixed_fields(self.options, self.chunk_tokens)
        counters = cache.engine.counters if cache is not None else [ByteCounter()]
        try:
            return plan_run(
                shape,
                device,
                model.dtype,
                max(tokens, 1),
                rows=rows,
                held_device_bytes=min(sum(held.device_bytes.values()) for held in counters),
                held_host_bytes=counters[0].host_bytes,
                is_loaded=True,
                fixed=fixed,
            )
        except CapacityError:
            return None

    def _chunk(self, tokens: int, rows: int, cache: HeadCache | None = None) -> int:
        """Tokens of a chunk, for a context that will have `tokens` tokens."""
        if self.chunk_tokens is not None:
            return self.chunk_tokens
        self.plan = self._make_plan(tokens, rows, cache)
        return self.plan.chunk_tokens if self.plan is not None else _UNPLANNED_CHUNK_TOKENS

    def disable(self) -> None:
        """Leave the model as it was; harmless to repeat."""
        model = self.model
        if model.__dict__.get("_headinfer") is not self:
            return
        if self._forward_before is None:
            del model.forward
        else:
            model.forward = self._forward_before
        del model._prepare_cache_for_generation, model._headinfer
        model.set_attn_implementation(self._attention_before)

    def __enter__(self) -> Enabled:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.disable()

    def _forward(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The model's forward, after which a HeadCache has all of the chunk in all layers, or none in any."""

        names = tuple(inspect.signature(forward).parameters)

        @functools.wraps(forward)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            inputs = {**dict(zip(names, args, strict=False)), **kwargs}
            cache = inputs.get("past_key_values")
            if unfit_cache(cache):
                raise _unfit(type(cache).__name__)
            if not isinstance(cache, HeadCache):
                return forward(*args, **kwargs)
            copies = cache.copies
            if copies > 1:
                one = one_of_each(inputs, self.model.config, copies)
                if one is None:
                    cache.separate()
                    copies = 1
                else:
                    inputs = one
            cache.engine.row_copies = cache.copies
            cache.model = weakref.ref(self.model)
            if not cache.engine.layers_on:
                offloaded = (index for index, layer in enumerate(cache.layers) if isinstance(layer, HeadLayer))
                cache.engine.layers_on = Counter(layer_device(self.model, index) for index in offloaded)
            before, result = cache.checkpoint(), None
            try:
                chunk = functools.partial(self._chunk, rows=cache.head_layers[0].rows or 1, cache=cache)
                for part in chunks_of(inputs, chunk):
                    if result is not None:
                        self._after_forward(cache)
                        cache.forget_recorded_past()
                    result = self._one_chunk(forward, part, cache)
            except BaseException:
                cache.rollback(before)
                raise
            self._after_forward(cache)
            return repeat_logits(result, copies) if copies > 1 else result

        return guarded

    def _one_chunk(self, forward: Callable[..., Any], inputs: dict[str, Any], cache: HeadCache) -> Any:
        cache.engine.attentions = 0
        result = forward(**inputs)
        if cache.engine.awaiting is not None or cache.engine.attentions != cache.attentions_per_forward:
            raise UnsupportedError(
                f"{type(self.model).__name__} ran {cache.engine.attentions} of its {cache.attentions_per_forward} "
                "full attentions through headinfer: use it without headinfer"
            )
        return result

    def _after_forward(self, cache: HeadCache) -> None:
        self.last_cache = cache
        if self.on_forward is not None:
            self.on_forward(cache)

    def _prepare_cache(
        self, generation_config: Any, model_kwargs: dict[str, Any], mode: Any, batch_size: int, max_cache_length: int
    ) -> None:
        """What generate() calls to get its cache; generation_config is the call's own copy."""
        cache = model_kwargs.get("past_key_values")
        if unfit_cache(cache):
            raise _unfit(type(cache).__name__)
        if generation_config.cache_implementation not in _OUR_CACHES:
            raise _unfit(f"cache_implementation={generation_config.cache_implementation!r}")
        if isinstance(cache, HeadCache) and cache.get_seq_length() and mode == GenerationMode.ASSISTED_GENERATION:
            raise UnsupportedError(
                f"the cache holds {cache.get_seq_length()} tokens, and transformers' assisted decoding would read them "
                "again on top: give it an empty cache, or generate without prompt lookup and draft model"
            )
        generation_config.cache_implementation = None
        if cache is not None or generation_config.use_cache is False:
            type(self.model)._prepare_cache_for_generation(
                self.model, generation_config, model_kwargs, mode, batch_size, max_cache_length
            )
        else:
            model_kwargs["past_key_values"] = self.new_cache(max_cache_length, batch_size)
        held = model_kwargs.get("past_key_values")
        copies = max(generation_config.num_beams, generation_config.num_return_sequences)
        if isinstance(held, HeadCache):
            held.separate()
            held.copies = copies if held.get_seq_length() == 0 else 1
        # generate() can not cut embeddings, nor before 5.23 what follows a past, as with an assistant: see chunks.py.
        is_first = mode != GenerationMode.ASSISTED_GENERATION and not (held is not None and held.get_seq_length())
        is_cut = is_first and model_kwargs.get("inputs_embeds") is None
        if generation_config.prefill_chunk_size is None and generation_config.use_cache is not False and is_cut:
            own = held if isinstance(held, HeadCache) else None
            generation_config.prefill_chunk_size = self._chunk(max_cache_length, batch_size, own)


def _unfit(what: str) -> UnsupportedError:
    return UnsupportedError(
        f"{what} can not work with headinfer, which keeps its own KV cache: leave it out, or pass a HeadCache"
    )


def enable(
    model: PreTrainedModel,
    *,
    chunk_tokens: int | None = None,
    on_forward: Callable[[HeadCache], None] | None = None,
    **options: Unpack[OptionFields],
) -> Enabled:
    """Switch headinfer on for a model; use the result as a context manager or call its disable().

    chunk_tokens: prompts are read in chunks of this many tokens. options: the fields of `headinfer.Options`, e.g.
    device_kv_budget_bytes in bytes. What is left open is planned for this machine, anew for each generate() and each long
    forward pass; `plan` is the last plan, and `plan.explain()` says why. on_forward: called with the cache after each
    forward pass, for progress displays. Raises UnsupportedError for a model that is not served exactly and UsageError
    for options out of range, both before anything is changed.
    """
    if chunk_tokens is not None and chunk_tokens < 1:
        raise UsageError(f"chunk_tokens is {chunk_tokens}: it must be a positive number")
    chosen = Options(**options)
    check_model(model)
    if "_headinfer" in model.__dict__:
        raise StateError("headinfer is already enabled on this model: disable it first, or leave its with block")
    return Enabled(model, chunk_tokens, chosen, on_forward)
