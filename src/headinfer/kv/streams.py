"""The four queues of a device, and the events that order their work.

    compute   the model's kernels, and packing new tokens into the write-back buffers
    fetch     host to device: tiles into the slots of the ring
    back      device to host: new tokens out of the write-back buffers
    host      both directions: queries that the host answers, and its results (exchange.py)

The work of one queue runs in order. Between queues only events order the work: a queue that waits for an event
continues when all work is done that was in the event's queue when the event was recorded.

The ring, the write-back and the exchange are written for the protocol `Streams`. If their events are right, the
results are right in every order that the events allow. CudaStreams runs the queues on CUDA streams. EagerStreams and
LazyStreams are CPU twins for tests, at the two extremes of what events allow: copies run when they are queued, or not
before something waits for them, with NaN in their destinations until then. tests/support/orders.py explores the orders
in between.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

__all__ = [
    "Copy",
    "CudaStreams",
    "EagerStreams",
    "LazyStreams",
    "Queue",
    "Streams",
    "Transport",
    "check_contiguous",
    "open_streams",
]

Queue = Literal["compute", "fetch", "back", "host"]

Transport = Literal["in_place", "eager", "lazy", "cuda"]
"""How KV reaches the device: "in_place" (the host is the device), "eager" and "lazy" (CPU twins), "cuda" (a link)."""

Copy = tuple[torch.Tensor, torch.Tensor]
"""Destination and source."""


class Streams(Protocol):
    """The queues of a device, as the ring and the write-back use them.

    No method makes the host wait, except finish() and drain().
    """

    def event(self) -> Any:
        """Return a new event. Waiting for an event that was never recorded does nothing."""

    def record(self, event: Any, queue: Queue) -> None:
        """Record an event: it happens when all work is done that is in the queue now."""

    def wait(self, event: Any, queue: Queue) -> None:
        """Let all later work of a queue wait for the last recording of an event."""

    def copy(self, copies: Iterable[Copy], queue: Queue) -> None:
        """Queue copies.

        In all queues but `compute`, both sides of each copy must be contiguous. Otherwise torch would allocate memory,
        copy through it, and block the host.
        """

    def finish(self, event: Any) -> None:
        """Wait until the event has happened."""

    def write_back_done(self) -> Callable[[], None]:
        """Return a function, for any thread, that waits until all work that is in `back` now is done."""

    def drain(self) -> None:
        """Wait until all queues are empty."""


def check_contiguous(copies: Iterable[Copy]) -> Iterable[Copy]:
    """Yield the same copies.

    Raises:
        AssertionError: a side of a copy is not contiguous.
    """
    for destination, source in copies:
        if not (destination.is_contiguous() and source.is_contiguous()):
            raise AssertionError("a transfer must be contiguous on both sides")
        yield destination, source


class CudaStreams:
    """Queues on CUDA streams: the current stream computes, and the others use both directions of the link at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._own: dict[Queue, torch.cuda.Stream] = {
            "fetch": torch.cuda.Stream(device),
            "back": torch.cuda.Stream(device),
            "host": torch.cuda.Stream(device),
        }

    def _stream(self, queue: Queue) -> torch.cuda.Stream:
        return self._own.get(queue) or torch.cuda.current_stream(self.device)

    def event(self) -> torch.cuda.Event:
        return torch.cuda.Event()

    def record(self, event: torch.cuda.Event, queue: Queue) -> None:
        event.record(self._stream(queue))

    def wait(self, event: torch.cuda.Event, queue: Queue) -> None:
        self._stream(queue).wait_event(event)

    def copy(self, copies: Iterable[Copy], queue: Queue) -> None:
        with torch.cuda.stream(self._stream(queue)):
            for destination, source in copies if queue == "compute" else check_contiguous(copies):
                destination.copy_(source, non_blocking=True)

    def finish(self, event: torch.cuda.Event) -> None:
        event.synchronize()

    def write_back_done(self) -> Callable[[], None]:
        event = torch.cuda.Event()
        event.record(self._own["back"])
        return event.synchronize

    def drain(self) -> None:
        torch.cuda.synchronize(self.device)


class EagerStreams:
    """A CPU twin whose copies run when they are queued. If memory is overwritten too early, results are wrong."""

    def event(self) -> None:
        return None

    def record(self, event: None, queue: Queue) -> None:
        """Do nothing: all work is done."""

    def wait(self, event: None, queue: Queue) -> None:
        """Do nothing: all work is done."""

    def copy(self, copies: Iterable[Copy], queue: Queue) -> None:
        for destination, source in copies if queue == "compute" else check_contiguous(copies):
            destination.copy_(source)

    def finish(self, event: None) -> None:
        """Do nothing: all work is done."""

    def write_back_done(self) -> Callable[[], None]:
        return lambda: None

    def drain(self) -> None:
        """Do nothing: the queues are empty."""


@dataclass(eq=False)
class _Mark:
    """An event of LazyStreams.

    Attributes:
        queue: the queue that it was recorded in.
        jobs: the number of jobs that the queue had been given by then.
    """

    queue: Queue = "compute"
    jobs: int = 0


_NAN_BYTE = 255  # two of them are a NaN in float16: quantised K and V whose scales are NaN


class LazyStreams:
    """A CPU twin whose copies run only when something waits for them; until then their destinations are NaN.

    If a wait is missing, results are NaN. If a buffer is overwritten before it was copied from, results are wrong. Work
    of `compute` runs at once, so waiting for it does nothing.
    """

    def __init__(self) -> None:
        self._jobs: dict[Queue, deque[Copy | _Mark]] = {"fetch": deque(), "back": deque(), "host": deque()}
        self._done: dict[Queue, int] = dict.fromkeys(self._jobs, 0)

    def event(self) -> _Mark:
        return _Mark()

    def record(self, event: _Mark, queue: Queue) -> None:
        event.queue = queue
        event.jobs = self._done[queue] + len(self._jobs[queue]) if queue != "compute" else 0

    def wait(self, event: _Mark, queue: Queue) -> None:
        if queue == "compute":
            self.finish(event)
        else:
            self._jobs[queue].append(_Mark(event.queue, event.jobs))

    def copy(self, copies: Iterable[Copy], queue: Queue) -> None:
        if queue == "compute":
            for destination, source in copies:
                destination.copy_(source)
            return
        for destination, source in check_contiguous(copies):
            destination.fill_(torch.nan if destination.is_floating_point() else _NAN_BYTE)
            self._jobs[queue].append((destination, source))

    def finish(self, event: _Mark) -> None:
        if event.queue == "compute":
            return
        jobs = self._jobs[event.queue]
        while self._done[event.queue] < event.jobs:
            job = jobs.popleft()
            self._done[event.queue] += 1
            if isinstance(job, _Mark):
                self.finish(job)
            else:
                destination, source = job
                with torch.inference_mode():  # the copy may have been queued in inference mode
                    destination.copy_(source)

    def write_back_done(self) -> Callable[[], None]:
        self.drain()
        return lambda: None

    def drain(self) -> None:
        for queue in self._jobs:
            self.finish(_Mark(queue, self._done[queue] + len(self._jobs[queue])))


def open_streams(transport: Transport, device: torch.device) -> Streams | None:
    """Return the queues for a transport, or None for "in_place", which has none."""
    if transport == "in_place":
        return None
    if transport == "cuda":
        return CudaStreams(device)
    return EagerStreams() if transport == "eager" else LazyStreams()
