"""Moves segments to a disk to keep host memory within a budget. read_ahead.py reads them back."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from headinfer.errors import CapacityError
from headinfer.kv.byte_counter import ByteCounter
from headinfer.kv.disk_file import DiskFile
from headinfer.kv.segments import Segment

__all__ = ["DiskTier"]


@dataclass(frozen=True)
class _Move:
    """A segment that is being written to the disk.

    Attributes:
        segment: the segment, whose memory is freed when the job is done.
        start: its offset in the file, in bytes.
        nbytes: its size.
        job: the job that writes it.
    """

    segment: Segment
    start: int
    nbytes: int
    job: Future[None]


class DiskTier:
    """Keeps host memory within a budget by moving the newest full segments to a file, while the computation goes on.

    A segment never changes after it is full, so each one is written at most once. Because the newest ones move, the
    beginning of the text stays in memory.

    Args:
        folder: the folder of the file.
        host_budget: the host memory for KV, in bytes.
        reserve_bytes: disk space to reserve at once.
        counter: counts the host memory that the budget is compared with, and the bytes on disk.
        written_back: called when a move begins. It returns a function, which is called in another thread and returns
            when the write-back has brought the whole segment to host memory.
    """

    def __init__(
        self,
        folder: Path,
        host_budget: int,
        reserve_bytes: int,
        counter: ByteCounter,
        written_back: Callable[[], Callable[[], None]],
    ) -> None:
        self.file = DiskFile(folder, reserve_bytes)
        self.host_budget = host_budget
        self.counter = counter
        self._written_back = written_back
        self._writer = ThreadPoolExecutor(1, "headinfer-disk-write")
        weakref.finalize(self, self._writer.shutdown, wait=False).atexit = False
        self._full: list[weakref.ref[Segment]] = []
        self._moves: deque[_Move] = deque()

    def seal_full(self, segments: Sequence[Segment]) -> None:
        """Seal segments that are full, and begin to move some of all full ones if memory will be short soon."""
        for segment in segments:
            segment.sealed = True
            self._full.append(weakref.ref(segment))
        self._collect()
        soon_bytes = 2 * sum(len(segment.bytes()) for segment in segments)  # an estimate for the next layers
        while self._staying_bytes() + soon_bytes > self.host_budget and self._begin_move():
            pass

    def make_room(self, nbytes: int) -> None:
        """Wait until nbytes more fit the budget.

        Raises:
            CapacityError: all other memory of the budget cannot be moved to the disk.
        """
        self._collect()
        while self.counter.host_bytes + nbytes > self.host_budget:
            if not self._moves and not self._begin_move():
                raise CapacityError(
                    f"a host KV budget of {self.host_budget / 2**20:,.1f} MiB is used up by what cannot move to the "
                    f"disk ({self.counter.host_bytes / 2**20:,.1f} MiB: read buffers, and the newest tokens of each "
                    "layer): raise it, or use shorter chunks"
                )
            self._moves[0].job.result()
            self._collect()

    def settle(self) -> None:
        """Wait until all moves that have begun are done."""
        while self._moves:
            self._moves[0].job.result()
            self._collect()

    def _staying_bytes(self) -> int:
        """Return the bytes of host memory that no move will free."""
        return self.counter.host_bytes - sum(move.nbytes for move in self._moves)

    def _begin_move(self) -> bool:
        """Begin to move the newest full segment; return False if there is none."""
        while self._full:
            segment = self._full.pop()()
            if segment is not None:
                data = [segment.bytes()]
                nbytes = len(data[0])
                start = self.file.allocate(nbytes)
                job = self._writer.submit(self._write, data, start, self._written_back())
                segment.is_leaving = True
                self._moves.append(_Move(segment, start, nbytes, job))
                return True
        return False

    def _write(self, data: list[memoryview], start: int, wait: Callable[[], None]) -> None:
        wait()
        self.file.write(start, [data.pop()])  # pop(), so that the finished job does not keep the memory

    def _collect(self) -> None:
        """Free the memory of the segments that have been written, in order; raise the error of a job that failed."""
        while self._moves and self._moves[0].job.done():
            move = self._moves.popleft()
            move.job.result()
            move.segment.move_to(self.file, move.start)
            self.counter.hold_disk(move.nbytes)
            weakref.finalize(move.segment, self.counter.hold_disk, -move.nbytes).atexit = False
