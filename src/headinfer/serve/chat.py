"""POST /v1/chat/completions: a chat, whole or as a stream of chunks."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse
from openai.types.chat import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionMessage,
    ChatCompletionMessageFunctionToolCall,
)
from openai.types.chat.chat_completion import Choice
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta, ChoiceDeltaToolCall, ChoiceDeltaToolCallFunction
from openai.types.chat.chat_completion_message_function_tool_call import Function
from pydantic import Field

from headinfer.serve.answers import Answer, WholeAnswer
from headinfer.serve.bodies import Body, ChatTool, GenerationBody, StreamOptions, Zero, json_body, session_of
from headinfer.serve.common import approximation_json, begin_answer, new_id, now, progress_json, usage, where_json
from headinfer.serve.events import Done, Prefill, Queued, Reasoning, Text, ToolCall, Where
from headinfer.serve.http_errors import HttpError
from headinfer.serve.service import Service
from headinfer.serve.sse import END, EventStream, frame

__all__ = ["ChatBody", "chat_routes", "template_call", "template_messages"]


class TextPart(Body):
    """A part of a message that is text."""

    type: Literal["text"]
    text: str


class FileReference(Body):
    """A document that was added before."""

    file_id: str
    filename: str | None = None


class FilePart(Body):
    """A part of a message that names the document which the chat is about."""

    type: Literal["file"]
    file: FileReference


Part = Annotated[TextPart | FilePart, Field(discriminator="type")]
Content = str | Annotated[list[Part], Field(min_length=1)]


class CalledFunction(Body):
    """A call of a function by the model, with its arguments as JSON."""

    name: str
    arguments: str


class CalledTool(Body):
    """A call of a tool by the model."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class SystemMessage(Body):
    """What the model is told before the chat."""

    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(Body):
    """What the user says."""

    role: Literal["user"]
    content: Content
    name: str | None = None


class AssistantMessage(Body):
    """What the model has answered, as clients send it back."""

    role: Literal["assistant"]
    content: Content | None = None
    reasoning_content: str | None = None
    tool_calls: list[CalledTool] | None = None
    name: str | None = None
    refusal: None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None


class ToolMessage(Body):
    """The result of a tool."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str
    name: str | None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class TextFormat(Body):
    """The form of an answer."""

    type: Literal["text"]


class ChatBody(GenerationBody):
    """The body of a request for a chat."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stream_options: StreamOptions | None = None
    tools: list[ChatTool] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: Literal[True] | None = None
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    response_format: TextFormat | None = None
    modalities: list[Literal["text"]] | None = None

    def chat_tools(self) -> list[dict[str, Any]]:
        """Return the tools as chat templates take them."""
        return [] if self.tool_choice == "none" else [tool.model_dump(exclude_none=True) for tool in self.tools or ()]


def chat_routes(service: Service) -> APIRouter:
    """Return the route of chats."""
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def chat(request: Request, body: Annotated[ChatBody, Depends(json_body(ChatBody))]) -> Response:
        messages, file_ids = template_messages(body.messages)
        answer = await begin_answer(
            request,
            service,
            body,
            session=session_of(body.metadata, file_ids),
            max_new_tokens=body.max_completion_tokens or body.max_tokens,
            messages=messages,
            tools=body.chat_tools(),
        )
        if body.stream:
            wants_usage = bool(body.stream_options and body.stream_options.include_usage)
            return EventStream(_Chunks(service, wants_usage).frames(answer), service.settings.root, answer.cancel)
        return JSONResponse(_completion(service, await answer.whole(request)))

    return router


def template_messages(messages: list[Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """Return messages as chat templates take them, and the documents that they name."""
    file_ids: list[str] = []
    converted = []
    for index, message in enumerate(messages):
        fields = message.model_dump(exclude_none=True)
        fields.pop("annotations", None)
        if isinstance(message.content, list):
            file_ids += [part.file.file_id for part in message.content if isinstance(part, FilePart)]
            fields["content"] = "\n".join(part.text for part in message.content if isinstance(part, TextPart))
        if message.role == "developer":  # templates know the older name
            fields["role"] = "system"
        if message.role == "assistant":
            fields.setdefault("content", "")
            calls = [
                template_call(call.id, call.function.name, call.function.arguments, f"messages[{index}].tool_calls")
                for call in message.tool_calls or ()
            ]
            fields.pop("tool_calls", None)
            if calls:
                fields["tool_calls"] = calls
        converted.append(fields)
    return converted, file_ids


def template_call(call_id: str, name: str, arguments: str, param: str) -> dict[str, Any]:
    """Return a call of a tool as chat templates take it, with its arguments as an object.

    Raises:
        HttpError: the arguments are no JSON object.
    """
    try:
        given = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict):
        raise HttpError(400, f"{param}: the arguments of {name[:100]!r} are no JSON object: send one", param=param)
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": given}}


def _completion(service: Service, whole: WholeAnswer) -> dict[str, Any]:
    calls = [
        ChatCompletionMessageFunctionToolCall(
            id=call.id, type="function", function=Function(name=call.name, arguments=call.arguments)
        )
        for call in whole.tool_calls
    ]
    fields: dict[str, Any] = {"role": "assistant", "content": whole.text or (None if calls else ""), "refusal": None}
    if calls:
        fields["tool_calls"] = calls
    if whole.reasoning:
        fields["reasoning_content"] = whole.reasoning
    completion = ChatCompletion(
        id=new_id("chatcmpl-"),
        object="chat.completion",
        created=now(),
        model=service.model,
        choices=[
            Choice(
                index=0,
                message=ChatCompletionMessage.model_validate(fields),
                finish_reason=_reason(whole.done),
                logprobs=None,
            )
        ],
        usage=usage(whole.done),
    ).to_dict()
    return {**completion, **where_json(whole.where), **approximation_json(service)}


def _reason(done: Done) -> Literal["stop", "length", "tool_calls"]:
    return "stop" if done.finish_reason == "cancelled" else done.finish_reason  # a cancelled one is an error before


class _Chunks:
    """Makes the chunks of a stream.

    Args:
        service: the service.
        wants_usage: whether a last chunk has the numbers of tokens.
    """

    def __init__(self, service: Service, wants_usage: bool) -> None:
        self._service = service
        self._wants_usage = wants_usage
        self._id = new_id("chatcmpl-")
        self._created = now()

    async def frames(self, answer: Answer) -> AsyncGenerator[bytes]:
        """Yield the chunks of an answer as frames."""
        yield self._delta(ChoiceDelta(role="assistant", content=""))
        calls = 0
        more = approximation_json(self._service)
        async for event in answer:
            match event:
                case Queued() | Prefill():
                    yield self._frame([], progress_json(event))
                case Text(text):
                    yield self._delta(ChoiceDelta(content=text))
                case Reasoning(text):
                    yield self._delta(ChoiceDelta.model_validate({"reasoning_content": text}))
                case ToolCall(id=call_id, name=name, arguments=arguments):
                    function = ChoiceDeltaToolCallFunction(name=name, arguments=arguments)
                    call = ChoiceDeltaToolCall(index=calls, id=call_id, type="function", function=function)
                    yield self._delta(ChoiceDelta(tool_calls=[call]))
                    calls += 1
                case Where():
                    more |= where_json(event)
                case Done():
                    yield self._frame([ChunkChoice(index=0, delta=ChoiceDelta(), finish_reason=_reason(event))], more)
                    if self._wants_usage:
                        yield self._frame([], {"usage": usage(event).to_dict()})
        yield END

    def _delta(self, delta: ChoiceDelta) -> bytes:
        return self._frame([ChunkChoice(index=0, delta=delta, finish_reason=None)], {})

    def _frame(self, choices: list[ChunkChoice], more: dict[str, Any]) -> bytes:
        chunk = ChatCompletionChunk(
            id=self._id,
            object="chat.completion.chunk",
            created=self._created,
            model=self._service.model,
            choices=choices,
        ).to_dict()
        if self._wants_usage:
            chunk["usage"] = None
        return frame({**chunk, **more})
