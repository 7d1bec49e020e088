"""Answers several questions together: batches that read what precedes the questions once for all of them."""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from headinfer.attention import native
from headinfer.errors import UsageError
from headinfer.hf.batch import BatchQuestion, answer_batch, plan_batches
from headinfer.hf.cache import HeadCache
from headinfer.hf.compat import last_logits_only
from headinfer.hf.enable import Enabled, enable
from headinfer.hf.rotary import RotaryLengths, keeps_frequencies
from headinfer.jobs.generate import Prepared, Streamer, Summary, already_warned, load
from headinfer.jobs.prompts import pad_id
from headinfer.jobs.sampling import Sampling
from headinfer.utils.files import read_text
from headinfer.utils.values import shown

__all__ = ["GivenQuestion", "Together", "answer_together", "generate_together", "read_questions"]

_LEAST_COMMON_TOKENS = 128  # a shorter beginning that questions have in common is read with each of them


@dataclass(frozen=True)
class GivenQuestion:
    """A question of a file.

    Attributes:
        text: the question.
        facts: the other fields of its JSON object, which the output repeats.
    """

    text: str
    facts: dict[str, Any] = field(default_factory=dict)


def read_questions(path: Path) -> list[GivenQuestion]:
    """Read a file of questions: one in each line, or, in JSON Lines, an object with the field "question".

    Args:
        path: the file; `-` is standard input. It has JSON Lines if its name ends with .jsonl, or if its first line is a
            JSON object.

    Raises:
        UsageError: the file cannot be read, has no question, or a line of it is invalid.
    """
    name = "standard input" if str(path) == "-" else str(path)
    lines = [(number, line.strip()) for number, line in enumerate(read_text(path).splitlines(), 1) if line.strip()]
    if not lines:
        raise UsageError(f"{name} has no question: write one in each line")
    if path.suffix != ".jsonl" and not isinstance(_json(lines[0][1]), dict):
        return [GivenQuestion(line) for _, line in lines]
    taken = {one.name for one in dataclasses.fields(Summary)}
    questions = []
    for number, line in lines:
        found = _json(line)
        text = found.get("question") if isinstance(found, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise UsageError(f'line {number} of {name} must be a JSON object with a text as "question": {shown(line)}')
        facts = {key: value for key, value in found.items() if key != "question"}
        if taken & facts.keys():
            clash = min(taken & facts.keys())
            raise UsageError(f'line {number} of {name} has the field "{clash}", which answers have too: rename it')
        questions.append(GivenQuestion(text, facts))
    return questions


def _json(line: str) -> Any:
    """Return the value of a line of JSON; None if it is none."""
    try:
        return json.loads(line)
    except ValueError:
        return None


@dataclass(frozen=True)
class Together:
    """What answer_together() is given.

    Attributes:
        enabled: the enabled model.
        tokenizer: its tokenizer.
        sampling: how tokens are chosen.
        max_new_tokens: tokens of an answer, at most.
        on_text: called with each answer and a newline when it and those before it are complete.
        on_done: called with the number of complete answers whenever one is complete.
        on_note: called with a line if not all questions are in one batch.
    """

    enabled: Enabled
    tokenizer: Any
    sampling: Sampling
    max_new_tokens: int
    on_text: Callable[[str], None] = lambda text: None
    on_done: Callable[[int], None] = lambda answers: None
    on_note: Callable[[str], None] = lambda line: None


def answer_together(
    job: Together, cache: HeadCache, ids: torch.Tensor, questions: Sequence[Sequence[int]], summaries: Sequence[Summary]
) -> None:
    """Answer questions in batches. The cache does not change. Ctrl-C ends the job.

    Args:
        job: how to answer.
        cache: holds what precedes the questions, in one row, or nothing.
        ids: the token ids [1, T] of what it holds, int64.
        questions: the token ids of each question.
        summaries: get the tokens, times and bytes of each answer, from the beginning of its batch.
    """
    answers = _Answers(job, cache, summaries)
    try:
        with _Beginning(job, cache, ids, questions) as begun:
            _ask(job, begun, questions, answers)
    except KeyboardInterrupt:
        answers.interrupt()
    for summary in summaries:
        summary.guesses_off_reason = job.enabled.guesses_off_reason


def generate_together(
    prepared: Prepared,
    *,
    on_text: Callable[[str], None],
    on_forward: Callable[[HeadCache], None] | None = None,
    on_done: Callable[[int], None] = lambda answers: None,
    on_note: Callable[[str], None] = lambda line: None,
) -> list[Summary]:
    """Load the model, read what all prompts of a job begin with, and answer them together.

    Args:
        prepared: the job.
        on_text: called with each answer and a newline, in the order of the prompts.
        on_forward: called with the cache after each chunk and each token.
        on_done: called with the number of complete answers.
        on_note: called with a line if not all prompts are in one batch.

    Returns:
        A summary for each prompt. Ctrl-C sets `interrupted` in those that are not complete.
    """
    job = prepared.job
    run_plan = prepared.run_plan
    model = load(prepared)
    options = dataclasses.replace(run_plan.options, expected_tokens=prepared.input_ids.shape[1] + job.max_new_tokens)
    cache = HeadCache(model.config, **vars(options))
    cache.rotary_min_tokens = job.options.expected_tokens
    summaries = []
    for ids in prepared.prompts:
        summary = Summary(job.model, tokens_in=len(ids), warnings=prepared.warnings, plan=run_plan.plan.as_dict())
        summary.options = options.as_dict() | {"chunk_tokens": run_plan.chunk_tokens}
        if prepared.device == "cpu":
            summary.kernel_failure = native.unavailable_reason(model.dtype)
        summaries.append(summary)

    def after_forward(cache: HeadCache) -> None:
        for summary in summaries:
            summary.tokens_read = max(summary.tokens_read, min(cache.get_seq_length(), summary.tokens_in))
        if on_forward is not None:
            on_forward(cache)

    with (
        already_warned(),
        torch.inference_mode(),
        enable(
            model,
            chunk_tokens=run_plan.chunk_tokens,
            on_forward=after_forward,
            guesses=job.sampling.guesses,
            **vars(run_plan.options),
        ) as enabled,
    ):
        together = Together(enabled, prepared.tokenizer, job.sampling, job.max_new_tokens, on_text, on_done, on_note)
        nothing = torch.zeros(1, 0, dtype=torch.long)
        answer_together(together, cache, nothing, prepared.prompts, summaries)
    return summaries


def _ask(job: Together, begun: _Beginning, questions: Sequence[Sequence[int]], answers: _Answers) -> None:
    asked = [
        BatchQuestion(question[begun.common :], job.max_new_tokens, streamer=streamer)
        for question, streamer in zip(questions, answers.streamers, strict=True)
    ]
    batches = plan_batches(job.enabled, begun.cache, asked)
    if len(batches) > 1:
        sizes = ", ".join(str(len(batch)) for batch in batches)
        job.on_note(
            f"{len(asked)} questions are answered in {len(batches)} batches ({sizes}), as their lengths and the memory "
            "allow"
        )
    for batch in batches:
        answers.begin()
        longest = max(len(question.ids) for _, question in batch)
        sampling = job.sampling.arguments(
            job.tokenizer, prompt_tokens=begun.ids.shape[1] + longest, max_new_tokens=job.max_new_tokens
        )
        answer_batch(
            job.enabled.model,
            begun.cache,
            begun.ids,
            [question for _, question in batch],
            tokenizer=job.tokenizer,  # for stop_strings in the model's generation config
            pad_token_id=pad_id(job.tokenizer),
            **sampling,
        )


class _Beginning:
    """Reads the beginning that all questions have in common, such as a document that precedes each, once for all.

    Attributes:
        cache: holds it, behind what the given cache holds.
        ids: the token ids [1, T] of what that cache holds.
        common: how many tokens of each question it holds.
    """

    def __init__(self, job: Together, cache: HeadCache, ids: torch.Tensor, questions: Sequence[Sequence[int]]) -> None:
        self.cache = cache
        self.ids = ids
        self.common = 0
        self._given = cache
        self._model = job.enabled.model
        common = _common_tokens(questions)
        longest = max(map(len, questions)) + job.max_new_tokens
        lengths = RotaryLengths.from_config(self._model.config)
        if common >= _LEAST_COMMON_TOKENS and keeps_frequencies(lengths, cache, longest):
            self.common = common
            beginning = torch.tensor([questions[0][:common]], dtype=torch.long)
            self.ids = torch.cat([ids, beginning], dim=1)
            self.cache = cache.fork()

    def __enter__(self) -> _Beginning:
        if self.common:
            new_ids = self.ids[:, self.ids.shape[1] - self.common :].to(self._model.device)
            self._model(new_ids, past_key_values=self.cache, use_cache=True, **last_logits_only(self._model))
        return self

    def __exit__(self, *error: object) -> None:
        if self.cache is not self._given:
            self.cache.reset()


def _common_tokens(questions: Sequence[Sequence[int]]) -> int:
    """Return with how many equal tokens all questions begin. One token of each question at least is left out."""
    common = 0
    for tokens in zip(*(question[:-1] for question in questions), strict=False):
        if len(set(tokens)) > 1:
            break
        common += 1
    return common


class _Answers:
    """Collects answers that end in any order, and passes them on in the order of the questions."""

    def __init__(self, job: Together, cache: HeadCache, summaries: Sequence[Summary]) -> None:
        self._job = job
        self._cache = cache
        self._summaries = summaries
        self._start = time.perf_counter()
        self._done = [False] * len(summaries)
        self._passed_on = 0
        self.streamers = [
            _Streamer(job, summary, functools.partial(self._end, number)) for number, summary in enumerate(summaries)
        ]

    def begin(self) -> None:
        """Note that a batch begins."""
        self._start = time.perf_counter()
        for streamer in self.streamers:
            streamer.begin(self._start)

    def interrupt(self) -> None:
        """End all answers as they are."""
        for number, summary in enumerate(self._summaries):
            if not self._done[number]:
                summary.interrupted = True
                self.streamers[number].end()

    def _end(self, number: int) -> None:
        summary = self._summaries[number]
        summary.total_s = time.perf_counter() - self._start
        summary.stats = self._cache.stats()
        self._done[number] = True
        self._job.on_done(sum(self._done))
        while self._passed_on < len(self._done) and self._done[self._passed_on]:
            self._job.on_text(self._summaries[self._passed_on].text + "\n")
            self._passed_on += 1


class _Streamer(Streamer):
    """Takes the tokens of one answer, and calls a function at its end."""

    def __init__(self, job: Together, summary: Summary, on_end: Callable[[], None]) -> None:
        super().__init__(job.tokenizer, lambda text: None, summary, time.perf_counter(), job.sampling.stop)
        self._on_end = on_end

    def begin(self, start: float) -> None:
        """Note when the batch of the question began."""
        self._start = start

    def end(self) -> None:
        """Note the rest of the text, and that the answer has ended."""
        super().end()
        self._on_end()
