"""The web server under the application: uvicorn, with a limit of the time that the head of a request may take."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from headinfer.serve.access import HEAD_BYTES

__all__ = ["web_server"]

HEAD_S = 20.0
CONNECTIONS = 1000
_GOODBYE_S = 3


def web_server(app: FastAPI, on_end: Callable[[], None]) -> uvicorn.Server:
    """Return a server of an application. Its run() takes listening sockets, and ends after Ctrl-C.

    Args:
        app: the application.
        on_end: ends all work of the application, so that answers that are being sent end too.
    """
    return _Server(
        uvicorn.Config(
            app,
            http=_TimedProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            h11_max_incomplete_event_size=HEAD_BYTES,
            limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=_GOODBYE_S,
        ),
        on_end,
    )


class _Server(uvicorn.Server):
    """A server that ends the work of its application when it ends."""

    def __init__(self, config: uvicorn.Config, on_end: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_end = on_end

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the work, and close all connections."""
        ending = asyncio.ensure_future(asyncio.to_thread(self._on_end))
        await super().shutdown(sockets)
        await ending


class _TimedProtocol(H11Protocol):
    """A connection that is closed if the head of a request does not come within `HEAD_S` seconds.

    uvicorn limits the time between requests, but not that of a head that comes byte by byte.
    """

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a head."""
        super().connection_made(transport)
        # asyncio does so only if the listening socket has a protocol number. Without it each part waits for 40 ms.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        """Take bytes of a client."""
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._wait_for_head()
        else:
            self._stop_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._stop_timer()
        super().connection_lost(exc)

    def _wait_for_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_S, self.transport.close)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
