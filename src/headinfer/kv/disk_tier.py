"""Which segments leave a bounded host memory for a disk. How they come back: read_ahead.py."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from headinfer.errors import CapacityError
from headinfer.kv.byte_counter import ByteCounter
from headinfer.kv.disk import DiskFile
from headinfer.kv.segments import Segment

__all__ = ["DiskTier"]


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
        counter: ByteCounter,
        written_back: Callable[[], Callable[[], None]],
    ) -> None:
        self.file, self.host_budget, self.counter = DiskFile(folder, reserve_bytes), host_budget, counter
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
        while self.counter.host_bytes + nbytes > self.host_budget:
            if not self._leaving and not self._send():
                raise CapacityError(
                    f"a host KV budget of {self.host_budget / 2**20:,.1f} MiB is used up by what can not go to the "
                    f"disk ({self.counter.host_bytes / 2**20:,.1f} MiB: read buffers, and the newest tokens of each "
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
        return self.counter.host_bytes - sum(nbytes for _, _, nbytes, _ in self._leaving)

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
            self.counter.hold_disk(nbytes)
            weakref.finalize(segment, self.counter.hold_disk, -nbytes).atexit = False
