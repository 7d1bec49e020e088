"""What an evaluation asks: a document, questions about it, and how an answer is scored."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["CountTokens", "Document", "Question", "Score", "fit", "match_all", "match_part"]

CountTokens = Callable[[str], int]
Score = Callable[[str, Sequence[str]], float]
_FIRST_UNITS = 256


def match_all(answer: str, references: Sequence[str]) -> float:
    """The share of the references that an answer contains, whatever their case (RULER's string_match_all)."""
    return sum(reference.lower() in answer.lower() for reference in references) / len(references)


def match_part(answer: str, references: Sequence[str]) -> float:
    """1 where an answer contains one of the references, whatever their case; else 0."""
    return float(any(reference.lower() in answer.lower() for reference in references))


@dataclass(frozen=True)
class Question:
    """One question. key: unique within its document. lead: how the answer is made to begin.

    score: (answer, references) -> 0 to 1. facts: what a result says beside the answer, such as a needle's depth.
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
    """A text that is read once, and questions that are each asked of what was read. key: unique in an evaluation."""

    key: str
    text: str
    questions: tuple[Question, ...]
    facts: dict[str, Any] = field(default_factory=dict)


def fit(build: Callable[[int], str], count: CountTokens, most_tokens: int, least_units: int = 1) -> int:
    """Units for which build(units) has about most_tokens tokens and not more; 0 where least_units have more.

    Tokens grow about evenly with units, so a few corrections by the tokens of a unit do, and a text is counted a few
    times only.
    """
    least = count(build(least_units))
    if least > most_tokens:
        return 0
    token_per_unit = max((count(build(least_units + _FIRST_UNITS)) - least) / _FIRST_UNITS, 1e-3)
    best, units = least_units, least_units + int((most_tokens - least) / token_per_unit)
    for _ in range(12):
        room = most_tokens - count(build(units)) if units > best else 0
        if room >= 0:
            best = max(best, units)
            if room <= max(token_per_unit, most_tokens / 200):
                break
        units = max(units + math.floor(room / token_per_unit), best)
    return best
