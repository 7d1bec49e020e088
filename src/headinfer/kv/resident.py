"""Resident KV: the first tokens of each row stay on the device, as many as a budget allows.

Resident tokens are written through to the host like all other tokens, so they can be dropped from the device without
a copy. The resident tokens of a row are stored in buffers, head by head, and neighbours are read as one piece. If all
tokens of a row are resident, attention is one kernel call on them, as it is without offloading.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from headinfer.kv.byte_counter import ByteCounter
from headinfer.kv.segments import ResidentBuffer, Segment, SegmentSlice
from headinfer.kv.streams import Streams

__all__ = ["RESIDENT_UNIT_TOKENS", "LayerResidency", "Residency"]

RESIDENT_UNIT_TOKENS = 128
_FIRST_BUFFER_TOKENS = 4096  # if the final length is unknown; later buffers double what the row has


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
        self._buffers: list[weakref.ref[ResidentBuffer]] = []

    @property
    def held_bytes(self) -> int:
        """Bytes of all resident buffers."""
        return self._counter.device_bytes["resident"]

    def take(self, heads: int, tokens: int, key_dim: int, value_dim: int, dtype: torch.dtype) -> ResidentBuffer | None:
        """Allocate a buffer for k [heads, tokens, key_dim] and v [heads, tokens, value_dim].

        Returns:
            The buffer, or None if it exceeds `room_bytes` or the device is out of memory.
        """
        nbytes = heads * tokens * (key_dim + value_dim) * dtype.itemsize
        if self.held_bytes + nbytes > self.room_bytes:
            return None
        try:
            with torch.inference_mode(False):
                k = torch.empty(heads, tokens, key_dim, dtype=dtype, device=self.device)
                v = torch.empty(heads, tokens, value_dim, dtype=dtype, device=self.device)
        except torch.OutOfMemoryError:  # other allocations took the free memory: these tokens stream
            return None
        buffer = ResidentBuffer(k, v)
        self._counter.hold_device("resident", nbytes)
        weakref.finalize(buffer, self._counter.hold_device, "resident", -nbytes).atexit = False
        self._buffers = [known for known in self._buffers if known() is not None]
        self._buffers.append(weakref.ref(buffer))
        return buffer

    def shrink(self, room_bytes: int) -> None:
        """Reduce `room_bytes`, and drop the newest buffers that exceed it. Their tokens stream from the host again."""
        self.room_bytes = room_bytes
        while self._buffers and self.held_bytes > room_bytes:
            buffer = self._buffers.pop()()
            if buffer is not None:
                for segment in list(buffer.segments):
                    segment.resident_buffer = None
                    segment.resident_tokens = 0
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

    def most_tokens(self, token_bytes: int, rows: int) -> int:
        """Return the maximum number of resident tokens of a row."""
        return self.nbytes // (token_bytes * rows) // RESIDENT_UNIT_TOKENS * RESIDENT_UNIT_TOKENS

    def assign(self, segment: Segment, start: int, before: Segment | None, rows: int) -> bool:
        """Make the first tokens of a segment resident, as many as the limits allow.

        Args:
            segment: a segment without resident tokens.
            start: the position of its first token in the row.
            before: the previous segment of the row. Only tokens that follow resident tokens become resident.
            rows: rows of the batch.

        Returns:
            Whether any token became resident.
        """
        heads, _, key_dim = segment.k.shape
        value_dim = segment.v.shape[2]
        dtype = segment.k.dtype
        most = self.most_tokens(heads * (key_dim + value_dim) * dtype.itemsize, rows)
        is_planned = start < self.host_tokens
        if is_planned:
            most = min(most, self.host_tokens)
        wanted = min(segment.tokens, most - start)
        if wanted <= 0 or (before is not None and before.resident_tokens < before.tokens):
            return False
        buffer = _buffer_with_room(before, wanted)
        if buffer is None:
            tokens = most - start
            if not is_planned:
                tokens = min(max(wanted, start, _FIRST_BUFFER_TOKENS), most - start)
            buffer = self.pool.take(heads, tokens, key_dim, value_dim, dtype)
        if buffer is None:
            return False
        segment.resident_buffer = buffer
        segment.resident_start = buffer.used
        segment.resident_tokens = wanted
        buffer.segments.add(segment)
        return True

    def promote(self, table: Sequence[SegmentSlice], rows: int) -> None:
        """Copy the first segments of a row to the device if they were not written through, such as a session's."""
        start = 0
        before: Segment | None = None
        for part in table:
            segment = part.segment
            if segment.resident_tokens == 0:
                if segment.location is not None or not self.assign(segment, start, before, rows):
                    return
                if segment.write_done is not None:
                    self.pool.streams.wait(segment.write_done, "compute")
                tokens = segment.resident_tokens
                k, v = segment.resident(slice(None), 0, tokens)
                copies = [
                    *zip(k, segment.k[:, :tokens], strict=True),
                    *zip(v, segment.v[:, :tokens], strict=True),
                ]
                self.pool.streams.copy(copies, "compute")
            start += part.tokens
            before = segment


def _buffer_with_room(before: Segment | None, tokens: int) -> ResidentBuffer | None:
    """Return the buffer of the previous segment, if the segment is the last one in it and `tokens` more tokens fit."""
    if before is None or before.resident_buffer is None:
        return None
    buffer = before.resident_buffer
    is_last = before.resident_start + before.tokens == buffer.used
    return buffer if is_last and buffer.left >= tokens else None
