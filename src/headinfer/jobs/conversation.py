"""The tokens of a conversation: what the model's chat template writes for all of its turns.

A cache holds the tokens of the turns so far. The template is applied to the whole conversation at each turn, since some
templates write earlier turns differently from the newest one: without the thoughts of a model, or without the system
prompt, which they write into the newest question. What the template writes as before is not read again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from headinfer.errors import UnsupportedError
from headinfer.jobs.prompts import (
    ANSWER_MARK,
    DOCUMENT_MARK,
    TEMPLATE_ERRORS,
    ChatTexts,
    document_ids,
    template_text,
    text_ids,
)

__all__ = ["Conversation", "Piece", "Prompt", "Turn"]


@dataclass(frozen=True)
class Turn:
    """A question and its answer, as they were typed and shown."""

    question: str
    answer: str


@dataclass(frozen=True)
class Piece:
    """A part of the conversation's text, and its tokens. The tokens of an answer are those that were generated."""

    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Prompt:
    """The conversation up to the beginning of the next answer.

    Attributes:
        pieces: the text and the tokens.
        before: the text that the template writes before the document or the earlier answers that precede the
            conversation. They are not read again if it changes.
    """

    pieces: tuple[Piece, ...]
    before: str

    @property
    def ids(self) -> list[int]:
        """All tokens."""
        return [token for piece in self.pieces for token in piece.ids]


@dataclass(frozen=True)
class Conversation:
    """The turns after what a cache held at first.

    Attributes:
        follows: what precedes the turns: "" is nothing, "document" a document, which the first question continues, and
            "answer" an answer, whose question and document are not known.
        is_raw: whether the chat template is left out.
        system: the system prompt; empty if there is none.
        turns: the turns.
        pieces: the text of the turns and its tokens.
    """

    follows: str
    is_raw: bool
    system: str = ""
    turns: tuple[Turn, ...] = ()
    pieces: tuple[Piece, ...] = ()

    @property
    def ids(self) -> list[int]:
        """The tokens of all turns."""
        return [token for piece in self.pieces for token in piece.ids]

    def prompt(self, tokenizer: Any, question: str) -> Prompt:
        """Return the tokens up to the beginning of the answer to a question.

        Args:
            tokenizer: the model's tokenizer.
            question: the question.

        Raises:
            UnsupportedError: the chat template cannot write the conversation.
        """
        has_template = not self.is_raw and bool(getattr(tokenizer, "chat_template", None))
        before, text = self._template_texts(tokenizer, question) if has_template else ("", self._raw_text(question))
        same: list[Piece] = []
        at = 0
        for piece in self.pieces:
            if not text.startswith(piece.text, at):
                break
            same.append(piece)
            at += len(piece.text)
        if same or self.follows:
            ids = text_ids(tokenizer, text[at:])
        else:
            ids = document_ids(tokenizer, text, ChatTexts("", "", is_stripped=False) if has_template else None)
        return Prompt((*same, Piece(text[at:], tuple(ids))), before)

    def answered(self, tokenizer: Any, prompt: Prompt, question: str, answer: str, ids: Sequence[int]) -> Conversation:
        """Return the conversation with one more turn.

        Args:
            tokenizer: the model's tokenizer.
            prompt: what prompt() returned for the question.
            question: the question.
            answer: the answer, as it was shown.
            ids: the tokens of the answer that were generated.
        """
        if not set(tokenizer.all_special_ids).isdisjoint(ids):  # they are not in the text, so the template drops them
            ids = text_ids(tokenizer, answer)
        pieces = (*prompt.pieces, Piece(answer, tuple(ids)))
        return replace(self, turns=(*self.turns, Turn(question, answer)), pieces=pieces)

    def undone(self, tokenizer: Any) -> Conversation:
        """Return the conversation without its last turn. There must be one."""
        turns = self.turns[:-1]
        pieces = self.pieces[:-2]
        if turns and (not pieces or pieces[-1].text != turns[-1].answer):  # the last prompt wrote it differently
            answer = turns[-1].answer
            pieces = (*pieces, Piece(answer, tuple(text_ids(tokenizer, answer))))
        return replace(self, turns=turns, pieces=pieces)

    def as_dict(self) -> dict[str, Any]:
        """Return what a session keeps, for JSON. The token ids are kept elsewhere."""
        return {
            "follows": self.follows,
            "turns": [[turn.question, turn.answer] for turn in self.turns],
            "pieces": [[piece.text, len(piece.ids)] for piece in self.pieces],
        }

    def resumed(self, about: dict[str, Any], ids: torch.Tensor) -> Conversation:
        """Return the conversation that a session has kept, or this one if it has kept none.

        Args:
            about: the facts of the session. What as_dict() returned is in its field `conversation`, with the number of
                tokens that precede the conversation in `after_tokens`. If other tokens follow, an answer was added by
                `headinfer ask --keep` since, and what was kept does not count.
            ids: the token ids [1, T] of the session.
        """
        kept = about.get("conversation")
        if kept is None:
            return self
        at = kept["after_tokens"]
        if at + sum(tokens for _, tokens in kept["pieces"]) != ids.shape[1]:
            return self
        pieces = []
        for text, tokens in kept["pieces"]:
            pieces.append(Piece(text, tuple(ids[0, at : at + tokens].tolist())))
            at += tokens
        turns = tuple(Turn(question, answer) for question, answer in kept["turns"])
        return replace(self, follows=kept["follows"], turns=turns, pieces=tuple(pieces))

    def _raw_text(self, question: str) -> str:
        """Return the text of all turns and a question without a template, as `headinfer ask --keep` joins them."""
        text = ""
        for turn in (*self.turns, Turn(question, "")):
            join = "\n" if text or self.follows == "answer" else "\n\n" if self.follows else ""
            text += join + turn.question + turn.answer
        return text

    def _template_texts(self, tokenizer: Any, question: str) -> tuple[str, str]:
        """Return what the chat template writes before the conversation, and what it writes for it."""
        questions = [*(turn.question for turn in self.turns), question]
        mark = ""
        messages = [("system", self.system)] if self.system else []
        if self.follows == "document":
            mark = DOCUMENT_MARK
            questions[0] = f"{mark}\n\n{questions[0]}"
        elif self.follows:
            mark = ANSWER_MARK
            messages += [("user", DOCUMENT_MARK), ("assistant", mark)]
        for turn, asked in zip(self.turns, questions, strict=False):
            messages += [("user", asked), ("assistant", turn.answer)]
        messages.append(("user", questions[-1]))
        reason = ""
        for as_parts in (False, True):
            try:
                text = template_text(tokenizer, messages, as_parts=as_parts)
            except TEMPLATE_ERRORS as error:
                reason = reason or str(error).strip() or type(error).__name__
                continue
            if (mark and text.count(mark) != 1) or question.strip() not in text:
                reason = reason or "it does not write each message once and unchanged"
                continue
            before, _, after = text.partition(mark) if mark else ("", "", text)
            return before, after
        raise UnsupportedError(
            f"the model's chat template cannot write this conversation ({reason.splitlines()[0]}): ask one question "
            "with `headinfer ask`, or leave the template out with --raw"
        )
