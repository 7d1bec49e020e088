"""The demo: finds facts in a very long text with the head-wise cache and with transformers' own cache.

The model and the text ship with headinfer (see headinfer.embedded). The needles are words that the model was not
trained on. The demo is also a self-test: every answer must be right, and both caches must give the same tokens.
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
from headinfer.errors import CapacityError, UsageError
from headinfer.evals.niah import niah_document
from headinfer.evals.reader import HEAD_WISE, STANDARD, Method, OnText, Reader, Reading
from headinfer.evals.tasks import Document
from headinfer.hf.models import resolve
from headinfer.plan.memory import available_host_bytes
from headinfer.plan.model_shape import ModelShape
from headinfer.utils.units import format_bytes

__all__ = ["DEMO_TOKENS", "Demo", "DemoResult", "largest_demo"]

DEMO_TOKENS = (16_384, 32_768, 65_536, 131_072, 262_144, 524_288, 1_048_576)
"""The lengths that `largest_demo()` chooses from."""

_TRIAL_TOKENS = 8192
_CHUNK_TOKENS = 2048
_QUESTION_TOKENS = 100  # of the document for each question; in denser documents the model finds other needles
_CPU_BUDGET_BYTES = 4 * 1024 * 1024
_GPU_BUDGET_BYTES = 64 * 1024 * 1024  # a launch takes a GPU's host as long as copying some MiB: tiles must be larger


@dataclass
class DemoResult:
    """The readings of one document with both caches.

    Attributes:
        document: the document.
        head_wise: the reading with the head-wise cache.
        standard: the reading with transformers' cache.
    """

    document: Document
    head_wise: Reading
    standard: Reading

    @property
    def identical(self) -> bool:
        """Whether both readings gave the same tokens in all answers."""
        head_wise_ids = [answer.token_ids for answer in self.head_wise.answers]
        standard_ids = [answer.token_ids for answer in self.standard.answers]
        return bool(head_wise_ids) and head_wise_ids == standard_ids

    @property
    def right(self) -> bool:
        """Whether all answers of the head-wise cache contain the needle's number."""
        pairs = zip(self.document.questions, self.head_wise.answers, strict=True)
        return all(question.score(answer.text, question.references) == 1.0 for question, answer in pairs)


class Demo:
    """The embedded model in float32, with a reader for both caches.

    The head-wise cache streams its KV through a ring with a small budget. This is also the case on a CPU, where
    headinfer would otherwise read the KV in place.

    Args:
        device: the device of the model, such as "cpu" or "cuda".
        on_tokens: called during a reading with the number of tokens that were read.
    """

    def __init__(self, device: str, on_tokens: Callable[[int], None] = lambda tokens: None) -> None:
        source = resolve(EMBEDDED)
        self.shape = ModelShape.from_config(source.config)
        model = source.load(dtype=torch.float32, device=device, seed=0)
        if device == "cpu":
            native.unavailable_reason(model.dtype)  # compiles the kernel, so that no reading is timed with it
        options: dict[str, Any] = {
            "chunk_tokens": _CHUNK_TOKENS,
            "device_kv_budget_bytes": _CPU_BUDGET_BYTES if device == "cpu" else _GPU_BUDGET_BYTES,
            "transport": "eager" if device == "cpu" else "auto",
        }
        self.reader = Reader(model, source.tokenizer(), options=options, on_tokens=on_tokens)

    def document(self, tokens: int, questions: int, seed: int) -> Document:
        """Make a document with needles at evenly spaced depths and one question for each, without a lead.

        Only words that the tokenizer splits into syllables are used. It splits one word in 300 differently, such as
        "tafore" into "ta" and "fore". The model often misspells such a word, independently of the cache.

        Args:
            tokens: the length of the document with a question and its answer.
            questions: the number of needles.
            seed: another seed gives other needles in another part of the text.

        Returns:
            The document.

        Raises:
            UsageError: the context is longer than what the model was made for, or the needles do not fit into it.
            CapacityError: the memory does not hold the KV of the standard cache and its copy for a question.
        """
        self._check(tokens, questions)
        depths = [(index + 0.5) / questions for index in range(questions)]
        return niah_document(
            tokens,
            depths,
            0,
            embedded_text(),
            self.reader.count,
            seed,
            gives_lead=False,
            accepts=self._is_split_into_syllables,
        )

    def _check(self, tokens: int, questions: int) -> None:
        """Check that a document can be made and read."""
        if tokens < 1 or questions < 1:
            raise UsageError(f"the demo needs at least 1 token and 1 question, not {tokens} and {questions}")
        longest = self.shape.max_context_tokens
        if tokens > longest:
            raise UsageError(f"a context of {tokens:,} tokens is too long for the demo's model: it reads {longest:,}")
        if questions > 1 and tokens < questions * _QUESTION_TOKENS:
            raise UsageError(
                f"{tokens:,} tokens cannot hold {questions:,} needles that the model tells apart: give a --context of "
                f"at least {questions * _QUESTION_TOKENS:,} tokens, or fewer --questions"
            )
        token_bytes = 2 * self.shape.kv_bytes_per_token(torch.float32.itemsize)
        free_bytes = available_host_bytes()
        if tokens * token_bytes > free_bytes:
            raise CapacityError(
                f"{tokens:,} tokens need {format_bytes(tokens * token_bytes)} of memory for the KV of the standard "
                f"cache and a copy, and {format_bytes(free_bytes)} are free: at most {free_bytes // token_bytes:,} "
                "tokens fit"
            )

    def _is_split_into_syllables(self, word: str) -> bool:
        tokens: list[str] = self.reader.tokenizer.tokenize(f" {word}")
        return len(tokens) == len(word) // 2

    def read(self, document: Document, method: Method, on_text: OnText | None = None) -> Reading:
        """Read a document and answer its questions; see `Reader.read()`."""
        gc.collect()  # free the memory of the other cache
        return self.reader.read(document, method, on_text)


def largest_demo(demo: Demo, seconds: float) -> int:
    """Choose the largest demo that takes about a given time on this machine.

    The function reads a document of 8,192 tokens with both caches and extrapolates from its floating-point operations.

    Args:
        demo: the demo.
        seconds: the time for reading the document with both caches.

    Returns:
        The largest of DEMO_TOKENS that takes at most that time, or the smallest one if all of them take longer.
    """
    document = demo.document(_TRIAL_TOKENS, 1, seed=0)
    start = time.perf_counter()
    for method in (HEAD_WISE, STANDARD):
        demo.read(document, method)
    flops_per_s = demo.shape.prefill_flops(_TRIAL_TOKENS) / (time.perf_counter() - start)
    fitting = [tokens for tokens in DEMO_TOKENS if demo.shape.prefill_flops(tokens) <= seconds * flops_per_s]
    return fitting[-1] if fitting else DEMO_TOKENS[0]
