"""What a request tells its client, in order: its place in the queue, progress, the answer, and one last event.

The last event of every request is `Done` or `Failed`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from headinfer.errors import HeadinferError

__all__ = [
    "Done",
    "Event",
    "Failed",
    "FinishReason",
    "Passage",
    "Prefill",
    "Queued",
    "Reasoning",
    "Text",
    "ToolCall",
    "Where",
]

FinishReason = Literal["stop", "length", "tool_calls", "cancelled"]


@dataclass(frozen=True)
class Queued:
    """The request waits.

    Attributes:
        position: how many requests are before it.
    """

    position: int


@dataclass(frozen=True)
class Prefill:
    """The prompt, or the document that it is about, is being read.

    Attributes:
        tokens: tokens that have been read, those of a cache or session included.
        of: tokens to read in all.
        eta_s: estimated seconds until all are read; None if there is no estimate yet.
    """

    tokens: int
    of: int
    eta_s: float | None


@dataclass(frozen=True)
class Text:
    """A part of the answer's text."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """A part of the text in which the model reasons before its answer."""

    text: str


@dataclass(frozen=True)
class ToolCall:
    """The model calls a tool.

    Attributes:
        id: a name of this call, unique within the service.
        name: the name of the tool.
        arguments: its arguments, as JSON.
    """

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Passage:
    """A passage of the document that an answer attended to.

    Attributes:
        start: its first character in the document's text.
        stop: the character after its last one.
        share: its share of the attention, 0 to 1.
        text: its text.
        file: the file of the document that holds it; empty if the document is one text.
        file_start: its first character in that file.
    """

    start: int
    stop: int
    share: float
    text: str
    file: str = ""
    file_start: int = 0


@dataclass(frozen=True)
class Where:
    """Where in the document the answer came from.

    Attributes:
        passages: the passages with the largest shares, the largest first.
        unavailable_reason: why they cannot be told; empty if they can.
    """

    passages: tuple[Passage, ...]
    unavailable_reason: str = ""


@dataclass(frozen=True)
class Done:
    """The request has ended without an error.

    Attributes:
        finish_reason: "stop" for the end of the answer or a stop string, "length" for max_new_tokens, "tool_calls" if
            the model calls tools, "cancelled" after Work.cancel().
        prompt_tokens: tokens of the prompt, those of the document included.
        cached_tokens: how many of them were not read for this request, since a cache or a session held them.
        completion_tokens: tokens that were generated.
    """

    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Failed:
    """The request has ended with an error.

    Attributes:
        error: the error. Its message is one sentence without paths of the server.
    """

    error: HeadinferError


Event = Queued | Prefill | Text | Reasoning | ToolCall | Where | Done | Failed
