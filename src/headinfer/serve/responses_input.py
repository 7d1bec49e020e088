"""The body of POST /v1/responses, and the chat that it stands for."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from headinfer.serve.bodies import Body, FunctionTool, GenerationBody, StreamOptions
from headinfer.serve.chat import template_call

__all__ = ["ResponseBody", "chat_of"]


class InputText(Body):
    """A part of a message that is text: the user's, or the model's with what clients send back with it."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class InputFile(Body):
    """A part of a message that names the document which the chat is about."""

    type: Literal["input_file"]
    file_id: str


InputPart = Annotated[InputText | InputFile, Field(discriminator="type")]


class InputMessage(Body):
    """A message of the chat."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[InputPart], Field(min_length=1)]
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class InputCall(Body):
    """A call of a function by the model."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: str | None = None


class InputCallOutput(Body):
    """The result of a function."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | Annotated[list[InputText], Field(min_length=1)]
    id: str | None = None
    status: str | None = None


class ReasoningText(Body):
    """A part of the text in which the model has reasoned."""

    type: Literal["reasoning_text", "summary_text"]
    text: str


class InputReasoning(Body):
    """What the model has reasoned before an answer."""

    type: Literal["reasoning"]
    summary: list[ReasoningText] | None = None
    content: list[ReasoningText] | None = None
    encrypted_content: None = None
    id: str | None = None
    status: str | None = None


def _type_of(item: Any) -> Any:
    """Return the type of an item, which messages need not have."""
    return item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", None)


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[InputCall, Tag("function_call")]
    | Annotated[InputCallOutput, Tag("function_call_output")]
    | Annotated[InputReasoning, Tag("reasoning")],
    Discriminator(_type_of),
]


class ResponseTool(FunctionTool):
    """A function that the model may call."""

    type: Literal["function"]


class TextFormat(Body):
    """The form of an answer."""

    type: Literal["text"]


class TextConfig(Body):
    """The form of an answer, as this API nests it."""

    format: TextFormat | None = None


class ResponseBody(GenerationBody):
    """The body of a request for a response."""

    input: str | Annotated[list[InputItem], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    stream_options: StreamOptions | None = None
    tools: list[ResponseTool] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: Literal[True] | None = None
    text: TextConfig | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    include: Annotated[list[str], Field(max_length=0)] | None = None
    previous_response_id: None = None
    conversation: None = None

    def chat_tools(self) -> list[dict[str, Any]]:
        """Return the tools as chat templates take them."""
        if self.tool_choice == "none":
            return []
        return [
            {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}
            for tool in self.tools or ()
        ]


def chat_of(body: ResponseBody) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the messages of a request as chat templates take them, and the documents that they name.

    What the model has reasoned and the tools that it has called are parts of the assistant's message.
    """
    messages: list[dict[str, Any]] = []
    file_ids: list[str] = []
    if body.instructions is not None:
        messages.append({"role": "system", "content": body.instructions})
    items = [InputMessage(role="user", content=body.input)] if isinstance(body.input, str) else body.input
    for index, item in enumerate(items):
        match item:
            case InputMessage():
                role = "system" if item.role == "developer" else item.role
                text = item.content
                if isinstance(text, list):
                    file_ids += [part.file_id for part in text if isinstance(part, InputFile)]
                    text = _joined([part for part in text if isinstance(part, InputText)])
                if role == "assistant":
                    message = _open_assistant(messages)
                    message["content"] = "\n".join(filter(None, (message["content"], text)))
                else:
                    messages.append({"role": role, "content": text})
            case InputReasoning():
                parts = item.content or item.summary or []
                if parts:
                    message = _open_assistant(messages)
                    message["reasoning_content"] = message.get("reasoning_content", "") + _joined(parts)
            case InputCall():
                call = template_call(item.call_id, item.name, item.arguments, f"input[{index}].arguments")
                _open_assistant(messages).setdefault("tool_calls", []).append(call)
            case InputCallOutput():
                output = item.output if isinstance(item.output, str) else _joined(item.output)
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": output})
    return messages, file_ids


def _joined(parts: list[Any]) -> str:
    return "\n".join(part.text for part in parts)


def _open_assistant(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the assistant's message at the end of a chat, and begin one if another message is there."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    return messages[-1]
