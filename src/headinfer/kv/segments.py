"""Segments of host memory, the slices of them that a row sees, and the prefixes that several rows share."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from headinfer.kv.device_buffer import BufferSlice, DeviceBuffer
from headinfer.kv.disk_file import DiskFile
from headinfer.kv.host_memory import HostTier, ReservedMemory
from headinfer.kv.slices import AnyPiece, DiskLocation, DiskSlice, PageableSlice
from headinfer.utils.tensors import Piece

__all__ = ["Segment", "SegmentSlice", "SharedPrefix", "TokenRanges", "clip", "first_of", "group", "seal"]

TokenRanges = Sequence[tuple[int, int]]
"""Half-open ranges [start, stop) of the tokens of one row."""


class Segment:
    """Host memory for K and V of some tokens of one row: k [Hkv, tokens, Dk] and v [Hkv, tokens, Dv].

    It is one allocation [Hkv, tokens * (Dk + Dv)]. K and V of a head are contiguous and next to each other. If host
    memory has a budget, a full segment may move to a disk (disk_tier.py).

    Attributes:
        tokens: the number of tokens that it can hold.
        sealed: whether it is never written again, for example because two rows share it.
        location: where it is stored on a disk; None while it is in host memory.
        is_leaving: whether it will be moved to a disk or has been. When the move ends depends on the speed of the disk.
        is_pageable: whether it should be pinned and is not. Devices copy from pinned memory only.
        resident_buffer: the device memory that holds its first resident_tokens too.
        resident_row: the row of the buffer.
        resident_start: where the first of these tokens is in the row.
        write_done: the event of the last write to it.
        version: incremented by crop(), after which tokens may be written again. It invalidates prefetched copies.
    """

    location: DiskLocation | None = None
    is_leaving = False
    is_pageable = False
    resident_buffer: DeviceBuffer | None = None
    resident_row = 0
    resident_start = 0
    resident_tokens = 0
    write_done: Any = None
    version = 0

    def __init__(
        self,
        tier: HostTier | ReservedMemory,
        heads: int,
        tokens: int,
        key_dim: int,
        value_dim: int,
        dtype: torch.dtype,
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
        """K [Hkv, tokens, Dk] in host memory."""
        return self._pair[0]

    @property
    def v(self) -> torch.Tensor:
        """V [Hkv, tokens, Dv] in host memory."""
        return self._pair[1]

    def piece(self, heads: slice, start: int, stop: int) -> AnyPiece:
        """Return some heads of the tokens [start, stop), to be read."""
        if self.location is not None:
            return DiskSlice(self.location, heads.start, heads.stop, start, stop)
        k = self.k[heads, start:stop]
        v = self.v[heads, start:stop]
        return PageableSlice(k, v) if self.is_pageable else (k, v)

    def keep_resident(self, buffer: DeviceBuffer, row: int, start: int) -> None:
        """Note that a row of a buffer holds the first tokens of the segment, from `start` on, as far as it reaches."""
        self.resident_tokens = max(min(self.tokens, buffer.resident_tokens - start), 0)
        self.resident_buffer = buffer if self.resident_tokens else None
        self.resident_row = row
        self.resident_start = start
        if self.resident_tokens:
            buffer.segments.add(self)

    def drop_resident(self) -> None:
        """Note that no buffer holds tokens of the segment any more."""
        self.resident_buffer = None
        self.resident_tokens = 0

    def resident(self, start: int, stop: int) -> BufferSlice:
        """Return where the resident tokens [start, stop) are in device memory."""
        assert self.resident_buffer is not None
        return BufferSlice(
            self.resident_buffer, self.resident_row, self.resident_start + start, self.resident_start + stop
        )

    def dense(self) -> Piece:
        """Return K and V in host memory. A segment on a disk is read into new memory."""
        if self.location is None:
            return self.k, self.v
        whole = DiskSlice(self.location, 0, self.location.heads, 0, self.tokens)
        reads, piece = whole.plan_reads(torch.empty(whole.nbytes, dtype=torch.uint8))
        self.location.file.read(reads)
        return piece

    def bytes(self) -> memoryview:
        """Return the bytes of the segment in host memory."""
        data: memoryview = self._memory.view(torch.uint8).reshape(-1).numpy().data
        return data

    def move_to(self, file: DiskFile, start: int) -> None:
        """Release the host memory of the segment, whose bytes are in the file from byte `start` on."""
        k, v = self._pair
        dtype = self._memory.dtype
        key_bytes = k.shape[2] * dtype.itemsize
        value_bytes = v.shape[2] * dtype.itemsize
        self.location = DiskLocation(file, start, k.shape[0], self.tokens, key_bytes, value_bytes, dtype)
        weakref.finalize(self, file.free, start, self._memory.numel() * dtype.itemsize).atexit = False
        del self._memory, self._pair


@dataclass(frozen=True)
class SegmentSlice:
    """The tokens [start, stop) of a segment."""

    segment: Segment
    start: int
    stop: int

    @property
    def tokens(self) -> int:
        """The number of tokens."""
        return self.stop - self.start

    @property
    def is_to_the_end(self) -> bool:
        """Whether it reaches the end of the segment."""
        return self.stop == self.segment.tokens


@dataclass(frozen=True)
class SharedPrefix:
    """Rows of the batch that see the same slices. One pass over these K and V serves all of them."""

    rows: tuple[int, ...]
    slices: tuple[SegmentSlice, ...]


def seal(table: list[SegmentSlice]) -> None:
    """Seal the segments of a row. The segments before the newest sealed one already are."""
    for part in reversed(table):
        if part.segment.sealed:
            return
        part.segment.sealed = True


def clip(table: list[SegmentSlice], token_ranges: TokenRanges) -> list[SegmentSlice]:
    """Return the parts of a row's slices that are in the token ranges."""
    clipped = []
    at = 0
    for part in table:
        for start, stop in token_ranges:
            first = max(start, at)
            last = min(stop, at + part.tokens)
            if first < last:
                clipped.append(SegmentSlice(part.segment, part.start + first - at, part.start + last - at))
        at += part.tokens
    return clipped


def first_of(token_ranges: Sequence[TokenRanges] | None, tokens: int, rows: int) -> list[TokenRanges]:
    """Return the parts of each row's token ranges within the first `tokens` tokens. None stands for all tokens."""
    whole = token_ranges if token_ranges is not None else [[(0, tokens)]] * rows
    return [[(start, min(stop, tokens)) for start, stop in ranges if start < tokens] for ranges in whole]


def group(tables: Sequence[list[SegmentSlice]]) -> list[SharedPrefix]:
    """Group the slices of all rows by the rows that see them. Neighbours with the same rows are joined."""
    sharers: dict[tuple[int, int, int], tuple[SegmentSlice, list[int]]] = {}
    for row, table in enumerate(tables):
        for part in table:
            key = (id(part.segment), part.start, part.stop)
            sharers.setdefault(key, (part, []))[1].append(row)
    return [
        SharedPrefix(rows, tuple(part for part, _ in members))
        for rows, members in itertools.groupby(sharers.values(), key=lambda entry: tuple(entry[1]))
    ]
