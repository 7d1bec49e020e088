"""The events of a request of the core, for asyncio: one by one, or collected."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from anyio import to_thread
from starlette.requests import ClientDisconnect, Request

from headinfer.errors import StateError
from headinfer.serve.events import Done, Event, Failed, Reasoning, Text, ToolCall, Where
from headinfer.serve.requests import Ask
from headinfer.serve.service import Service, Work

__all__ = ["Answer", "WholeAnswer", "while_connected"]

T = TypeVar("T")


@dataclass
class WholeAnswer:
    """An answer that is complete.

    Attributes:
        done: the event that ended it.
        text: its text.
        reasoning: the text in which the model reasons before it.
        tool_calls: the calls of tools.
        where: where in the document it came from; None if that was not asked for.
    """

    done: Done
    text: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    where: Where | None = None


class Answer:
    """A request that was submitted. Its events are iterated over once.

    Args:
        events: the events, which the worker thread puts in.
        work: the request.
    """

    def __init__(self, events: asyncio.Queue[Event], work: Work) -> None:
        self._events = events
        self.cancel = work.cancel

    @classmethod
    async def begin(cls, service: Service, ask: Ask) -> Answer:
        """Submit a request.

        Raises:
            HeadinferError: as `Service.submit`.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()

        def on_event(event: Event) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, event)

        submitting = asyncio.ensure_future(to_thread.run_sync(service.submit, ask, on_event))
        try:
            work = await asyncio.shield(submitting)
        except asyncio.CancelledError:  # the server stops; the thread goes on
            submitting.add_done_callback(_cancel_work)
            raise
        return cls(events, work)

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Yield the events. The last one is `Done`.

        Raises:
            HeadinferError: the request has failed.
        """
        while True:
            event = await self._events.get()
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Done) and event.finish_reason == "cancelled":
                raise StateError("the service was closed")
            yield event
            if isinstance(event, Done):
                return

    async def whole(self, request: Request) -> WholeAnswer:
        """Wait for the end of the answer, and end it if the client leaves.

        Raises:
            HeadinferError: the request has failed.
            ClientDisconnect: the client has left.
        """
        return await while_connected(request, self, self._collect())

    async def _collect(self) -> WholeAnswer:
        whole = WholeAnswer(Done("stop", 0, 0, 0))
        async for event in self:
            match event:
                case Text(text):
                    whole.text += text
                case Reasoning(text):
                    whole.reasoning += text
                case ToolCall():
                    whole.tool_calls.append(event)
                case Where():
                    whole.where = event
                case Done():
                    whole.done = event
        return whole


async def while_connected(request: Request, answer: Answer, waiting: Coroutine[Any, Any, T]) -> T:
    """Return the result of a coroutine, and end an answer if the client leaves before.

    Raises:
        ClientDisconnect: the client has left.
    """
    result = asyncio.ensure_future(waiting)
    leaving = asyncio.ensure_future(_until_disconnect(request))
    try:
        await asyncio.wait({result, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not result.done():
            raise ClientDisconnect
        return result.result()
    finally:
        answer.cancel()
        result.cancel()
        leaving.cancel()


def _cancel_work(submitting: asyncio.Future[Work]) -> None:
    if not submitting.cancelled() and submitting.exception() is None:
        submitting.result().cancel()


async def _until_disconnect(request: Request) -> None:
    """Return when the client has left. The body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
