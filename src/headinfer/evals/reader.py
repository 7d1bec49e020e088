"""Reads a document once and asks many questions about it, with the head-wise cache or with transformers' cache.

Each question is asked on a copy of the cache, so that no answer depends on another question. A HeadCache is forked,
which copies no KV. A DynamicCache of transformers is copied completely. With a HeadCache several questions can be
answered together, also about several documents.
"""

from __future__ import annotations

import copy
import functools
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import DynamicCache, TextStreamer

from headinfer.evals.tasks import Document, Question
from headinfer.hf.batch import BatchQuestion, answer_all, plan_batches
from headinfer.hf.cache import HeadCache
from headinfer.hf.compat import LinearAttentionCacheLayerMixin, PreTrainedModel, last_logits_only
from headinfer.hf.enable import enable
from headinfer.hf.rotary import RotaryLengths
from headinfer.hf.stats import Stats
from headinfer.jobs.prompts import chat_texts, document_ids, following_ids, pad_id

__all__ = ["HEAD_WISE", "STANDARD", "Answer", "Method", "Reader", "Reading"]

OnText = Callable[[Question, str], None]
"""Receives a question and the next piece of its answer."""

Method = Literal["head-wise", "standard"]
"""Names the cache that a document is read with."""

HEAD_WISE: Method = "head-wise"
STANDARD: Method = "standard"
_STANDARD_CHUNK_TOKENS = 2048


@dataclass(frozen=True)
class Answer:
    """A greedily decoded answer.

    Attributes:
        text: the generated text. It continues the question's lead and does not contain it.
        token_ids: the generated tokens.
        seconds: the time that the answer took; an equal share of the time of all answers that were given together.
    """

    text: str
    token_ids: list[int]
    seconds: float


@dataclass
class Reading:
    """The answers about one document with one cache, with times and memory.

    Attributes:
        method: the cache.
        tokens: the tokens of the document.
        read_s: the seconds that reading the document took, without the questions; an equal share if several documents
            were read together.
        answers: the answers, in the order of the questions.
        device_kv_bytes: the peak of the KV on the device; for the standard cache, the KV of the document.
        host_kv_bytes: the KV in host memory.
        stats: the statistics of the head-wise cache; None for the standard cache.
    """

    method: Method
    tokens: int
    read_s: float = 0.0
    answers: list[Answer] = field(default_factory=list)
    device_kv_bytes: int = 0
    host_kv_bytes: int = 0
    stats: Stats | None = None


class Reader:
    """Reads documents with one model and answers questions about them.

    Args:
        model: the loaded model.
        tokenizer: the tokenizer of the model.
        is_raw: do not use the tokenizer's chat template.
        options: keyword arguments of `enable()` for the head-wise cache.
        on_tokens: called after each forward pass with the number of tokens in the cache.
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
        self.model = model
        self.tokenizer = tokenizer
        self.is_raw = is_raw
        self._options = dict(options or {})
        self._on_tokens = on_tokens

    def count(self, text: str) -> int:
        """Count the tokens of a text, without special tokens."""
        return len(self.tokenizer(text, add_special_tokens=False).input_ids)

    def encode(self, document: Document) -> tuple[list[int], list[list[int]]]:
        """Tokenize a document and its questions.

        Args:
            document: the document.

        Returns:
            The token ids of the document with everything before it, and for each question the token ids that follow
            the document.
        """
        chat = chat_texts(self.tokenizer, is_raw=self.is_raw)
        head = document_ids(self.tokenizer, document.text, chat)
        tails = [following_ids(self.tokenizer, one.text, chat, one.lead) for one in document.questions]
        return head, tails

    def read(self, document: Document, method: Method, on_text: OnText | None = None) -> Reading:
        """Read a document, then answer its questions.

        Args:
            document: the document.
            method: the cache to use, HEAD_WISE or STANDARD.
            on_text: called with each piece of an answer as soon as it is generated.

        Returns:
            The answers.
        """
        head, tails = self.encode(document)
        ids = torch.tensor([head], device=self.model.device)
        pairs = zip(tails, document.questions, strict=True)
        max_tail_tokens = max(len(tail) + question.new_tokens for tail, question in pairs)
        reading = Reading(method, len(head))
        if method == STANDARD:
            cache = self._read_standard(ids, reading)
            reading.device_kv_bytes = _tensor_bytes(cache)
            self._ask(ids, tails, document, reading, lambda: copy.deepcopy(cache), on_text)
            return reading
        with enable(self.model, on_forward=self._after_forward, **self._options) as enabled:
            start = time.perf_counter()
            head_cache = enabled.new_cache(len(head) + max_tail_tokens)
            self._forward(ids, head_cache)
            reading.read_s = time.perf_counter() - start
            self._ask(ids, tails, document, reading, head_cache.fork, on_text)
        stats = head_cache.stats()
        reading.stats = stats
        reading.device_kv_bytes = stats.device_kv_peak_bytes
        reading.host_kv_bytes = stats.host_kv_bytes
        head_cache.reset()
        return reading

    def can_read_together(self) -> bool:
        """Return whether documents of different lengths can be rows of one batch of the head-wise cache.

        They are padded, which would change the states of linear layers. Rotary frequencies that depend on the length
        would be those of the longest document.
        """
        cache = HeadCache(self.model.config)
        has_states = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers)
        return not has_states and not RotaryLengths.from_config(self.model.config)

    def fits_together(self, tokens: int, documents: int) -> bool:
        """Return whether the KV of several documents fits the memory at once.

        Args:
            tokens: tokens of each document and what follows it.
            documents: the number of documents.
        """
        with enable(self.model, **self._options) as enabled:
            return documents == 1 or enabled.fits(tokens, documents)

    def read_together(self, documents: Sequence[Document]) -> list[Reading]:
        """Read documents as rows of one batch with the head-wise cache, then answer all questions in batches.

        Args:
            documents: the documents.

        Returns:
            The answers about each document.
        """
        encoded = [self.encode(document) for document in documents]
        longest = max(len(head) for head, _ in encoded)
        starts = torch.tensor([longest - len(head) for head, _ in encoded])
        ids = torch.tensor([head[:1] * (longest - len(head)) + head for head, _ in encoded])
        mask = torch.arange(longest) >= starts[:, None]
        asked = [
            BatchQuestion(tail, question.new_tokens, row)
            for row, ((_, tails), document) in enumerate(zip(encoded, documents, strict=True))
            for tail, question in zip(tails, document.questions, strict=True)
        ]
        with enable(self.model, on_forward=self._after_forward, **self._options) as enabled, torch.inference_mode():
            start = time.perf_counter()
            cache = enabled.new_cache(longest + max(question.work for question in asked), len(documents))
            if len(documents) == 1:
                self._forward(ids.to(self.model.device), cache)
            else:
                self._forward_rows(ids, mask, cache)
            read_s = time.perf_counter() - start
            start = time.perf_counter()
            batches = plan_batches(enabled, cache, asked)
            generate = {"pad_token_id": pad_id(self.tokenizer), "tokenizer": self.tokenizer}
            answers = iter(answer_all(enabled, cache, ids, batches, mask=mask, **generate))
            answer_s = (time.perf_counter() - start) / len(asked)
            stats = cache.stats()
            cache.reset()
        readings = []
        for document, (head, _) in zip(documents, encoded, strict=True):
            reading = Reading(HEAD_WISE, len(head), read_s / len(documents), stats=stats)
            reading.device_kv_bytes = stats.device_kv_peak_bytes
            reading.host_kv_bytes = stats.host_kv_bytes
            for new_ids in itertools.islice(answers, len(document.questions)):
                text = self.tokenizer.decode(new_ids, skip_special_tokens=True)
                reading.answers.append(Answer(text, new_ids, answer_s))
            readings.append(reading)
        return readings

    def _forward_rows(self, ids: torch.Tensor, mask: torch.Tensor, cache: HeadCache) -> None:
        """Read padded rows. generate() gives each token its position; the token that it generates is not read."""
        device = self.model.device
        self.model.generate(
            ids.to(device),
            attention_mask=mask.to(device),
            past_key_values=cache,
            max_new_tokens=1,
            do_sample=False,
            pad_token_id=pad_id(self.tokenizer),
            tokenizer=self.tokenizer,  # for stop_strings in the model's generation config
        )

    def _read_standard(self, ids: torch.Tensor, reading: Reading) -> DynamicCache:
        start = time.perf_counter()
        cache = DynamicCache(config=self.model.config)
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
            streamer = None
            if on_text is not None:
                streamer = _Streamer(self.tokenizer, functools.partial(on_text, question))
            prompt = torch.cat([ids, torch.tensor([tail], device=ids.device)], dim=1)
            start = time.perf_counter()
            generated = self.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                past_key_values=fork(),
                max_new_tokens=question.new_tokens,
                do_sample=False,
                pad_token_id=pad_id(self.tokenizer),
                streamer=streamer,
                tokenizer=self.tokenizer,  # for stop_strings in the model's generation config
            )
            new_ids = generated[0, prompt.shape[1] :].tolist()
            text = self.tokenizer.decode(new_ids, skip_special_tokens=True)
            reading.answers.append(Answer(text, new_ids, time.perf_counter() - start))


class _Streamer(TextStreamer):  # type: ignore[misc]
    """Passes the text of an answer on as soon as it is generated."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Receive a piece of text from transformers."""
        self._on_text(text + "\n" if stream_end else text)


def _tensor_bytes(cache: DynamicCache) -> int:
    tensors = (tensor for layer in cache.layers for tensor in vars(layer).values() if isinstance(tensor, torch.Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
