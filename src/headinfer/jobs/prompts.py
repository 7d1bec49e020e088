"""A prompt around a document: what stands before it and what follows it, in a chat template or without."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["document_ids", "frame", "pad_id"]

_MARK = "\N{SYMBOL FOR START OF TEXT}document\N{SYMBOL FOR END OF TEXT}"
_ANSWER_MARK = "\N{SYMBOL FOR START OF TEXT}answer\N{SYMBOL FOR END OF TEXT}"


def frame(tokenizer: Any, question: str, *, is_raw: bool, is_later: bool = False) -> tuple[str, str]:
    """The texts before and after a document that is asked a question.

    is_raw: without the tokenizer's chat template. is_later: an earlier question was answered before; then the second
    text follows that answer.
    """
    if is_raw or not getattr(tokenizer, "chat_template", None):
        return "", question
    turns = [{"role": "user", "content": _MARK + ("" if is_later else question)}]
    if is_later:
        turns += [{"role": "assistant", "content": _ANSWER_MARK}, {"role": "user", "content": question.lstrip()}]
    whole: str = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    before, after = whole.split(_MARK, 1)
    return before, after.split(_ANSWER_MARK, 1)[1] if is_later else after


def document_ids(tokenizer: Any, document: str, *, is_raw: bool) -> Sequence[int]:
    """Token ids of a document and what stands before it, so that a question can follow."""
    is_chat = not is_raw and getattr(tokenizer, "chat_template", None)
    before, _ = frame(tokenizer, "", is_raw=is_raw)
    text = before + (document.lstrip() if is_chat else document)  # many templates strip
    ids: list[int] = tokenizer(text, add_special_tokens=not is_chat).input_ids
    if not is_chat and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]  # a tokenizer that ends every text
    return ids


def pad_id(tokenizer: Any) -> int:
    """What generate() is to pad with; it warns where it has to choose."""
    return next(one for one in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if one is not None)
