"""What the APIs that answer have in common: the checks of a request, and the parts of their answers."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from openai.types import CompletionUsage
from openai.types.completion_usage import PromptTokensDetails
from starlette.requests import Request

from headinfer.serve.access import client_name
from headinfer.serve.answers import Answer
from headinfer.serve.bodies import GenerationBody
from headinfer.serve.events import Done, Prefill, Queued, Where
from headinfer.serve.http_errors import HttpError
from headinfer.serve.requests import Ask
from headinfer.serve.service import Service

__all__ = [
    "approximation_json",
    "begin_answer",
    "check_model",
    "new_id",
    "now",
    "progress_json",
    "usage",
    "where_json",
]


def check_model(service: Service, name: str | None) -> None:
    """Check that a request does not name another model than the one that is served.

    Raises:
        HttpError: it does.
    """
    if name is not None and name != service.model:
        raise HttpError(
            404,
            f"the model {name[:100]!r} is not served here: use {service.model!r}",
            code="model_not_found",
            param="model",
        )


async def begin_answer(
    request: Request,
    service: Service,
    body: GenerationBody,
    *,
    session: str | None,
    max_new_tokens: int | None,
    messages: Sequence[Mapping[str, Any]] = (),
    prompt: str | Sequence[int] | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
) -> Answer:
    """Submit what a request asks for.

    Raises:
        HttpError: the request names another model, or wants to know where in no document the answer came from.
        HeadinferError: as `Service.submit`.
    """
    check_model(service, body.model)
    if body.where and session is None:
        raise HttpError(400, "where needs a document: name one in metadata.session, or a file", param="where")
    ask = Ask(
        client=client_name(request.scope),
        messages=messages,
        prompt=prompt,
        session=session,
        sampling=body.sampling(service.settings.sampling),
        max_new_tokens=max_new_tokens,
        tools=tools,
        where=bool(body.where),
    )
    return await Answer.begin(service, ask)


def usage(done: Done) -> CompletionUsage:
    """Return the numbers of tokens of a request."""
    return CompletionUsage(
        prompt_tokens=done.prompt_tokens,
        completion_tokens=done.completion_tokens,
        total_tokens=done.prompt_tokens + done.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=done.cached_tokens),
    )


def progress_json(event: Queued | Prefill) -> dict[str, Any]:
    """Return the extra field that says how far a request is: "queue" or "prefill"."""
    return {"queue" if isinstance(event, Queued) else "prefill": asdict(event)}


def where_json(where: Where | None) -> dict[str, Any]:
    """Return the extra field "where", and why its passages cannot be told; nothing if it was not asked for."""
    if where is None:
        return {}
    reason = {"where_unavailable": where.unavailable_reason} if where.unavailable_reason else {}
    return {"where": [asdict(passage) for passage in where.passages], **reason}


def approximation_json(service: Service) -> dict[str, Any]:
    """Return the extra field "approximation" of an answer, a sentence; nothing if KV is exact."""
    sentence = service.settings.approximation
    return {"approximation": sentence} if sentence else {}


def new_id(prefix: str) -> str:
    """Return a new identifier."""
    return f"{prefix}{uuid.uuid4().hex}"


def now() -> int:
    """Return the time in whole seconds since 1970."""
    return int(time.time())
