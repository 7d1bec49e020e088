"""The HTTP application over a service: OpenAI's API, its extensions, and the page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from anyio import to_thread
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from openai.types import Model
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headinfer.errors import HeadinferError
from headinfer.serve.access import Access, HostCheck, KeyCheck, Limits
from headinfer.serve.chat import chat_routes
from headinfer.serve.common import check_model, now
from headinfer.serve.completions import completion_routes
from headinfer.serve.files import file_routes
from headinfer.serve.http_errors import BUG, HttpError, as_http_error, error_response
from headinfer.serve.metrics import metrics_routes
from headinfer.serve.responses import response_routes
from headinfer.serve.service import Service

__all__ = ["build_app"]

_PAGE = Path(__file__).parent / "page"
_HEADERS = {
    "Cache-Control": "no-cache",  # a browser asks whether its copy of the page is that of this version
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_CLIENT_LEFT = 499  # nobody reads this answer
_MESSAGES = {
    404: "there is nothing at this path: docs/serve.md lists what there is",
    405: "this path does not have this method: docs/serve.md lists what there is",
}


def build_app(service: Service, access: Access) -> FastAPI:
    """Return the application.

    Args:
        service: what does the work.
        access: who may use it, and how much a request may send.
    """
    app = FastAPI(title="headinfer", docs_url=None, redoc_url=None, openapi_url=None)
    for routes in (chat_routes, completion_routes, response_routes, file_routes, metrics_routes):
        app.include_router(routes(service))
    _add_small_routes(app, service)
    app.mount("/page", StaticFiles(directory=_PAGE, check_dir=False))
    _add_error_handlers(app, service.settings.root)
    for middleware in (KeyCheck, HostCheck, Limits):  # the last one is the outermost
        app.add_middleware(middleware, access=access)
    app.add_middleware(_SafetyHeaders)
    return app


def _add_small_routes(app: FastAPI, service: Service) -> None:
    model = Model(id=service.model, object="model", created=now(), owned_by="headinfer").to_dict()

    @app.get("/health")
    async def health() -> Response:
        if not service.is_ready:
            raise HttpError(503, "the server does not work any more: start it again", code="closed")
        return JSONResponse({"status": "ok"})

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [model]})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        check_model(service, name)
        return JSONResponse(model)

    @app.get("/v1/state")
    async def state() -> Response:
        return JSONResponse(asdict(await to_thread.run_sync(service.state)))

    @app.get("/")
    async def page() -> Response:
        return FileResponse(_PAGE / "index.html")


def _add_error_handlers(app: FastAPI, root: Path) -> None:
    def handles(kind: type[Exception], convert: Callable[[Any], HttpError]) -> None:
        async def handler(_: Request, error: Exception) -> Response:
            return error_response(convert(error))

        app.add_exception_handler(kind, handler)

    handles(HttpError, lambda error: error)
    handles(HeadinferError, lambda error: as_http_error(error, root))
    handles(HTTPException, _of_framework)
    handles(RequestValidationError, _of_query)
    handles(ClientDisconnect, lambda _: HttpError(_CLIENT_LEFT, "the client has left"))
    handles(Exception, lambda _: BUG)  # uvicorn logs the traceback


def _of_framework(error: HTTPException) -> HttpError:
    """Return an error of routing, or of a form that cannot be read."""
    message = _MESSAGES.get(error.status_code, f"the request cannot be read ({error.detail}): send it again")
    return HttpError(error.status_code, message, headers=dict(error.headers or {}))


def _of_query(error: RequestValidationError) -> HttpError:
    """Return a wrong parameter of a query."""
    first = error.errors()[0]
    name = str(first["loc"][-1])
    return HttpError(400, f"{name} in the query is wrong ({first['msg']}): give another value", param=name)


class _SafetyHeaders:
    """Adds headers to every answer: browsers load nothing from elsewhere, guess no type, and keep nothing unasked.

    Args:
        app: the application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""

        async def sends(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, sends)
