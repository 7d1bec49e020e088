"""Makes host memory ready for copies of a device, in background threads: touches pages, registers and unregisters them.

CUDA registers pages at a tenth of the rate if nobody has touched them, since the driver then touches them in one
thread. So all cores touch them first. Registering from several threads is not faster.

The threads end as soon as there is nothing to do. None of them waits for work.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import itertools
import mmap
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from headinfer.kv.byte_counter import ByteCounter

__all__ = ["Mapping", "Pages", "Preparer", "Releaser", "Times", "touch_pages"]

AHEAD_BYTES = 2 * 2**30
"""Pages that are prepared before they are needed take at most this much memory."""

_MOST_THREADS = 16
_THREAD_BYTES = 4 * 2**20  # the least that is worth a thread
_HUGE_PAGE_BYTES = 2 * 2**20
_MADV_POPULATE_WRITE = 23  # of Linux, from 5.14
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


@dataclass(eq=False)
class Mapping:
    """A range of pages, without the tensor on it.

    Attributes:
        memory: keeps the pages mapped; None after they were released.
        address: the first byte.
        nbytes: the size.
        device: the device that copies from them; None if they are not pinned.
        pinned: the addresses of all pinned ranges of the tier.
        counter: counts the bytes.
        process: the process that mapped them. A fork does not have them.
        is_untouched: whether the counter counts them as untouched.
    """

    memory: mmap.mmap | None
    address: int
    nbytes: int
    device: torch.device | None
    pinned: set[int]
    counter: ByteCounter
    process: int = field(default_factory=os.getpid)
    is_untouched: bool = False

    def note_untouched(self, is_untouched: bool) -> None:
        """Count the pages as untouched, or no longer."""
        if is_untouched != self.is_untouched:
            self.is_untouched = is_untouched
            self.counter.host_untouched_bytes += self.nbytes if is_untouched else -self.nbytes


@dataclass(eq=False)
class Pages:
    """A tensor on pages of its own, which are prepared for copies.

    Attributes:
        tensor: the tensor.
        mapping: the pages.
        is_ready: whether they have been prepared, or the attempt has ended.
        refusal: why the system did not pin them; empty if it did.
        error: the exception that ended the attempt.
    """

    tensor: torch.Tensor
    mapping: Mapping
    is_ready: bool = False
    refusal: str = ""
    error: BaseException | None = None


@dataclass
class Times:
    """Seconds and bytes of preparing host memory.

    Attributes:
        waited_s: seconds that the thread of the model waited for pages.
        touch_s: seconds of touching pages, in all threads at once.
        touched_bytes: the bytes that were touched.
        register_s: seconds of registering pages.
        registered_bytes: the bytes that were registered.
    """

    waited_s: float = 0.0
    touch_s: float = 0.0
    touched_bytes: int = 0
    register_s: float = 0.0
    registered_bytes: int = 0


def _threads() -> int:
    """Return how many threads touch pages: one for each core that this process may use."""
    has_affinity = hasattr(os, "sched_getaffinity")
    return max(1, min(len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1, _MOST_THREADS))


def touch_pages(address: int, nbytes: int, pool: Executor | None = None) -> None:
    """Let the system provide new pages, which are zero, in all threads of a pool or in this one.

    Args:
        address: the first byte, at the beginning of a page. Nothing has been written to the pages.
        nbytes: the size of the range.
        pool: the threads.
    """
    parts = min(_threads(), nbytes // _THREAD_BYTES) if pool is not None else 1
    if pool is None or parts < 2:
        _touch(address, nbytes)
        return
    end = address + nbytes
    step = -(-nbytes // parts)
    edges = [address + step * part for part in range(1, parts)]
    edges = [address, *(edge // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES for edge in edges), end]
    jobs = [pool.submit(_touch, start, stop - start) for start, stop in itertools.pairwise(edges)]
    for job in jobs:
        job.result()


def _touch(address: int, nbytes: int) -> None:
    """Touch pages in this thread, without the GIL. Registering reports pages that the system cannot provide."""
    if _LIBC is not None:
        status = _LIBC.madvise(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), _MADV_POPULATE_WRITE)
        if status == 0 or ctypes.get_errno() != 22:  # EINVAL: an older kernel
            return
    ctypes.memset(address, 0, nbytes)


class Preparer:
    """Prepares the pages of a host tier, ahead of their use and in the order of their use.

    In the first forward pass the layers reserve their pages one after another, and each waits for the ones that it
    needs. From the second pass on, prepare_ahead() lets a thread go on, at most `ahead_bytes` ahead of the model. The
    order does not depend on how fast anything is, so if the system refuses to pin more, the same pages are pinned.

    Args:
        pin: pins a range, given its address and size, and returns why the system refused; empty if it did not.
        ahead_bytes: the most bytes that are prepared before they are needed.

    Attributes:
        times: seconds and bytes of the work.
    """

    def __init__(self, pin: Callable[[int, int], str], ahead_bytes: int = AHEAD_BYTES) -> None:
        self.times = Times()
        self._pin = pin
        self._ahead_bytes = ahead_bytes
        self._condition = threading.Condition()  # on an RLock: garbage collection may free pages at any time
        self._queue: list[tuple[int, int, weakref.ref[Pages]]] = []  # turn, number, pages; in the order of their use
        self._count = 0
        self._wanted: Pages | None = None
        self._goes_ahead = False
        self._refusal = ""
        self._thread: threading.Thread | None = None

    def add(self, pages: Pages, turn: int) -> None:
        """Add pages that a layer will need.

        Args:
            pages: the pages.
            turn: the position of the pages among those of their layer. All layers need their first pages first.
        """
        if self._refusal:
            self._prepare(pages, None)
            return
        pages.mapping.note_untouched(True)
        with self._condition:
            bisect.insort(self._queue, (turn, self._count, weakref.ref(pages)), key=lambda entry: entry[:2])
            self._count += 1

    def prepare_ahead(self) -> None:
        """Begin to prepare pages before they are needed. Call it when all layers have added theirs."""
        with self._condition:
            self._goes_ahead = True
            self._start_if_needed(self._ahead_bytes // 2)

    def wait(self, pages: Pages) -> None:
        """Wait until pages that were added are ready, and take them out of the queue."""
        with self._condition:
            if not pages.is_ready:
                began = time.perf_counter()
                self._wanted = pages
                try:
                    self._wait_until_ready(pages)
                finally:
                    self._wanted = None
                    self.times.waited_s += time.perf_counter() - began
            self._queue = [entry for entry in self._queue if entry[2]() not in (pages, None)]
            if self._goes_ahead:
                self._start_if_needed(self._ahead_bytes // 2)

    def prepare_now(self, pages: Pages) -> None:
        """Prepare pages that were not added, in this thread."""
        began = time.perf_counter()
        if pages.mapping.nbytes < 2 * _THREAD_BYTES:
            self._prepare(pages, None)
        else:
            with ThreadPoolExecutor(_threads(), "headinfer-touch") as pool:
                self._prepare(pages, pool)
        self.times.waited_s += time.perf_counter() - began

    def pause(self) -> None:
        """Prepare nothing ahead until prepare_ahead() is called again. No thread runs when the call returns."""
        with self._condition:
            self._goes_ahead = False
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _wait_until_ready(self, pages: Pages) -> None:
        if not self._start():
            self._prepare(pages, None)
        while not pages.is_ready:
            self._condition.wait()

    def _start_if_needed(self, most_ahead: int) -> None:
        """Start the thread if at most `most_ahead` bytes are ready, so that it has more than one range to prepare."""
        if self._ready_bytes() <= most_ahead and self._next() is not None:
            self._start()

    def _start(self) -> bool:
        """Start the thread unless it runs. Return False if the system refuses a thread."""
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="headinfer-pin")
            self._thread = thread
            try:
                thread.start()
            except RuntimeError:
                self._thread = None
                return False
        return True

    def _run(self) -> None:
        while True:
            with ThreadPoolExecutor(_threads(), "headinfer-touch") as pool:
                while self._prepare_next(pool):
                    pass
            with self._condition:
                if self._next() is None:
                    self._thread = None
                    return

    def _prepare_next(self, pool: Executor) -> bool:
        """Prepare the next pages; return False if there are none to prepare."""
        with self._condition:
            pages = self._next()
        if pages is None:
            return False
        self._prepare(pages, pool)
        with self._condition:
            self._condition.notify_all()
        return True

    def _next(self) -> Pages | None:
        """Return the next pages to prepare, as far as these are wanted or the limit allows it."""
        alive = [pages for pages in (entry[2]() for entry in self._queue) if pages is not None]
        found = next((pages for pages in alive if not pages.is_ready), None)
        if found is None:
            return None
        is_wanted = self._wanted is not None and not self._wanted.is_ready
        fits = self._ready_bytes() + found.mapping.nbytes <= self._ahead_bytes
        return found if is_wanted or (self._goes_ahead and fits) else None

    def _ready_bytes(self) -> int:
        """Return the bytes of the pages that are ready and not in use."""
        added = [entry[2]() for entry in self._queue]
        return sum(pages.mapping.nbytes for pages in added if pages is not None and pages.is_ready)

    def _prepare(self, pages: Pages, pool: Executor | None) -> None:
        """Touch and pin pages, unless the system has refused to pin others."""
        mapping = pages.mapping
        try:
            if not self._refusal:
                began = time.perf_counter()
                touch_pages(mapping.address, mapping.nbytes, pool)
                touched = time.perf_counter()
                self._refusal = self._pin(mapping.address, mapping.nbytes)
                self.times.touch_s += touched - began
                self.times.touched_bytes += mapping.nbytes
                if not self._refusal:
                    self.times.register_s += time.perf_counter() - touched
                    self.times.registered_bytes += mapping.nbytes
                    mapping.pinned.add(mapping.address)
            pages.refusal = self._refusal
        except BaseException as error:  # noqa: BLE001 (raised where the pages are used)
            pages.error = error
        mapping.note_untouched(False)
        pages.is_ready = True


class Releaser:
    """Unpins and unmaps ranges in a thread, with one wait for the device for all that are released together.

    Args:
        wait_for_device: waits until no queued copy reads from the memory.
        unpin: unpins a range.
    """

    def __init__(self, wait_for_device: Callable[[torch.device], None], unpin: Callable[[Mapping], None]) -> None:
        self._wait_for_device = wait_for_device
        self._unpin = unpin
        self._condition = threading.Condition()  # on an RLock: garbage collection may free pages at any time
        self._waiting: list[Mapping] = []
        self._thread: threading.Thread | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that are no longer counted, and not yet free."""
        with self._condition:
            return sum(mapping.nbytes for mapping in self._waiting)

    def add(self, mapping: Mapping) -> None:
        """Release a range soon."""
        with self._condition:
            self._waiting.append(mapping)
            if self._thread is not None:
                return
            self._thread = threading.Thread(target=self._run, name="headinfer-unpin")
            try:
                self._thread.start()
            except RuntimeError:  # the interpreter ends
                self._run()

    def finish(self) -> None:
        """Wait until all ranges are released, and the thread has ended."""
        while True:
            with self._condition:
                thread = self._thread
            if thread is None or thread is threading.current_thread():
                return
            thread.join()

    def _run(self) -> None:
        try:
            self._release_all()
        finally:  # also after an error, so that finish() returns and add() begins again
            with self._condition:
                if self._thread is threading.current_thread():
                    self._thread = None

    def _release_all(self) -> None:
        while True:
            with self._condition:
                batch = list(self._waiting)
                if not batch:
                    self._thread = None
                    if not self._waiting:  # garbage collection may have added some in between
                        return
                    self._thread = threading.current_thread()
                    continue
            # An error is one of the device's earlier work. The pages are unmapped all the same.
            with contextlib.suppress(RuntimeError):
                for device in dict.fromkeys(mapping.device for mapping in batch):
                    if device is not None:
                        self._wait_for_device(device)
            for mapping in batch:
                with contextlib.suppress(RuntimeError):
                    self._unpin(mapping)
                mapping.memory = None  # unmaps it
            with self._condition:
                done = set(map(id, batch))
                self._waiting = [mapping for mapping in self._waiting if id(mapping) not in done]
