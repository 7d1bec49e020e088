"""Names the passages of a document that an answer came from, with offsets in the text and in its files.

    document = DocumentText(tokenizer, cache.token_ids[0].tolist(), manifest.about)
    for passage in passages(enabled, cache, prompt_ids, answer_ids, document):
        print(f"{passage.share:.0%} {passage.file} {passage.file_start}: {passage.text}")

hf/where.py computes the attention; this module knows texts.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headinfer.errors import UsageError
from headinfer.hf.cache import HeadCache
from headinfer.hf.enable import Enabled
from headinfer.hf.where import even_edges
from headinfer.jobs.documents import sha256_of_text
from headinfer.jobs.token_text import TokenText

__all__ = ["MOST_PASSAGES", "DocumentText", "Passage", "passages"]

MOST_PASSAGES = 5
"""Passages that are named for an answer, at most."""


@dataclass(frozen=True)
class Passage:
    """A stretch of about 256 tokens of a document.

    Attributes:
        start: its first character in the text of the document (DocumentText.text).
        stop: the character after its last one.
        share: its share in the attention of the heads that look far (hf/where.py), from 0 to 1.
        text: its text.
        file: the name of its file; empty if it is unknown.
        file_start: its first character in the text of the file.
    """

    start: int
    stop: int
    share: float
    text: str
    file: str
    file_start: int


@dataclass(frozen=True)
class _Piece:
    """A piece of a document (jobs/documents.py).

    Attributes:
        file: the name of its file.
        start: where its heading begins in the text of the document.
        heading: the characters of its heading.
        file_start: its first character in the text of the file.
    """

    file: str
    start: int
    heading: int
    file_start: int


class DocumentText:
    """The text of a document that a session holds as tokens, cut into stretches of about 256 tokens.

    The text is decoded from the tokens, and compared with the checksums that the session keeps. It is the text that was
    read, with the headings of its files. If a tokenizer does not give back what it was given, offsets are those of the
    decoded text, and the name of a file is known only if there is one file.

    It may be used for any number of answers. Making it takes about a second for a million tokens.

    Args:
        tokenizer: the model's tokenizer.
        ids: the tokens from the beginning of the context on. What follows the document may be among them.
        about: the facts that a session keeps (Manifest.about). Without them all tokens are the document.

    Attributes:
        text: the text, without what precedes the document, such as the beginning of a chat template.
        is_exact: whether it is known to be the text that was read.
        edges: the positions of the tokens at which the stretches begin, and the end of the last one.
    """

    def __init__(self, tokenizer: Any, ids: Sequence[int], about: Mapping[str, Any] | None = None) -> None:
        facts = about or {}
        tokens = TokenText(tokenizer, ids[: facts.get("document_tokens", len(ids))])
        before = _characters_before(tokens.text, facts.get("pieces", ()))
        self.is_exact = before is not None
        names = [file["name"] for file in facts.get("files", ())]
        if before is None:
            before = min(len((facts.get("chat") or {}).get("before", "")), len(tokens.text))
            self._pieces = [_Piece(names[0] if len(names) == 1 else "", 0, 0, 0)]
        else:
            self._pieces = _pieces(facts["pieces"], names)
        self.text = tokens.text[before:]
        begins = [tokens.position(before + piece.start) for piece in self._pieces]
        edges = {len(tokens)}
        for begin, end in zip(begins, [*begins[1:], len(tokens)], strict=True):
            edges.update(tokens.whole_characters(edge) for edge in even_edges(begin, end))
        self.edges = sorted(edges)
        self._characters = [max(tokens.character(edge) - before, 0) for edge in self.edges]

    def passages(self, shares: Sequence[float], most: int = MOST_PASSAGES) -> list[Passage]:
        """Return the stretches with the largest shares, the largest first.

        Args:
            shares: the share of each stretch.
            most: passages, at most. Stretches without a share are left out.
        """
        order = sorted(range(len(shares)), key=lambda stretch: -shares[stretch])
        return [self._passage(stretch, shares[stretch]) for stretch in order[:most] if shares[stretch] > 0]

    def _passage(self, stretch: int, share: float) -> Passage:
        start, stop = self._characters[stretch : stretch + 2]
        piece = self._pieces[bisect_right(self._pieces, start, key=lambda piece: piece.start) - 1]
        file_start = piece.file_start + max(start - piece.start - piece.heading, 0)
        return Passage(start, stop, share, self.text[start:stop], piece.file, file_start)


def passages(
    enabled: Enabled,
    cache: HeadCache,
    prompt_ids: Sequence[int],
    answer_ids: Sequence[int],
    document: DocumentText,
    *,
    most: int = MOST_PASSAGES,
) -> list[Passage]:
    """Return the passages of a document that an answer came from, those with the largest shares first.

    It takes one more pass over the KV for each 64 tokens of the answer. Call it where the model may be used, such as
    the thread that has answered, in or out of inference mode.

    Args:
        enabled: the enabled model.
        cache: a cache of one row that holds a beginning of the prompt, such as the document. It does not change. It may
            hold the whole prompt and more, if all layers of the model can be cut (HeadCache.crop()).
        prompt_ids: the tokens of the document and of all that follows it up to the answer.
        answer_ids: the tokens of the answer. Without any there are no passages.
        document: the text of the document, with which the prompt begins.
        most: passages, at most.

    Raises:
        UsageError: the document does not precede the answer.
        UnsupportedError: the model's answer cannot be computed again in one pass.
        StateError: the cache holds the whole prompt, and a layer of the model cannot be cut.
    """
    if not answer_ids:
        return []
    if len(prompt_ids) < document.edges[-1]:
        raise UsageError(
            f"the prompt has {len(prompt_ids):,} tokens, and the document {document.edges[-1]:,}: give the prompt that "
            "the document begins"
        )
    held = cache.get_seq_length()
    fork = cache.fork() if held >= len(prompt_ids) else None
    try:
        if fork is not None:
            fork.crop(len(prompt_ids) - 1)
        used = fork or cache
        question = prompt_ids[used.get_seq_length() :]
        found = enabled.where(used, question, answer_ids, edges=document.edges)
    finally:
        if fork is not None:
            fork.reset()
    return document.passages(found.shares.tolist(), most)


def _characters_before(text: str, pieces: Sequence[Mapping[str, Any]]) -> int | None:
    """Return how many characters precede a document, whose pieces a text ends with.

    Returns:
        The number; None if the text does not end with these pieces, or if there are none.
    """
    before: int = len(text) - sum(len(piece["before"]) + piece["stop"] - piece["start"] for piece in pieces)
    if not pieces or before < 0:
        return None
    at = before
    for piece in pieces:
        start = at + len(piece["before"])
        at = start + piece["stop"] - piece["start"]
        if sha256_of_text(text[start:at]) != piece["sha256"]:
            return None
    return before


def _pieces(kept: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[_Piece]:
    """Return the pieces that a session keeps, with their places in the text of the document."""
    pieces = []
    at = 0
    for piece in kept:
        heading = len(piece["before"])
        pieces.append(_Piece(names[piece["file"]], at, heading, piece["start"]))
        at += heading + piece["stop"] - piece["start"]
    return pieces
