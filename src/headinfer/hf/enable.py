"""enable(model): offload the KV cache of everything that a model does, until it is disabled.

Model classes are not patched. On the one model object, enable() sets the attention implementation, the cache that
generate() prepares, and a forward that restores the cache after an error.
"""

from __future__ import annotations

import functools
import inspect
import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import TracebackType
from typing import Any, Unpack

import torch

from headinfer.engine.options import OptionFields, Options
from headinfer.errors import ContextLengthWarning, StateError, UnsupportedError, UsageError
from headinfer.hf.attention import NAME, register, windows_skip_padding
from headinfer.hf.batch import ask
from headinfer.hf.cache import HeadCache
from headinfer.hf.chunks import chunks_of
from headinfer.hf.compat import (
    Cache,
    GenerationMode,
    PreTrainedModel,
    check_version,
    is_unsupported_cache,
    layer_device,
    takes_attention_interface,
)
from headinfer.hf.copies import distinct_rows, repeat_logits
from headinfer.hf.defaults import use_cache_by_default
from headinfer.hf.draws import DrawControl
from headinfer.hf.generation import check_generate
from headinfer.hf.guesses import GuessControl, GuessCounts
from headinfer.hf.inputs import (
    check_attention_outputs,
    check_no_images,
    number_of_positions,
    number_of_tokens,
    text_only,
    unused_positions,
    wants_more_than_logits,
)
from headinfer.hf.layers import HeadLayer
from headinfer.hf.planning import Planning
from headinfer.hf.recovery import Recovery
from headinfer.hf.rollback import rollback_on_error
from headinfer.hf.rotary import RotaryControl
from headinfer.hf.sparse_layers import check_approximations
from headinfer.hf.where import TokenIds, Where, where
from headinfer.hf.wrappers import unwrapped
from headinfer.plan.families import check_family
from headinfer.plan.guesses import Guesses, guesses_option
from headinfer.plan.model_shape import ModelShape
from headinfer.plan.planner import Plan
from headinfer.sessions.weights import adapter_layers, applied_adapters
from headinfer.utils.stacklevel import stacklevel_of_user
from headinfer.utils.values import optional, shown, token_count, whole_number

__all__ = ["Enabled", "check_model", "context_warning", "enable", "enabled_on"]

# The methods that enable() replaces on the model object.
_REPLACED = (
    "forward",
    "generate",
    "prepare_inputs_for_generation",
    "_prepare_cache_for_generation",
    "_get_stopping_criteria",
    "_get_candidate_generator",
    "_get_logits_processor",
)
_OUR_CACHES = (None, "dynamic", "hybrid")  # "hybrid": older Gemma checkpoints name it; a HeadCache is one


def check_model(model: PreTrainedModel) -> None:
    """Check that a model is served exactly. The model is not changed.

    Raises:
        UnsupportedError: it is not. The message says why.
    """
    check_version()
    if not takes_attention_interface(model):
        raise UnsupportedError(
            f"{model.config.model_type} does not use transformers' attention interface, so its KV cache cannot be "
            "offloaded: docs/models.md lists the families that are served"
        )
    check_family(model.config.model_type, model.config.get_text_config(decoder=True).model_type)
    HeadCache(model.config)  # raises if a layer is not served


def context_warning(tokens: int, shape: ModelShape) -> str | None:
    """Return a warning if a context is longer than a model was made for; None if it is not, or if that is unknown.

    Raises:
        UsageError: the model has no positions for a context of this length.
    """
    shape.check_positions(tokens)
    if not shape.max_context_tokens or tokens <= shape.max_context_tokens:
        return None
    return (
        f"{tokens:,} tokens exceed the {shape.max_context_tokens:,} that this model was made for: expect poor answers"
    )


class Enabled:
    """A model with headinfer enabled. disable(), or leaving the `with` block, undoes it.

    Args:
        model: the model.
        chunk_tokens: tokens of a prefill chunk; None is planned.
        options: the options of the caches that it makes.
        on_forward: called with the cache after each forward pass.
        guesses: whether generate() uses prompt lookup; see enable().

    Attributes:
        last_cache: the cache of the last forward pass.
        planning: plans its runs.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        chunk_tokens: int | None,
        options: Options,
        on_forward: Callable[[HeadCache], None] | None,
        guesses: Guesses = "auto",
    ) -> None:
        self.model = model
        self.chunk_tokens = chunk_tokens
        self.options = options
        self.on_forward = on_forward
        self.last_cache: HeadCache | None = None
        ranks = getattr(model, "tp_size", None) or 1
        self._shape = ModelShape.from_config(model.config).shard(ranks)
        check_approximations(options, self._shape, ranks)
        self.planning = Planning(model, self._shape, options, chunk_tokens)
        self._has_warned = False
        self._removes_last_token = False
        self._draft: Any = None  # the draft model of the generate() that is running
        self._attention_before = model.config._attn_implementation
        self._before = {name: model.__dict__.get(name) for name in _REPLACED}
        register()
        model.set_attn_implementation(NAME)
        self._restore_defaults = use_cache_by_default(model)
        model.forward = self._forward(model.forward)
        model.generate = self._generate(model.generate)
        model._prepare_cache_for_generation = self._prepare_cache
        self._guesses = GuessControl(model, guesses, self._guess_costs)
        self._draws = DrawControl(model)
        self._rotary = RotaryControl(model)
        self._adapter_layers = adapter_layers(model)
        model.prepare_inputs_for_generation = self._rotary.wrap(model.prepare_inputs_for_generation)
        model._headinfer = self

    @property
    def plan(self) -> Plan | None:
        """The last plan; None before the first one, or if no plan fits the free memory."""
        return self.planning.plan

    @property
    def guess_counts(self) -> GuessCounts:
        """What the guesses of the last generate() did."""
        return self._guesses.counts

    @property
    def guesses_off_reason(self) -> str:
        """Why the last generate() could not use guesses; empty if it could, or if they are off."""
        return self._guesses.off_reason

    def new_cache(self, expected_tokens: int | str = 0, rows: int = 1) -> HeadCache:
        """Create an empty cache to pass as past_key_values. What the options leave open is planned.

        Args:
            expected_tokens: the final length of the context; 0 stands for the option of enable().
            rows: rows of the batch.

        Raises:
            UsageError: a number is of another type or out of range.
        """
        expected_tokens = token_count(expected_tokens, "expected_tokens", low=0) or self.options.expected_tokens
        return self.planning.new_cache(expected_tokens, whole_number(rows, "rows"))

    @property
    def shape(self) -> ModelShape:
        """The shape of the model, or of this rank's shard."""
        return self._shape

    def fits(self, tokens: int, rows: int) -> bool:
        """Return whether a plan for a context of so many tokens in each row fits the free memory."""
        return self.planning.plan_now(tokens, rows) is not None

    def ask(
        self,
        cache: HeadCache,
        questions: Sequence[TokenIds],
        *,
        document_ids: torch.Tensor | None = None,
        max_new_tokens: int = 256,
        **options: Any,
    ) -> list[list[int]]:
        """Answer questions about the document in a cache together. Each token reads the document's KV once for all.

        Each answer is the one that its question gets alone, up to the rounding of other shapes. The cache does not
        change.

        Args:
            cache: holds the document in one row.
            questions: the token ids of each question, which follow the document.
            document_ids: the ids [1, T] of what the cache holds; None takes cache.token_ids, which load() sets.
            max_new_tokens: tokens of an answer, at most.
            **options: further arguments of generate(), such as pad_token_id.

        Returns:
            The ids of each answer.

        Raises:
            UsageError: an argument is invalid.
        """
        return ask(self, cache, questions, document_ids=document_ids, max_new_tokens=max_new_tokens, **options)

    def where(
        self, cache: HeadCache, question: TokenIds, answer: TokenIds, *, edges: Sequence[int] | None = None
    ) -> Where:
        """Compute the exact attention mass of the document's stretches for each token of an answer (where.py).

        Args:
            cache: holds the document in one row. It does not change.
            question: the token ids of the question, which follow the document.
            answer: those of its answer.
            edges: the positions at which the stretches begin, and the end of the last; None is every 256 tokens.

        Raises:
            UsageError: an argument is invalid.
            UnsupportedError: the answer cannot be repeated in one pass.
        """
        return where(self, cache, question, answer, edges=edges)

    def _warn_about(self, tokens: int) -> None:
        """Warn once if a context is longer than what the model was made for. Raise UsageError if it cannot be."""
        warning = context_warning(tokens, self._shape)
        if warning is not None and not self._has_warned:
            self._has_warned = True
            warnings.warn(warning, ContextLengthWarning, stacklevel=stacklevel_of_user())

    def disable(self) -> None:
        """Restore the model. Calling it again does nothing."""
        model = self.model
        if model.__dict__.get("_headinfer") is not self:
            return
        for name, before in self._before.items():
            if before is None:
                delattr(model, name)
            else:
                setattr(model, name, before)
        del model._headinfer
        self._rotary.remove()
        self._restore_defaults()
        model.set_attn_implementation(self._attention_before)

    def __enter__(self) -> Enabled:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.disable()

    def _forward(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the model's forward: a HeadCache gets all of the chunk in all layers, or nothing in any."""
        names = tuple(inspect.signature(forward).parameters)

        @functools.wraps(forward)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            inputs = {**dict(zip(names, args, strict=False)), **kwargs}
            check_attention_outputs(inputs, self.model.config)
            cache = inputs.get("past_key_values")
            past_tokens = cache.get_seq_length() if isinstance(cache, Cache) else 0
            if self._shape.has_position_table:
                self._shape.check_positions(number_of_positions(inputs, past_tokens))
            if is_unsupported_cache(cache):
                raise _unsupported_cache(type(cache).__name__)
            if not isinstance(cache, HeadCache):
                return forward(*args, **kwargs)
            check_no_images(inputs, self.model.config)
            inputs = text_only(inputs, self.model.config)
            copies = cache.copies
            if copies > 1:
                distinct = distinct_rows(inputs, self.model.config, copies)
                if distinct is None:
                    cache.separate()
                    copies = 1
                else:
                    inputs = distinct
            if not self._shape.has_position_table:
                self._warn_about(past_tokens + number_of_tokens(inputs))
            result = self._guarded_chunks(forward, inputs, cache)
            return repeat_logits(result, copies) if copies > 1 else result

        return guarded

    def _generate(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the model's generate(): check its arguments before transformers changes them."""
        names = tuple(inspect.signature(generate).parameters)

        @functools.wraps(generate)
        def checked(*args: Any, **kwargs: Any) -> Any:
            kwargs = self._draws.begin(kwargs)
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            given.setdefault("input_ids", given.get("inputs"))
            self._draft = given.get("assistant_model")
            self._removes_last_token = check_generate(given, self.model.config)
            mask = given.get("attention_mask")
            ids = given.get("input_ids")
            self._has_all_ids = ids is not None and (mask is None or mask.shape[-1] == ids.shape[-1])
            return generate(*args, **kwargs | self._guesses.begin(given))

        return checked

    def _guess_costs(self, cache: Any, tokens: int) -> Sequence[float] | None:
        """Return what guesses cost in a context of so many tokens; None if no plan fits."""
        planned = self.planning.plan_of(cache, tokens, 1) if isinstance(cache, HeadCache) else None
        return planned.plan.guess_costs if planned is not None else None

    def _guarded_chunks(self, forward: Callable[..., Any], inputs: dict[str, Any], cache: HeadCache) -> Any:
        """Run a forward pass, in chunks if it is long. After an error the cache is as it was before.

        If a device runs out of memory, the pass goes on with less resident KV or shorter chunks (recovery.py).
        """
        engine = cache.engine
        engine.row_copies = cache.copies
        cache.model = weakref.ref(self.model)
        if not engine.layers_on:
            offloaded = (index for index, layer in enumerate(cache.layers) if isinstance(layer, HeadLayer))
            engine.place(layer_device(self.model, index) for index in offloaded)
        adapters = applied_adapters(self._adapter_layers)
        cache.check_adapters(adapters)
        cache.adapters = adapters
        rotary = self._rotary.next_pass(inputs, cache)
        config = self.model.config
        recovery = Recovery(cache, self.model, self._shape)
        with (
            rollback_on_error(cache, empties=rotary.rereads) as before,
            self._rotary.frequencies(rotary, cache) as has_noted,
        ):
            result = recovery.run(
                chunks_of(
                    inputs,
                    config,
                    lambda tokens: self.planning.chunk_of(cache, tokens, cache.head_layers[0].rows or 1),
                ),
                lambda chunk: self._one_chunk(forward, chunk, cache),
                lambda: self._between_chunks(cache),
                cache.checkpoint() if has_noted else before,
            )
        self._after_forward(cache)
        return result

    def _one_chunk(self, forward: Callable[..., Any], inputs: dict[str, Any], cache: HeadCache) -> Any:
        cache.engine.attentions = 0
        cache.is_in_forward = True
        try:
            with windows_skip_padding() if cache.shares_rows else nullcontext():
                result = forward(**inputs)
        finally:
            cache.is_in_forward = False
        if cache.engine.awaiting is not None or cache.engine.attentions != cache.attentions_per_forward:
            raise UnsupportedError(
                f"{type(self.model).__name__} ran {cache.engine.attentions} of its {cache.attentions_per_forward} "
                "full attentions through headinfer: use it without headinfer"
            )
        return result

    def _between_chunks(self, cache: HeadCache) -> None:
        self._after_forward(cache)
        cache.crop_recorded_past()

    def _after_forward(self, cache: HeadCache) -> None:
        self.last_cache = cache
        if self.on_forward is not None:
            self.on_forward(cache)

    def _prepare_cache(
        self, generation_config: Any, model_kwargs: dict[str, Any], mode: Any, batch_size: int, max_cache_length: int
    ) -> None:
        """Make the cache of generate(), which calls this. generation_config is the call's own copy."""
        cache = model_kwargs.get("past_key_values")
        if is_unsupported_cache(cache):
            raise _unsupported_cache(type(cache).__name__)
        if generation_config.cache_implementation not in _OUR_CACHES:
            raise _unsupported_cache(f"cache_implementation={generation_config.cache_implementation!r}")
        is_assisted = mode == GenerationMode.ASSISTED_GENERATION
        if is_assisted and isinstance(cache, HeadCache) and cache.get_seq_length() and not self._has_all_ids:
            raise UnsupportedError(
                f"the cache holds {cache.get_seq_length()} tokens, and assisted decoding needs their ids too: give "
                "generate() the ids of all tokens, or generate without prompt lookup and draft model"
            )
        generation_config.cache_implementation = None
        if cache is not None or generation_config.use_cache is False:
            type(self.model)._prepare_cache_for_generation(
                self.model, generation_config, model_kwargs, mode, batch_size, max_cache_length
            )
        else:
            cache = self.new_cache(max_cache_length, batch_size)
            cache.rotary_min_tokens = self.options.expected_tokens
            model_kwargs["past_key_values"] = cache
        guesses = 0
        if not self._guesses.is_on:
            guesses = (generation_config.prompt_lookup_num_tokens or 1) - 1  # they may go beyond the last token
        longest = max_cache_length + guesses - unused_positions(model_kwargs)
        self._warn_about(longest)
        draft = getattr(self._draft, "_headinfer", None)
        if isinstance(draft, Enabled) and draft._shape.vocab_size == self._shape.vocab_size:
            draft._shape.check_positions(longest)  # not in the middle of the answer
        self._rotary.begin_generation(longest, is_assisted=is_assisted)
        if self._rotary.lengths or wants_more_than_logits(model_kwargs, self.model.config):
            generation_config.prefill_chunk_size = None  # the pass must be whole: chunks_of() cuts it
        if isinstance(cache, HeadCache):
            self._prepare_head_cache(cache, generation_config, batch_size, max_cache_length)

    def _prepare_head_cache(
        self, cache: HeadCache, generation_config: Any, batch_size: int, max_cache_length: int
    ) -> None:
        """Prepare the HeadCache that generate() will use."""
        if self._removes_last_token:  # not before transformers has checked the arguments
            cache.crop(-1)
        is_empty = cache.get_seq_length() == 0
        copies = max(generation_config.num_beams, generation_config.num_return_sequences)
        cache.separate()
        cache.copies = copies if is_empty else 1
        if generation_config.is_assistant:
            cache.activate_past_recording()  # rejected guesses are cropped
        if is_empty:
            self.planning.chunk_of(cache, max_cache_length, batch_size)  # plans the whole run, not the prompt alone


def enabled_on(model: PreTrainedModel) -> Enabled:
    """Return what enable() returned for a model on which headinfer is enabled."""
    found: Enabled = model._headinfer
    return found


def _unsupported_cache(what: str) -> UnsupportedError:
    return UnsupportedError(
        f"{what} cannot work with headinfer, which keeps its own KV cache: leave it out, or pass a HeadCache"
    )


def enable(
    model: PreTrainedModel,
    *,
    chunk_tokens: int | str | None = None,
    on_forward: Callable[[HeadCache], None] | None = None,
    guesses: Guesses = "auto",
    **options: Unpack[OptionFields],
) -> Enabled:
    """Offload the KV cache of a model to host memory, in model(...) and model.generate(...).

    What the options leave open is planned for this machine, once for each generate() and again if a context outgrows
    its plan. `plan` of the result is the last plan, and `plan.explain()` says why it was chosen. A warning is given if
    a context is longer than what the model was made for. `use_cache: false` in the model's configs does not count, only
    in a call.

        with headinfer.enable(model, device_kv_budget_bytes=256 * 2**20):
            model.generate(**inputs)

    Args:
        model: the model. Its classes are not patched. A PeftModel or a result of torch.compile() stands for the model
            in it.
        chunk_tokens: tokens of a prefill chunk, as a number or a text such as "4K".
        on_forward: called with the cache after each forward pass, for progress displays.
        guesses: whether generate() guesses that what followed the newest tokens of the text before follows again, and
            verifies these guesses in the pass of the next token: greedy tokens are the same up to rounding, and
            sampling keeps its distribution. "auto" guesses as much as the plan expects to pay, a number from 1 to 15 is
            the most guesses of a pass, and "off" is none. A batch, beams and whatever else it cannot serve exactly go
            on without guesses.
        **options: fields of `headinfer.Options`.

    Returns:
        A context manager that disables headinfer on exit. It also has disable().

    Raises:
        UnsupportedError: the model is not served exactly.
        UsageError: an option is unknown, of another type or out of range.
        StateError: headinfer is already enabled on the model.
        In each case the model is unchanged.
    """
    chunk = optional(token_count)(chunk_tokens, "chunk_tokens")
    if on_forward is not None and not callable(on_forward):
        raise UsageError(f"on_forward is {shown(on_forward)}: it must be a function that gets the cache")
    chosen = Options.from_fields(options, "enable()")
    model = unwrapped(model)
    check_model(model)
    if "_headinfer" in model.__dict__:
        raise StateError("headinfer is already enabled on this model: disable it first, or leave its with block")
    return Enabled(model, chunk, chosen, on_forward, guesses_option(guesses, "guesses"))
