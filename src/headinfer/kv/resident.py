"""Resident KV: the first tokens of each row stay on the device, as many as a budget allows.

Resident tokens are written to the host like all other tokens, so they can be dropped from the device without a copy.
They are stored in the buffers that hold the tails (device_buffer.py). If all tokens of a layer are resident, attention
is one kernel call on one buffer, as it is without offloading.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from headinfer.kv.byte_counter import ByteCounter
from headinfer.kv.device_buffer import BufferShape, DeviceBuffer, pieces_of
from headinfer.kv.segments import SegmentSlice
from headinfer.kv.streams import Streams
from headinfer.utils.kv_format import UNIT, rounded_up
from headinfer.utils.tensors import Piece

__all__ = ["LEAST_BUFFER_TOKENS", "RESIDENT_UNIT_TOKENS", "LayerResidency", "Residency"]

RESIDENT_UNIT_TOKENS = 128
_FIRST_BUFFER_TOKENS = 4096  # if the final length is unknown; later buffers are twice as large
LEAST_BUFFER_TOKENS = 1024
"""The least number of resident tokens for which a layer gets another buffer, with memory for another tail."""


class Residency:
    """The memory for resident KV on one device, shared by its layers.

    Args:
        room_bytes: upper bound of resident bytes.
        device: the device.
        counter: counts the bytes.
        streams: the queues of the device.
    """

    def __init__(self, room_bytes: int, device: torch.device, counter: ByteCounter, streams: Streams) -> None:
        self.room_bytes = room_bytes
        self.device = device
        self.streams = streams
        self._counter = counter
        self._buffers: list[weakref.ref[DeviceBuffer]] = []

    @property
    def held_bytes(self) -> int:
        """Bytes of all resident tokens."""
        return self._counter.device_bytes["resident"]

    def take(self, shape: BufferShape, first: int, tokens: int) -> DeviceBuffer | None:
        """Allocate a buffer with `tokens` resident tokens.

        Returns:
            The buffer, or None if it exceeds `room_bytes` or the device is out of memory.
        """
        if self.held_bytes + tokens * shape.token_bytes > self.room_bytes:
            return None
        try:
            buffer = DeviceBuffer(shape, first, tokens, self._counter)
        except torch.OutOfMemoryError:  # other allocations took the free memory: these tokens stream
            return None
        self._buffers = [known for known in self._buffers if known() is not None]
        self._buffers.append(weakref.ref(buffer))
        return buffer

    def shrink(self, room_bytes: int) -> None:
        """Reduce `room_bytes`, and drop the newest buffers that exceed it. Their tokens stream from the host again."""
        self.room_bytes = room_bytes
        while self._buffers and self.held_bytes > room_bytes:
            buffer = self._buffers.pop()()
            if buffer is not None:
                buffer.drop()
            del buffer


@dataclass(frozen=True)
class LayerResidency:
    """The part of a device's resident memory that one layer may use.

    Attributes:
        pool: the memory of the device.
        nbytes: upper bound of the layer's resident bytes.
        host_tokens: tokens that a row of the layer will have on the host at its expected length; 0 if unknown.
    """

    pool: Residency
    nbytes: int
    host_tokens: int

    def most_tokens(self, shape: BufferShape) -> int:
        """Return the maximum number of resident tokens of a row."""
        return self.nbytes // shape.token_bytes // RESIDENT_UNIT_TOKENS * RESIDENT_UNIT_TOKENS

    def buffer_for(
        self, shape: BufferShape, first: int, tokens: int, held_tokens: int, least_tokens: int = 0
    ) -> DeviceBuffer | None:
        """Allocate a buffer for more resident tokens, as many as the limits allow.

        It reaches the expected length if that is known. Otherwise it has at least twice the tokens held so far.

        Args:
            shape: the shape of the layer.
            first: the position of the buffer's first token in a row.
            tokens: tokens of each row, from the first one of the row on, that should be resident.
            held_tokens: tokens of the buffer that it replaces.
            least_tokens: the least number of tokens that is worth a buffer, which has memory for a tail too.

        Returns:
            The buffer, or None if it would hold no more than held_tokens, or less than least_tokens.
        """
        most = self.most_tokens(shape) - first
        needed = min(tokens - first, most)
        wanted = max(needed, 2 * held_tokens, _FIRST_BUFFER_TOKENS)
        if tokens <= self.host_tokens:
            wanted = self.host_tokens - first
        for size in dict.fromkeys((min(wanted, most), needed)):
            if size > held_tokens and size >= least_tokens:
                buffer = self.pool.take(shape, first, size)
                if buffer is not None:
                    return buffer
        return None

    def promote(
        self, tables: Sequence[Sequence[SegmentSlice]], shape: BufferShape, decoded: Callable[[Piece], Piece]
    ) -> DeviceBuffer | None:
        """Copy the first tokens of each row to the device, if they were not written there, such as a session's.

        Args:
            tables: the slices of each row. All rows have equal lengths.
            shape: the shape of the layer.
            decoded: returns stored K and V in the dtype of the layer.

        Returns:
            A buffer with as many resident tokens as the limits allow; None if these allow none, the first tokens are on
            a disk, or some tokens are resident already.
        """
        if any(part.segment.resident_tokens for table in tables for part in table):
            return None
        host_tokens = sum(part.tokens for part in tables[0])
        tokens = min(sum(part.tokens for part in itertools.takewhile(_is_in_memory, table)) for table in tables)
        buffer = self.buffer_for(shape, 0, tokens, 0) if tokens else None
        if buffer is None:
            return None
        if tokens < host_tokens:  # the tokens behind these are not copied, so no later ones can follow them
            buffer.resident_tokens = min(buffer.resident_tokens, tokens)
        for row, table in enumerate(tables):
            start = 0
            for part in table:
                part.segment.keep_resident(buffer, row, start)
                self._fetch(part, decoded)
                start += part.tokens
        return buffer

    def _fetch(self, part: SegmentSlice, decoded: Callable[[Piece], Piece]) -> None:
        """Copy the resident tokens of a segment to the device."""
        segment = part.segment
        tokens = min(segment.resident_tokens, part.stop)
        if not tokens:
            return
        if segment.write_done is not None:
            self.pool.streams.wait(segment.write_done, "compute")
        ((k, v),) = pieces_of([segment.resident(0, tokens)], slice(None))
        whole = rounded_up(tokens, UNIT)
        host_k, host_v = decoded((segment.k[:, :whole], segment.v[:, :whole]))
        copies = [*zip(k, host_k[:, :tokens], strict=True), *zip(v, host_v[:, :tokens], strict=True)]
        self.pool.streams.copy(copies, "compute")


def _is_in_memory(part: SegmentSlice) -> bool:
    return part.start == 0 and part.segment.location is None
