"""Who may use the server, and how much a request may send: pure ASGI middlewares.

A page of another site can make a browser send requests to a server on loopback, also under a name of its own that
resolves to 127.0.0.1 (DNS rebinding). So the Host of a request must be a name of this server, and its Origin must be
this server.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import time
from contextlib import suppress
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headinfer.serve.http_errors import HttpError, error_response

__all__ = ["Access", "HostCheck", "KeyCheck", "Limits", "client_name"]

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
WILDCARDS = ("0.0.0.0", "::")
HEAD_BYTES = 32768
_FILES = "/v1/files"
_DEFAULT_PORTS = (":80", ":443")
_CLOSE = {"Connection": "close"}


@dataclass(frozen=True)
class Access:
    """Who may use the server, and how much a request may send.

    Attributes:
        host: the name or address that the server listens on.
        keys: the keys, one of which a request must have; none if no key is needed.
        allowed_hosts: further names that the Host of a request may have, such as that of a reverse proxy.
        body_bytes: bytes of a request, but for files.
        file_bytes: bytes of a request that brings a file.
        grace_s: seconds that any body may take; afterwards it must have come at `slowest_bytes_per_s`.
        slowest_bytes_per_s: the rate at which a body must come on average.
        stall_s: seconds that a client may take to accept a part of an answer.
    """

    host: str = "127.0.0.1"
    keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    body_bytes: int = 64 << 20
    file_bytes: int = (1 << 30) + (1 << 20)  # a document of 1 GiB, and the form around it
    grace_s: float = 30.0
    slowest_bytes_per_s: float = 16384.0
    stall_s: float = 300.0

    def allows_host(self, name: str) -> bool:
        """Return whether a request may name the server so.

        A server on all addresses of a machine may be named by any address: a page of another site needs a name.
        """
        if name in {*LOOPBACK_NAMES, self.host.lower(), *(allowed.lower() for allowed in self.allowed_hosts)}:
            return True
        return self.host in WILDCARDS and _is_address(name)

    def has_key(self, given: str) -> bool:
        """Return whether a text is one of the keys. The time that it takes tells nothing about the keys."""
        digest = _digest(given)
        return sum(hmac.compare_digest(digest, _digest(key)) for key in self.keys) > 0


def client_name(scope: Scope) -> str:
    """Return a name for the client of a request, for fairness: its address."""
    client = scope.get("client")
    return str(client[0]) if client else "unknown"


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _digest(text: str) -> bytes:
    """Return a hash of a text, so that comparing two of them does not tell their lengths."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


class HostCheck:
    """Refuses requests that name another host, or that a page of another site makes.

    Args:
        app: the application.
        access: the rules.
    """

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or refuse it with 403."""
        if scope["type"] == "http":
            error = self._refusal(Headers(scope=scope), scope["path"])
            if error is not None:
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, headers: Headers, path: str) -> HttpError | None:
        hosts = headers.getlist("host")
        name = _host_name(hosts[0]) if len(hosts) == 1 else None
        if name is None or not self._access.allows_host(name):
            return HttpError(
                403,
                "this server does not have the name in the request's Host: use the address that it prints, or give the "
                "name with --allow-host when the server starts",
                code="host_not_allowed",
            )
        is_other_site = any(not _is_same_origin(origin, hosts[0]) for origin in headers.getlist("origin"))
        # Browsers send no Origin with some requests. A link from another page to this one is allowed.
        is_other_site |= path.startswith("/v1/") and headers.get("sec-fetch-site") in ("cross-site", "same-site")
        if is_other_site:
            return HttpError(
                403, "a page of another site made this request: use the page of this server", code="origin_not_allowed"
            )
        return None


def _host_name(host: str) -> str | None:
    """Return the name in a Host header, without its port, in lower case; None if there is none."""
    if host.startswith("["):
        name, bracket, port = host[1:].partition("]")
        if not bracket or (port and not _is_port(port)):
            return None
    else:
        name, colon, number = host.partition(":")
        if colon and not _is_port(f":{number}"):
            return None
    return name.lower().removesuffix(".") or None


def _is_port(text: str) -> bool:
    return text.startswith(":") and text[1:].isdecimal() and text.isascii()


def _is_same_origin(origin: str, host: str) -> bool:
    """Return whether an Origin is the server that a Host header names, whose scheme a proxy may have changed."""
    scheme, _, place = origin.partition("://")
    return scheme in ("http", "https") and _without_default_port(place) == _without_default_port(host)


def _without_default_port(host: str) -> str:
    for port in _DEFAULT_PORTS:
        host = host.removesuffix(port)
    return host.lower()


class KeyCheck:
    """Refuses requests to the API without a key. The page's files and /health need none.

    Args:
        app: the application.
        access: the rules.
    """

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or refuse it with 401."""
        if scope["type"] == "http" and self._access.keys and not _is_public(scope["path"]):
            scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not self._access.has_key(key.strip()):
                given = "the API key is wrong" if key else "there is no API key"
                error = HttpError(
                    401,
                    f"{given}: send the header Authorization: Bearer KEY with a key of this server",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _is_public(path: str) -> bool:
    return path in ("/", "/health") or path.startswith("/page/")


class Limits:
    """Ends requests that are too large or come too slowly, and answers that their client does not accept.

    Args:
        app: the application.
        access: the limits.
    """

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request. Reading its body raises HttpError 413 or 408."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if sum(len(name) + len(value) for name, value in scope["headers"]) + len(scope["path"]) > HEAD_BYTES:
            await error_response(HttpError(431, "the head of the request is too large: send less", headers=_CLOSE))(
                scope, receive, send
            )
            return
        limit = self._access.file_bytes if scope["path"] == _FILES else self._access.body_bytes
        length = Headers(scope=scope).get("content-length", "0")
        if not (length.isascii() and length.isdecimal()) or len(length) > 18:
            await error_response(HttpError(400, "Content-Length is no number"))(scope, receive, send)
            return
        if int(length) > limit:
            await error_response(_too_large(limit))(scope, receive, send)
            return
        body = _Body(receive, self._access, limit)
        with suppress(_StalledError):  # uvicorn closes the connection, since the answer is not complete
            await self._app(scope, body.receive, _patient(send, self._access.stall_s))


class _Body:
    """The body of a request, with a limit of its bytes and of its time."""

    def __init__(self, receive: Receive, access: Access, limit: int) -> None:
        self._receive = receive
        self._access = access
        self._limit = limit
        self._started = time.monotonic()
        self._nbytes = 0
        self._is_whole = False

    async def receive(self) -> Message:
        """Return the next part of the body, or that the client has left.

        Raises:
            HttpError: the body is too large, or comes too slowly.
        """
        if self._is_whole:
            return await self._receive()  # returns when the client leaves
        allowed_s = self._access.grace_s + self._nbytes / self._access.slowest_bytes_per_s
        remaining_s = self._started + allowed_s - time.monotonic()
        try:
            async with asyncio.timeout(max(remaining_s, 0)):
                message = await self._receive()
        except TimeoutError:
            raise HttpError(
                408, "the request's body comes too slowly: send it again", code="slow_body", headers=_CLOSE
            ) from None
        if message["type"] == "http.request":
            self._nbytes += len(message.get("body", b""))
            self._is_whole = not message.get("more_body", False)
            if self._nbytes > self._limit:
                raise _too_large(self._limit)
        return message


def _too_large(limit: int) -> HttpError:
    return HttpError(413, f"the request has more than {limit:,} bytes: send less", code="too_large", headers=_CLOSE)


class _StalledError(Exception):
    """A client does not accept a part of its answer."""


def _patient(send: Send, stall_s: float) -> Send:
    """Return `send` with a limit of the time that a client may take to accept a part of an answer."""

    async def sends(message: Message) -> None:
        try:
            async with asyncio.timeout(stall_s):
                await send(message)
        except TimeoutError:
            raise _StalledError from None

    return sends
