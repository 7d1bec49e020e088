"""The ring: device memory in slots, through which tiles stream from the host to the device.

For each tile the loop calls, in this order:

    handle = ring.fetch(pieces)      begins to copy the pieces to a slot; returns at once
    pieces = ring.wait(handle)       the tile, which the compute queue may read: pairs of k [h, T, Dk] and v [h, T, Dv]
    ring.release(handle)             the compute queue's reads are queued, so the slot may be used again

A tile that is a contiguous run on the host, such as some heads of a whole segment, is one copy and has the same layout
in its slot. Other tiles are one piece too, joined from a copy for each piece, head and side.

The loop fetches tile i + 1 before it waits for tile i. In the last tile of a layer it prefetches the first tiles of
the next layer. Events order the work of the queues (streams.py):

    slot free   recorded in compute by release()         `fetch` waits for it before it writes to the slot
    slot ready  recorded in fetch after the copies       `compute` waits for it in wait()
    write_done  recorded in back (write_back.py)         `fetch` waits for it before it reads what was written
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Hashable, Sequence
from typing import Any, Protocol

import torch

from headinfer.errors import StateError
from headinfer.kv.byte_counter import ByteCounter
from headinfer.kv.streams import Copy, Streams
from headinfer.utils.tensors import Piece

__all__ = ["InPlace", "Ring", "SlotRing"]


class Ring(Protocol):
    """The interface between the loop and the transfer of tiles.

    Attributes:
        slot_bytes: the largest tile, in bytes; 0 if tiles are read in place.
        depth: how many tiles the loop fetches or prefetches ahead of the one that is computed.
    """

    slot_bytes: int
    depth: int

    def fetch(self, pieces: Sequence[Any], after: Sequence[Any] = (), key: Hashable = None) -> int:
        """Begin to bring a tile to the device.

        Args:
            pieces: the pieces of the tile on the host, k [h, T, Dk] and v [h, T, Dv] each. A ring with read-ahead
                (read_ahead.py) also accepts DiskSlice and PageableSlice.
            after: events of the write-back of the pieces.
            key: equal for tiles with the same content. A tile that was prefetched with this key is not copied again.

        Returns:
            A handle for the other methods.
        """

    def wait(self, handle: int) -> Sequence[Piece]:
        """Let the compute queue wait for a tile, and return its pieces on the device."""

    def release(self, handle: int) -> None:
        """Free the slot of a tile whose reads have all been queued."""

    def wait_copied(self, handle: int) -> None:
        """Wait on the host until the host memory of a tile is not read any more."""

    def prefetch(self, pieces: Sequence[Any], after: Sequence[Any] = (), key: Hashable = None) -> bool:
        """Begin to copy a tile that will be fetched next, if a slot is free. See fetch() for the arguments.

        Returns:
            Whether it was begun.
        """

    def drop_prefetched(self) -> None:
        """Drop the tiles that were prefetched and not fetched."""

    def abandon(self) -> None:
        """Drop all tiles, after an error between fetch() and release()."""

    def close(self) -> None:
        """Drop all tiles and free the slots."""


class SlotRing:
    """A ring with a fixed number of slots of fixed size in device memory. Only wait_copied() makes the host wait.

    Args:
        slots: the number of slots.
        slot_bytes: the size of each slot.
        device: the device of the slots.
        counter: counts the slots and the copied bytes.
        streams: the queues of the device.
    """

    depth = 1

    def __init__(
        self, slots: int, slot_bytes: int, device: torch.device, counter: ByteCounter, streams: Streams
    ) -> None:
        self.slot_bytes = slot_bytes
        self._counter = counter
        self._streams = streams
        with torch.inference_mode(False):
            self._memory = [torch.zeros(slot_bytes, dtype=torch.uint8, device=device) for _ in range(slots)]
        # torch's allocator orders reuse of freed memory by the compute queue only, and the copies of a prefetched tile
        # may still be queued. So drain all queues before the memory is freed.
        weakref.finalize(self, streams.drain).atexit = False
        counter.hold_device("ring", slots * slot_bytes)
        self._ready = [streams.event() for _ in range(slots)]
        self._free = [streams.event() for _ in range(slots)]
        for event in self._free:  # the compute queue writes the zeros of the slots
            streams.record(event, "compute")
        self._in_use: dict[int, tuple[Piece, Sequence[Piece]]] = {}  # by handle: the tile, and its pieces on the host
        self._prefetched: deque[tuple[Hashable, int]] = deque()  # keys and handles
        self._next_handle = 0

    def fetch(self, pieces: Sequence[Piece], after: Sequence[Any] = (), key: Hashable = None) -> int:
        if self._prefetched and key is not None and key == self._prefetched[0][0]:
            return self._prefetched.popleft()[1]
        self.drop_prefetched()  # if the first one is not wanted, those behind it are not either
        return self._begin(pieces, after)

    def prefetch(self, pieces: Sequence[Piece], after: Sequence[Any] = (), key: Hashable = None) -> bool:
        if self._is_in_use(self._next_handle):
            return False
        self._prefetched.append((key, self._begin(pieces, after)))
        return True

    def wait(self, handle: int) -> Sequence[Piece]:
        self._streams.wait(self._ready[self._slot(handle)], "compute")
        return (self._in_use[handle][0],)

    def release(self, handle: int) -> None:
        del self._in_use[handle]
        self._streams.record(self._free[self._slot(handle)], "compute")

    def wait_copied(self, handle: int) -> None:
        # If the slot has been filled again since, this waits for the later copies too.
        self._streams.finish(self._ready[self._slot(handle)])

    def drop_prefetched(self) -> None:
        if self._prefetched:
            # The next tiles get the same slots: nothing reads the dropped ones, and their copies are in the same queue.
            self._next_handle = self._prefetched[0][1]
        while self._prefetched:
            del self._in_use[self._prefetched.popleft()[1]]

    def abandon(self) -> None:
        self._streams.drain()
        self._prefetched.clear()
        self._in_use.clear()

    def close(self) -> None:
        """Drop all tiles and free the slots."""
        self.abandon()
        self._counter.hold_device("ring", -len(self._memory) * self.slot_bytes)
        self._memory = []

    def _slot(self, handle: int) -> int:
        return handle % len(self._memory)

    def _is_in_use(self, handle: int) -> bool:
        return any(self._slot(used) == self._slot(handle) for used in self._in_use)

    def _begin(self, pieces: Sequence[Piece], after: Sequence[Any]) -> int:
        handle = self._next_handle
        slot = self._slot(handle)
        if self._is_in_use(handle):
            raise StateError("a tile was fetched into a slot that is still in use: release tiles in order")
        run = _contiguous(pieces[0]) if len(pieces) == 1 else None
        if run is None:
            tile = self._tile_in(slot, pieces)
            copies = _copies(tile, pieces)
        else:
            tile, copy = self._same_layout(slot, pieces[0], run)
            copies = [copy]
        self._in_use[handle] = (tile, pieces)
        self._next_handle += 1
        self._streams.wait(self._free[slot], "fetch")
        for event in after:
            self._streams.wait(event, "fetch")
        self._streams.copy(copies, "fetch")
        self._streams.record(self._ready[slot], "fetch")
        self._counter.copies += len(copies)
        self._counter.host_to_device_bytes += sum(x.numel() * x.element_size() for piece in pieces for x in piece)
        return handle

    def _tile_in(self, slot: int, pieces: Sequence[Piece]) -> Piece:
        """Lay out one piece in a slot, K before V. It can hold all tokens of some pieces.

        The stride between heads is that of a tile that fills the slot, whatever the length of this tile. So kernels
        that make a plan for each stride and length see few different strides.
        """
        k, v = pieces[0]
        heads = k.shape[0]
        tokens = sum(k.shape[1] for k, _ in pieces)
        token_bytes = heads * (k.shape[2] + v.shape[2]) * k.element_size()
        self._check_size(tokens * token_bytes)
        capacity = self.slot_bytes // token_bytes
        flat = self._memory[slot].view(k.dtype)
        k_size, v_size = (heads * capacity * x.shape[2] for x in (k, v))
        return (
            flat[:k_size].view(heads, capacity, k.shape[2])[:, :tokens],
            flat[k_size : k_size + v_size].view(heads, capacity, v.shape[2])[:, :tokens],
        )

    def _same_layout(self, slot: int, piece: Piece, run: torch.Tensor) -> tuple[Piece, Copy]:
        """Lay out a piece in a slot as it is on the host, where it is all of a contiguous run.

        Returns:
            The tile, and the copy of the run.
        """
        self._check_size(run.numel() * run.element_size())
        target = self._memory[slot].view(run.dtype)[: run.numel()]
        k, v = (target.as_strided(x.shape, x.stride(), x.storage_offset() - run.storage_offset()) for x in piece)
        return (k, v), (target, run)

    def _check_size(self, nbytes: int) -> None:
        if nbytes > self.slot_bytes:
            raise StateError(f"a tile of {nbytes} bytes exceeds a slot of {self.slot_bytes}")


def _contiguous(piece: Piece) -> torch.Tensor | None:
    """Return the memory of K and V as one tensor if they fill it without gaps, as some heads of a segment do.

    K and V have no element in common, so they fill a range of memory that has as many elements as they.
    """
    k, v = piece
    if k.untyped_storage().data_ptr() != v.untyped_storage().data_ptr():
        return None
    first = min(x.storage_offset() for x in piece)
    end = max(
        x.storage_offset() + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1
        for x in piece
    )
    elements = k.numel() + v.numel()
    return k.as_strided((elements,), (1,), first) if end - first == elements else None


def _copies(tile: Piece, pieces: Sequence[Piece]) -> list[Copy]:
    """Plan one copy for each piece, head and side (K or V), which is contiguous on the host and in the slot."""
    copies: list[Copy] = []
    for destination, sources in zip(tile, zip(*pieces, strict=True), strict=True):
        start = 0
        for source in sources:
            stop = start + source.shape[1]
            copies += [(destination[head, start:stop], source[head]) for head in range(source.shape[0])]
            start = stop
    return copies


class InPlace:
    """The ring if the host is the compute device: a tile is read in place, and nothing is copied."""

    slot_bytes = 0
    depth = 1

    def __init__(self) -> None:
        self._pieces: dict[int, Sequence[Piece]] = {}
        self._next_handle = 0

    def fetch(self, pieces: Sequence[Any], after: Sequence[Any] = (), key: Hashable = None) -> int:
        self._next_handle += 1
        self._pieces[self._next_handle] = pieces
        return self._next_handle

    def wait(self, handle: int) -> Sequence[Piece]:
        return self._pieces[handle]

    def release(self, handle: int) -> None:
        del self._pieces[handle]

    def wait_copied(self, handle: int) -> None:
        """Do nothing: a tile has been read when it is released."""

    def prefetch(self, pieces: Sequence[Any], after: Sequence[Any] = (), key: Hashable = None) -> bool:
        """Do nothing: there is no copy to begin."""
        return False

    def drop_prefetched(self) -> None:
        """Do nothing: prefetch() begins nothing."""

    def abandon(self) -> None:
        self._pieces.clear()

    def close(self) -> None:
        self._pieces.clear()
