"""Takes the tokens of an answer, and tells a client its text, its reasoning and its tool calls as they come."""

from __future__ import annotations

import itertools
import logging
import secrets
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from headinfer.hf.compat import BaseStreamer, StoppingCriteria, parsed_events
from headinfer.jobs.answer_text import AnswerText
from headinfer.serve.events import Event, Reasoning, Text, ToolCall

__all__ = ["AnswerStream", "CanEnd", "Cancelled", "TurnOver"]

_PARSER_ERRORS = (LookupError, RuntimeError, TypeError, ValueError)  # of transformers' parser, for invalid tool calls

_TURN_TOKENS = 32  # of an answer, before those of other clients go on

_logger = logging.getLogger(__name__)


class AnswerStream(BaseStreamer):  # type: ignore[misc]
    """A streamer of transformers for one answer.

    Args:
        tokenizer: the model's tokenizer.
        stop: texts that end the answer.
        tell: called with each event.
        parser: what hf.compat.response_parser() returned; None passes all text on.

    Attributes:
        answer: the answer so far.
        has_tool_calls: whether the model has called a tool.
        is_paused: whether the answer goes on in a later generate(), so that the end of this one is not its end.
        on_tokens: called with the number of new tokens of each pass.
        on_end: called when the answer has ended.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop: Sequence[str],
        tell: Callable[[Event], None],
        parser: Any = None,
    ) -> None:
        self.answer = AnswerText(tokenizer, stop, self._pass_on, has_special=parser is not None)
        self.has_tool_calls = False
        self.is_paused = False
        self.on_tokens: Callable[[int], None] = lambda tokens: None
        self.on_end: Callable[[], None] = lambda: None
        self._tell = tell
        self._parser = parser
        self._has_prompt = False
        self._has_ended = False
        self._call_names = (f"call_{secrets.token_hex(8)}{number}" for number in itertools.count())
        if parser is not None:
            self._tell_parsed(parser.initial_events)

    def begin_turn(self) -> None:
        """Note that a generate() begins, which gives its prompt first."""
        self.is_paused = False
        self._has_prompt = False

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, and then the new tokens of each pass."""
        if not self._has_prompt:
            self._has_prompt = True
            return
        ids = value.flatten().tolist()
        self.on_tokens(len(ids))
        self.answer.put(ids)

    def end(self) -> None:
        """Pass on the rest of the text, unless the answer is paused."""
        if self._has_ended or self.is_paused:
            return
        self._has_ended = True
        self.answer.end()
        if self._parser is not None:
            try:
                _, events = self._parser.finalize()
                self._tell_parsed(events)
            except _PARSER_ERRORS as error:  # the answer ends within a tool call
                _logger.warning("the end of an answer could not be parsed: %s", error)
        self.on_end()

    def _pass_on(self, text: str) -> None:
        if self._parser is None:
            self._tell(Text(text))
            return
        try:
            self._tell_parsed(self._parser.feed(text))
        except _PARSER_ERRORS as error:  # a tool call that is none
            _logger.warning("an answer could not be parsed, so its rest is passed on as it is: %s", error)
            self._parser = None
            self._tell(Text(text))

    def _tell_parsed(self, events: list[Any]) -> None:
        for kind, text, arguments in parsed_events(events):
            if kind == "tool":
                self.has_tool_calls = True
                self._tell(ToolCall(next(self._call_names), text, arguments))
            else:
                self._tell(Reasoning(text) if kind == "reasoning" else Text(text))


class CanEnd(Protocol):
    """A request that can be cancelled."""

    @property
    def is_cancelled(self) -> bool:
        """Whether it must end."""


class Cancelled(StoppingCriteria):  # type: ignore[misc]
    """Ends each row of generate() whose request was cancelled.

    Args:
        rows: the request of each row.
    """

    takes_several_tokens = True  # read by hf/guesses.py

    def __init__(self, rows: Sequence[CanEnd]) -> None:
        self._rows = rows

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Return which rows have ended, a bool tensor [B]."""
        return torch.tensor([row.is_cancelled for row in self._rows], device=input_ids.device)


class TurnOver(StoppingCriteria):  # type: ignore[misc]
    """Pauses an answer if other clients wait and it has got some tokens since its turn began.

    It also ends an answer whose stop string began in an earlier turn, which generate() does not see.

    Args:
        stream: the answer.
        others_wait: returns whether other clients wait.
        prompt_tokens: tokens before the turn.
    """

    takes_several_tokens = True  # read by hf/guesses.py

    def __init__(self, stream: AnswerStream, others_wait: Callable[[], bool], prompt_tokens: int) -> None:
        self._stream = stream
        self._others_wait = others_wait
        self._stop = prompt_tokens + _TURN_TOKENS

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Return whether the turn is over, a bool tensor [1]."""
        if input_ids.shape[1] >= self._stop and self._others_wait():
            self._stream.is_paused = True
        is_over = self._stream.is_paused or self._stream.answer.stopped_by is not None
        return torch.tensor([is_over], device=input_ids.device)
