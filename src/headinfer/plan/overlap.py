"""What of one layer's copies a prefill does not hide, over all its chunks, as closed forms.

Chunk i has a past of p = i * chunk_tokens tokens, of which the first `resident_tokens` are on the device for good.
Three streams run side by side:

    compute      attention_first_s + attention_s_per_token * p, and merging
    copy         fetch_s_per_token * max(0, p - resident_tokens)
    write-back   back_s

Each is a straight line in p, so a sum over chunks is one over at most three ranges of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["LayerChunks"]


@dataclass(frozen=True)
class LayerChunks:
    """The chunks of a prefill in one offloaded layer.

    merge_first_s: in each chunk that has a past, for a last tile that is shorter, or for the resident tokens;
    merge_s_per_token: for the streamed ones. early_s, back_early_s: what of fetching and of writing back is hidden
    behind other layers' work.
    """

    chunks: int
    chunk_tokens: float
    resident_tokens: int
    attention_first_s: float
    attention_s_per_token: float
    merge_first_s: float
    merge_s_per_token: float
    fetch_s_per_token: float
    back_s: float
    early_s: float
    back_early_s: float

    @property
    def streaming_chunks(self) -> int:
        """Chunks that fetch anything."""
        return self.chunks - self._first_above(0.0)

    @property
    def streamed_tokens(self) -> float:
        """Tokens fetched by all chunks together."""
        first = self._first_above(0.0)
        return (self.chunks - first) * ((first + self.chunks - 1) / 2 * self.chunk_tokens - self.resident_tokens)

    @property
    def merge_s(self) -> float:
        """Seconds of merging."""
        return self.merge_first_s * (self.chunks - 1) + self.merge_s_per_token * self.streamed_tokens

    @property
    def transfer_s(self) -> float:
        """Seconds that the link is busy: fetching and writing back go in opposite directions, side by side."""
        first = self._first_above(self.back_s)
        fetch_s = self._positive_sum(0.0, 0.0, self.fetch_s_per_token, first, self.chunks)
        return first * self.back_s + fetch_s

    @property
    def exposed_s(self) -> float:
        """Seconds of copies that are not hidden behind this layer's attention, or behind others' work."""
        back_s, first = self.back_s - self.back_early_s, self._first_above(0.0)
        start_s, slope, merge = self.attention_first_s, self.attention_s_per_token, self.merge_s_per_token
        later_s = start_s + self.merge_first_s
        above = max(self._first_above(back_s + self.early_s), first)
        return (
            max(0.0, back_s - start_s)
            + self._positive_sum(back_s - later_s, -slope, 0.0, 1, first)
            + self._positive_sum(back_s - later_s, -slope, -merge, first, above)
            + self._positive_sum(-self.early_s - later_s, -slope, self.fetch_s_per_token - merge, above, self.chunks)
        )

    def _first_above(self, seconds: float) -> int:
        """The first chunk, but not the very first, whose fetch takes more than that."""
        past = self.resident_tokens + seconds / self.fetch_s_per_token
        return min(max(math.floor(past / self.chunk_tokens) + 1, 1), self.chunks)

    def _positive_sum(self, first_s: float, slope: float, streamed_slope: float, begin: int, end: int) -> float:
        """Sum of max(0, first_s + slope * p + streamed_slope * (p - resident_tokens)) for the chunks begin to end."""
        level = first_s - streamed_slope * self.resident_tokens
        step = (slope + streamed_slope) * self.chunk_tokens
        if step == 0.0:
            return max(0.0, level) * max(end - begin, 0)
        crossing = -level / step  # positive before it where the line falls, after it where it rises
        if step < 0:
            end = min(end, max(begin, math.ceil(crossing)))
        else:
            begin = max(begin, min(end, math.ceil(crossing)))
        terms = max(end - begin, 0)
        return max(0.0, terms * level + step * (begin + end - 1) * terms / 2)
