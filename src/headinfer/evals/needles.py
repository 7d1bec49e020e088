"""Needles: made-up words with one number each, hidden between the sentences of a real text.

A model that was trained on such sentences is evaluated on other words: `random_words(..., held_out=True)`.
"""

from __future__ import annotations

import bisect
import random
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = [
    "SYLLABLES",
    "Needle",
    "build_haystack",
    "insert_sentences",
    "is_held_out",
    "random_needles",
    "random_words",
]

SYLLABLES = tuple(consonant + vowel for consonant in "bdfghjklmnprstvz" for vowel in "aeiou")
"""The syllables that made-up words consist of."""

NUMBER_DIGITS = 5
_WORD_SYLLABLES = 3
_HELD_OUT_INTERVAL = 8  # one word in 8 is held out
_SENTENCE_END = re.compile(r"[.!?][\"'”’)]*(?=\s)")


@dataclass(frozen=True)
class Needle:
    """A made-up word and its number.

    Attributes:
        word: the word.
        number: the number, as five digits.
    """

    word: str
    number: str

    @property
    def sentence(self) -> str:
        """The sentence that is hidden in the text."""
        return f" The magic number for {self.word} is {self.number}."

    @property
    def question(self) -> str:
        """The question that follows the text. It contains no digit."""
        return f"\nWhat is the magic number for {self.word}?"

    @property
    def lead(self) -> str:
        """The beginning of the answer, up to the number. It repeats the words of the hidden sentence."""
        return f" The magic number for {self.word} is"

    @property
    def answer(self) -> str:
        """The whole answer. It repeats the hidden sentence."""
        return f"{self.lead} {self.number}."


def random_words(
    count: int, rng: random.Random, *, held_out: bool, accepts: Callable[[str], bool] = lambda word: True
) -> list[str]:
    """Make different words of three syllables each.

    Args:
        count: the number of words.
        rng: the source of random numbers.
        held_out: make only words that are held out from training; otherwise only words that are not.
        accepts: decides whether a word may be used.

    Returns:
        The words.
    """
    words: dict[str, None] = {}
    while len(words) < count:
        word = "".join(rng.choices(SYLLABLES, k=_WORD_SYLLABLES))
        if is_held_out(word) == held_out and accepts(word):
            words[word] = None
    return list(words)


def is_held_out(word: str) -> bool:
    """Return whether a word is held out from training. A checksum of the word selects one in eight."""
    return zlib.crc32(word.encode()) % _HELD_OUT_INTERVAL == 0


def random_needles(
    count: int, rng: random.Random, *, held_out: bool, accepts: Callable[[str], bool] = lambda word: True
) -> list[Needle]:
    """Make needles with different words and different numbers. The arguments are those of `random_words()`."""
    numbers = rng.sample(range(10**NUMBER_DIGITS), count)
    words = random_words(count, rng, held_out=held_out, accepts=accepts)
    return [Needle(word, f"{number:0{NUMBER_DIGITS}}") for word, number in zip(words, numbers, strict=True)]


def build_haystack(text: str, needles: Sequence[Needle], depths: Sequence[float]) -> str:
    """Hide needles in a text.

    Args:
        text: the text.
        needles: the needles.
        depths: the depth of each needle, from 0 (before the text) to 1 (after it).

    Returns:
        The text in which each needle follows the end of a sentence, the one nearest to its depth.

    Raises:
        ValueError: a depth is not between 0 and 1, or the text already contains the word of a needle.
    """
    for needle in needles:
        if needle.word in text:
            raise ValueError(f"the text already contains the word {needle.word}")
    return insert_sentences(text, [needle.sentence for needle in needles], depths)


def insert_sentences(text: str, sentences: Sequence[str], depths: Sequence[float]) -> str:
    """Insert sentences into a text, each after the end of a sentence of the text.

    Args:
        text: the text.
        sentences: the sentences. Each begins with the space that separates it.
        depths: the depth of each sentence, from 0 (before the text) to 1 (after it).

    Returns:
        The text with the sentences.

    Raises:
        ValueError: a depth is not between 0 and 1.
    """
    for depth in depths:
        if not 0 <= depth <= 1:
            raise ValueError(f"a depth of {depth} is not between 0 and 1")
    ends = [0, *(match.end() for match in _SENTENCE_END.finditer(text)), len(text)]
    insertions = sorted((_nearest(ends, depth * len(text)), index) for index, depth in enumerate(depths))
    parts = []
    start = 0
    for position, index in insertions:
        parts += [text[start:position], sentences[index]]
        start = position
    return "".join([*parts, text[start:]])


def _nearest(positions: Sequence[int], wanted: float) -> int:
    right = bisect.bisect_left(positions, wanted)
    return min(positions[max(right - 1, 0) : right + 1], key=lambda position: abs(position - wanted))
