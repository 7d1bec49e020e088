"""KV that also stays on the device: the first tokens of each row, as far as a budget reaches.

What is resident is written through to the host like all other KV, so letting go of it is free. A row's resident
tokens lie in resident buffers, head by head, and neighbours are read as one piece: where all is resident, attention is one kernel
call on them, as it is without offloading.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from headinfer.kv.byte_counter import ByteCounter
from headinfer.kv.segments import ResidentBuffer, Segment, SegmentSlice
from headinfer.kv.streams import Streams

__all__ = ["RESIDENT_UNIT_TOKENS", "Residency", "Share"]

RESIDENT_UNIT_TOKENS = 128
_FIRST_BUFFER_TOKENS = 4096  # where the final length is not known; later ones double what the row has


class Residency:
    """The room for resident KV on one device."""

    def __init__(self, room_bytes: int, device: torch.device, counter: ByteCounter, streams: Streams) -> None:
        self.room_bytes, self.device, self.streams, self._counter = room_bytes, device, streams, counter
        self._buffers: list[weakref.ref[ResidentBuffer]] = []

    @property
    def held_bytes(self) -> int:
        """Bytes of all resident buffers."""
        return self._counter.device_bytes["resident"]

    def take(self, heads: int, tokens: int, key_dim: int, value_dim: int, dtype: torch.dtype) -> ResidentBuffer | None:
        """A new resident buffer, or None where there is no room for it."""
        nbytes = heads * tokens * (key_dim + value_dim) * dtype.itemsize
        if self.held_bytes + nbytes > self.room_bytes:
            return None
        try:
            with torch.inference_mode(False):
                k = torch.empty(heads, tokens, key_dim, dtype=dtype, device=self.device)
                v = torch.empty(heads, tokens, value_dim, dtype=dtype, device=self.device)
        except torch.OutOfMemoryError:  # others took what was free: these tokens stream
            return None
        resident_buffer = ResidentBuffer(k, v)
        self._counter.hold_device("resident", nbytes)
        weakref.finalize(resident_buffer, self._counter.hold_device, "resident", -nbytes).atexit = False
        self._buffers = [known for known in self._buffers if known() is not None] + [weakref.ref(resident_buffer)]
        return resident_buffer

    def let_go(self, room_bytes: int) -> None:
        """Keep no more than this from now on; the newest go first. Their tokens stream from the host again."""
        self.room_bytes = room_bytes
        while self.held_bytes > room_bytes:
            resident_buffer = self._buffers.pop()()
            if resident_buffer is not None:
                for segment in list(resident_buffer.segments):
                    segment.resident_buffer, segment.resident_tokens = None, 0
            del resident_buffer


@dataclass(frozen=True)
class Share:
    """What one store may keep of its device's room.

    host_tokens: what a row of the store will hold on the host at its expected length, 0 where that is not known.
    """

    pool: Residency
    nbytes: int
    host_tokens: int

    def most_tokens(self, token_bytes: int, rows: int) -> int:
        """Resident tokens of a row, at most."""
        return self.nbytes // (token_bytes * rows) // RESIDENT_UNIT_TOKENS * RESIDENT_UNIT_TOKENS

    def assign(self, segment: Segment, start: int, before: Segment | None, rows: int) -> bool:
        """Give a segment that begins at token `start` of its row a place in an resident buffer, whole or up to the limit.

        before: the row's previous segment; only what follows resident tokens is resident. False where it has none.
        """
        heads, _, key_dim = segment.k.shape
        value_dim, dtype = segment.v.shape[2], segment.k.dtype
        most = self.most_tokens(heads * (key_dim + value_dim) * dtype.itemsize, rows)
        is_planned = start < self.host_tokens
        most = min(most, self.host_tokens) if is_planned else most
        wanted = min(segment.tokens, most - start)
        if wanted <= 0 or (before is not None and before.resident_tokens < before.tokens):
            return False
        resident_buffer = before.resident_buffer if before is not None else None
        if (
            resident_buffer is None
            or before is None
            or before.resident_start + before.tokens != resident_buffer.used
            or resident_buffer.left < wanted
        ):
            tokens = most - start if is_planned else min(max(wanted, start, _FIRST_BUFFER_TOKENS), most - start)
            resident_buffer = self.pool.take(heads, tokens, key_dim, value_dim, dtype)
        if resident_buffer is None:
            return False
        segment.resident_buffer, segment.resident_start, segment.resident_tokens = (
            resident_buffer,
            resident_buffer.used,
            wanted,
        )
        resident_buffer.segments.add(segment)
        return True

    def promote(self, table: Sequence[SegmentSlice], rows: int) -> None:
        """Bring the first segments of a row to the device that were not written through, such as a session's."""
        start, before = 0, None
        for part in table:
            segment = part.segment
            if segment.resident_tokens == 0:
                if segment.location is not None or not self.assign(segment, start, before, rows):
                    return
                if segment.write_done is not None:
                    self.pool.streams.wait(segment.write_done, "compute")
                (k, v), tokens = segment.resident(slice(None), 0, segment.resident_tokens), segment.resident_tokens
                pairs = [*zip(k, segment.k[:, :tokens], strict=True), *zip(v, segment.v[:, :tokens], strict=True)]
                self.pool.streams.copy(pairs, "compute")
            start, before = start + part.tokens, segment
