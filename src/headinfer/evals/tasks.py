"""The parts of an evaluation: documents, questions and scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["CountTokens", "Document", "Question", "Score", "largest_fitting", "match_all", "match_part"]

CountTokens = Callable[[str], int]
"""Counts the tokens of a text."""

Score = Callable[[str, Sequence[str]], float]
"""Scores an answer against the references, from 0 to 1."""

_FIRST_UNITS = 256
_MAX_CORRECTIONS = 12


def match_all(answer: str, references: Sequence[str]) -> float:
    """Compute the share of the references that an answer contains, ignoring case (RULER's string_match_all)."""
    return sum(reference.lower() in answer.lower() for reference in references) / len(references)


def match_part(answer: str, references: Sequence[str]) -> float:
    """Return 1 if an answer contains at least one of the references, ignoring case, else 0."""
    return float(any(reference.lower() in answer.lower() for reference in references))


@dataclass(frozen=True)
class Question:
    """A question about a document.

    Attributes:
        key: the name of the question, unique within its document.
        text: the text that follows the document.
        references: the expected answers.
        new_tokens: the maximum number of tokens to generate.
        lead: the beginning of the answer, appended to the prompt. The model continues it.
        score: compares the generated text with the references; from 0 to 1.
        facts: fields that are added to the result, such as the depth of a needle.
    """

    key: str
    text: str
    references: tuple[str, ...]
    new_tokens: int
    lead: str = ""
    score: Score = match_all
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Document:
    """A text that is read once, with questions that are asked independently of each other.

    Attributes:
        key: the name of the document, unique within an evaluation.
        text: the text.
        questions: the questions about the text.
        facts: fields that are added to every result, such as the length.
    """

    key: str
    text: str
    questions: tuple[Question, ...]
    facts: dict[str, Any] = field(default_factory=dict)


def largest_fitting(build: Callable[[int], str], count: CountTokens, max_tokens: int, min_units: int = 1) -> int:
    """Find how many units of text fit into a number of tokens.

    The number of tokens grows almost linearly with the number of units. The search therefore corrects an estimate a
    few times instead of bisecting, so a long text is tokenized only a few times.

    Args:
        build: makes the text of a given number of units.
        count: counts the tokens of a text.
        max_tokens: the limit.
        min_units: the smallest number of units that `build` accepts.

    Returns:
        A number of units for which the text has at most `max_tokens` tokens and is close to that, or 0 if the text of
        `min_units` exceeds the limit.
    """
    min_count = count(build(min_units))
    if min_count > max_tokens:
        return 0
    tokens_per_unit = max((count(build(min_units + _FIRST_UNITS)) - min_count) / _FIRST_UNITS, 1e-3)
    best = min_units
    units = min_units + int((max_tokens - min_count) / tokens_per_unit)
    for _ in range(_MAX_CORRECTIONS):
        unused = max_tokens - count(build(units)) if units > best else 0
        if unused >= 0:
            best = max(best, units)
            if unused <= max(tokens_per_unit, max_tokens / 200):
                break
        units = max(units + math.floor(unused / tokens_per_unit), best)
    return best
