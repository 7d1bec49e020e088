"""Guesses in generate(): prompt lookup, by default if it pays, with the verification of transformers.

A pass verifies what followed the newest tokens when they occurred before, and keeps what the model would have written
itself. Greedy tokens are those without guesses, up to the rounding of other shapes. Sampling keeps its distribution:
each position is sampled from the model's own probabilities, and a guess is accepted if it is the sampled token.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from headinfer.hf.compat import (
    CandidateGenerator,
    EosTokenCriteria,
    LinearAttentionCacheLayerMixin,
    MaxLengthCriteria,
    MaxTimeCriteria,
    PreTrainedModel,
    StopStringCriteria,
    after_prompt,
    default_layers,
)
from headinfer.hf.ngrams import KEY_TOKENS, NgramIndex
from headinfer.hf.rotary import RotaryLengths
from headinfer.plan.guesses import MOST_GUESSES, Guesses, best_width

__all__ = ["Ends", "GuessControl", "GuessCounts", "PromptLookup"]

# For matches of at least so many tokens, how likely a guess is right before any has been verified.
_FIRST_CHANCES = {KEY_TOKENS: 0.5, 6: 0.7, 12: 0.85, 24: 0.95}
_FIRST_WEIGHT = 4  # guesses that this estimate counts as
_MEMORY = 0.97  # the weight of what was verified falls by this factor with each pass, so that guesses are tried again


@dataclass
class GuessCounts:
    """What guesses did in a generate().

    Attributes:
        passes: forward passes, each of which gave at least one token.
        guessed: guesses that were verified.
        accepted: guesses that were right.
    """

    passes: int = 0
    guessed: int = 0
    accepted: int = 0

    @property
    def tokens_per_pass(self) -> float | None:
        """Tokens that a pass gave on average; None without a pass."""
        return (self.passes + self.accepted) / self.passes if self.passes else None

    @property
    def accepted_share(self) -> float | None:
        """The share of the guesses that were right; None if there were none."""
        return self.accepted / self.guessed if self.guessed else None


class _Chances:
    """How likely guesses are right, by the length of the match that they follow, from what was verified so far."""

    def __init__(self) -> None:
        self._right = dict.fromkeys(_FIRST_CHANCES, 0.0)
        self._verified = dict.fromkeys(_FIRST_CHANCES, 0.0)

    def chance(self, match_tokens: int) -> float:
        """Return how likely the next guess is right, if those before it are."""
        kind = self._kind(match_tokens)
        first = _FIRST_CHANCES[kind] * _FIRST_WEIGHT
        return (first + self._right[kind]) / (_FIRST_WEIGHT + self._verified[kind])

    def note(self, match_tokens: int, guesses: int, right: int) -> None:
        """Note how many of the guesses of a pass were right, in their order. Later ones than the first wrong one do
        not count."""
        for length in _FIRST_CHANCES:
            self._right[length] *= _MEMORY
            self._verified[length] *= _MEMORY
        kind = self._kind(match_tokens)
        self._right[kind] += right
        self._verified[kind] += min(right + 1, guesses)

    def _kind(self, match_tokens: int) -> int:
        return max(length for length in _FIRST_CHANCES if length <= match_tokens)


class Ends:
    """How an answer ends: by a token, or by the text of its last tokens.

    Args:
        criteria: the stopping criteria of a generate(). Others than these two kinds are left out.
    """

    def __init__(self, criteria: Iterable[Callable[..., Any]] = ()) -> None:
        self._tokens: set[int] = set()
        self._texts: list[Callable[..., Any]] = []
        for criterion in criteria:
            if isinstance(criterion, EosTokenCriteria):
                self._tokens.update(criterion.eos_token_id.flatten().tolist())
            elif isinstance(criterion, StopStringCriteria):
                self._texts.append(criterion)

    def before_end(self, ids: torch.Tensor, newest: Sequence[int]) -> int:
        """Return how many of the newest tokens of a text come before the first one that ends it.

        Args:
            ids: token ids [1, T].
            newest: the last of them.
        """
        first = ids.shape[1] - len(newest)
        for count, token in enumerate(newest):
            text = ids[:, : first + count + 1]
            if token in self._tokens or any(bool(torch.all(criterion(text, None))) for criterion in self._texts):
                return count
        return len(newest)


class PromptLookup(CandidateGenerator):  # type: ignore[misc]
    """Guesses by prompt lookup in an index of the text, for transformers' assisted decoding.

    The number of guesses depends on the tokens and on `costs` alone, so the same options give the same passes.

    Args:
        held_tokens: returns how many tokens the cache holds.
        most: guesses of a pass, at most.
        costs: the seconds of a pass with 0, 1, 2 ... guesses, in units of those without guesses; the number of guesses
            is then the one that is expected to give the most tokens per second. None always takes `most`.
        ends: how an answer ends. Guesses from the first one on that ends it are left out, so that only the last token
            of a pass can end the answer.
        max_length: the most tokens of the prompt and the answer.
        counts: counts passes and guesses.
    """

    requires_model_outputs = False  # some versions of transformers read it

    def __init__(
        self,
        held_tokens: Callable[[], int],
        *,
        most: int,
        costs: Sequence[float] | None,
        ends: Ends,
        max_length: int,
        counts: GuessCounts,
    ) -> None:
        self._held_tokens = held_tokens
        self._most = most
        self._costs = costs
        self._ends = ends
        self._max_length = max_length
        self._counts = counts
        self._index: NgramIndex | None = None
        self._chances = _Chances()
        self._match_tokens = 0
        self._guesses = 0

    def get_candidates(self, input_ids: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        """Return input_ids [1, T] with guesses behind them: [1, T + n].

        The pass that reads the prompt has no guesses.
        """
        self._counts.passes += 1
        self._guesses = 0
        tokens = input_ids.shape[1]
        most = min(self._most, self._max_length - tokens - 1)  # a pass gives one token more than guesses
        if most < 1 or self._held_tokens() < tokens - 1:
            return input_ids, None
        self._match_tokens, guessed = self._updated_index(input_ids).continuation(most)
        if not guessed:
            return input_ids, None
        if self._costs is not None:
            guessed = guessed[: best_width(self._costs[: most + 1], self._chances.chance(self._match_tokens))]
        new_ids = torch.tensor([guessed], dtype=input_ids.dtype, device=input_ids.device)
        candidates = torch.cat([input_ids, new_ids], dim=1)
        self._guesses = self._ends.before_end(candidates, guessed)
        self._counts.guessed += self._guesses
        return candidates[:, : tokens + self._guesses], None

    def update_candidate_strategy(self, input_ids: torch.Tensor, scores: torch.Tensor, num_matches: Any) -> None:
        """Note how many guesses of the last pass were right."""
        right = int(num_matches)
        self._counts.accepted += right
        if self._guesses:
            self._chances.note(self._match_tokens, self._guesses, right)

    def _updated_index(self, input_ids: torch.Tensor) -> NgramIndex:
        """Return the index of all of input_ids [1, T]."""
        if self._index is None:
            self._index = NgramIndex(input_ids[0])
        else:
            self._index.append(input_ids[0, len(self._index) :].tolist())
        return self._index


class _Counted(CandidateGenerator):  # type: ignore[misc]
    """Counts the guesses of another generator, such as that of a draft model."""

    def __init__(self, generator: Any, counts: GuessCounts) -> None:
        self._generator = generator
        self._counts = counts
        self.requires_model_outputs = getattr(generator, "requires_model_outputs", False)

    def get_candidates(self, input_ids: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        """Return what the other generator returns."""
        candidates: torch.Tensor
        candidates, logits = self._generator.get_candidates(input_ids, **kwargs)
        self._counts.passes += 1
        self._counts.guessed += candidates.shape[1] - input_ids.shape[1]
        return candidates, logits

    def update_candidate_strategy(self, input_ids: torch.Tensor, scores: torch.Tensor, num_matches: Any) -> None:
        """Note how many guesses of the last pass were right."""
        self._counts.accepted += int(num_matches)
        self._generator.update_candidate_strategy(input_ids, scores, num_matches)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._generator, name)


class GuessControl:
    """Adds prompt lookup to calls of generate() that it can serve exactly.

    Args:
        model: the model. Its methods that make stopping criteria and candidates are replaced.
        guesses: the option.
        costs_of: returns, for the cache of a generate() and the most tokens that it will hold, `Plan.guess_costs`; None
            if there is no plan, and then "auto" makes no guesses.

    Attributes:
        counts: what the guesses of the last generate() did.
        off_reason: why the last generate() could not use guesses; empty if it could, or if the option is "off".
    """

    def __init__(
        self, model: PreTrainedModel, guesses: Guesses, costs_of: Callable[[Any, int], Sequence[float] | None]
    ) -> None:
        self.guesses = guesses
        self.counts = GuessCounts()
        self.off_reason = ""
        self._model = model
        self._costs_of = costs_of
        self._is_on = False
        self._prompt_tokens = 0
        self._ends = Ends()
        model._get_stopping_criteria = self._noting_criteria(model._get_stopping_criteria)
        model._get_candidate_generator = self._making_guesses(model._get_candidate_generator)
        self._always_off = ""
        if RotaryLengths.from_config(model.config):
            self._always_off = "the model's rotary frequencies depend on the length of the context"
        elif guesses == "auto" and (getattr(model, "tp_size", None) or 1) > 1:
            # Each process would choose by its own plan.
            self._always_off = "several processes share the model: give the number of guesses, which is then the same"
        elif any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in default_layers(model.config)):
            self._always_off = "the model's linear-attention layers cannot remove guesses that are wrong"

    def begin(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Decide whether a generate() uses guesses.

        Args:
            given: the arguments of generate() by name.

        Returns:
            The arguments that switch transformers' assisted decoding on; empty if it stays off.
        """
        self.counts = GuessCounts()
        self._is_on = False
        self.off_reason = ""
        ids = given.get("input_ids")
        self._prompt_tokens = ids.shape[1] if isinstance(ids, torch.Tensor) and ids.dim() == 2 else 0
        if self.guesses == "off":
            return {}
        self.off_reason = self._always_off or _off_reason(self._model, given)
        if self.off_reason:
            return {}
        self._is_on = True
        config = given.get("generation_config")
        if config is None:
            return {"prompt_lookup_num_tokens": MOST_GUESSES}
        config = copy.deepcopy(config)
        config.prompt_lookup_num_tokens = MOST_GUESSES
        return {"generation_config": config}

    @property
    def is_on(self) -> bool:
        """Whether the generate() that is running uses these guesses."""
        return self._is_on

    def _noting_criteria(self, make: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the method of the model that makes the stopping criteria of a generate(), and note them."""

        @functools.wraps(make)
        def make_and_note(*args: Any, **kwargs: Any) -> Any:
            criteria = make(*args, **kwargs)
            self._ends = Ends(criteria)
            return after_prompt(criteria, self._prompt_tokens)

        return make_and_note

    def _making_guesses(self, make: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the method of the model that makes the candidates of transformers' assisted decoding."""

        @functools.wraps(make)
        def make_ours(*args: Any, **kwargs: Any) -> Any:
            if not self._is_on:
                return _Counted(make(*args, **kwargs), self.counts)
            cache = kwargs["model_kwargs"]["past_key_values"]
            max_length = kwargs["generation_config"].max_length
            costs = self._costs_of(cache, max_length - 1) if self.guesses == "auto" else None
            most = self.guesses if isinstance(self.guesses, int) else len(costs or [0]) - 1
            return PromptLookup(
                cache.get_seq_length,
                most=most,
                costs=costs,
                ends=self._ends,
                max_length=max_length,
                counts=self.counts,
            )

        return make_ours


def _off_reason(model: PreTrainedModel, given: Mapping[str, Any]) -> str:
    """Return why guesses cannot serve a generate() with these arguments; empty if they can."""
    configs = [given.get("generation_config"), model.generation_config]

    def setting(name: str) -> Any:
        values = [given.get(name), *(getattr(config, name, None) for config in configs)]
        return next((value for value in values if value is not None), None)

    ids = given.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2:
        return "guesses need the ids of the prompt"
    if ids.shape[0] > 1:
        return "a batch is decoded without guesses"
    if max(setting("num_beams") or 1, setting("num_return_sequences") or 1) > 1:
        return "beams and several sequences are decoded without guesses"
    mask = given.get("attention_mask")
    if mask is not None and mask.shape[-1] != ids.shape[1]:
        return "guesses need the ids of all tokens of the cache"
    if setting("use_cache") is False:
        return "guesses need a cache"
    names = ("assistant_early_exit", "constraints", "force_words_ids", "penalty_alpha", "prompt_lookup_num_tokens")
    if any(setting(name) for name in (*names, "use_mtp", "dola_layers")) or given.get("assistant_model") is not None:
        return "the call asks for another way of decoding"
    if setting("return_dict_in_generate") or given.get("custom_generate") is not None:
        return "the call asks for the outputs of each step"
    criteria = given.get("stopping_criteria") or ()
    known = (EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria, StopStringCriteria)
    if not all(isinstance(one, known) or getattr(one, "takes_several_tokens", False) for one in criteria):
        return "a stopping criterion of the call may need to see each token"
    return ""
