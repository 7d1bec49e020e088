"""The text of a long list of tokens, and the place of each token in it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

__all__ = ["TokenText"]

_STEP_TOKENS = 256  # places are kept this often
_WINDOW_TOKENS = 8  # a tokenizer needs only the neighbours of a token to decode its spaces and bytes
_LONGEST_CHARACTER_BYTES = 4


class TokenText:
    """Decodes tokens, and converts between positions of tokens and characters of the text.

    Every tokenizer will do: the text of some tokens is what they add to the text of the few tokens before them.

    Args:
        tokenizer: the tokenizer.
        ids: the tokens.

    Attributes:
        text: their text, special tokens included.
    """

    def __init__(self, tokenizer: Any, ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(ids)
        self._positions = [0]  # of some tokens
        self._characters = [0]  # at which these tokens begin
        texts = []
        for position in [*range(_STEP_TOKENS, len(self._ids), _STEP_TOKENS), len(self._ids)]:
            start = self._positions[-1]
            stop = self.whole_characters(position)
            texts.append(self._added(start, stop))
            self._positions.append(stop)
            self._characters.append(self._characters[-1] + len(texts[-1]))
        self.text = "".join(texts)

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self._ids)

    def whole_characters(self, position: int) -> int:
        """Return the first position, from a given one on, at which no character of several bytes is split."""
        stop = min(position + _LONGEST_CHARACTER_BYTES, len(self._ids))
        for later in range(position, stop):
            if not self._decode(max(later - _WINDOW_TOKENS, 0), later).endswith("\ufffd"):
                return later
        return stop

    def character(self, position: int) -> int:
        """Return the character of the text at which the token at a position begins."""
        at = bisect_right(self._positions, position) - 1
        return self._characters[at] + len(self._added(self._positions[at], position))

    def position(self, character: int) -> int:
        """Return the position of the token that has a character of the text."""
        at = bisect_right(self._characters, character) - 1
        low = self._positions[at]
        high = self._positions[min(at + 1, len(self._positions) - 1)]
        return low + bisect_right(range(low, high), character, lo=1, key=self.character) - 1 if low < high else low

    def _added(self, start: int, stop: int) -> str:
        """Return the text that the tokens [start, stop) add to those before them."""
        begin = max(start - _WINDOW_TOKENS, 0)
        return self._decode(begin, stop)[len(self._decode(begin, start)) :]

    def _decode(self, start: int, stop: int) -> str:
        text: str = self._tokenizer.decode(
            self._ids[start:stop], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text
