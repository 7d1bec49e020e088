"""Server-sent events: the frames of a stream, and comments while there is nothing to send."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from headinfer.errors import HeadinferError
from headinfer.serve.http_errors import HttpError, as_http_error

__all__ = ["COMMENT", "END", "EventStream", "frame", "with_comments"]

COMMENT = b": waiting\n\n"
END = b"data: [DONE]\n\n"
SILENCE_S = 5.0


def frame(data: dict[str, Any], event: str | None = None) -> bytes:
    """Return an event as bytes.

    Args:
        data: the event, for JSON, in which a line break cannot end the event.
        event: its name.
    """
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    name = f"event: {event}\n" if event else ""
    return f"{name}data: {text}\n\n".encode("utf-8", "replace")


class EventStream(StreamingResponse):
    """A response of events. A comment is sent after every few seconds of silence, so that no proxy gives up.

    Args:
        frames: the events as bytes. An error of headinfer that it raises is the last event.
        root: the folder of all sessions, which errors do not name.
        on_end: called when the response has ended, also if the client has left, even before the first event.
    """

    media_type = "text/event-stream"

    def __init__(self, frames: AsyncGenerator[bytes], root: Path, on_end: Callable[[], None]) -> None:
        self._stream = with_comments(_with_error(frames, root))
        self._on_end = on_end
        # The second header asks nginx not to buffer.
        super().__init__(self._stream, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()
            await self._stream.aclose()


async def _with_error(frames: AsyncGenerator[bytes], root: Path) -> AsyncGenerator[bytes]:
    try:
        async for one in frames:
            yield one
    except (HeadinferError, HttpError) as error:
        yield frame(as_http_error(error, root).body())


async def with_comments(frames: AsyncGenerator[bytes], silence_s: float | None = None) -> AsyncGenerator[bytes]:
    """Yield the frames, and a comment after each `silence_s` seconds (5 if None) in which there is none."""
    coming = asyncio.ensure_future(anext(frames, None))
    try:
        while True:
            ready, _ = await asyncio.wait({coming}, timeout=SILENCE_S if silence_s is None else silence_s)
            if not ready:
                yield COMMENT
                continue
            one = coming.result()
            if one is None:
                return
            yield one
            coming = asyncio.ensure_future(anext(frames, None))
    finally:
        coming.cancel()
