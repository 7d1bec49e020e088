"""Read a document once and ask it many questions: with the head-wise cache, or with transformers' own.

Each question is asked on a copy of what was read, so no answer knows of another question. The head-wise cache forks,
which copies nothing; transformers' DynamicCache is copied whole.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import DynamicCache, TextStreamer

from headinfer.evals.tasks import Document, Question
from headinfer.hf.cache import HeadCache, Stats
from headinfer.hf.compat import PreTrainedModel, last_logits_only
from headinfer.hf.enable import enable
from headinfer.jobs.prompts import document_ids, frame, pad_id

__all__ = ["HEAD_WISE", "STANDARD", "Answer", "Method", "Reader", "Reading"]

OnText = Callable[[Question, str], None]
Method = Literal["head-wise", "standard"]
HEAD_WISE: Method = "head-wise"
STANDARD: Method = "standard"
_STANDARD_CHUNK_TOKENS = 2048


@dataclass(frozen=True)
class Answer:
    """The tokens that followed a question, greedily chosen, and their text after the question's lead."""

    text: str
    token_ids: list[int]
    seconds: float


@dataclass
class Reading:
    """What came of one document with one method. tokens: read from the document; bytes: of its KV."""

    method: Method
    tokens: int
    read_s: float = 0.0
    answers: list[Answer] = field(default_factory=list)
    device_kv_bytes: int = 0
    host_kv_bytes: int = 0
    stats: Stats | None = None


class Reader:
    """A loaded model and its tokenizer. is_raw: do not use the tokenizer's chat template.

    options: those of `enable()`, for the head-wise cache. on_tokens: called with the tokens read so far.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        is_raw: bool = False,
        options: Mapping[str, Any] | None = None,
        on_tokens: Callable[[int], None] = lambda tokens: None,
    ) -> None:
        self.model, self.tokenizer, self.is_raw = model, tokenizer, is_raw
        self._options, self._on_tokens = dict(options or {}), on_tokens

    def count(self, text: str) -> int:
        """Tokens of a text, special ones aside."""
        return len(self.tokenizer(text, add_special_tokens=False).input_ids)

    def encode(self, document: Document) -> tuple[list[int], list[list[int]]]:
        """Token ids of the document, and of what follows it for each question."""
        head = list(document_ids(self.tokenizer, document.text, is_raw=self.is_raw))
        tails = []
        for question in document.questions:
            _, after = frame(self.tokenizer, question.text, is_raw=self.is_raw)
            tails.append(self.tokenizer(after + question.lead, add_special_tokens=False).input_ids)
        return head, tails

    def read(self, document: Document, method: Method, on_text: OnText | None = None) -> Reading:
        """Read the document, then ask each question. on_text gets a question and pieces of its answer as they come."""
        head, tails = self.encode(document)
        ids = torch.tensor([head], device=self.model.device)
        most = max(len(tail) + question.new_tokens for tail, question in zip(tails, document.questions, strict=True))
        reading = Reading(method, len(head))
        if method == STANDARD:
            cache = self._read_standard(ids, reading)
            reading.device_kv_bytes = _tensor_bytes(cache)
            self._ask(ids, tails, document, reading, lambda: copy.deepcopy(cache), on_text)
            return reading
        with enable(self.model, on_forward=self._after_forward, **self._options) as enabled:
            start = time.perf_counter()
            head_cache = enabled.new_cache(len(head) + most)
            self._forward(ids, head_cache)
            reading.read_s = time.perf_counter() - start
            self._ask(ids, tails, document, reading, head_cache.fork, on_text)
        reading.stats = stats = head_cache.stats()
        reading.device_kv_bytes, reading.host_kv_bytes = stats.device_kv_peak_bytes, stats.host_kv_bytes
        head_cache.reset()
        return reading

    def _read_standard(self, ids: torch.Tensor, reading: Reading) -> DynamicCache:
        start, cache = time.perf_counter(), DynamicCache(config=self.model.config)
        for chunk in ids.split(_STANDARD_CHUNK_TOKENS, dim=1):
            self._forward(chunk, cache)
            self._on_tokens(cache.get_seq_length())
        reading.read_s = time.perf_counter() - start
        return cache

    def _after_forward(self, cache: HeadCache) -> None:
        self._on_tokens(cache.head_layers[0].get_seq_length())

    @torch.inference_mode()
    def _forward(self, ids: torch.Tensor, cache: Any) -> None:
        self.model(input_ids=ids, past_key_values=cache, use_cache=True, **last_logits_only(self.model))

    def _ask(
        self,
        ids: torch.Tensor,
        tails: Sequence[list[int]],
        document: Document,
        reading: Reading,
        fork: Callable[[], Any],
        on_text: OnText | None,
    ) -> None:
        for tail, question in zip(tails, document.questions, strict=True):
            whole = torch.cat([ids, torch.tensor([tail], device=ids.device)], dim=1)
            start = time.perf_counter()
            written = self.model.generate(
                whole,
                attention_mask=torch.ones_like(whole),
                past_key_values=fork(),
                max_new_tokens=question.new_tokens,
                do_sample=False,
                pad_token_id=pad_id(self.tokenizer),
                streamer=_Streamer(self.tokenizer, functools.partial(on_text, question))
                if on_text is not None
                else None,
            )
            new_ids = written[0, whole.shape[1] :].tolist()
            text = self.tokenizer.decode(new_ids, skip_special_tokens=True)
            reading.answers.append(Answer(text, new_ids, time.perf_counter() - start))


class _Streamer(TextStreamer):  # type: ignore[misc]
    """Gives the answer's text away as it comes."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called with each piece of text."""
        self._on_text(text + "\n" if stream_end else text)


def _tensor_bytes(cache: DynamicCache) -> int:
    tensors = (tensor for layer in cache.layers for tensor in vars(layer).values() if isinstance(tensor, torch.Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
