"""A request on its way: what was asked, what was read of its prompt, and what its client is told."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch

from headinfer.hf.cache import HeadCache
from headinfer.serve.caches import Checkpoint, Kept
from headinfer.serve.events import Done, Event, Failed, FinishReason
from headinfer.serve.parsing import AnswerStream
from headinfer.serve.requests import Ask
from headinfer.serve.turns import Kind

__all__ = ["AnswerTask", "Begun"]

_logger = logging.getLogger(__name__)


@dataclass
class Begun:
    """A request whose prompt is being read.

    Attributes:
        ids: the token ids [T] of the prompt, int64.
        cache: holds a beginning of it.
        cached: how many tokens it held at first.
        chunk_tokens: tokens of a chunk.
        origin: the session with which the prompt begins; None if there is none.
        base: the kept cache of exactly this session, if the cache is a fork of it.
        checkpoints: those of the cache to which it can return; see Kept.
        is_kept: whether the cache is kept, so that it belongs to other requests now.
        stream: the answer, once it has begun.
    """

    ids: torch.Tensor
    cache: HeadCache
    cached: int
    chunk_tokens: int
    origin: str | None
    base: Kept | None
    checkpoints: tuple[Checkpoint, ...] = ()
    is_kept: bool = False
    stream: AnswerStream | None = None


class AnswerTask:
    """A request on its way. It is the `Work` that submit() returns.

    Args:
        request: the request.
        rest_ids: the token ids of its prompt, or those after its session.
        max_new_tokens: tokens of the answer, at most.
        on_event: called with each event.

    Attributes:
        client: who asks.
        kind: "answer".
        request: the request.
        rest_ids: as given.
        max_new_tokens: as given.
        begun: what was found and read of the prompt so far; None before the first step.
    """

    kind: Kind = "answer"

    def __init__(
        self, request: Ask, rest_ids: list[int], max_new_tokens: int, on_event: Callable[[Event], None]
    ) -> None:
        self.client = request.client
        self.request = request
        self.rest_ids = rest_ids
        self.max_new_tokens = max_new_tokens
        self.begun: Begun | None = None
        self._on_event = on_event
        self._cancelling = threading.Event()
        self._has_ended = False

    @property
    def is_cancelled(self) -> bool:
        """Whether it must end."""
        return self._cancelling.is_set()

    @property
    def has_ended(self) -> bool:
        """Whether its last event was told."""
        return self._has_ended

    def cancel(self) -> None:
        """End the request within one chunk or token. What was read is kept. It may be called at any time."""
        self._cancelling.set()

    def tell(self, event: Event) -> None:
        """Tell the client an event, unless the last one was told."""
        if self._has_ended:
            return
        self._has_ended = isinstance(event, Done | Failed)
        if self._has_ended:
            self.begun = None  # clients may hold on to this object for long
        try:
            self._on_event(event)
        except Exception:  # whatever the client's function raises must not end the work of others
            _logger.exception("a request is cancelled, since its on_event has failed")
            self.cancel()

    def end(self, reason: FinishReason, stream: AnswerStream | None = None) -> None:
        """Tell the client that the request has ended without an error."""
        begun = self.begun
        prompt = begun.ids.shape[0] if begun is not None else len(self.rest_ids)
        written = len(stream.answer.token_ids) if stream is not None else 0
        self.tell(Done(reason, prompt, begun.cached if begun is not None else 0, written))

    def is_asked_like(self, other: AnswerTask) -> bool:
        """Return whether both requests can be answered in one batch, if they ask the same session."""
        one = self.request
        two = other.request
        is_same = one.session == two.session and one.sampling == two.sampling and not (one.where or two.where)
        return is_same and (not one.sampling.ignore_eos or self.max_new_tokens == other.max_new_tokens)
