"""A ring before the ring, for tiles that a device can not copy from where they lie: on a disk, or in pageable memory.

They are brought into host buffers by threads, some tiles ahead of their use and over the boundary of layers too, and
go through the inner ring from there like any other.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from headinfer.kv.disk import DiskSlice, PageableSlice
from headinfer.kv.streams import Streams
from headinfer.kv.tiers import HostTier
from headinfer.kv.transfer import Ring
from headinfer.utils.tensors import Piece

__all__ = ["READ_SLOTS", "ReadAhead", "read_slot_bytes"]

READ_SLOTS = 5
_SLOT_SHARE = 32  # of the host budget for one slot
_LARGEST_SLOT_BYTES = 32 * 1024 * 1024
_SLOT_ALIGN_BYTES = 64 * 1024
_READERS = 4

AnyPiece = Piece | DiskSlice | PageableSlice


def read_slot_bytes(host_budget: int | None = None) -> int:
    """Bytes of one of the READ_SLOTS host buffers that tiles are brought into."""
    share = (host_budget or sys.maxsize) // _SLOT_SHARE
    return max(min(share, _LARGEST_SLOT_BYTES) // _SLOT_ALIGN_BYTES, 1) * _SLOT_ALIGN_BYTES


@dataclass
class _Tile:
    """One tile on its way: from the disk into a host slot, and from there through the inner ring."""

    pieces: list[Piece]
    after: Sequence[Any]
    slot: int | None
    reads: list[Future[None]] = field(default_factory=list)
    inner: int | None = None

    def come(self) -> list[Piece]:
        """The tile in host memory."""
        for read in self.reads:
            read.result()
        return self.pieces


class ReadAhead:
    """Brings tiles with such pieces into host slots, `depth` tiles ahead. streams: the inner ring's, if it has any."""

    depth = READ_SLOTS - 1

    def __init__(self, inner: Ring, tier: HostTier, slot_bytes: int, streams: Streams | None = None) -> None:
        self.inner, self.slot_bytes, self.counter = inner, inner.slot_bytes, tier.counter
        self._streams = streams
        self._memory = [tier.buffer(slot_bytes) for _ in range(READ_SLOTS)]
        self._readers = ThreadPoolExecutor(_READERS, "headinfer-disk-read")
        weakref.finalize(self, self._readers.shutdown, wait=False).atexit = False
        self._free = list(range(READ_SLOTS))
        self._used_by: dict[int, int] = {}  # the inner handle that a slot was last copied with
        self._tiles: dict[int, _Tile] = {}
        self._expected: dict[Hashable, _Tile] = {}
        self._next_handle = 0

    def fetch(self, pieces: Sequence[AnyPiece], after: Sequence[Any] = (), key: Hashable = None) -> int:
        tile = self._expected.pop(key, None) or self._begin(pieces, after)
        handle, self._next_handle = self._next_handle, self._next_handle + 1
        self._tiles[handle] = tile
        return handle

    def expect(self, pieces: Sequence[AnyPiece], after: Sequence[Any] = (), key: Hashable = None) -> None:
        """This tile will be fetched before long: begin to bring it in where a slot is free."""
        if self._free and key is not None and key not in self._expected:
            self._expected[key] = self._begin(pieces, after)

    def forget(self) -> None:
        for tile in self._expected.values():
            self._give_back(tile)
        self._expected.clear()
        self.inner.forget()

    def wait(self, handle: int) -> Sequence[Piece]:
        tile, following = self._tiles[handle], self._tiles.get(handle + 1)
        self._forward(tile)
        if following is not None and all(read.done() for read in following.reads):
            self._forward(following)
        assert tile.inner is not None
        return self.inner.wait(tile.inner)

    def release(self, handle: int) -> None:
        tile = self._tiles.pop(handle)
        assert tile.inner is not None
        self.inner.release(tile.inner)
        if tile.slot is not None:
            self._used_by[tile.slot] = tile.inner
            self._free.append(tile.slot)

    def copied(self, handle: int) -> None:
        self.inner.copied(handle)

    def abandon(self) -> None:
        for tile in self._tiles.values():
            self._give_back(tile)
        self._tiles.clear()
        self.forget()
        self.inner.abandon()

    def close(self) -> None:
        self.abandon()
        self.inner.close()
        self._memory = []

    def _begin(self, pieces: Sequence[AnyPiece], after: Sequence[Any]) -> _Tile:
        if all(isinstance(piece, tuple) for piece in pieces):
            return _Tile([piece for piece in pieces if isinstance(piece, tuple)], after, None)
        if not self._free:
            self.forget()  # the pass went another way than the one before
        slot = self._free.pop(0)
        if slot in self._used_by:
            self.inner.copied(self._used_by.pop(slot))
        if self._streams is not None and any(isinstance(piece, PageableSlice) for piece in pieces):
            for (
                event
            ) in after:  # the threads read what was written back; to pageable memory that was not behind anything
                self._streams.finish(event)
        tile, at = _Tile([], after, slot), 0
        for piece in pieces:
            if isinstance(piece, tuple):
                tile.pieces.append(piece)
                continue
            jobs, near = piece.bring(self._memory[slot][at:])
            at += piece.nbytes
            tile.reads += [self._readers.submit(job) for job in jobs]
            tile.pieces.append(near)
            if isinstance(piece, DiskSlice):
                self.counter.disk_to_host_bytes += piece.nbytes
        return tile

    def _forward(self, tile: _Tile) -> None:
        if tile.inner is None:
            tile.inner = self.inner.fetch(tile.come(), tile.after)

    def _give_back(self, tile: _Tile) -> None:
        for read in tile.reads:
            read.exception()  # it must not write into the slot any more; whether it failed is of no interest
        if tile.slot is not None:
            self._free.append(tile.slot)
