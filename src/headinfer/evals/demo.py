"""The demo: a fact found in a very long text, with the head-wise cache and with transformers' own.

The model and the text ship with headinfer (see embedded/); the needles are new words with new numbers. It is a
self-test too: every answer must be right, and all tokens of both caches the same.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from headinfer.attention import native
from headinfer.embedded import EMBEDDED, embedded_text
from headinfer.errors import UsageError
from headinfer.evals.niah import niah_document
from headinfer.evals.reader import HEAD_WISE, STANDARD, Method, OnText, Reader, Reading
from headinfer.evals.tasks import Document
from headinfer.hf.models import resolve
from headinfer.plan.model_shape import ModelShape

__all__ = ["DEMO_TOKENS", "Demo", "DemoResult", "largest_demo"]

DEMO_TOKENS = (16_384, 32_768, 65_536, 131_072, 262_144, 524_288, 1_048_576)
_TRIAL_TOKENS = 8192
_CHUNK_TOKENS = 2048
_BUDGET_BYTES = 4 * 1024 * 1024


@dataclass
class DemoResult:
    """Both readings of one document."""

    document: Document
    head_wise: Reading
    standard: Reading

    @property
    def identical(self) -> bool:
        """Whether all tokens of all answers are equal."""
        ours, theirs = ([one.token_ids for one in reading.answers] for reading in (self.head_wise, self.standard))
        return bool(ours) and ours == theirs

    @property
    def right(self) -> bool:
        """Whether all answers hold the needle's number."""
        pairs = zip(self.document.questions, self.head_wise.answers, strict=True)
        return all(question.score(answer.text, question.references) == 1.0 for question, answer in pairs)


class Demo:
    """The model, loaded in float32, with the ring and budget of a GPU also where there is none.

    on_tokens: called with the tokens read so far.
    """

    def __init__(self, device: str, on_tokens: Callable[[int], None] = lambda tokens: None) -> None:
        source = resolve(EMBEDDED)
        self.shape = ModelShape.from_config(source.config)
        model = source.load(dtype=torch.float32, device=device, seed=0)
        if device == "cpu":
            native.unavailable_reason()  # compiles the decode kernel where that was never done here: no part of the timing
        options: dict[str, Any] = {
            "chunk_tokens": _CHUNK_TOKENS,
            "device_kv_budget_bytes": _BUDGET_BYTES,
            "transport": "eager" if device == "cpu" else "auto",
        }
        self.reader = Reader(model, source.tokenizer(), options=options, on_tokens=on_tokens)

    def document(self, tokens: int, questions: int, seed: int) -> Document:
        """A text of `tokens` tokens with a needle at each of `questions` depths, each asked for without a lead.

        Its words are spelt in syllables by the model's tokenizer: one in 300 that is not ("ta" and "fore") often is
        not said again rightly, which says nothing of a cache.
        Raises UsageError for numbers out of range.
        """
        if tokens < 1 or questions < 1:
            raise UsageError(f"the demo needs at least 1 token and 1 question, not {tokens} and {questions}")
        depths = [(index + 0.5) / questions for index in range(questions)]
        return niah_document(
            tokens, depths, 0, embedded_text(), self.reader.count, seed, gives_lead=False, suits=self._is_spelt
        )

    def _is_spelt(self, word: str) -> bool:
        pieces: list[str] = self.reader.tokenizer.tokenize(f" {word}")
        return len(pieces) == len(word) // 2

    def read(self, document: Document, method: Method, on_text: OnText | None = None) -> Reading:
        """Read the document and answer its questions."""
        gc.collect()  # what the other method held
        return self.reader.read(document, method, on_text)


def largest_demo(demo: Demo, seconds: float) -> int:
    """The most of DEMO_TOKENS that both methods read in about so many seconds here, after a trial of 8,192 tokens."""
    document = demo.document(_TRIAL_TOKENS, 1, seed=0)
    start = time.perf_counter()
    for method in (HEAD_WISE, STANDARD):
        demo.read(document, method)
    flops_per_s = demo.shape.prefill_flops(_TRIAL_TOKENS) / (time.perf_counter() - start)
    fitting = [tokens for tokens in DEMO_TOKENS if demo.shape.prefill_flops(tokens) <= seconds * flops_per_s]
    return fitting[-1] if fitting else DEMO_TOKENS[0]
