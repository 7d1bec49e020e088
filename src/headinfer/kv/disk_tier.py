"""Which segments leave a bounded host memory for a disk, and how their tiles come back ahead of need."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from headinfer.errors import CapacityError
from headinfer.kv.disk import DiskFile, FarPiece, split_reads
from headinfer.kv.ledger import Ledger
from headinfer.kv.segments import Piece, Segment
from headinfer.kv.tiers import HostTier
from headinfer.kv.transfer import Ring

__all__ = ["READ_SLOTS", "DiskTier", "ReadAhead", "read_slot_bytes"]

READ_SLOTS = 5
_SLOT_SHARE = 32  # of the host budget for one slot
_LARGEST_SLOT_BYTES = 32 * 1024 * 1024
_SLOT_ALIGN_BYTES = 64 * 1024
_READERS = 4


def read_slot_bytes(host_budget: int) -> int:
    """Bytes of one of the READ_SLOTS host buffers that tiles are read into."""
    return max(min(host_budget // _SLOT_SHARE, _LARGEST_SLOT_BYTES) // _SLOT_ALIGN_BYTES, 1) * _SLOT_ALIGN_BYTES


class DiskTier:
    """Keeps host memory within its budget: the newest full segments leave it, written behind the computation.

    So each segment is written once, and the beginning of the text stays in memory. written_back: called when a segment
    leaves; gives what waits, on any thread, until the segment is in host memory whole.
    """

    def __init__(
        self,
        folder: Path,
        host_budget: int,
        reserve_bytes: int,
        ledger: Ledger,
        written_back: Callable[[], Callable[[], None]],
    ) -> None:
        self.file, self.host_budget, self.ledger = DiskFile(folder, reserve_bytes), host_budget, ledger
        self._written_back = written_back
        self._writer = ThreadPoolExecutor(1, "headinfer-disk-write")
        weakref.finalize(self, self._writer.shutdown, wait=False).atexit = False
        self._full: list[weakref.ref[Segment]] = []
        self._leaving: deque[tuple[Segment, int, int, Future[None]]] = deque()

    def full(self, segments: Sequence[Segment]) -> None:
        """These segments will not be written to any more. Begins to write some to the disk where memory gets short."""
        for segment in segments:
            segment.sealed = True
            self._full.append(weakref.ref(segment))
        self._collect()
        soon = 2 * sum(len(segment.bytes()) for segment in segments)  # what the next layers will ask for
        while self._staying() + soon > self.host_budget and self._send():
            pass

    def make_room(self, nbytes: int) -> None:
        """Wait until nbytes more fit the budget. Raises CapacityError where they never will."""
        self._collect()
        while self.ledger.host_bytes + nbytes > self.host_budget:
            if not self._leaving and not self._send():
                raise CapacityError(
                    f"a host KV budget of {self.host_budget / 2**20:,.1f} MiB is used up by what can not go to the "
                    f"disk ({self.ledger.host_bytes / 2**20:,.1f} MiB: read buffers, and the newest tokens of each "
                    "layer): raise it, or use shorter chunks"
                )
            self._leaving[0][3].result()
            self._collect()

    def settle(self) -> None:
        """Wait until all that has begun to leave has left."""
        while self._leaving:
            self._leaving[0][3].result()
            self._collect()

    def _staying(self) -> int:
        return self.ledger.host_bytes - sum(nbytes for _, _, nbytes, _ in self._leaving)

    def _send(self) -> bool:
        """Begin to write the newest full segment; False where there is none."""
        while self._full:
            segment = self._full.pop()()
            if segment is not None:
                data = [segment.bytes()]
                nbytes = len(data[0])
                start = self.file.allocate(nbytes)
                job = self._writer.submit(self._write, data, start, self._written_back())
                self._leaving.append((segment, start, nbytes, job))
                return True
        return False

    def _write(self, data: list[memoryview], start: int, wait: Callable[[], None]) -> None:
        wait()
        self.file.write(start, [data.pop()])  # popped, so that the memory is nobody's when this is done

    def _collect(self) -> None:
        """Let go of the memory of what has been written. Raises what went wrong with it."""
        while self._leaving and self._leaving[0][3].done():
            segment, start, nbytes, job = self._leaving.popleft()
            job.result()
            segment.move_to(self.file, start)
            self.ledger.hold_disk(nbytes)
            weakref.finalize(segment, self.ledger.hold_disk, -nbytes).atexit = False


@dataclass
class _Tile:
    """One tile on its way: from the disk into a host slot, and from there through the inner ring."""

    pieces: list[Piece]
    slot: int | None
    reads: list[Future[None]] = field(default_factory=list)
    inner: int | None = None

    def come(self) -> list[Piece]:
        """The tile in host memory."""
        for read in self.reads:
            read.result()
        return self.pieces


class ReadAhead:
    """A ring before a ring: tiles with pieces on disk are read into host slots, `depth` tiles ahead of their use."""

    depth = READ_SLOTS - 1

    def __init__(self, inner: Ring, tier: HostTier, slot_bytes: int) -> None:
        self.inner, self.slot_bytes, self.ledger = inner, inner.slot_bytes, tier.ledger
        self._memory = [tier.allocate((slot_bytes,), torch.uint8) for _ in range(READ_SLOTS)]
        self._readers = ThreadPoolExecutor(_READERS, "headinfer-disk-read")
        weakref.finalize(self, self._readers.shutdown, wait=False).atexit = False
        self._free = list(range(READ_SLOTS))
        self._used_by: dict[int, int] = {}  # the inner ticket that a slot was last copied with
        self._tiles: dict[int, _Tile] = {}
        self._expected: dict[object, _Tile] = {}
        self._next_ticket = 0

    def fetch(self, pieces: Sequence[Piece | FarPiece]) -> int:
        tile = self._expected.pop(_key(pieces), None) or self._begin(pieces)
        ticket, self._next_ticket = self._next_ticket, self._next_ticket + 1
        self._tiles[ticket] = tile
        return ticket

    def expect(self, pieces: Sequence[Piece | FarPiece]) -> None:
        """This tile will be fetched before long: begin to read it where a slot is free."""
        key = _key(pieces)
        if self._free and key not in self._expected:
            self._expected[key] = self._begin(pieces)

    def wait(self, ticket: int) -> Sequence[Piece]:
        tile, following = self._tiles[ticket], self._tiles.get(ticket + 1)
        self._forward(tile)
        if following is not None and all(read.done() for read in following.reads):
            self._forward(following)
        assert tile.inner is not None
        return self.inner.wait(tile.inner)

    def release(self, ticket: int) -> None:
        tile = self._tiles.pop(ticket)
        assert tile.inner is not None
        self.inner.release(tile.inner)
        if tile.slot is not None:
            self._used_by[tile.slot] = tile.inner
            self._free.append(tile.slot)

    def copied(self, ticket: int) -> None:
        self.inner.copied(ticket)

    def abandon(self) -> None:
        for tile in self._tiles.values():
            self._give_back(tile)
        self._tiles.clear()
        self._forget_expected()
        self.inner.abandon()

    def close(self) -> None:
        self.abandon()
        self.inner.close()
        self._memory = []

    def _begin(self, pieces: Sequence[Piece | FarPiece]) -> _Tile:
        if not any(isinstance(piece, FarPiece) for piece in pieces):
            return _Tile([piece for piece in pieces if not isinstance(piece, FarPiece)], None)
        if not self._free:
            self._forget_expected()  # the pass went another way than the one before
        slot = self._free.pop(0)
        if slot in self._used_by:
            self.inner.copied(self._used_by.pop(slot))
        tile, at = _Tile([], slot), 0
        for piece in pieces:
            if isinstance(piece, FarPiece):
                reads, near = piece.into(self._memory[slot][at:])
                at += piece.nbytes
                tile.reads += [self._readers.submit(piece.place.file.read, part) for part in split_reads(reads)]
                tile.pieces.append(near)
                self.ledger.disk_to_host_bytes += piece.nbytes
            else:
                tile.pieces.append(piece)
        return tile

    def _forward(self, tile: _Tile) -> None:
        if tile.inner is None:
            tile.inner = self.inner.fetch(tile.come())

    def _give_back(self, tile: _Tile) -> None:
        for read in tile.reads:
            read.exception()  # it must not write into the slot any more; whether it failed is of no interest
        if tile.slot is not None:
            self._free.append(tile.slot)

    def _forget_expected(self) -> None:
        for tile in self._expected.values():
            self._give_back(tile)
        self._expected.clear()


def _key(pieces: Sequence[Piece | FarPiece]) -> object:
    """Equal for tiles of the same memory and the same places on disk."""
    return tuple(
        piece if isinstance(piece, FarPiece) else tuple((side.data_ptr(), tuple(side.shape)) for side in piece)
        for piece in pieces
    )
