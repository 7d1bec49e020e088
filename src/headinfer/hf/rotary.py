"""Rotary embeddings whose frequencies depend on the length of the context: longrope (Phi-3) and dynamic NTK.

transformers chooses the frequencies anew in each forward pass, by the largest position in it. If a prompt is read in
chunks, its first chunks would get those of a short context. Here a pass gets the frequencies of the context that it
belongs to, and a cache keeps K with the frequencies of one length only:

- All chunks of a pass use the frequencies of the context's length at the end of the pass, or of `expected_tokens` if
  that is longer.
- If generate() goes on from a cache that needs other frequencies by then, the pass reads all tokens again, with a
  RereadWarning. This happens once if a context crosses the original length of a longrope model.
- Dynamic NTK changes the frequencies with each token beyond max_position_embeddings. There generate() does what
  transformers does: the prompt has those of its length, each new token those of its own.
- A forward pass outside of generate() has the ids of the new tokens only, so it is refused.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from headinfer.errors import RereadWarning, StateError, UnsupportedError
from headinfer.hf.cache import HeadCache
from headinfer.hf.compat import PreTrainedConfig, PreTrainedModel
from headinfer.hf.inputs import number_of_positions, number_of_tokens
from headinfer.utils.stacklevel import stacklevel_of_user

__all__ = ["MIXED", "RotaryControl", "RotaryLengths", "RotaryPass", "crossing_warning", "keeps_frequencies"]

MIXED = -1
"""The value of HeadLayer.rotary_tokens if the tokens of a cache have the frequencies of different lengths."""

_CHANGE = "_headinfer_rotary_change"  # an argument of a pass that generate() prepares; the model never sees it
_REREAD = "reread"
_GROW = "grow"


@dataclass(frozen=True)
class RotaryLengths:
    """The lengths of a context at which the rotary frequencies of a model change.

    Attributes:
        steps: longrope: a context longer than one of these lengths has other frequencies than a shorter one.
        grows_beyond: dynamic NTK: all lengths beyond this one have different frequencies. None if no layer uses it.
    """

    steps: tuple[int, ...] = ()
    grows_beyond: int | None = None

    @classmethod
    def from_config(cls, config: PreTrainedConfig) -> RotaryLengths:
        """Return the lengths of a model by its config."""
        text = config.get_text_config(decoder=True)
        rope = getattr(text, "rope_parameters", None) or {}
        kinds = [rope] if "rope_type" in rope else [kind for kind in rope.values() if isinstance(kind, dict)]
        steps = {kind["original_max_position_embeddings"] for kind in kinds if kind.get("rope_type") == "longrope"}
        grows = any("dynamic" in kind.get("rope_type", "") for kind in kinds)
        return cls(tuple(sorted(steps)), text.max_position_embeddings if grows else None)

    def __bool__(self) -> bool:
        """Whether the frequencies depend on the length at all."""
        return bool(self.steps) or self.grows_beyond is not None

    def normalized(self, tokens: int) -> int:
        """Return the shortest length whose frequencies are those of a context of `tokens` tokens. It is at least 1."""
        if self.grows_beyond is not None and tokens > self.grows_beyond:
            return tokens
        return max((step + 1 for step in self.steps if tokens > step), default=1)

    def limit(self, tokens: int) -> int | None:
        """Return the longest context with the frequencies of a context of `tokens` tokens; None if there is none."""
        limits = self.steps if self.grows_beyond is None else (*self.steps, self.grows_beyond)
        return min((limit for limit in limits if limit >= tokens), default=None)

    def held(self, rotary_tokens: int, tokens: int) -> int:
        """Return the normalized length whose frequencies the tokens of a cache have.

        Args:
            rotary_tokens: what the cache's first layer has noted; 0 if it has noted nothing, as in sessions of
                earlier versions.
            tokens: tokens of the cache.
        """
        if rotary_tokens:
            return rotary_tokens
        return MIXED if self.normalized(tokens) > 1 else 1


def crossing_warning(
    lengths: RotaryLengths, *, held: int, past_tokens: int, prompt_tokens: int, longest_tokens: int
) -> str | None:
    """Return what the user of generate() should know beforehand about a context that is read again; None if it is not.

    Args:
        lengths: the lengths at which the model's frequencies change.
        held: what RotaryLengths.held() says of the cache.
        past_tokens: tokens of the cache; 0 if it is empty.
        prompt_tokens: tokens of the whole prompt, with those of the cache.
        longest_tokens: tokens of the longest context that can be reached.
    """
    needed = lengths.normalized(prompt_tokens)
    if past_tokens and held != needed:
        return (
            f"the {past_tokens:,} tokens are read again for each answer: the model's rotary frequencies depend on the "
            f"length of the context, which has {prompt_tokens:,} tokens with the question"
        )
    limit = lengths.limit(prompt_tokens)
    if lengths.grows_beyond is not None or limit is None or longest_tokens <= limit:
        return None
    return (
        f"the rotary frequencies of the model change beyond {limit:,} tokens of context: if the answer gets there, all "
        "tokens are read again"
    )


@dataclass(frozen=True)
class RotaryPass:
    """The frequencies of a forward pass.

    Attributes:
        tokens: the length of the context that has them; None if the model's frequencies do not depend on it.
        held: the normalized length whose frequencies all tokens of the cache have after the pass, or MIXED.
        min_tokens: the length whose frequencies shorter contexts of the cache have as well; 0 if there is none.
        rereads: whether the pass has all tokens of the context, so that the cache must be emptied first.
    """

    tokens: int | None = None
    held: int = 0
    min_tokens: int = 0
    rereads: bool = False


class RotaryControl:
    """Gives the forward passes of one model the rotary frequencies of the length that their context has.

    Args:
        model: the model. Hooks are registered on its rotary modules if their frequencies depend on the length.

    Attributes:
        lengths: the lengths at which the frequencies change.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.lengths = RotaryLengths.from_config(model.config)
        self._tokens: int | None = None  # of the pass that is running
        self._longest_tokens = 0  # of the generate() that is running
        self._is_assisted = False
        self._hooks: list[Any] = []
        if self.lengths:
            for module in model.modules():
                if _depends_on_length(module):
                    self._hooks.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
                    self._hooks.append(module.register_forward_hook(self._after, with_kwargs=True))

    def remove(self) -> None:
        """Remove the hooks from the model."""
        for hook in self._hooks:
            hook.remove()

    # -- generate() ------------------------------------------------------------------------------------------

    def begin_generation(self, longest_tokens: int, *, is_assisted: bool) -> None:
        """Note what a generate() may reach.

        Args:
            longest_tokens: the longest context that it can reach.
            is_assisted: whether its passes check several guessed tokens at once.
        """
        self._longest_tokens = longest_tokens
        self._is_assisted = is_assisted

    def wrap(self, prepare: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
        """Wrap prepare_inputs_for_generation() of the model, which makes the arguments of each pass of generate()."""

        @functools.wraps(prepare)
        def prepare_inputs(
            input_ids: torch.Tensor, next_sequence_length: int | None = None, **kwargs: Any
        ) -> dict[str, Any]:
            cache = kwargs.get("past_key_values")
            if not isinstance(cache, HeadCache):
                return prepare(input_ids, next_sequence_length=next_sequence_length, **kwargs)
            past_tokens = cache.get_seq_length()
            if next_sequence_length is None and self._is_assisted and past_tokens:
                # transformers' assisted decoding would read the tokens of the cache again.
                next_sequence_length = input_ids.shape[1] - past_tokens
            inputs = _inputs_with_cache(prepare, input_ids, next_sequence_length, kwargs)
            if not self.lengths:
                return inputs
            change = self._change(inputs, input_ids, cache, is_first=bool(kwargs.get("is_first_iteration")))
            if change == _REREAD:
                inputs = _inputs_with_cache(prepare, input_ids, None, kwargs)
            return inputs | {_CHANGE: change}

        return prepare_inputs

    def _change(self, inputs: dict[str, Any], input_ids: torch.Tensor, cache: HeadCache, *, is_first: bool) -> str:
        """Return what the next pass of generate() does about the frequencies: nothing (""), _REREAD or _GROW.

        Raises:
            UnsupportedError: the generation needs the ids of tokens that it was not given, or its guesses would cross a
                length at which the frequencies change.
        """
        past_tokens = cache.get_seq_length()
        end = number_of_positions(inputs, past_tokens)
        needed = self._needed(end, cache)
        changes_later = self._needed(max(self._longest_tokens, end), cache) != needed
        has_all_ids = input_ids.shape[1] >= past_tokens + number_of_tokens(inputs)
        if is_first and changes_later and self._is_assisted:
            raise UnsupportedError(
                "guesses cannot cross a length at which the model's rotary frequencies change: use neither prompt "
                f"lookup nor a draft model, or {self._how_to_stay(end)}"
            )
        if is_first and changes_later and not has_all_ids and self.lengths.grows_beyond is None:
            raise UnsupportedError(
                "the model's rotary frequencies change within this generation, which then must read its context again, "
                f"but it was not given the ids of all tokens: pass them, or {self._how_to_stay(end)}"
            )
        if not past_tokens or self._held(cache) == needed:
            return ""
        grows_beyond = self.lengths.grows_beyond
        if not is_first and grows_beyond is not None and needed == end > grows_beyond:
            return _GROW
        if not has_all_ids:
            raise UnsupportedError(
                f"the {past_tokens:,} tokens of the cache have the rotary frequencies of another length than the "
                "context has now, and must be read again: pass the ids of all tokens"
            )
        return _REREAD

    def _how_to_stay(self, end: int) -> str:
        """Return what a user can do so that the frequencies do not change."""
        limit = self.lengths.limit(end)
        shorter = f"stay within {limit:,} tokens, or " if limit is not None else ""
        return f"{shorter}give enable() or the HeadCache expected_tokens={self._longest_tokens}"

    # -- forward passes --------------------------------------------------------------------------------------

    def next_pass(self, inputs: dict[str, Any], cache: HeadCache) -> RotaryPass:
        """Choose the frequencies of a forward pass.

        Args:
            inputs: the arguments of the pass by name. What prepare_inputs() noted is removed from them.
            cache: the cache.

        Raises:
            StateError: the tokens of the cache have the frequencies of another length than the pass needs.
        """
        change = inputs.pop(_CHANGE, "")
        if not self.lengths:
            return RotaryPass()
        past_tokens = cache.get_seq_length()
        end = number_of_positions(inputs, past_tokens)
        needed = self._needed(end, cache)
        if change == _GROW:
            return RotaryPass(end, MIXED, _min_tokens(cache))
        if change == _REREAD:
            warnings.warn(
                f"{past_tokens:,} tokens are read again, since the model's rotary frequencies depend on the length of "
                f"the context, which has {end:,} tokens now",
                RereadWarning,
                stacklevel=stacklevel_of_user(),
            )
        elif past_tokens and self._held(cache) != needed:
            raise StateError(
                f"the model's rotary frequencies depend on the length of the context, and the {past_tokens:,} tokens "
                f"of the cache have those of another length than {end:,} tokens: make the cache with expected_tokens="
                f"{end} or more, or use generate() with the ids of all tokens, which reads them again"
            )
        return RotaryPass(needed, needed, _min_tokens(cache), rereads=change == _REREAD)

    @contextmanager
    def frequencies(self, chosen: RotaryPass, cache: HeadCache) -> Iterator[bool]:
        """Use the frequencies that next_pass() chose within the block, and note them in the cache.

        Yields:
            Whether anything was noted.
        """
        if chosen.tokens is None:
            yield False
            return
        layer = cache.head_layers[0]
        if chosen.min_tokens:
            layer.rotary_min_tokens = chosen.min_tokens
        layer.rotary_tokens = chosen.held
        self._tokens = chosen.tokens
        try:
            yield True
        finally:
            self._tokens = None

    def _needed(self, end: int, cache: HeadCache) -> int:
        """Return the normalized length whose frequencies a pass needs that ends a context of `end` tokens."""
        return self.lengths.normalized(max(end, _min_tokens(cache)))

    def _held(self, cache: HeadCache) -> int:
        """Return the normalized length whose frequencies the tokens of a cache have, or MIXED."""
        return self.lengths.held(cache.head_layers[0].rotary_tokens, cache.get_seq_length())

    # -- the model's rotary modules --------------------------------------------------------------------------

    def _before(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Append the last position of the context, by which the module chooses its frequencies."""
        if self._tokens is None:
            return None
        x, positions, layer_type = _rotary_arguments(*args, **kwargs)
        self._forget(module, x, layer_type)
        last = torch.full_like(positions[..., :1], self._tokens - 1)
        return (x, torch.cat([positions, last], dim=-1), *layer_type), {}

    def _after(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Remove the results of the position that was appended."""
        if self._tokens is None:
            return None
        x, _, layer_type = _rotary_arguments(*args, **kwargs)
        self._forget(module, x, layer_type)
        if isinstance(output, torch.Tensor):
            return output[..., :-1, :]
        return tuple(part[..., :-1, :] for part in output)

    def _forget(self, module: torch.nn.Module, x: torch.Tensor, layer_type: tuple[str, ...]) -> None:
        """Let a dynamic NTK module forget the longest context that it has seen, whose frequencies it would keep."""
        if self.lengths.grows_beyond is not None:
            module.forward(x[:1, :1], torch.zeros(1, 1, dtype=torch.long, device=x.device), *layer_type)


def keeps_frequencies(lengths: RotaryLengths, cache: HeadCache, new_tokens: int) -> bool:
    """Return whether all passes up to `new_tokens` more tokens have the frequencies of the tokens in a cache."""
    past_tokens = cache.get_seq_length()
    first, last = (lengths.normalized(max(past_tokens + new, _min_tokens(cache))) for new in (1, new_tokens))
    held = lengths.held(cache.head_layers[0].rotary_tokens, past_tokens) if past_tokens and lengths else first
    return held == first == last


def _min_tokens(cache: HeadCache) -> int:
    """Return the length whose frequencies shorter contexts of a cache have as well; 0 if there is none."""
    return cache.head_layers[0].rotary_min_tokens if cache.get_seq_length() else cache.rotary_min_tokens


def _depends_on_length(module: torch.nn.Module) -> bool:
    """Return whether a module computes rotary embeddings with frequencies that depend on the length."""
    kinds = getattr(module, "rope_type", None)
    names = kinds.values() if isinstance(kinds, dict) else [kinds]
    return any(isinstance(name, str) and (name == "longrope" or "dynamic" in name) for name in names)


def _rotary_arguments(
    x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None
) -> tuple[torch.Tensor, torch.Tensor, tuple[str, ...]]:
    """Return the arguments of a rotary module: the last one, if it was given, in a tuple."""
    return x, position_ids, () if layer_type is None else (layer_type,)


def _inputs_with_cache(
    prepare: Callable[..., dict[str, Any]],
    input_ids: torch.Tensor,
    next_sequence_length: int | None,
    kwargs: dict[str, Any],
) -> dict[str, Any]:
    """Prepare the inputs of a pass, and keep the cache in them.

    Phi-3's own method drops the cache at the model's original length. The model would then make one of transformers'
    own, and the HeadCache would no longer be used.
    """
    cache = kwargs["past_key_values"]
    inputs = prepare(input_ids, next_sequence_length=next_sequence_length, **kwargs)
    if inputs.get("past_key_values") is not cache:
        inputs = prepare(input_ids, next_sequence_length=next_sequence_length, **kwargs | {"past_key_values": None})
    return inputs | {"past_key_values": cache}
