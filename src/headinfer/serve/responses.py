"""POST /v1/responses: OpenAI's newer form of a chat, whole or as a stream of events. Nothing is stored."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi import Response as HttpResponse
from fastapi.responses import JSONResponse
from openai.types.responses import (
    Response,
    ResponseFunctionToolCall,
    ResponseOutputMessage,
    ResponseOutputText,
    ResponseReasoningItem,
    ResponseUsage,
)
from openai.types.responses.response import IncompleteDetails
from openai.types.responses.response_reasoning_item import Content
from openai.types.responses.response_status import ResponseStatus
from openai.types.responses.response_usage import InputTokensDetails, OutputTokensDetails

from headinfer.errors import HeadinferError
from headinfer.serve.answers import Answer, while_connected
from headinfer.serve.bodies import json_body, session_of
from headinfer.serve.common import approximation_json, begin_answer, new_id, now, progress_json, where_json
from headinfer.serve.events import Done, Event, Prefill, Queued, Reasoning, Text, ToolCall, Where
from headinfer.serve.http_errors import as_http_error
from headinfer.serve.responses_input import ResponseBody, chat_of
from headinfer.serve.service import Service
from headinfer.serve.sse import EventStream, frame

__all__ = ["response_routes"]


def response_routes(service: Service) -> APIRouter:
    """Return the route of responses."""
    router = APIRouter()

    @router.post("/v1/responses")
    async def respond(
        request: Request, body: Annotated[ResponseBody, Depends(json_body(ResponseBody))]
    ) -> HttpResponse:
        messages, file_ids = chat_of(body)
        answer = await begin_answer(
            request,
            service,
            body,
            session=session_of(body.metadata, file_ids),
            max_new_tokens=body.max_output_tokens,
            messages=messages,
            tools=body.chat_tools(),
        )
        output = _Output(service, body)
        if body.stream:
            return EventStream(_frames(output, answer), service.settings.root, answer.cancel)
        return JSONResponse(await while_connected(request, answer, _whole(output, answer)))

    return router


async def _whole(output: _Output, answer: Answer) -> dict[str, Any]:
    async for event in answer:
        output.take(event)
    return output.response()


async def _frames(output: _Output, answer: Answer) -> AsyncGenerator[bytes]:
    numbered = 0
    try:
        for one in output.begin():
            yield frame({**one, "sequence_number": numbered}, one["type"])
            numbered += 1
        async for event in answer:
            for one in output.take(event):
                yield frame({**one, "sequence_number": numbered}, one["type"])
                numbered += 1
    except HeadinferError as error:
        one = output.fail(error)
        yield frame({**one, "sequence_number": numbered}, one["type"])


class _Output:
    """A response that grows with the events of the core, and OpenAI's events that tell so.

    Args:
        service: the service.
        body: the request.
    """

    def __init__(self, service: Service, body: ResponseBody) -> None:
        self._root = service.settings.root
        self._items: list[dict[str, Any]] = []
        self._text = ""  # of the item that grows
        self._more = approximation_json(service)
        self._response = Response(
            id=new_id("resp_"),
            object="response",
            created_at=now(),
            model=service.model,
            output=[],
            status="in_progress",
            error=None,
            incomplete_details=None,
            instructions=body.instructions,
            metadata=body.metadata,
            parallel_tool_calls=True,
            temperature=body.temperature,
            top_p=body.top_p,
            tool_choice=body.tool_choice or "auto",
            tools=[],
        )

    def response(self) -> dict[str, Any]:
        """Return the response as it is now."""
        return {**self._response.to_dict(), "output": list(self._items), **self._more}

    def begin(self) -> list[dict[str, Any]]:
        """Return the events at the beginning."""
        return [{"type": f"response.{name}", "response": self.response()} for name in ("created", "in_progress")]

    def take(self, event: Event) -> list[dict[str, Any]]:
        """Take an event of the core; return OpenAI's events that it leads to."""
        match event:
            case Queued() | Prefill():
                return [{"type": "response.in_progress", "response": self.response(), **progress_json(event)}]
            case Text(text):
                return self._grow("message", "output_text", text)
            case Reasoning(text):
                return self._grow("reasoning", "reasoning_text", text)
            case ToolCall():
                return [*self._finish_item(), *self._call(event)]
            case Where():
                self._more |= where_json(event)
            case Done():
                return [*self._finish_item(), self._end(event)]
        return []

    def fail(self, error: HeadinferError) -> dict[str, Any]:
        """Return the event that ends a response with an error."""
        http_error = as_http_error(error, self._root)
        self._response.status = "failed"
        code = "rate_limit_exceeded" if http_error.status == 429 else "server_error"
        failed = {**self.response(), "error": {"code": code, "message": http_error.message}}
        return {"type": "response.failed", "response": failed}

    def _grow(self, kind: str, part: str, text: str) -> list[dict[str, Any]]:
        """Append a text to the last item, or begin one of its kind."""
        events: list[dict[str, Any]] = []
        if self._open_kind() != kind:
            events = [*self._finish_item(), *self._begin_item(kind)]
        self._text += text
        delta = {"type": f"response.{part}.delta", **self._place(), "content_index": 0, "delta": text}
        return [*events, {**delta, "logprobs": []} if part == "output_text" else delta]

    def _open_kind(self) -> str | None:
        """Return the type of the item that grows; None if there is none."""
        is_open = bool(self._items) and self._items[-1]["status"] == "in_progress"
        return str(self._items[-1]["type"]) if is_open else None

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}

    def _begin_item(self, kind: str) -> list[dict[str, Any]]:
        self._text = ""
        if kind == "message":
            item = ResponseOutputMessage(
                id=new_id("msg_"), type="message", role="assistant", status="in_progress", content=[]
            ).to_dict()
        else:
            item = ResponseReasoningItem(
                id=new_id("rs_"), type="reasoning", status="in_progress", summary=[], content=[]
            ).to_dict()
        self._items.append(item)
        added = {"type": "response.output_item.added", "output_index": len(self._items) - 1, "item": dict(item)}
        begun = {"type": "response.content_part.added", **self._place(), "content_index": 0, "part": self._part()}
        return [added, begun]

    def _part(self) -> dict[str, Any]:
        """Return the content of the item that grows."""
        if self._items[-1]["type"] == "message":
            return ResponseOutputText(type="output_text", text=self._text, annotations=[], logprobs=[]).to_dict()
        return Content(type="reasoning_text", text=self._text).to_dict()

    def _finish_item(self, status: str = "completed") -> list[dict[str, Any]]:
        """End the item that grows, if there is one."""
        if self._open_kind() is None:
            return []
        part = self._part()
        self._items[-1] = {**self._items[-1], "content": [part], "status": status}
        done = {"type": f"response.{part['type']}.done", **self._place(), "content_index": 0, "text": self._text}
        return [
            {**done, "logprobs": []} if part["type"] == "output_text" else done,
            {"type": "response.content_part.done", **self._place(), "content_index": 0, "part": part},
            self._item_done(),
        ]

    def _item_done(self) -> dict[str, Any]:
        item = dict(self._items[-1])
        return {"type": "response.output_item.done", "output_index": len(self._items) - 1, "item": item}

    def _call(self, call: ToolCall) -> list[dict[str, Any]]:
        item = ResponseFunctionToolCall(
            id=new_id("fc_"), call_id=call.id, type="function_call", name=call.name, arguments="", status="in_progress"
        ).to_dict()
        self._items.append(item)
        added = {"type": "response.output_item.added", "output_index": len(self._items) - 1, "item": item}
        self._items[-1] = {**item, "arguments": call.arguments, "status": "completed"}
        name = "response.function_call_arguments"
        return [
            added,
            {"type": f"{name}.delta", **self._place(), "delta": call.arguments},
            {"type": f"{name}.done", **self._place(), "name": call.name, "arguments": call.arguments},
            self._item_done(),
        ]

    def _end(self, done: Done) -> dict[str, Any]:
        status: ResponseStatus = "incomplete" if done.finish_reason == "length" else "completed"
        self._response.status = status
        if status == "incomplete":
            self._response.incomplete_details = IncompleteDetails(reason="max_output_tokens")
        self._response.usage = ResponseUsage(
            input_tokens=done.prompt_tokens,
            input_tokens_details=InputTokensDetails(cached_tokens=done.cached_tokens, cache_write_tokens=0),
            output_tokens=done.completion_tokens,
            output_tokens_details=OutputTokensDetails(reasoning_tokens=0),
            total_tokens=done.prompt_tokens + done.completion_tokens,
        )
        return {"type": f"response.{status}", "response": self.response()}
