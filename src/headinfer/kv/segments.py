"""Segments of host memory, the spans of them that a row sees, and the shared prefixes of rows that see the same."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from headinfer.kv.disk_file import DiskFile
from headinfer.kv.slices import DiskLocation, DiskSlice, PageableSlice
from headinfer.kv.tiers import HostTier
from headinfer.utils.tensors import Piece

__all__ = ["ResidentBuffer", "Segment", "SegmentSlice", "SharedPrefix", "TokenRanges", "clip", "group", "seal"]

TokenRanges = Sequence[tuple[int, int]]


class Segment:
    """Memory for K and V of some tokens of one row: k [Hkv, tokens, Dk], v [Hkv, tokens, Dv] in host memory.

    One allocation [Hkv, tokens * (Dk + Dv)]: each head's K and V are contiguous and next to each other. Where host
    memory is short a full segment moves to a disk (disk_tier.py): then it has a place there instead.
    """

    location: DiskLocation | None = None
    is_pageable = False  # a device copies from pinned memory only, and this is not pinned
    resident_buffer: ResidentBuffer | None = (
        None  # where the first resident_tokens also lie on the device, from arena_start on
    )
    resident_start = 0
    resident_tokens = 0
    write_done: Any = None  # the event of the last write to it
    version = 0  # how often tokens of it were given up, whose places are written again

    def __init__(
        self, tier: HostTier, heads: int, tokens: int, key_dim: int, value_dim: int, dtype: torch.dtype
    ) -> None:
        self._memory = tier.allocate((heads, tokens * (key_dim + value_dim)), dtype)
        self.is_pageable = tier.is_pageable(self._memory)
        k = self._memory[:, : tokens * key_dim].unflatten(1, (tokens, key_dim))
        v = self._memory[:, tokens * key_dim :].unflatten(1, (tokens, value_dim))
        self._pair: Piece = (k, v)
        self.tokens = tokens
        self.sealed = False

    @property
    def k(self) -> torch.Tensor:
        """K in host memory."""
        return self._pair[0]

    @property
    def v(self) -> torch.Tensor:
        """V in host memory."""
        return self._pair[1]

    def piece(self, heads: slice, start: int, stop: int) -> Piece | DiskSlice | PageableSlice:
        """Some heads of the tokens [start, stop), to be read; a segment that lies in a session comes in here."""
        if self.location is not None:
            return DiskSlice(self.location, heads.start, heads.stop, start, stop)
        k, v = self.k[heads, start:stop], self.v[heads, start:stop]
        return PageableSlice(k, v) if self.is_pageable else (k, v)

    def resident(self, heads: slice, start: int, stop: int) -> Piece:
        """The same, of tokens that also lie on the device."""
        assert self.resident_buffer is not None
        here = slice(self.resident_start + start, self.resident_start + stop)
        return self.resident_buffer.k[heads, here], self.resident_buffer.v[heads, here]

    def write_through(self, start: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write k [Hkv, T, Dk] and v [Hkv, T, Dv] on the device, from token `start` on, as far as it is resident."""
        tokens = min(k.shape[1], self.resident_tokens - start)
        if tokens > 0:
            for own, new in zip(self.resident(slice(None), start, start + tokens), (k, v), strict=True):
                own.copy_(new[:, :tokens])

    def dense(self) -> Piece:
        """K and V in host memory, from the disk where they lie there: a copy then."""
        if self.location is None:
            return self.k, self.v
        whole = DiskSlice(self.location, 0, self.location.heads, 0, self.tokens)
        reads, piece = whole.into(torch.empty(whole.nbytes, dtype=torch.uint8))
        self.location.file.read(reads)
        return piece

    def bytes(self) -> memoryview:
        """All of it, as it lies in memory."""
        data: memoryview = self._memory.view(torch.uint8).reshape(-1).numpy().data
        return data

    def move_to(self, file: DiskFile, start: int) -> None:
        """It lies in the file from now on, and its memory is let go of."""
        (k, v), dtype = self._pair, self._memory.dtype
        heads, sizes = k.shape[0], (k.shape[2] * dtype.itemsize, v.shape[2] * dtype.itemsize)
        self.location = DiskLocation(file, start, heads, self.tokens, *sizes, dtype)
        weakref.finalize(self, file.free, start, self._memory.numel() * dtype.itemsize).atexit = False
        del self._memory, self._pair


class ResidentBuffer:
    """Device memory for a run of tokens of one row: k [Hkv, tokens, Dk], v [Hkv, tokens, Dv]. See resident.py."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor) -> None:
        self.k, self.v = k, v
        self.segments: weakref.WeakSet[Segment] = weakref.WeakSet()

    @property
    def used(self) -> int:
        """Tokens up to the end of the last segment that lies here."""
        return max((segment.resident_start + segment.resident_tokens for segment in self.segments), default=0)

    @property
    def left(self) -> int:
        """Tokens after that."""
        return int(self.k.shape[1]) - self.used


@dataclass(frozen=True)
class SegmentSlice:
    """The tokens [start, stop) of a segment."""

    segment: Segment
    start: int
    stop: int

    @property
    def tokens(self) -> int:
        """Number of tokens in the span."""
        return self.stop - self.start

    @property
    def is_to_the_end(self) -> bool:
        """Whether nothing of the segment comes after it."""
        return self.stop == self.segment.tokens


@dataclass(frozen=True)
class SharedPrefix:
    """Rows of the batch that see the same spans: one pass over these K and V serves all of them."""

    rows: tuple[int, ...]
    slices: tuple[SegmentSlice, ...]


def seal(table: list[SegmentSlice]) -> None:
    """Mark a row's segments as shared. Those before the newest sealed one already are."""
    for part in reversed(table):
        if part.segment.sealed:
            return
        part.segment.sealed = True


def clip(table: list[SegmentSlice], token_ranges: TokenRanges) -> list[SegmentSlice]:
    """The parts of a row's spans that lie in the half-open token ranges."""
    clipped, at = [], 0
    for part in table:
        for start, stop in token_ranges:
            lo, hi = max(start, at), min(stop, at + part.tokens)
            if lo < hi:
                clipped.append(SegmentSlice(part.segment, part.start + lo - at, part.start + hi - at))
        at += part.tokens
    return clipped


def group(tables: Sequence[list[SegmentSlice]]) -> list[SharedPrefix]:
    """Spans that several rows see become one shared prefix; neighbours with the same rows are joined."""
    sharers: dict[tuple[int, int, int], tuple[SegmentSlice, list[int]]] = {}
    for row, table in enumerate(tables):
        for part in table:
            sharers.setdefault((id(part.segment), part.start, part.stop), (part, []))[1].append(row)
    return [
        SharedPrefix(rows, tuple(part for part, _ in members))
        for rows, members in itertools.groupby(sharers.values(), key=lambda entry: tuple(entry[1]))
    ]
