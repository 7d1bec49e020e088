"""An index of all n-grams of a growing text of token ids, for prompt lookup.

Prompt lookup guesses that what followed the newest tokens of a text when they occurred before follows again
(https://github.com/apoorvumang/prompt-lookup-decoding). transformers' own scans the text for each guess. This index
sorts the positions of a long text once, and keeps those of later tokens in a dict. A match is found in microseconds at
any length.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["KEY_TOKENS", "LONGEST_MATCH", "NgramIndex"]

KEY_TOKENS = 3
"""The length of the n-grams that are looked up, and of the shortest match."""

LONGEST_MATCH = 32
"""Matches are compared up to this length."""

_MOST_CANDIDATES = 64  # the newest occurrences of an n-gram that are compared
_BASE = 0x9E3779B1  # hashes are polynomials in it, modulo 2^64


class NgramIndex:
    """The positions of all n-grams of KEY_TOKENS tokens in a text.

    It takes 16 bytes of host memory for each token that it is made with: an id, a hash and a position.

    Args:
        ids: the text: token ids [T], int64.
    """

    def __init__(self, ids: torch.Tensor) -> None:
        self._ids = ids.to("cpu", torch.int32)
        self._later: list[int] = []  # the tokens behind _ids
        self._later_positions: dict[tuple[int, ...], list[int]] = {}
        hashes = _hashes(self._ids)
        self._hashes, positions = hashes.sort(stable=True)
        self._positions = positions.to(torch.int32)

    def __len__(self) -> int:
        return len(self._ids) + len(self._later)

    def append(self, ids: Sequence[int]) -> None:
        """Append tokens to the text."""
        for token in ids:
            self._later.append(token)
            position = len(self) - KEY_TOKENS
            if position >= 0:
                self._later_positions.setdefault(tuple(self._tail(KEY_TOKENS)), []).append(position)

    def continuation(self, tokens: int) -> tuple[int, list[int]]:
        """Return what followed the newest tokens of the text when they occurred before.

        The longest match counts, and the newest one of several. A match that reaches the end of the text is a
        repetition, which goes on with its period.

        Args:
            tokens: the length of the continuation.

        Returns:
            The length of the match, at most LONGEST_MATCH, and the continuation; 0 and no token if there is no match.
        """
        if len(self) <= KEY_TOKENS:
            return 0, []
        newest = self._tail(LONGEST_MATCH)
        best = 0
        end = 0
        for position in self._candidates(newest[-KEY_TOKENS:]):
            length = self._match(position + KEY_TOKENS, newest)
            if length > best:
                best = length
                end = position + KEY_TOKENS
            if best == LONGEST_MATCH:
                break
        if best < KEY_TOKENS:
            return 0, []
        found = self._slice(end, min(end + tokens, len(self)))
        for at in range(tokens - len(found)):
            found.append(found[at])
        return best, found

    def _candidates(self, key: list[int]) -> list[int]:
        """Return positions of an n-gram before the end of the text, the newest first. Some may be of other n-grams."""
        last = len(self) - KEY_TOKENS
        later = self._later_positions.get(tuple(key), [])
        found = [position for position in reversed(later[-_MOST_CANDIDATES - 1 :]) if position != last]
        wanted = _hashes(torch.tensor(key, dtype=torch.int32))
        first = int(torch.searchsorted(self._hashes, wanted))
        stop = int(torch.searchsorted(self._hashes, wanted, right=True))
        newest = self._positions[max(first, stop - _MOST_CANDIDATES) : stop].tolist()
        found += [position for position in reversed(newest) if position != last]
        return found[:_MOST_CANDIDATES]

    def _match(self, end: int, newest: list[int]) -> int:
        """Return how many tokens before a position equal the newest tokens of the text."""
        before = self._slice(max(end - len(newest), 0), end)
        length = 0
        for token, wanted in zip(reversed(before), reversed(newest), strict=False):
            if token != wanted:
                break
            length += 1
        return length

    def _slice(self, start: int, stop: int) -> list[int]:
        """Return the tokens [start, stop)."""
        early = len(self._ids)
        later = self._later[max(start - early, 0) : max(stop - early, 0)]
        return [*self._ids[start:stop].tolist(), *later] if start < early else later

    def _tail(self, count: int) -> list[int]:
        """Return the newest tokens."""
        return self._slice(max(len(self) - count, 0), len(self))


def _hashes(ids: torch.Tensor) -> torch.Tensor:
    """Return a hash of each n-gram of token ids [T]: [T - KEY_TOKENS + 1] int64, or none for a shorter text."""
    count = max(len(ids) - KEY_TOKENS + 1, 0)
    hashes = torch.zeros(count, dtype=torch.int64)
    for at in range(KEY_TOKENS):
        hashes.mul_(_BASE).add_(ids[at : at + count])
    return hashes
