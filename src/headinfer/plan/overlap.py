"""Closed forms for the copy time of one layer's prefill, and for the part of it that stays exposed.

Chunk i of a prefill has a past of p = i * chunk_tokens tokens. The first `resident_tokens` of them stay on the device.
Three streams run at the same time, and the seconds of each are linear in p:

    compute      attention_first_s + attention_s_per_token * p, plus merging and what a slower kernel adds
    copy         fetch_s_per_token * max(0, p - resident_tokens)
    write-back   back_s

A sum over all chunks is therefore a sum over at most three ranges of chunks, each of which has a closed form.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["LayerChunks"]


@dataclass(frozen=True)
class LayerChunks:
    """The chunks of a prefill in one offloaded layer.

    Attributes:
        chunks: the number of chunks.
        chunk_tokens: tokens of a chunk.
        resident_tokens: tokens of the past that stay on the device and are never fetched.
        attention_first_s: seconds of a chunk's attention on itself.
        attention_s_per_token: seconds of a chunk's attention on one token of the past.
        merge_first_s: seconds of merging in each chunk with a past, for the resident tokens or a shorter last tile.
        merge_s_per_token: seconds of merging for each streamed token.
        rest_first_s: seconds that a slower kernel adds in each chunk with a past.
        rest_s_per_token: seconds that it adds for each streamed token.
        fetch_s_per_token: seconds to copy one token to the device.
        back_s: seconds to write a chunk's KV back to the host.
        early_s: seconds of a chunk's fetching that are hidden behind other layers' work.
        back_early_s: seconds of a chunk's write-back that are hidden behind other layers' work.
    """

    chunks: int
    chunk_tokens: float
    resident_tokens: int
    attention_first_s: float
    attention_s_per_token: float
    merge_first_s: float
    merge_s_per_token: float
    rest_first_s: float
    rest_s_per_token: float
    fetch_s_per_token: float
    back_s: float
    early_s: float
    back_early_s: float

    @property
    def streaming_chunks(self) -> int:
        """The number of chunks that fetch tokens."""
        return self.chunks - self._first_above(0.0)

    @property
    def streamed_tokens(self) -> float:
        """The number of tokens that all chunks together fetch."""
        first = self._first_above(0.0)
        return (self.chunks - first) * ((first + self.chunks - 1) / 2 * self.chunk_tokens - self.resident_tokens)

    @property
    def merge_s(self) -> float:
        """Seconds of merging in all chunks."""
        return self.merge_first_s * (self.chunks - 1) + self.merge_s_per_token * self.streamed_tokens

    @property
    def rest_s(self) -> float:
        """Seconds that a slower kernel adds in all chunks."""
        return self.rest_first_s * (self.chunks - 1) + self.rest_s_per_token * self.streamed_tokens

    @property
    def transfer_s(self) -> float:
        """Seconds that the link is busy. Fetching and write-back use its two directions at the same time."""
        first = self._first_above(self.back_s)
        fetch_s = self._positive_sum(0.0, 0.0, self.fetch_s_per_token, first, self.chunks)
        return first * self.back_s + fetch_s

    @property
    def exposed_s(self) -> float:
        """Seconds of copies that neither this layer's attention nor other layers' work hides."""
        back_s = self.back_s - self.back_early_s
        slope = self.attention_s_per_token
        merge = self.merge_s_per_token + self.rest_s_per_token
        start_s = self.attention_first_s
        later_s = start_s + self.merge_first_s + self.rest_first_s
        first = self._first_above(0.0)
        above = max(self._first_above(back_s + self.early_s), first)
        return (
            max(0.0, back_s - start_s)
            + self._positive_sum(back_s - later_s, -slope, 0.0, 1, first)
            + self._positive_sum(back_s - later_s, -slope, -merge, first, above)
            + self._positive_sum(-self.early_s - later_s, -slope, self.fetch_s_per_token - merge, above, self.chunks)
        )

    def _first_above(self, seconds: float) -> int:
        """Return the first chunk after chunk 0 that fetches for longer than `seconds`."""
        past = self.resident_tokens + seconds / self.fetch_s_per_token
        return min(max(math.floor(past / self.chunk_tokens) + 1, 1), self.chunks)

    def _positive_sum(self, first_s: float, slope: float, streamed_slope: float, begin: int, end: int) -> float:
        """Sum max(0, first_s + slope * p + streamed_slope * (p - resident_tokens)) over the chunks begin to end - 1."""
        level = first_s - streamed_slope * self.resident_tokens
        step = (slope + streamed_slope) * self.chunk_tokens
        if step == 0.0:
            return max(0.0, level) * max(end - begin, 0)
        # A falling line is positive before its zero, and a rising line after it.
        crossing = -level / step
        if step < 0:
            end = min(end, max(begin, math.ceil(crossing)))
        else:
            begin = max(begin, min(end, math.ceil(crossing)))
        terms = max(end - begin, 0)
        return max(0.0, terms * level + step * (begin + end - 1) * terms / 2)
