"""A ring in front of another one: loads tiles from disk or pageable memory into pinned host buffers.

Threads load each tile some tiles ahead of its use, across the boundaries of layers too. From its buffer a tile goes
through the inner ring like any other.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from headinfer.kv.host_memory import HostTier
from headinfer.kv.slices import AnyPiece, DiskSlice, PageableSlice
from headinfer.kv.streams import Streams
from headinfer.kv.transfer import Ring
from headinfer.utils.tensors import Piece

__all__ = ["READ_SLOTS", "ReadAhead", "read_slot_bytes"]

READ_SLOTS = 5
_BUDGET_SHARE = 32  # one slot is at most this part of the host budget
_LARGEST_SLOT_BYTES = 32 * 1024 * 1024
_SLOT_ALIGN_BYTES = 64 * 1024
_READERS = 4


def read_slot_bytes(host_budget: int | None = None) -> int:
    """Return the bytes of each of the READ_SLOTS host buffers.

    Args:
        host_budget: the host memory for KV, in bytes; None if it is not limited.
    """
    share = (host_budget or sys.maxsize) // _BUDGET_SHARE
    return max(min(share, _LARGEST_SLOT_BYTES) // _SLOT_ALIGN_BYTES, 1) * _SLOT_ALIGN_BYTES


@dataclass
class _Tile:
    """A tile on its way through a host buffer and the inner ring.

    Attributes:
        pieces: the pieces in host memory, valid when all loads are done.
        after: events of the write-back of the pieces.
        slot: the index of the host buffer; None if the tile needs none.
        loads: the jobs that fill the buffer.
        inner: the handle of the inner ring, after the tile has been passed on.
    """

    pieces: list[Piece]
    after: Sequence[Any]
    slot: int | None
    loads: list[Future[None]] = field(default_factory=list)
    inner: int | None = None

    def wait_loaded(self) -> list[Piece]:
        """Wait until the tile is in host memory, and return its pieces; raise the error of a load that failed."""
        for load in self.loads:
            load.result()
        return self.pieces


class ReadAhead:
    """A ring for tiles that may contain DiskSlice and PageableSlice; see `Ring` in transfer.py for its methods.

    Args:
        inner: the ring that brings tiles from host memory to the device.
        tier: allocates the host buffers.
        slot_bytes: the size of each host buffer.
        streams: the queues of the inner ring, or None if it has none.
    """

    depth = READ_SLOTS - 1

    def __init__(self, inner: Ring, tier: HostTier, slot_bytes: int, streams: Streams | None = None) -> None:
        self.inner = inner
        self.slot_bytes = inner.slot_bytes
        self.counter = tier.counter
        self._streams = streams
        self._memory = [tier.buffer(slot_bytes) for _ in range(READ_SLOTS)]
        self._readers = ThreadPoolExecutor(_READERS, "headinfer-disk-read")
        weakref.finalize(self, self._readers.shutdown, wait=False).atexit = False
        self._free = list(range(READ_SLOTS))
        self._used_by: dict[int, int] = {}  # by free slot: the inner handle of the tile that was last copied from it
        self._tiles: dict[int, _Tile] = {}
        self._prefetched: dict[Hashable, _Tile] = {}
        self._next_handle = 0

    def fetch(self, pieces: Sequence[AnyPiece], after: Sequence[Any] = (), key: Hashable = None) -> int:
        tile = self._prefetched.pop(key, None) or self._begin(pieces, after)
        handle = self._next_handle
        self._next_handle += 1
        self._tiles[handle] = tile
        return handle

    def prefetch(self, pieces: Sequence[AnyPiece], after: Sequence[Any] = (), key: Hashable = None) -> bool:
        """Begin to load a tile that will be fetched soon, if a slot is free."""
        if not self._free or key is None or key in self._prefetched:
            return False
        self._prefetched[key] = self._begin(pieces, after)
        return True

    def drop_prefetched(self) -> None:
        for tile in self._prefetched.values():
            self._free_slot(tile)
        self._prefetched.clear()
        self.inner.drop_prefetched()

    def wait(self, handle: int) -> Sequence[Piece]:
        tile = self._tiles[handle]
        following = self._tiles.get(handle + 1)
        self._pass_on(tile)
        if following is not None and all(load.done() for load in following.loads):
            self._pass_on(following)
        assert tile.inner is not None
        return self.inner.wait(tile.inner)

    def release(self, handle: int) -> None:
        tile = self._tiles.pop(handle)
        assert tile.inner is not None
        self.inner.release(tile.inner)
        if tile.slot is not None:
            self._used_by[tile.slot] = tile.inner
            self._free.append(tile.slot)

    def wait_copied(self, handle: int) -> None:
        self.inner.wait_copied(handle)

    def abandon(self) -> None:
        for tile in self._tiles.values():
            self._free_slot(tile)
        self._tiles.clear()
        self.drop_prefetched()
        self.inner.abandon()

    def close(self) -> None:
        self.abandon()
        self.inner.close()
        self._memory = []

    def _begin(self, pieces: Sequence[AnyPiece], after: Sequence[Any]) -> _Tile:
        """Begin to load a tile; a tile whose pieces all are in pinned memory needs no slot."""
        if all(isinstance(piece, tuple) for piece in pieces):
            return _Tile([piece for piece in pieces if isinstance(piece, tuple)], after, None)
        if not self._free:
            self.drop_prefetched()  # the prefetched tiles are not those that are fetched
        slot = self._free[0]
        if slot in self._used_by:
            self.inner.wait_copied(self._used_by[slot])
            del self._used_by[slot]
        if self._streams is not None and any(isinstance(piece, PageableSlice) for piece in pieces):
            # The threads read what was written back. A write-back to pageable memory is synchronous anyway, so waiting
            # for it here costs no overlap.
            for event in after:
                self._streams.finish(event)
        tile = _Tile([], after, self._free.pop(0))
        try:
            self._load(tile, pieces, self._memory[slot])
        except BaseException:
            self._free_slot(tile)
            raise
        return tile

    def _load(self, tile: _Tile, pieces: Sequence[AnyPiece], memory: torch.Tensor) -> None:
        """Begin to load the pieces of a tile into its host buffer."""
        start = 0
        for piece in pieces:
            if isinstance(piece, tuple):
                tile.pieces.append(piece)
                continue
            jobs, loaded = piece.load_into(memory[start:])
            start += piece.nbytes
            for job in jobs:
                tile.loads.append(self._readers.submit(job))
            tile.pieces.append(loaded)
            if isinstance(piece, DiskSlice):
                self.counter.disk_to_host_bytes += piece.nbytes

    def _pass_on(self, tile: _Tile) -> None:
        """Fetch a tile with the inner ring, unless that was done already."""
        if tile.inner is None:
            tile.inner = self.inner.fetch(tile.wait_loaded(), tile.after)

    def _free_slot(self, tile: _Tile) -> None:
        for load in tile.loads:
            load.exception()  # wait, because the load must not write to the slot any more; ignore its error
        if tile.slot is not None:
            self._free.append(tile.slot)
