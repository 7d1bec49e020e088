"""The ring of slots that tiles stream through from the host to the device.

A ring has a fixed number of slots of fixed bytes. For each tile the loop calls, in this order,

    handle = ring.fetch(pieces)      starts bringing the pieces in; returns at once
    pieces = ring.wait(handle)       the tile, readable by the compute queue: pairs of k [h, T, Dk] and v [h, T, Dv]
    ring.release(handle)             the compute queue's reads are queued; the slot may be used again

and fetches tile i + 1 before it waits for tile i; in its last tile it tells what the next layer will fetch first.
All that orders the work are events (streams.py):

    slot free     recorded in compute by release()       fetch waits for it before it writes to the slot
    slot ready    recorded in fetch after the copies     compute waits for it in wait()
    write_done        recorded in back (write_back.py)       fetch waits for it before it reads what was written
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Hashable, Sequence
from typing import Any, Protocol

import torch

from headinfer.errors import StateError
from headinfer.kv.byte_counter import ByteCounter
from headinfer.kv.streams import Streams
from headinfer.utils.tensors import Piece

__all__ = ["InPlace", "Ring", "SlotRing"]


class Ring(Protocol):
    """What the loop needs of a ring. depth: how many tiles ahead it is to be told of.

    after: events of the write-back of what is fetched. key: equal for equal tiles, while what they hold is the same.
    """

    slot_bytes: int
    depth: int

    def fetch(self, pieces: Sequence[Any], after: Sequence[Any] = (), key: Hashable = None) -> int: ...

    def wait(self, handle: int) -> Sequence[Piece]: ...

    def release(self, handle: int) -> None: ...

    def copied(self, handle: int) -> None:
        """Return when what the handle was fetched from is not read any more."""

    def expect(self, pieces: Sequence[Any], after: Sequence[Any] = (), key: Hashable = None) -> None:
        """This will be fetched after all that was, by the next layer: begin now, where a slot is free."""

    def forget(self) -> None:
        """Let go of what was expected and not fetched."""

    def abandon(self) -> None:
        """Forget all handles, after an error between fetch and release."""

    def close(self) -> None: ...


class SlotRing:
    """Slots in device memory, filled by the fetch queue; the host never waits."""

    depth = 1

    def __init__(
        self, slots: int, slot_bytes: int, device: torch.device, counter: ByteCounter, streams: Streams
    ) -> None:
        self.slot_bytes, self._counter, self._streams = slot_bytes, counter, streams
        with torch.inference_mode(False):
            self._memory = [torch.zeros(slot_bytes, dtype=torch.uint8, device=device) for _ in range(slots)]
        # The allocator knows the compute queue only, and a tile that was expected may still be on its way.
        weakref.finalize(self, streams.drain).atexit = False
        counter.hold_device("ring", slots * slot_bytes)
        self._ready = [streams.event() for _ in range(slots)]
        self._free = [streams.event() for _ in range(slots)]
        for event in self._free:  # the slots' zeros are written by the compute queue
            streams.record(event, "compute")
        self._in_use: dict[int, tuple[Piece, Sequence[Piece]]] = {}  # by handle: the tile, and what it comes from
        self._expected: deque[tuple[Hashable, int]] = deque()
        self._next_handle = 0

    def fetch(self, pieces: Sequence[Piece], after: Sequence[Any] = (), key: Hashable = None) -> int:
        while self._expected:
            expected, handle = self._expected.popleft()
            if key is not None and key == expected:
                return handle
            del self._in_use[handle]  # nothing read it; what is copied into its slot next comes after it
        return self._begin(pieces, after)

    def expect(self, pieces: Sequence[Piece], after: Sequence[Any] = (), key: Hashable = None) -> None:
        if not self._is_in_use(self._next_handle):
            self._expected.append((key, self._begin(pieces, after)))

    def wait(self, handle: int) -> Sequence[Piece]:
        self._streams.wait(self._ready[self._slot(handle)], "compute")
        return (self._in_use[handle][0],)

    def release(self, handle: int) -> None:
        del self._in_use[handle]
        self._streams.record(self._free[self._slot(handle)], "compute")

    def copied(self, handle: int) -> None:
        # The slot may have been filled again since: then this waits for that too.
        self._streams.finish(self._ready[self._slot(handle)])

    def forget(self) -> None:
        while self._expected:
            del self._in_use[self._expected.popleft()[1]]

    def abandon(self) -> None:
        self._streams.drain()
        self._expected.clear()
        self._in_use.clear()

    def close(self) -> None:
        """Give the slots back."""
        self.abandon()
        self._counter.hold_device("ring", -len(self._memory) * self.slot_bytes)
        self._memory = []

    def _slot(self, handle: int) -> int:
        return handle % len(self._memory)

    def _is_in_use(self, handle: int) -> bool:
        return any(self._slot(used) == self._slot(handle) for used in self._in_use)

    def _begin(self, pieces: Sequence[Piece], after: Sequence[Any]) -> int:
        handle, slot = self._next_handle, self._slot(self._next_handle)
        if self._is_in_use(handle):
            raise StateError("a tile was fetched into a slot that is still in use: release tiles in order")
        tile = self._tile_in(slot, pieces)
        self._in_use[handle] = (tile, pieces)
        self._next_handle += 1
        self._streams.wait(self._free[slot], "fetch")
        for event in after:
            self._streams.wait(event, "fetch")
        self._streams.copy(self._copies(tile, pieces), "fetch")
        self._streams.record(self._ready[slot], "fetch")
        return handle

    def _tile_in(self, slot: int, pieces: Sequence[Piece]) -> Piece:
        """A slot's memory as one piece that holds all of these, K before V.

        A head is as far from the next one as a slot full of these heads wants it, whatever the tile's length: kernels
        that plan by strides as well as by lengths then see few of them.
        """
        k, v = pieces[0]
        heads, tokens = k.shape[0], sum(k.shape[1] for k, _ in pieces)
        token_bytes = heads * (k.shape[2] + v.shape[2]) * k.element_size()
        room = self.slot_bytes // token_bytes
        if tokens > room:
            raise StateError(f"a tile of {tokens * token_bytes} bytes exceeds a slot of {self.slot_bytes}")
        flat = self._memory[slot].view(k.dtype)
        k_size, v_size = (heads * room * x.shape[2] for x in (k, v))
        return (
            flat[:k_size].view(heads, room, k.shape[2])[:, :tokens],
            flat[k_size : k_size + v_size].view(heads, room, v.shape[2])[:, :tokens],
        )

    def _copies(self, tile: Piece, pieces: Sequence[Piece]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """One contiguous copy per piece, side and head: a head's tokens lie together on the host and in the slot."""
        copies = []
        for inside, sides in zip(tile, zip(*pieces, strict=True), strict=True):
            at = 0
            for source in sides:
                tokens = source.shape[1]
                copies += [(inside[head, at : at + tokens], source[head]) for head in range(source.shape[0])]
                at += tokens
                self._counter.host_to_device_bytes += source.numel() * source.element_size()
        self._counter.copies += len(copies)
        return copies


class InPlace:
    """No ring: the host is the compute device, and a tile is the pieces themselves."""

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

    def copied(self, handle: int) -> None:
        """Released is read."""

    def expect(self, pieces: Sequence[Any], after: Sequence[Any] = (), key: Hashable = None) -> None:
        """Nothing to do."""

    def forget(self) -> None:
        """Nothing was begun."""

    def abandon(self) -> None:
        self._pieces.clear()

    def close(self) -> None:
        self._pieces.clear()
