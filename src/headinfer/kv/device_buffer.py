"""The device memory of one layer: its resident tokens, and behind them the tail of its newest tokens.

    tokens on the host:    [first ............................. host_tokens)
    buffer:                [resident tokens ..... | tail ..... | free       ]

While all host tokens from `first` on are resident, the tail follows them directly. Later, the resident tokens fill
their part of the buffer, and the tail is in the last part. In both cases resident tokens, tail and a new token are
neighbours, so one kernel call attends to all of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from headinfer.kv.byte_counter import ByteCounter
from headinfer.utils.tensors import Piece

__all__ = [
    "TAIL_TOKENS",
    "TAIL_UNIT_TOKENS",
    "BufferShape",
    "BufferSlice",
    "DeviceBuffer",
    "ResidentTokens",
    "no_action",
    "pieces_of",
]

TAIL_UNIT_TOKENS = 128
TAIL_TOKENS = 2 * TAIL_UNIT_TOKENS
"""Tokens of a tail. After a flush it holds at least one unit."""


@dataclass(frozen=True)
class BufferShape:
    """What the buffers of one layer have in common: rows B, KV heads Hkv, head dims Dk and Dv, dtype and device."""

    rows: int
    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def token_bytes(self) -> int:
        """Bytes of K and V of one token of all rows."""
        return self.rows * self.heads * (self.key_dim + self.value_dim) * self.dtype.itemsize


class ResidentTokens(Protocol):
    """Tokens of one row whose first ones a buffer may hold. Segments implement it.

    Attributes:
        resident_row: the row of the buffer.
        resident_start: where the first token is in the row.
    """

    resident_row: int
    resident_start: int

    def keep_resident(self, buffer: DeviceBuffer, row: int, start: int) -> None:
        """Note that a row of a buffer holds the first tokens, from `start` on, as far as it reaches."""

    def drop_resident(self) -> None:
        """Note that no buffer holds tokens any more."""


class DeviceBuffer:
    """K [B, Hkv, resident_tokens + TAIL_TOKENS, Dk] and V [B, Hkv, resident_tokens + TAIL_TOKENS, Dv] of one layer.

    Args:
        shape: the shape of the layer.
        first: the position, in each row, of the first token of the buffer.
        resident_tokens: tokens of each row that it holds beside the tail.
        counter: counts the bytes.

    Attributes:
        k: K.
        v: V.
        first: see above.
        tokens: tokens of each row that it can hold.
        resident_tokens: see above.
        segments: the segments whose first tokens the buffer holds too.
        on_drop: returns a function that moves the tail to another buffer, for drop(); None if no tail is in the buffer.
    """

    def __init__(self, shape: BufferShape, first: int, resident_tokens: int, counter: ByteCounter) -> None:
        size = (shape.rows, shape.heads, resident_tokens + TAIL_TOKENS)
        with torch.inference_mode(False):  # a cache that was filled in inference mode may be used outside of it
            self.k = torch.empty(*size, shape.key_dim, dtype=shape.dtype, device=shape.device)
            self.v = torch.empty(*size, shape.value_dim, dtype=shape.dtype, device=shape.device)
        self.first = first
        self.tokens = resident_tokens + TAIL_TOKENS
        self.resident_tokens = resident_tokens
        self.resident_bytes = resident_tokens * shape.token_bytes
        self.tail_bytes = TAIL_TOKENS * shape.token_bytes
        self.segments: weakref.WeakSet[ResidentTokens] = weakref.WeakSet()
        self.on_drop: Callable[[], Callable[[], None] | None] = no_action
        counter.hold_device("tail", self.tail_bytes)
        counter.hold_device("resident", self.resident_bytes)
        # close() may not be called
        weakref.finalize(self, _uncount, counter, self.tail_bytes, self.resident_bytes).atexit = False

    def views(self, start: int, tokens: int) -> Piece:
        """Return views k [B, Hkv, tokens, Dk] and v [B, Hkv, tokens, Dv] of the tokens from `start` on."""
        return self.k.narrow(2, start, tokens), self.v.narrow(2, start, tokens)

    def put(self, start: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write k [B, Hkv, T, Dk] and v [B, Hkv, T, Dv] to the tokens from `start` on."""
        self.k.narrow(2, start, k.shape[2]).copy_(k)
        self.v.narrow(2, start, v.shape[2]).copy_(v)

    def tail_start(self, host_tokens: int) -> int:
        """Return where the tail begins if the host has the first `host_tokens` tokens of each row."""
        return min(host_tokens - self.first, self.resident_tokens)

    def tail_slices(
        self, row: int, host_tokens: int, tail_tokens: int, token_ranges: Sequence[tuple[int, int]] | None
    ) -> list[BufferSlice]:
        """Return where the tail of a row is: one slice for each range of its tokens that is seen; None sees all."""
        if not tail_tokens:
            return []
        begin = self.tail_start(host_tokens)
        if token_ranges is None:
            return [BufferSlice(self, row, begin, begin + tail_tokens)]
        found = []
        for start, stop in token_ranges:
            first = max(start - host_tokens, 0)
            last = min(stop - host_tokens, tail_tokens)
            if first < last:
                found.append(BufferSlice(self, row, begin + first, begin + last))
        return found

    def advance(self, k: torch.Tensor, v: torch.Tensor, leaving: int, *, host_tokens: int, tail_tokens: int) -> None:
        """Write a chunk behind the tail, and let the tail begin `leaving` tokens later.

        Tokens that leave the tail and become resident stay where they are. If the resident part is full, the rest of
        the tail moves behind it.

        Args:
            k: [B, Hkv, T, Dk].
            v: [B, Hkv, T, Dv].
            leaving: how many of the oldest tokens of tail and chunk leave the tail.
            host_tokens: tokens on the host before that.
            tail_tokens: tokens of the tail before that.
        """
        start = self.tail_start(host_tokens)
        chunk_start = start + tail_tokens
        if host_tokens + leaving - self.first <= self.resident_tokens:
            self.put(chunk_start, k, v)
            return
        from_tail = min(leaving, tail_tokens)
        from_chunk = leaving - from_tail
        kept = tail_tokens - from_tail
        tail_start = self.resident_tokens
        if kept:
            moved_k, moved_v = self.views(start + from_tail, kept)
            self.put(tail_start, moved_k.clone(), moved_v.clone())
        becoming_resident = min(max(tail_start - chunk_start, 0), from_chunk)
        if becoming_resident:
            self.put(chunk_start, k[:, :, :becoming_resident], v[:, :, :becoming_resident])
        self.put(tail_start + kept, k[:, :, from_chunk:], v[:, :, from_chunk:])

    def copy_from(self, other: DeviceBuffer, tokens: int) -> None:
        """Copy the first `tokens` tokens of a buffer with the same shape and the same first token. Its segments move
        to this buffer."""
        self.put(0, *other.views(0, tokens))
        for segment in list(other.segments):
            segment.keep_resident(self, segment.resident_row, segment.resident_start)

    def drop(self) -> None:
        """Make the resident tokens host tokens only. The memory is freed with the last reference to the buffer."""
        for segment in list(self.segments):
            segment.drop_resident()
        self.segments.clear()
        move_tail = self.on_drop()
        if move_tail is not None:
            move_tail()


@dataclass(frozen=True)
class BufferSlice:
    """The tokens at [start, stop) of one row of a buffer."""

    buffer: DeviceBuffer
    row: int
    start: int
    stop: int


def pieces_of(slices: Iterable[BufferSlice], heads: slice) -> list[Piece]:
    """Return slices of buffers as views k [h, T, Dk] and v [h, T, Dv] of some heads. Neighbours become one piece."""
    joined: list[BufferSlice] = []
    for part in slices:
        last = joined[-1] if joined else None
        if last is not None and last.buffer is part.buffer and last.row == part.row and last.stop == part.start:
            joined[-1] = BufferSlice(part.buffer, part.row, last.start, part.stop)
        else:
            joined.append(part)
    return [
        (part.buffer.k[part.row, heads, part.start : part.stop], part.buffer.v[part.row, heads, part.start : part.stop])
        for part in joined
    ]


def no_action() -> None:
    """The on_drop of a buffer that holds no tail."""


def _uncount(counter: ByteCounter, tail_bytes: int, resident_bytes: int) -> None:
    counter.hold_device("tail", -tail_bytes)
    counter.hold_device("resident", -resident_bytes)
