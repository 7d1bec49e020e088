"""The token ids of a request: of the messages of a chat, by the model's chat template, or of a prompt to continue."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from headinfer.errors import UnsupportedError, UsageError
from headinfer.jobs.prompts import ANSWER_MARK, DOCUMENT_MARK, TEMPLATE_ERRORS, ChatTexts, document_ids, text_ids

__all__ = ["chat_ids", "completion_ids"]

Message = dict[str, Any]


def completion_ids(tokenizer: Any, prompt: str | Sequence[int], about: Mapping[str, Any] | None) -> list[int]:
    """Return the token ids of a prompt to continue.

    Args:
        tokenizer: the model's tokenizer.
        prompt: the text or its ids.
        about: the facts of the session that precedes it; None for none.
    """
    if not isinstance(prompt, str):
        return list(prompt)
    return document_ids(tokenizer, prompt, None) if about is None else text_ids(tokenizer, prompt)


def chat_ids(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    about: Mapping[str, Any] | None,
) -> list[int]:
    """Return the token ids of a chat up to the beginning of the next answer.

    A document that a session holds precedes the first question, as `headinfer ask` and `headinfer chat` have it: the
    template is applied to all messages with a mark for the document, and the tokens are those of the text after it.

    Args:
        tokenizer: the model's tokenizer.
        messages: the messages.
        tools: the tools that the model may call.
        about: the facts of the session; None for none.

    Returns:
        The ids of all tokens, or of those that follow the session.

    Raises:
        UsageError: a message is invalid, or the template refuses the messages.
        UnsupportedError: the template cannot write these messages.
    """
    given = [_checked(message) for message in messages]
    about_session = about or {}
    follows = "" if about is None else "answer" if about_session.get("answers") else "document"
    system = about_session.get("system", "")
    if follows:
        given = _after_system(given, system)
    if about_session.get("raw") or not getattr(tokenizer, "chat_template", None):
        text = _raw_text(given, tools, follows)
        return text_ids(tokenizer, text) if follows else document_ids(tokenizer, text, None)
    if not follows:
        return document_ids(tokenizer, _template_text(tokenizer, given, tools), ChatTexts("", "", is_stripped=False))
    mark = DOCUMENT_MARK if follows == "document" else ANSWER_MARK
    marked = _with_mark(given, follows)
    if system:
        marked = [{"role": "system", "content": system}, *marked]
    _, found, after = _template_text(tokenizer, marked, tools, mark).partition(mark)
    assert found
    return text_ids(tokenizer, after)


def _checked(message: Mapping[str, Any]) -> Message:
    """Return a message as templates take it: its content is a text, and the arguments of tool calls are objects."""
    role = message.get("role")
    if role not in ("system", "developer", "user", "assistant", "tool"):
        raise UsageError(f"a message has the role {role!r}: use system, user, assistant or tool")
    content = message.get("content")
    if content is not None and not isinstance(content, str):
        parts = []
        for part in content:
            if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise UsageError('the content of a message has a part that is not {"type": "text", "text": ...}')
            parts.append(part["text"])
        content = "".join(parts)
    if content is None and not message.get("tool_calls"):
        raise UsageError(f"a message of the role {role} has no content: give it a text")
    checked = {**message, "content": content or "", "role": "system" if role == "developer" else role}
    if message.get("tool_calls"):
        checked["tool_calls"] = [_with_object(call) for call in message["tool_calls"]]
    return checked


def _with_object(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tool call whose arguments are an object, as templates expect them, and not its JSON."""
    function = dict(call.get("function") or {})
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            function["arguments"] = json.loads(arguments)
        except ValueError:
            raise UsageError("the arguments of a tool call are not JSON") from None
    return {**call, "function": function}


def _after_system(messages: list[Message], system: str) -> list[Message]:
    """Return the messages after the system prompt, which precedes the document and must be the session's."""
    if messages and messages[0]["role"] == "system":
        if messages[0]["content"] != system:
            read = "with another system prompt" if system else "without a system prompt"
            raise UsageError(
                f"the session was read {read}, and it precedes the document: leave the system message out, or put it "
                "into the question"
            )
        messages = messages[1:]
    if not any(message["role"] == "user" for message in messages):
        raise UsageError("no message asks the document a question: give one of the role user")
    return messages


def _with_mark(messages: list[Message], follows: str) -> list[Message]:
    """Return the messages with a mark for what the session holds."""
    if follows == "answer":
        before = [{"role": "user", "content": DOCUMENT_MARK}, {"role": "assistant", "content": ANSWER_MARK}]
        return [*before, *messages]
    first = next(at for at, message in enumerate(messages) if message["role"] == "user")
    if first:
        raise UsageError(f"a message of the role {messages[0]['role']} precedes the question: begin with a question")
    asked = {**messages[0], "content": f"{DOCUMENT_MARK}\n\n{messages[0]['content']}"}
    return [asked, *messages[1:]]


def _raw_text(messages: list[Message], tools: Sequence[Any], follows: str) -> str:
    """Return the text of all messages without a template, as `headinfer chat` joins them."""
    if tools or any(message["role"] in ("system", "tool") or message.get("tool_calls") for message in messages):
        raise UnsupportedError(
            "the model has no chat template here, so it takes neither a system prompt nor tools: leave them out, or "
            "put them into the question"
        )
    text = ""
    for message in messages:
        join = ""
        if message["role"] == "user":
            join = "\n" if text or follows == "answer" else "\n\n" if follows else ""
        text += join + message["content"]
    return text


def _template_text(tokenizer: Any, messages: list[Message], tools: Sequence[Mapping[str, Any]], mark: str = "") -> str:
    """Return what the chat template writes, up to the beginning of the next answer.

    Some templates take the text of a message as a string, others as a list of parts, and write nothing for the other.
    """
    newest = next((message["content"] for message in reversed(messages) if message["role"] == "user"), "").strip()
    reason = ""
    for as_parts in (False, True):
        given = [_parts(message) for message in messages] if as_parts else messages
        options: dict[str, Any] = {"add_generation_prompt": True, "tokenize": False}
        try:
            text: str = tokenizer.apply_chat_template(given, tools=list(tools) or None, **options)
            without = tokenizer.apply_chat_template(given, **options) if tools else ""
        except TEMPLATE_ERRORS as error:
            reason = reason or str(error).strip() or type(error).__name__
            continue
        if tools and text == without:
            raise UnsupportedError("the model's chat template takes no tools: leave them out")
        if newest.removeprefix(mark).strip() in text and (not mark or text.count(mark) == 1):
            return text
        reason = reason or "it does not write each message once and unchanged"
    raise UsageError(f"the model's chat template cannot write these messages: {reason.splitlines()[0]}")


def _parts(message: Message) -> Message:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}
