"""Builds a prompt around a document: the text before it and the text after it, with or without a chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["document_ids", "pad_id", "surrounding_texts"]

_DOCUMENT_MARK = "\N{SYMBOL FOR START OF TEXT}document\N{SYMBOL FOR END OF TEXT}"
_ANSWER_MARK = "\N{SYMBOL FOR START OF TEXT}answer\N{SYMBOL FOR END OF TEXT}"


def surrounding_texts(tokenizer: Any, question: str, *, is_raw: bool, is_later: bool = False) -> tuple[str, str]:
    """Return the texts before and after a document in a prompt with a question about it.

    Args:
        tokenizer: the tokenizer. Its chat template is used if it has one.
        question: the question, with the blank lines before it.
        is_raw: whether the chat template is ignored.
        is_later: whether an earlier question was answered before. The second text then follows that answer.

    Returns:
        The text before the document and the text after it.
    """
    if is_raw or not getattr(tokenizer, "chat_template", None):
        return "", question
    turns = [{"role": "user", "content": _DOCUMENT_MARK + ("" if is_later else question)}]
    if is_later:
        turns += [{"role": "assistant", "content": _ANSWER_MARK}, {"role": "user", "content": question.lstrip()}]
    whole: str = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    before, after = whole.split(_DOCUMENT_MARK, 1)
    if is_later:
        after = after.split(_ANSWER_MARK, 1)[1]
    return before, after


def document_ids(tokenizer: Any, document: str, *, is_raw: bool) -> Sequence[int]:
    """Return the token ids of a document and the text before it. A question can follow them.

    Args:
        tokenizer: the tokenizer. Its chat template is used if it has one.
        document: the document.
        is_raw: whether the chat template is ignored.
    """
    is_chat = not is_raw and getattr(tokenizer, "chat_template", None)
    before, _ = surrounding_texts(tokenizer, "", is_raw=is_raw)
    text = before + (document.lstrip() if is_chat else document)  # many templates strip the document
    ids: list[int] = tokenizer(text, add_special_tokens=not is_chat).input_ids
    if not is_chat and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]  # some tokenizers end every text with this token
    return ids


def pad_id(tokenizer: Any) -> int:
    """Return the padding id for generate(), which warns if it must choose one itself."""
    return next(token_id for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token_id is not None)
