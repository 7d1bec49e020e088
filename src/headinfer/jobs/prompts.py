"""Makes the token ids of a prompt: those of a document, then those of a question about it.

`generate` gives the model both at once. `read` gives it the document, and `ask` gives it the question later. Both ways
call the same two functions, so the ids are equal for every tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from jinja2 import TemplateError

from headinfer.errors import UnsupportedError, UsageError

__all__ = [
    "ANSWER_MARK",
    "DOCUMENT_MARK",
    "TEMPLATE_ERRORS",
    "ChatTexts",
    "chat_texts",
    "document_ids",
    "document_parts",
    "following_ids",
    "later_question_ids",
    "pad_id",
    "prompt_ids",
    "prompts_ids",
    "question_ids",
    "template_text",
    "text_ids",
]

DOCUMENT_MARK = "\N{SYMBOL FOR START OF TEXT}document\N{SYMBOL FOR END OF TEXT}"
ANSWER_MARK = "\N{SYMBOL FOR START OF TEXT}answer\N{SYMBOL FOR END OF TEXT}"
_QUESTION_MARK = "\N{SYMBOL FOR START OF TEXT}question\N{SYMBOL FOR END OF TEXT}"
# A template is a program of the model's author, and these are the errors with which such programs end.
TEMPLATE_ERRORS = (TemplateError, ArithmeticError, AttributeError, ImportError, LookupError, TypeError, ValueError)
_SYSTEM_MARK = "\N{SYMBOL FOR START OF TEXT}system\N{SYMBOL FOR END OF TEXT}"
_BLANK = "\f"  # put around a mark, to find out whether the template strips it
_BEGINNINGS = ("a", "0", ".")


@dataclass(frozen=True)
class ChatTexts:
    """What a chat template writes around a message. A session keeps it, because some templates write the date.

    Attributes:
        before: the text before the message.
        after: the text after it, up to the beginning of the answer.
        is_stripped: whether the template strips blanks around a message. They are stripped around questions, and kept
            around documents, whose first line may be indented.
    """

    before: str
    after: str
    is_stripped: bool


def chat_texts(tokenizer: Any, *, is_raw: bool, system: str = "") -> ChatTexts | None:
    """Return what the chat template writes around a message.

    Args:
        tokenizer: the tokenizer.
        is_raw: whether the template is ignored.
        system: the system prompt; empty if there is none.

    Returns:
        The texts; None if there is no template or it is ignored.

    Raises:
        UsageError: there is a system prompt, and no template.
        UnsupportedError: the template fails, or does not write the message once and unchanged, or no system prompt.
    """
    if is_raw or not getattr(tokenizer, "chat_template", None):
        if system:
            reason = "--raw leaves out the model's chat template" if is_raw else "the model has no chat template"
            raise UsageError(f"{reason}, which a system prompt needs: put it before the document, or before the prompt")
        return None
    (before, after), is_stripped = _texts_around(tokenizer, [DOCUMENT_MARK], system)
    return ChatTexts(before, after, is_stripped)


def prompt_ids(
    tokenizer: Any, document: str | Sequence[str], question: str, *, is_raw: bool, system: str = ""
) -> list[int]:
    """Return the token ids of a prompt: those of the document, then those of the question.

    Args:
        tokenizer: the tokenizer. Its chat template is used if it has one.
        document: the document, or its pieces, which are tokenized on their own; may be empty.
        question: the question; may be empty.
        is_raw: whether the template is ignored.
        system: the system prompt; empty if there is none.

    Raises:
        UsageError: there is a system prompt, and no template.
        UnsupportedError: the template cannot be used.
    """
    return prompts_ids(tokenizer, document, [question], is_raw=is_raw, system=system)[0]


def prompts_ids(
    tokenizer: Any, document: str | Sequence[str], questions: Sequence[str], *, is_raw: bool, system: str = ""
) -> list[list[int]]:
    """Return the token ids of several prompts with the same document, which is tokenized once; see prompt_ids()."""
    chat = chat_texts(tokenizer, is_raw=is_raw, system=system)
    if any(document):
        head = document_ids(tokenizer, document, chat)
        return [head + question_ids(tokenizer, question, chat) for question in questions]
    if chat is None:
        return [document_ids(tokenizer, question, None) for question in questions]
    messages = [question.strip() if chat.is_stripped else question for question in questions]
    return [_ids(tokenizer, chat.before + message + chat.after) for message in messages]


def document_ids(tokenizer: Any, document: str | Sequence[str], chat: ChatTexts | None) -> list[int]:
    """Return the token ids of a document and of everything before it. question_ids() continues them.

    Without a template they begin with the special tokens that the tokenizer puts before a text. They never end with
    those that it puts after a text, such as an end token.

    Args:
        tokenizer: the tokenizer.
        document: the document, or its pieces, which are tokenized on their own.
        chat: the texts around a message; None without a template.
    """
    return list(chain.from_iterable(document_parts(tokenizer, document, chat)))


def document_parts(tokenizer: Any, document: str | Sequence[str], chat: ChatTexts | None) -> list[list[int]]:
    """Return the token ids of document_ids() for each piece of a document."""
    first, *others = [document] if isinstance(document, str) else document
    if chat is not None:
        ids = _ids(tokenizer, chat.before + first)
    else:
        ids = _ids_before_a_text(tokenizer) + _ids(tokenizer, first)
    return [ids, *(_ids_of_continuation(tokenizer, text) for text in others)]


def question_ids(tokenizer: Any, question: str, chat: ChatTexts | None) -> list[int]:
    """Return the token ids of a question that follows a document, with the blank line between them.

    Args:
        tokenizer: the tokenizer.
        question: the question; may be empty.
        chat: the texts around a message; None without a template.
    """
    return following_ids(tokenizer, "\n\n" + question if question else "", chat)


def following_ids(tokenizer: Any, text: str, chat: ChatTexts | None, lead: str = "") -> list[int]:
    """Return the token ids of any text that follows a document.

    Args:
        tokenizer: the tokenizer.
        text: the rest of the message that the document begins.
        chat: the texts around a message; None without a template.
        lead: the beginning of the answer.
    """
    if chat is not None:
        text = (text.rstrip() if chat.is_stripped else text) + chat.after
    return _ids_of_continuation(tokenizer, text + lead)


def later_question_ids(tokenizer: Any, question: str, *, is_raw: bool) -> list[int]:
    """Return the token ids of a question that follows the answer to an earlier one.

    Args:
        tokenizer: the tokenizer. Its chat template is used if it has one.
        question: the question.
        is_raw: whether the template is ignored.

    Raises:
        UnsupportedError: the template does not accept a conversation of several questions.
    """
    if is_raw or not getattr(tokenizer, "chat_template", None):
        return _ids_of_continuation(tokenizer, "\n" + question)
    texts, is_stripped = _texts_around(tokenizer, [DOCUMENT_MARK, ANSWER_MARK, _QUESTION_MARK])
    return _ids_of_continuation(tokenizer, texts[2] + (question.strip() if is_stripped else question) + texts[3])


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a text that continues another one, with nothing before or after it."""
    return _ids_of_continuation(tokenizer, text)


def pad_id(tokenizer: Any) -> int:
    """Return the padding id for generate(), which warns if it must choose one itself."""
    return next(token_id for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token_id is not None)


def _texts_around(tokenizer: Any, marks: Sequence[str], system: str = "") -> tuple[list[str], bool]:
    """Return what a chat template writes around messages of the user and the assistant in turn.

    Some templates take the text of a message as a string, others as a list of parts, and write nothing for the other.

    Args:
        tokenizer: the tokenizer.
        marks: the messages.
        system: the system prompt before them; empty if there is none.

    Returns:
        The texts before, between and after the messages, and whether the template strips the messages.

    Raises:
        UnsupportedError: the template fails, or does not write each message once and unchanged, or no system prompt.
    """
    reasons = []
    messages = [("assistant" if number % 2 else "user", _BLANK + mark + _BLANK) for number, mark in enumerate(marks)]
    for as_parts in (False, True):
        try:
            first = [("system", system)] if system else []
            whole = template_text(tokenizer, [*first, *messages], as_parts=as_parts)
            is_written = not system or _SYSTEM_MARK in template_text(
                tokenizer, [("system", _SYSTEM_MARK), *messages], as_parts=as_parts
            )
        except TEMPLATE_ERRORS as error:
            reasons.append(str(error).strip() or type(error).__name__)
            continue
        if not is_written:
            reasons.append("it does not write a system prompt")
            continue
        is_stripped = _BLANK + marks[0] + _BLANK not in whole
        texts = re.split("|".join(f"{_BLANK}?{mark}{_BLANK}?" for mark in marks), whole)
        if len(texts) == len(marks) + 1 and all(mark in whole for mark in marks):
            return texts, is_stripped
        reasons.append("it does not write each message once and unchanged")
    if system and _can_write(tokenizer, marks):
        raise UnsupportedError(
            f"the model's chat template takes no system prompt ({reasons[0].splitlines()[0]}): put it before the "
            "document, or before the prompt"
        )
    if len(marks) > 1:
        raise UnsupportedError(
            f"the model's chat template cannot be used for a second question ({reasons[0].splitlines()[0]}): ask "
            "one question with `headinfer ask` without --keep, or leave the template out with --raw"
        )
    raise UnsupportedError(
        f"the model's chat template cannot be used ({reasons[0].splitlines()[0]}): leave it out with --raw"
    )


def template_text(tokenizer: Any, messages: Sequence[tuple[str, str]], *, as_parts: bool) -> str:
    """Return what a chat template writes for messages (role, text), up to the beginning of the next answer."""
    given = [
        {"role": role, "content": [{"type": "text", "text": text}] if as_parts else text} for role, text in messages
    ]
    whole: str = tokenizer.apply_chat_template(given, add_generation_prompt=True, tokenize=False)
    return whole


def _can_write(tokenizer: Any, marks: Sequence[str]) -> bool:
    """Return whether a chat template can be used without a system prompt."""
    try:
        _texts_around(tokenizer, marks)
    except UnsupportedError:
        return False
    return True


def _ids(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a text without special tokens around it."""
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return list(ids)


def _ids_before_a_text(tokenizer: Any) -> list[int]:
    """Return the special tokens that a tokenizer puts before a text."""
    text = _BEGINNINGS[0]
    whole = list(tokenizer(text).input_ids)
    alone = _ids(tokenizer, text)
    for start in range(len(whole) - len(alone) + 1):
        if whole[start : start + len(alone)] == alone:
            return whole[:start]
    return []


def _ids_of_continuation(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a text that follows another one.

    Many tokenizers put a space before a text. So the ids are taken from a longer text, after a beginning with which
    no token of the text merges.
    """
    if not text:
        return []
    for beginning in _BEGINNINGS:
        alone = _ids(tokenizer, beginning)
        whole = _ids(tokenizer, beginning + text)
        if alone and whole[: len(alone)] == alone:
            return whole[len(alone) :]
    return _ids(tokenizer, text)
