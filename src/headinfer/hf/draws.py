"""Sampling whose random numbers depend on a seed and on the position in the answer, and on nothing else.

transformers draws from torch's generator, whose state depends on all draws before. The same question would then get
another answer in a batch, or if guesses are verified. Here the number for the n-th token of an answer is a hash of the
seed and n, and the token is the one at that quantile of the model's distribution.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import torch

from headinfer.hf.compat import LogitsProcessor, PreTrainedModel
from headinfer.utils.values import whole_number

__all__ = ["DrawControl", "Draws"]


class Draws(LogitsProcessor):  # type: ignore[misc]
    """Chooses the token of each row: all others get the score -inf.

    It must come behind all processors that change the distribution.

    Args:
        seed: the seed.
        prompt_tokens: tokens of each row before its answer.
        sequences: so many rows that follow each other continue one prompt, with different numbers.
    """

    def __init__(self, seed: int, prompt_tokens: int, sequences: int = 1) -> None:
        self._seed = seed
        self._prompt_tokens = prompt_tokens
        self._sequences = sequences

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return scores [B, V] for the token behind input_ids [B, T] that leave one token of each row."""
        position = input_ids.shape[1] - self._prompt_tokens
        numbers = [self._number(row % self._sequences, position) for row in range(scores.shape[0])]
        sums = scores.double().softmax(dim=-1).cumsum(dim=-1)
        quantiles = torch.tensor(numbers, dtype=sums.dtype, device=sums.device)[:, None] * sums[:, -1:]
        # The first token whose sum exceeds the quantile, so that a token without probability is never chosen.
        chosen = torch.searchsorted(sums, quantiles, right=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)

    def _number(self, sequence: int, position: int) -> float:
        """Return a number in [0, 1)."""
        return random.Random(f"{self._seed} {sequence} {position}").random()


class DrawControl:
    """Gives the generate() of one model the arguments `sampling_seed` and `sampling_position`.

    The position is the number of tokens at the end of the prompt that belong to the answer already, so that an answer
    which several calls generate is the same as that of one call.

    Args:
        model: the model. Its method that makes the logits processors is replaced.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._seed: int | None = None
        self._position = 0
        model._get_logits_processor = self._wrap(model._get_logits_processor)

    def begin(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Take the arguments `sampling_seed` and `sampling_position` of a generate().

        Returns:
            The other arguments.
        """
        seed = kwargs.pop("sampling_seed", None)
        self._seed = None if seed is None else whole_number(seed, "sampling_seed", low=0, high=2**63 - 1)
        self._position = whole_number(kwargs.pop("sampling_position", 0), "sampling_position", low=0)
        return kwargs

    def _wrap(self, make: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(make)
        def make_with_draws(*args: Any, **kwargs: Any) -> Any:
            processors = make(*args, **kwargs)
            config = kwargs["generation_config"]
            if self._seed is not None and config.do_sample:
                sequences = config.num_return_sequences or 1
                prompt_tokens = kwargs["input_ids_seq_length"] - self._position
                processors.append(Draws(self._seed, prompt_tokens, sequences))
            return processors

        return make_with_draws
