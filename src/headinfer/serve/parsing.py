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

__all__ = ["AnswerStream", "CanEnd", "Cancelled"]

_PARSER_ERRORS = (LookupError, RuntimeError, TypeError, ValueError)  # of transformers' parser, for invalid tool calls

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
        self.on_tokens: Callable[[int], None] = lambda tokens: None
        self.on_end: Callable[[], None] = lambda: None
        self._tell = tell
        self._parser = parser
        self._has_prompt = False
        self._has_ended = False
        self._call_names = (f"call_{secrets.token_hex(8)}{number}" for number in itertools.count())
        if parser is not None:
            self._tell_parsed(parser.initial_events)

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, and then the new tokens of each pass."""
        if not self._has_prompt:
            self._has_prompt = True
            return
        ids = value.flatten().tolist()
        self.on_tokens(len(ids))
        self.answer.put(ids)

    def end(self) -> None:
        """Pass on the rest of the text."""
        if self._has_ended:
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
