"""Chooses how many tokens the segments of a row hold."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from headinfer.kv.device_buffer import TAIL_UNIT_TOKENS
from headinfer.kv.segments import SegmentSlice

__all__ = ["expected_sizes", "next_size"]

_SMALL_SEGMENT_TOKENS = 256
_LARGE_SEGMENT_TOKENS = 16_384
_DISK_SEGMENT_TOKENS = 2048  # if full segments may move to a disk
_SLACK = 16  # a new segment has at most 1/16 of the row's tokens: only the last segment can be partly empty


def expected_sizes(first: int, expected_tokens: int) -> list[int]:
    """Return the sizes of the segments of a row up to the expected length; the first one has `first` tokens."""
    written = (expected_tokens // TAIL_UNIT_TOKENS - 1) * TAIL_UNIT_TOKENS  # the rest stays in the tail
    sizes = [first]
    while sum(sizes) < written:
        left = expected_tokens - sum(sizes)
        sizes.append(min(_whole_units(left), _LARGE_SEGMENT_TOKENS))
    return sizes


def next_size(table: Sequence[SegmentSlice], tokens: int, expected_tokens: int, *, has_disk: bool) -> int:
    """Return the size of a row's next segment, which gets at least `tokens` tokens, or as many as fit.

    It reaches the expected length, if that is known. Otherwise it is small at first and after a fork, and grows with
    the row up to 16K tokens.

    Args:
        table: the slices of the row.
        tokens: tokens that will be written to it next.
        expected_tokens: the final length of the row; 0 if it is unknown.
        has_disk: whether full segments may move to a disk.
    """
    left = expected_tokens - sum(part.tokens for part in table)
    if left > 0 and not (table and table[-1].segment.sealed):
        return min(max(_whole_units(left), tokens), _LARGE_SEGMENT_TOKENS)
    largest = _DISK_SEGMENT_TOKENS if has_disk else _LARGE_SEGMENT_TOKENS
    own_parts = itertools.takewhile(lambda part: not part.segment.sealed, reversed(table))
    own = sum(part.tokens for part in own_parts)
    grown = own // _SLACK // _SMALL_SEGMENT_TOKENS * _SMALL_SEGMENT_TOKENS
    return min(max(grown, _SMALL_SEGMENT_TOKENS, tokens), largest)


def _whole_units(tokens: int) -> int:
    return -(-tokens // TAIL_UNIT_TOKENS) * TAIL_UNIT_TOKENS
