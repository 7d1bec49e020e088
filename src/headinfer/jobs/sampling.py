"""How the tokens of an answer are chosen and where the answer ends: the same options in every job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from headinfer.errors import UsageError
from headinfer.plan.guesses import Guesses

__all__ = ["Sampling"]


@dataclass(frozen=True)
class Sampling:
    """Options of decoding. What is None is as in the model's generation config.

    Attributes:
        temperature: 0 decodes greedily. A value above 0 samples.
        top_k: sample from the k most likely tokens.
        top_p: sample from the fewest tokens whose probabilities sum to p.
        min_p: sample from the tokens that are at least min_p times as likely as the most likely one.
        repetition_penalty: a value above 1 discourages repetition.
        stop: texts that end an answer. They are not part of it.
        ignore_eos: whether the tokens that end an answer are never chosen.
        seed: the seed of sampling, of each answer.
        guesses: how many guessed tokens a pass verifies; see `headinfer.enable()`.
        draft: where a draft model is, which guesses in place of the text before; None for none.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop: Sequence[str] = ()
    ignore_eos: bool = False
    seed: int = 0
    guesses: Guesses = "auto"
    draft: str | None = None

    def check(self, *, is_together: bool = False) -> None:
        """Check what does not depend on the model.

        Args:
            is_together: whether several questions are answered together.

        Raises:
            UsageError: an option needs another one or excludes it, or a stop string is empty.
        """
        chosen = {"--top-k": self.top_k, "--top-p": self.top_p, "--min-p": self.min_p}
        useless = [name for name, value in chosen.items() if value is not None]
        if useless and not self.temperature:
            verb = "chooses" if len(useless) == 1 else "choose"
            raise UsageError(f"{' and '.join(useless)} {verb} among samples: give --temperature above 0 as well")
        if self.draft is not None and self.guesses != "auto":
            raise UsageError("--draft guesses with a model, and --guesses from the text before: give one of them")
        if self.draft is not None and is_together:
            raise UsageError(
                "--draft guesses for one question at a time, and several questions are answered together: leave it "
                "out, or ask one question at a time"
            )
        if "" in self.stop:
            raise UsageError("--stop is empty: give the text that ends an answer")

    def arguments(
        self,
        tokenizer: Any,
        *,
        prompt_tokens: int,
        max_new_tokens: int,
        ends: Sequence[Any] = (),
        answered_tokens: int = 0,
    ) -> dict[str, Any]:
        """Return the arguments of transformers' generate().

        Args:
            tokenizer: the model's tokenizer.
            prompt_tokens: tokens of a row of the prompt, padding included.
            max_new_tokens: tokens of an answer, at most.
            ends: further stopping criteria of transformers.
            answered_tokens: tokens at the end of the prompt that belong to the answer already.
        """
        from headinfer.jobs.answer_text import StopCriterion  # loads transformers, and the command line imports this

        wanted: dict[str, Any] = {
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "temperature": self.temperature or None,
            "min_new_tokens": max_new_tokens if self.ignore_eos else None,
        }
        given = {name: value for name, value in wanted.items() if value is not None}
        criteria = [StopCriterion(tokenizer, self.stop, prompt_tokens)] if self.stop else []
        if criteria or ends:
            given["stopping_criteria"] = [*criteria, *ends]
        if self.temperature:
            given |= {"sampling_seed": self.seed, "sampling_position": answered_tokens}
        return {**given, "do_sample": self.temperature > 0, "max_new_tokens": max_new_tokens}
