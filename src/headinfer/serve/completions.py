"""POST /v1/completions: a text goes on, without a chat template."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse
from openai.types import Completion, CompletionChoice
from pydantic import Field

from headinfer.serve.answers import Answer, WholeAnswer
from headinfer.serve.bodies import GenerationBody, StreamOptions, Zero, json_body, session_of
from headinfer.serve.common import approximation_json, begin_answer, new_id, now, progress_json, usage, where_json
from headinfer.serve.events import Done, Prefill, Queued, Reasoning, Text, Where
from headinfer.serve.http_errors import HttpError
from headinfer.serve.service import Service
from headinfer.serve.sse import END, EventStream, frame

__all__ = ["CompletionBody", "completion_routes"]

Ids = list[Annotated[int, Field(ge=0, le=2**31 - 1)]]


class CompletionBody(GenerationBody):
    """The body of a request for a completion. A list of texts, or of lists of token ids, has one entry."""

    prompt: str | Ids | list[str] | list[Ids]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    logprobs: None = None
    suffix: None = None
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None


def completion_routes(service: Service) -> APIRouter:
    """Return the route of completions."""
    router = APIRouter()

    @router.post("/v1/completions")
    async def complete(
        request: Request, body: Annotated[CompletionBody, Depends(json_body(CompletionBody))]
    ) -> Response:
        answer = await begin_answer(
            request,
            service,
            body,
            session=session_of(body.metadata),
            max_new_tokens=body.max_tokens,
            prompt=_prompt(body.prompt),
        )
        if body.stream:
            wants_usage = bool(body.stream_options and body.stream_options.include_usage)
            frames = _frames(service, answer, wants_usage)
            return EventStream(frames, service.settings.root, answer.cancel)
        return JSONResponse(_completion(service, await answer.whole(request)))

    return router


def _prompt(prompt: str | Sequence[Any]) -> str | Sequence[int]:
    """Return the one prompt of a request.

    Raises:
        HttpError: it has none or several.
    """
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        return prompt
    if len(prompt) != 1:
        raise HttpError(400, f"prompt has {len(prompt)} entries: send one prompt in a request", param="prompt")
    only: str | Sequence[int] = prompt[0]
    return only


def _completion(service: Service, whole: WholeAnswer) -> dict[str, Any]:
    choice = CompletionChoice(index=0, text=whole.text, finish_reason=_reason(whole.done), logprobs=None)
    completion = Completion(
        id=new_id("cmpl-"),
        object="text_completion",
        created=now(),
        model=service.model,
        choices=[choice],
        usage=usage(whole.done),
    )
    return {**completion.to_dict(), **where_json(whole.where), **approximation_json(service)}


def _reason(done: Done) -> Literal["stop", "length"]:
    return "length" if done.finish_reason == "length" else "stop"


async def _frames(service: Service, answer: Answer, wants_usage: bool) -> AsyncGenerator[bytes]:
    completion_id = new_id("cmpl-")
    created = now()
    extra = approximation_json(service)

    def chunk(choices: list[dict[str, Any]], more: dict[str, Any]) -> bytes:
        fields = {"id": completion_id, "object": "text_completion", "created": created, "model": service.model}
        last = {"usage": None} if wants_usage else {}
        return frame({**fields, "choices": choices, **last, **more})

    def choice(text: str, reason: str | None) -> list[dict[str, Any]]:
        return [{"index": 0, "text": text, "finish_reason": reason, "logprobs": None}]  # the type needs a reason

    async for event in answer:
        match event:
            case Queued() | Prefill():
                yield chunk([], progress_json(event))
            case Text(text) | Reasoning(text):
                yield chunk(choice(text, None), {})
            case Where():
                extra |= where_json(event)
            case Done():
                yield chunk(choice("", _reason(event)), extra)
                if wants_usage:
                    yield chunk([], {"usage": usage(event).to_dict()})
    yield END
