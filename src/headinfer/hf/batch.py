"""Answers several questions about one document together: rows of a batch that share the KV of the document.

A decode step reads the KV of the document once for all rows. Questions of different lengths are padded between the
document and the question:

    row 0:  [document ............][padding][question 0][answer 0]
    row 1:  [document ............][question 1 ........][answer 1]

A row whose answer has ended leaves the batch, so it costs nothing more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from headinfer.engine.machine import free_device_bytes
from headinfer.errors import UsageError
from headinfer.hf.cache import HeadCache
from headinfer.hf.compat import DynamicSlidingWindowLayer, PreTrainedModel
from headinfer.hf.layers import HeadLayer
from headinfer.hf.rotary import RotaryLengths, keeps_frequencies
from headinfer.hf.sparse_layers import SparseHeadLayer
from headinfer.plan.model_shape import ModelShape
from headinfer.utils.values import whole_number

__all__ = [
    "MOST_ROWS",
    "AnswerStreamer",
    "BatchQuestion",
    "EnabledModel",
    "answer_all",
    "ask",
    "plan_batches",
]

MOST_ROWS = 32
"""Rows of a batch, at most."""

_CHEAP_TOKENS = 64  # so much padding is always accepted: reading the document takes the time
_IGNORED_ID = 0  # stands for a token of a row that has left the batch


class AnswerStreamer(Protocol):
    """Receives the tokens of one answer, as a streamer of transformers does."""

    def put(self, value: torch.Tensor) -> None:
        """Receive the ids of the prompt, then one id at a time."""

    def end(self) -> None:
        """Note that the answer has ended."""


@dataclass(frozen=True)
class BatchQuestion:
    """A question of a batch.

    Attributes:
        ids: its token ids, which follow the document. There is at least one.
        new_tokens: tokens of the answer, at most.
        row: the row of the cache that holds its document.
        streamer: receives the tokens of the answer.
    """

    ids: Sequence[int]
    new_tokens: int
    row: int = 0
    streamer: AnswerStreamer | None = None

    @property
    def work(self) -> int:
        """The tokens that its row adds to the document, at most."""
        return len(self.ids) + self.new_tokens


class EnabledModel(Protocol):
    """What is used of `Enabled` here."""

    model: PreTrainedModel

    @property
    def shape(self) -> ModelShape:
        """The shape of the model, or of this rank's shard."""

    def fits(self, tokens: int, rows: int) -> bool:
        """Return whether a plan for a context of so many tokens in each row fits the free memory."""


Batch = list[tuple[int, BatchQuestion]]
"""The questions of a batch, each with its number among all questions."""


def ask(
    enabled: EnabledModel,
    cache: HeadCache,
    questions: Sequence[Sequence[int] | torch.Tensor],
    *,
    document_ids: torch.Tensor | None,
    max_new_tokens: int,
    **options: Any,
) -> list[list[int]]:
    """Answer questions about the document in a cache of one row; see Enabled.ask()."""
    new_tokens = whole_number(max_new_tokens, "max_new_tokens")
    ids = cache.token_ids if document_ids is None else document_ids
    if ids is None:
        raise UsageError("the cache does not hold its token ids: give those of the document as document_ids")
    ids = ids.view(1, -1) if ids.ndim == 1 else ids
    if ids.shape != (1, cache.get_seq_length()):
        raise UsageError(
            f"document_ids has shape {list(ids.shape)}: it must be the ids [1, {cache.get_seq_length()}] of what the "
            "cache holds, one row"
        )
    asked = [BatchQuestion(torch.as_tensor(question).flatten().tolist(), new_tokens) for question in questions]
    if not all(question.ids for question in asked):
        raise UsageError("a question has no tokens: give at least one")
    batches = plan_batches(enabled, cache, asked)
    return answer_all(enabled, cache, ids, batches, **options)


def plan_batches(enabled: EnabledModel, cache: HeadCache, questions: Sequence[BatchQuestion]) -> list[Batch]:
    """Split questions into batches that fit the memory, of similar lengths, so that padding does not double the work.

    Args:
        enabled: the enabled model.
        cache: holds the documents, one in each row, or nothing.
        questions: the questions.

    Returns:
        The batches, in the order of their first questions.
    """
    if not questions:
        return []
    longest = max(question.work for question in questions)
    most_rows = _most_rows(enabled, cache, min(len(questions), MOST_ROWS), longest)
    if not keeps_frequencies(RotaryLengths.from_config(enabled.model.config), cache, longest):
        most_rows = 1
    return split_into_batches(questions, most_rows, is_padded=_can_pad(cache))


def _most_rows(enabled: EnabledModel, cache: HeadCache, wanted: int, new_tokens: int) -> int:
    """Return how many rows of a batch fit the memory, 1 to `wanted`."""
    layer_kvs = list(cache.layer_kvs().values())
    rows = wanted
    if not layer_kvs:
        while rows > 1 and not enabled.fits(new_tokens, rows):
            rows -= 1
        return rows
    layer = enabled.shape.layers[enabled.shape.offloaded_layers[0]]
    rows = cache.engine.rows_that_fit(layer_kvs, wanted, new_tokens, layer.query_heads)
    device = layer_kvs[0].device
    states = _other_bytes(cache) // layer_kvs[0].rows
    if device.type == "cuda" and states:
        rows = max(min(rows, free_device_bytes(device) // 2 // states), 1)
    return rows


def _other_bytes(cache: HeadCache) -> int:
    """Return the bytes of the windows and states of the layers that are not offloaded, which each row has."""
    others = (layer for layer in cache.layers if type(layer) is not HeadLayer)
    return sum(tensor.nbytes for layer in others for tensor in _tensors(layer))


def _tensors(layer: Any) -> list[torch.Tensor]:
    """Return the tensors of a cache layer of transformers."""
    values = vars(layer).values()
    parts = (part for value in values for part in (value.values() if isinstance(value, dict) else [value]))
    return [part for part in parts if isinstance(part, torch.Tensor)]


def _can_pad(cache: HeadCache) -> bool:
    """Return whether questions of different lengths can be padded behind the tokens of a cache.

    Padding before all tokens always can. Behind a document it would change the states of linear layers.
    """
    paddable = (HeadLayer, SparseHeadLayer, DynamicSlidingWindowLayer)
    return not cache.get_seq_length() or all(type(layer) in paddable or not _tensors(layer) for layer in cache.layers)


def split_into_batches(questions: Sequence[BatchQuestion], most_rows: int, *, is_padded: bool) -> list[Batch]:
    """Split questions into batches of similar lengths.

    Args:
        questions: the questions.
        most_rows: rows of a batch, at most.
        is_padded: whether the questions of a batch may have different lengths.

    Returns:
        The batches, in the order of their first questions.
    """
    batches: list[Batch] = []
    for entry in sorted(enumerate(questions), key=lambda entry: -len(entry[1].ids)):
        last = batches[-1] if batches else None
        if last is not None and len(last) < most_rows and _join(entry[1], len(last[0][1].ids), is_padded=is_padded):
            last.append(entry)
        else:
            batches.append([entry])
    return sorted((sorted(batch, key=_number) for batch in batches), key=lambda batch: _number(batch[0]))


def _join(question: BatchQuestion, longest: int, *, is_padded: bool) -> bool:
    """Return whether a question may be in a batch whose longest question has `longest` tokens."""
    padding = longest - len(question.ids)
    return padding == 0 or (is_padded and padding <= max(question.work, _CHEAP_TOKENS))


def _number(entry: tuple[int, BatchQuestion]) -> int:
    return entry[0]


def answer_all(
    enabled: EnabledModel,
    cache: HeadCache,
    document_ids: torch.Tensor,
    batches: Sequence[Batch],
    *,
    mask: torch.Tensor | None = None,
    **options: Any,
) -> list[list[int]]:
    """Answer the questions of all batches. The cache and its documents do not change.

    Args:
        enabled: the enabled model.
        cache: holds the documents, one in each row, or nothing.
        document_ids: the token ids [rows, T] of what the cache holds, int64.
        batches: what plan_batches() returned.
        mask: the padding mask [rows, T] of the documents, bool; None if there is no padding.
        **options: further arguments of generate().

    Returns:
        The ids of each answer, in the order of the questions.
    """
    answers: dict[int, list[int]] = {}
    for batch in batches:
        questions = [question for _, question in batch]
        found = answer_batch(enabled.model, cache, document_ids, questions, mask=mask, **options)
        answers.update(zip(map(_number, batch), found, strict=True))
    return [answers[number] for number in sorted(answers)]


def answer_batch(
    model: PreTrainedModel,
    cache: HeadCache,
    document_ids: torch.Tensor,
    questions: Sequence[BatchQuestion],
    *,
    mask: torch.Tensor | None = None,
    **options: Any,
) -> list[list[int]]:
    """Answer the questions of one batch. The cache and its documents do not change.

    Args:
        model: the enabled model.
        cache: holds the documents, one in each row, or nothing.
        document_ids: the token ids [rows, T] of what the cache holds, int64.
        questions: the questions.
        mask: the padding mask [rows, T] of the documents, bool; None if there is no padding.
        **options: further arguments of generate().

    Returns:
        The ids of each answer.
    """
    device = model.device
    rows = torch.tensor([question.row for question in questions])
    longest = max(len(question.ids) for question in questions)
    documents = document_ids.cpu()[rows]
    seen = torch.ones(documents.shape, dtype=torch.bool) if mask is None else mask.cpu()[rows]
    tails = torch.tensor(
        [_padded(document, question.ids, longest) for document, question in zip(documents, questions, strict=True)]
    )
    starts = torch.tensor([longest - len(question.ids) for question in questions])
    ids = torch.cat([documents, tails], dim=1).to(device)
    whole_mask = torch.cat([seen, torch.arange(longest) >= starts[:, None]], dim=1).to(device)
    new_tokens = max(question.new_tokens for question in questions)
    decoding = _Decoding(questions)
    loop = {"custom_generate": decoding.run} if len(questions) > 1 else {"streamer": questions[0].streamer}
    with _forked(cache, rows, int(starts.max())) as forked:
        written = model.generate(
            ids,
            attention_mask=whole_mask,
            past_key_values=forked,
            **({"do_sample": False, "max_new_tokens": new_tokens} | loop | options),
        )
    return decoding.answers if len(questions) > 1 else [written[0, ids.shape[1] :].tolist()]


def _padded(document: torch.Tensor, ids: Sequence[int], tokens: int) -> list[int]:
    """Return the ids of a question with padding before it.

    The padding repeats the document's last ids. So penalties for repetition, which look at all ids, see no other ids
    than without padding.
    """
    missing = tokens - len(ids)
    filling = document[document.shape[0] - missing :].tolist() if missing else []
    first = filling[0] if filling else ids[0]
    return [first] * (missing - len(filling)) + filling + list(ids)


@contextmanager
def _forked(cache: HeadCache, rows: torch.Tensor, padding: int) -> Iterator[HeadCache]:
    """Fork a cache as fork_rows() does, and free its memory at the end."""
    forked = cache.fork_rows(rows, padding)
    try:
        yield forked
    finally:
        forked.reset()


class _Decoding:
    """The decoding loop of a batch, which generate() calls with the processors and criteria that it has prepared.

    Processors and criteria see all rows at each step, as in generate()'s own loop. The model computes the rows whose
    answers have not ended.

    Args:
        questions: the questions, one for each row.

    Attributes:
        answers: the ids of each answer so far.
    """

    def __init__(self, questions: Sequence[BatchQuestion]) -> None:
        self._questions = questions
        self.answers: list[list[int]] = [[] for _ in questions]

    def run(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: Callable[..., torch.Tensor],
        stopping_criteria: Callable[..., torch.Tensor],
        generation_config: Any,
        tokenizer: Any = None,  # generate() passes a tokenizer on to stopping criteria if a loop takes one
        **model_kwargs: Any,
    ) -> torch.Tensor:
        """Decode all answers to their ends.

        Args:
            model: the enabled model.
            input_ids: the prompts [N, T].
            logits_processor: changes the scores [N, V].
            stopping_criteria: says which rows have ended, bool [N].
            generation_config: the configuration of the call.
            tokenizer: not used here.
            **model_kwargs: the arguments of the model.

        Returns:
            The ids [N, T + new], with any ids behind the end of an answer.
        """
        cache: HeadCache = model_kwargs["past_key_values"]
        length = input_ids.shape[1]
        new_tokens = max(question.new_tokens for question in self._questions)
        ids = torch.nn.functional.pad(input_ids, (0, new_tokens), value=_IGNORED_ID)
        step = length - cache.get_seq_length()
        scores: torch.Tensor | None = None
        alive = list(range(len(self._questions)))
        for number in alive:
            self._stream(number, input_ids[number])
        is_first = True
        while alive:
            chosen = torch.tensor(alive, device=ids.device)
            inputs = model.prepare_inputs_for_generation(
                ids[chosen, :length] if is_first else ids[chosen, length - 1 : length],
                next_sequence_length=step,
                is_first_iteration=is_first,
                **model_kwargs,
            )
            outputs = model(**inputs, return_dict=True)
            model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
            if model_kwargs.get("position_ids") is not None:
                model_kwargs["position_ids"] = model_kwargs["position_ids"][..., -1:]  # those before are not used again
            logits = outputs.logits[:, -1].to(device=ids.device, dtype=torch.float32)
            del outputs
            scores = logits if scores is None else scores.index_copy(0, chosen, logits)
            processed = logits_processor(ids[:, :length], scores.clone())[chosen]
            if generation_config.do_sample:
                ids[chosen, length] = torch.multinomial(processed.softmax(dim=-1), num_samples=1)[:, 0]
            else:
                ids[chosen, length] = processed.argmax(dim=-1)
            length += 1
            ended = stopping_criteria(ids[:, :length], None).tolist()
            kept = []
            for at, number in enumerate(alive):
                token = ids[number, length - 1 : length]
                self.answers[number].append(int(token))
                self._stream(number, token)
                if ended[number] or len(self.answers[number]) >= self._questions[number].new_tokens:
                    self._end(number)
                else:
                    kept.append(at)
            if len(kept) < len(alive):
                alive = [alive[at] for at in kept]
                if alive:
                    model_kwargs = _select_rows(model_kwargs, torch.tensor(kept, device=ids.device))
            is_first = False
            step = 1
        return ids[:, :length]

    def _stream(self, number: int, ids: torch.Tensor) -> None:
        streamer = self._questions[number].streamer
        if streamer is not None:
            streamer.put(ids.cpu())

    def _end(self, number: int) -> None:
        streamer = self._questions[number].streamer
        if streamer is not None:
            streamer.end()


def _select_rows(model_kwargs: dict[str, Any], rows: torch.Tensor) -> dict[str, Any]:
    """Keep some rows of the cache and of the other arguments of a model in generate()."""
    cache: HeadCache = model_kwargs["past_key_values"]
    before = cache.head_layers[0].rows
    cache.reorder_cache(rows)
    selected = dict(model_kwargs)
    for name, value in model_kwargs.items():
        if isinstance(value, torch.Tensor) and value.ndim >= 2:
            # position_ids may be [3, B, T], with a position in time, height and width
            dim = value.ndim - 2 if name == "position_ids" else 0
            if value.shape[dim] == before:
                selected[name] = value.index_select(dim, rows)
    mask = selected.get("attention_mask")
    if mask is not None and bool(mask.all()):
        selected["attention_mask"] = None
    return selected
