"""/v1/files: documents, which are read into sessions in the background."""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from anyio import to_thread
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from openai.types import FileDeleted, FileObject
from starlette.datastructures import UploadFile

from headinfer.errors import CapacityError
from headinfer.serve.access import client_name
from headinfer.serve.http_errors import HttpError, without_paths
from headinfer.serve.requests import DocumentState, DocumentStatus
from headinfer.serve.service import Service

__all__ = ["file_json", "file_routes"]

_PURPOSES = ("user_data", "assistants")
_STATUS: dict[DocumentStatus, Literal["uploaded", "processed", "error"]] = {
    "waiting": "uploaded",
    "reading": "uploaded",
    "partial": "uploaded",
    "ready": "processed",
    "failed": "error",
}
_IN_MEMORY_BYTES = 1 << 20
_FORM = {"max_files": 1, "max_fields": 8, "max_part_size": 1 << 16}


def file_routes(service: Service) -> APIRouter:
    """Return the routes of documents."""
    router = APIRouter()

    @router.post("/v1/files")
    async def add(request: Request) -> Response:
        if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            raise HttpError(415, "the request is no form with a file: send multipart/form-data with the field file")
        with _storing():
            form = await request.form(**_FORM)
        try:
            given = form.get("file")
            if not isinstance(given, UploadFile):
                raise HttpError(400, "the form has no file in the field file: send one", param="file")
            purpose = form.get("purpose", "user_data")
            if purpose not in _PURPOSES:
                raise HttpError(400, f"purpose must be one of {', '.join(_PURPOSES)}", param="purpose")
            unknown = sorted(set(form) - {"file", "purpose"})
            if unknown:
                name = unknown[0][:100]
                raise HttpError(400, f"{name} is unknown or not supported: leave it out", param=name)
            with _storing():
                state = await to_thread.run_sync(_add, service, given, client_name(request.scope))
        finally:
            await form.close()
        return JSONResponse(file_json(state))

    @router.get("/v1/files")
    async def files(
        limit: Annotated[int, Query(ge=1, le=10000)] = 10000,
        order: Literal["asc", "desc"] = "asc",
        after: str | None = None,
        purpose: str | None = None,
    ) -> Response:
        states = await to_thread.run_sync(service.documents)
        chosen = [] if purpose not in (None, "user_data") else states
        return JSONResponse(_page([file_json(state) for state in chosen], limit, order, after))

    @router.get("/v1/files/{file_id}")
    async def file(file_id: str) -> Response:
        return JSONResponse(file_json(await to_thread.run_sync(service.document, file_id)))

    @router.delete("/v1/files/{file_id}")
    async def delete(file_id: str) -> Response:
        await to_thread.run_sync(service.remove_document, file_id)
        return JSONResponse(FileDeleted(id=file_id, object="file", deleted=True).to_dict())

    @router.get("/v1/files/{file_id}/content")
    async def content(
        file_id: str, start: Annotated[int, Query(ge=0)] = 0, stop: Annotated[int | None, Query(ge=0)] = None
    ) -> Response:
        text = await to_thread.run_sync(service.document_text, file_id, start, stop)
        return PlainTextResponse(text.encode("utf-8", "replace"))

    return router


@contextmanager
def _storing() -> Iterator[None]:
    """Turn the error of a full disk into one for the client."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise CapacityError("the server's disk is full: send less, or free some of it") from error


def _add(service: Service, given: UploadFile, client: str) -> DocumentState:
    """Hand a file to the service, through a file of its own if it is large."""
    filename = given.filename or ""
    if (given.size or 0) <= _IN_MEMORY_BYTES:
        return service.add_document(filename, given.file.read(), client)
    with tempfile.NamedTemporaryFile(prefix="headinfer-") as copy:
        shutil.copyfileobj(given.file, copy, 1 << 20)
        copy.flush()
        return service.add_document(filename, Path(copy.name), client)


def file_json(state: DocumentState) -> dict[str, Any]:
    """Return a document as OpenAI's file object, with the field "headinfer" for how far it is read."""
    file = FileObject(
        id=state.name,
        object="file",
        bytes=state.nbytes,
        created_at=int(state.created_s),
        filename=state.filename,
        purpose="user_data",
        status=_STATUS[state.status],
        status_details=without_paths(state.error) or None,
    )
    progress = {
        "state": state.status,
        "tokens": state.tokens,
        "of": state.of,
        "eta_s": state.eta_s,
        "disk_bytes": state.disk_bytes,
        "characters": state.characters,
        "approximation": state.approximation,
    }
    return {**file.to_dict(), "headinfer": progress}


def _page(files: Sequence[dict[str, Any]], limit: int, order: str, after: str | None) -> dict[str, Any]:
    """Return a list of files as OpenAI's clients go through it."""
    ordered = list(files) if order == "asc" else list(reversed(files))
    ids = [one["id"] for one in ordered]
    begin = ids.index(after) + 1 if after in ids else 0
    chosen = ordered[begin : begin + limit]
    return {
        "object": "list",
        "data": chosen,
        "first_id": chosen[0]["id"] if chosen else None,
        "last_id": chosen[-1]["id"] if chosen else None,
        "has_more": begin + limit < len(ordered),
    }
