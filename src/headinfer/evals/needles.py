"""Needles in a haystack: made-up words with a number each, hidden between the sentences of a real text.

A model that is trained on such sentences is to be evaluated on other words: `random_words(held_out=True)`.
"""

from __future__ import annotations

import bisect
import random
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["SYLLABLES", "Needle", "build_haystack", "hide", "is_held_out", "random_needles", "random_words"]

SYLLABLES = tuple(consonant + vowel for consonant in "bdfghjklmnprstvz" for vowel in "aeiou")
_WORD_SYLLABLES, NUMBER_DIGITS = 3, 5
_HELD_OUT_SHARE = 8  # one word in so many


@dataclass(frozen=True)
class Needle:
    """A made-up word and its number, with the sentence that says it and the question that asks for it."""

    word: str
    number: str

    @property
    def sentence(self) -> str:
        """What is hidden in the text."""
        return f" The magic number for {self.word} is {self.number}."

    @property
    def question(self) -> str:
        """What is asked after the text; it has no digit."""
        return f"\nWhat is the magic number for {self.word}?"

    @property
    def lead(self) -> str:
        """How an answer begins: as the needle does, so that finding the number is going on where the words stood."""
        return f" The magic number for {self.word} is"

    @property
    def answer(self) -> str:
        """The answer: the needle's own sentence."""
        return f"{self.lead} {self.number}."


def random_words(
    count: int, rng: random.Random, *, held_out: bool, suits: Callable[[str], bool] = lambda word: True
) -> list[str]:
    """Different made-up words of three syllables that suit, all held out from training or none."""
    words: dict[str, None] = {}
    while len(words) < count:
        word = "".join(rng.choices(SYLLABLES, k=_WORD_SYLLABLES))
        if is_held_out(word) == held_out and suits(word):
            words[word] = None
    return list(words)


def is_held_out(word: str) -> bool:
    """Whether a word is held out from training: one in eight is, by its checksum."""
    return zlib.crc32(word.encode()) % _HELD_OUT_SHARE == 0


def random_needles(
    count: int, rng: random.Random, *, held_out: bool, suits: Callable[[str], bool] = lambda word: True
) -> list[Needle]:
    """Needles with different words that suit, and different numbers."""
    numbers = rng.sample(range(10**NUMBER_DIGITS), count)
    words = random_words(count, rng, held_out=held_out, suits=suits)
    return [Needle(word, f"{number:0{NUMBER_DIGITS}}") for word, number in zip(words, numbers, strict=True)]


def build_haystack(text: str, needles: Sequence[Needle], depths: Sequence[float]) -> str:
    """The text with each needle after the end of a sentence nearest to its depth (0: before all, 1: after all).

    Raises ValueError where a depth is no share of the text, or where the text holds a needle's word already.
    """
    for needle in needles:
        if needle.word in text:
            raise ValueError(f"the text holds the word {needle.word} already")
    return hide(text, [needle.sentence for needle in needles], depths)


def hide(text: str, sentences: Sequence[str], depths: Sequence[float]) -> str:
    """The text with each sentence after the end of a sentence nearest to its depth; raises ValueError as above."""
    for depth in depths:
        if not 0 <= depth <= 1:
            raise ValueError(f"a depth of {depth} is not between 0 and 1")
    ends = [0, *(match.end() for match in re.finditer(r"[.!?][\"'”’)]*(?=\s)", text)), len(text)]
    placed = sorted((_nearest(ends, depth * len(text)), index) for index, depth in enumerate(depths))
    parts, start = [], 0
    for position, index in placed:
        parts += [text[start:position], sentences[index]]
        start = position
    return "".join([*parts, text[start:]])


def _nearest(positions: Sequence[int], wanted: float) -> int:
    right = bisect.bisect_left(positions, wanted)
    return min(positions[max(right - 1, 0) : right + 1], key=lambda position: abs(position - wanted))
