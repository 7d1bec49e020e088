"""Makes a head pattern from a model: measures, over texts with needles, which KV heads need the whole context.

Each text is read once. Then each needle is asked for on a copy of the cache, with its answer given (teacher forcing).
hf/head_needs.py measures the queries that predict the needle's number, and, for information only, a sample of those of
the text. The value of a head is the mean of its effect on the former, over all needles, divided by the largest mean of
all heads.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers

import headinfer
from headinfer.engine.machine import free_device_bytes
from headinfer.errors import CapacityError, UsageError
from headinfer.evals.niah import niah_document
from headinfer.hf.compat import PreTrainedModel
from headinfer.hf.enable import context_warning
from headinfer.hf.head_needs import HeadMeter, LayerNeeds
from headinfer.hf.models import ModelSource
from headinfer.jobs.prompts import chat_texts, document_ids, following_ids
from headinfer.plan.memory import available_host_bytes
from headinfer.plan.model_shape import ModelShape
from headinfer.utils.head_pattern import HeadPattern
from headinfer.utils.units import format_bytes

__all__ = ["Asked", "CalibrationJob", "Calibrator", "Context", "Text"]

_FIRST_SAMPLE = 100_000  # `headinfer eval niah` has fewer samples, so it asks for other needles
_TEXT_QUERIES = 64  # of each text
_DIGITS = 6  # of the numbers in the file: rounding hides the order of sums
_MEASURES = ("error", "effect", "mass", "largest_mass")


@dataclass(frozen=True)
class Text:
    """A text that needles are hidden in.

    Attributes:
        name: its name, for the file.
        text: the text.
    """

    name: str
    text: str


@dataclass(frozen=True)
class CalibrationJob:
    """What is measured.

    Attributes:
        source: the model.
        name: how the user named the model.
        dtype: the dtype of the weights.
        device: the device, such as "cpu".
        texts: the texts.
        lengths: tokens of a context; each text is read at each length.
        needles: needles of each context.
        sink_tokens: the first tokens, which streaming heads see.
        recent_tokens: the newest tokens, which streaming heads see.
        seed: the seed of needles and of random weights.
        is_raw: whether the model's chat template is left out.
        share: the share of the heads that are streaming in the pattern; None if its threshold is 0.5.
    """

    source: ModelSource
    name: str
    dtype: torch.dtype
    device: str
    texts: Sequence[Text]
    lengths: Sequence[int]
    needles: int
    sink_tokens: int
    recent_tokens: int
    seed: int = 0
    is_raw: bool = False
    share: float | None = None


@dataclass(frozen=True)
class Asked:
    """A question with its answer.

    Attributes:
        ids: the token ids of both, which follow the text.
        first: the index of the first token of the answer's number, with which the answer ends.
    """

    ids: list[int]
    first: int


@dataclass(frozen=True)
class Context:
    """A text with needles and its questions.

    Attributes:
        ids: the token ids of the text and of all before it.
        questions: the questions.
        positions: the positions of the text whose queries are measured.
    """

    ids: list[int]
    questions: list[Asked]
    positions: list[int]


class Calibrator:
    """A calibration, checked; the weights are loaded by run().

    Args:
        job: what is measured.

    Attributes:
        shape: the model.
        warnings: what the user should know before it runs, a sentence each.
        contexts: what is read, in order.
        document_tokens: tokens of each context.

    Raises:
        UsageError: a length is too short, or the model has no positions or embeddings for a context.
        CapacityError: the memory does not hold the weights and the KV of the longest context twice.
    """

    def __init__(self, job: CalibrationJob) -> None:
        self._job = job
        self.shape = ModelShape.from_config(job.source.config)
        local = job.sink_tokens + job.recent_tokens
        for length in job.lengths:
            if length < 2 * local:
                raise UsageError(
                    f"a context of {length:,} tokens is too short to measure what is outside of {job.sink_tokens:,} "
                    f"sink and {job.recent_tokens:,} recent tokens: give a --context of at least {2 * local:,}"
                )
        warned = context_warning(max(job.lengths), self.shape)
        self.warnings = [warned] if warned is not None else []
        self._check_memory()
        self._check_share(job.share)
        self._tokenizer = job.source.tokenizer()
        self._chat = chat_texts(self._tokenizer, is_raw=job.is_raw)
        self.contexts = [
            self._context(text, number, length) for number, text in enumerate(job.texts) for length in job.lengths
        ]
        self.document_tokens = [len(context.ids) for context in self.contexts]

    def run(
        self,
        on_tokens: Callable[[int], None] = lambda tokens: None,
        on_document: Callable[[float], None] = lambda found: None,
    ) -> HeadPattern:
        """Load the model and measure.

        Args:
            on_tokens: called with the tokens of the current context that are read so far.
            on_document: called after each context with the share of the numbers that the model has predicted so far.

        Returns:
            The pattern.

        Raises:
            UnsupportedError: the heads of the model cannot be measured.
        """
        job = self._job
        model = job.source.load(dtype=job.dtype, device=job.device, seed=job.seed)
        return self.measure(model, on_tokens, on_document)

    def measure(
        self,
        model: PreTrainedModel,
        on_tokens: Callable[[int], None] = lambda tokens: None,
        on_document: Callable[[float], None] = lambda found: None,
    ) -> HeadPattern:
        """Measure a model that is loaded; see run()."""
        needles: list[dict[str, list[list[float]]]] = []
        texts: list[dict[str, list[list[float]]]] = []
        predicted: list[bool] = []
        with HeadMeter(model, self._job.sink_tokens, self._job.recent_tokens, on_tokens) as meter:
            for context in self.contexts:
                cache = meter.new_cache()
                found, _ = meter.read(cache, context.ids, context.positions)
                texts.append(self._figures(found))
                start = len(context.ids)
                for asked in context.questions:
                    queries = range(start + asked.first - 1, start + len(asked.ids) - 1)  # each predicts the next token
                    found, logits = meter.read(meter.fork(cache), asked.ids[:-1], queries, logits=len(queries))
                    needles.append(self._figures(found))
                    predicted += (logits.argmax(-1).cpu() == torch.tensor(asked.ids[asked.first :])).tolist()
                on_document(sum(predicted) / len(predicted))
        return self._pattern(needles, texts, sum(predicted) / len(predicted))

    def _check_share(self, share: float | None) -> None:
        """Raise UsageError if a share of streaming heads leaves no full head."""
        if share is not None:
            offloaded = (layer.kv_heads if layer.is_offloaded else 0 for layer in self.shape.layers)
            HeadPattern(tuple((0.0,) * heads for heads in offloaded)).with_share(share)

    def _check_memory(self) -> None:
        """Raise CapacityError if the weights and the KV do not fit. A question is asked on a copy of the cache."""
        element_bytes = self._job.dtype.itemsize
        kv_bytes = self.shape.kv_bytes_per_token(element_bytes) * max(self._job.lengths)
        needed = self._job.source.weight_bytes(self._job.dtype) + 2 * kv_bytes
        device = torch.device(self._job.device)
        free = free_device_bytes(device) if device.type == "cuda" else available_host_bytes()
        if needed > free:
            raise CapacityError(
                f"calibrating with {max(self._job.lengths):,} tokens needs {format_bytes(needed)} for the weights, the "
                f"KV and a copy of it, and {format_bytes(free)} are free: give a smaller --context"
            )

    def _context(self, text: Text, number: int, length: int) -> Context:
        """Hide needles in a text, between the sink and the neighbourhood of its last token, and tokenize it."""
        job = self._job
        first = job.sink_tokens / length
        last = 1 - job.recent_tokens / length
        depths = [first + (last - first) * (index + 0.5) / job.needles for index in range(job.needles)]
        document = niah_document(length, depths, _FIRST_SAMPLE + number, text.text, self._count, job.seed)
        ids = document_ids(self._tokenizer, document.text, self._chat)
        questions = []
        for question in document.questions:
            answer = f"{question.lead} {question.references[0]}"
            before = following_ids(self._tokenizer, question.text, self._chat, question.lead)
            whole = following_ids(self._tokenizer, question.text, self._chat, answer)
            shared = next((at for at, pair in enumerate(zip(before, whole, strict=False)) if pair[0] != pair[1]), None)
            questions.append(Asked(whole, len(before) if shared is None else shared))
        self._job.source.check_ids({*ids, *(token for asked in questions for token in asked.ids)})
        local = job.sink_tokens + job.recent_tokens
        rng = random.Random(f"{job.seed}/calibrate/{length}/{number}")
        count = min(_TEXT_QUERIES, len(ids) - local)
        return Context(ids, questions, sorted(rng.sample(range(local, len(ids)), count)))

    def _count(self, text: str) -> int:
        return len(self._tokenizer(text, add_special_tokens=False).input_ids)

    def _figures(self, found: dict[int, LayerNeeds]) -> dict[str, list[list[float]]]:
        """Return the mean over the queries for each measure, decoder layer and KV head."""
        return {
            name: [
                getattr(found[layer], name).mean(dim=1).tolist() if layer in found else []
                for layer in range(len(self.shape.layers))
            ]
            for name in _MEASURES
        }

    def _pattern(
        self,
        needles: Sequence[dict[str, list[list[float]]]],
        texts: Sequence[dict[str, list[list[float]]]],
        predicted: float,
    ) -> HeadPattern:
        job = self._job
        measured = {name: _mean([one[name] for one in needles]) for name in _MEASURES}
        of_texts = {name: _mean([one[name] for one in texts]) for name in _MEASURES}
        largest = max((effect for effects in measured["effect"] for effect in effects), default=0.0) or 1.0
        values = tuple(tuple(round(effect / largest, _DIGITS) for effect in effects) for effects in measured["effect"])
        element_bytes = job.dtype.itemsize
        info: dict[str, Any] = {
            "model": job.name,
            "family": self.shape.family,
            "dtype": str(job.dtype).removeprefix("torch."),
            "head_bytes_per_token": [
                layer.kv_bytes_per_token(element_bytes) // layer.kv_heads if layer.is_offloaded else 0
                for layer in self.shape.layers
            ],
            "texts": [
                {"name": text.name, "sha256": hashlib.sha256(text.text.encode()).hexdigest()} for text in job.texts
            ],
            "contexts": list(job.lengths),
            "needles": job.needles,
            "seed": job.seed,
            "raw": job.is_raw,
            "predicted": round(predicted, _DIGITS),
            "measured": {"needles": measured, "text": of_texts},
            "versions": {
                "headinfer": headinfer.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }
        pattern = HeadPattern(values, sink_tokens=job.sink_tokens, recent_tokens=job.recent_tokens, info=info)
        return pattern if job.share is None else pattern.with_share(job.share)


def _mean(tables: Sequence[list[list[float]]]) -> list[list[float]]:
    """Return the rounded means of tables of the same shape, number by number."""
    return [
        [round(sum(numbers) / len(numbers), _DIGITS) for numbers in zip(*rows, strict=True)]
        for rows in zip(*tables, strict=True)
    ]
