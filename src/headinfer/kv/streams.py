"""The three queues of a device, and what keeps their work in order.

    compute   the model's kernels, and packing new tokens into the write-back buffers
    fetch     host to device: tiles into the slots of the ring
    back      device to host: new tokens out of the write-back buffers

Work within a queue runs in order. Between queues nothing is in order but by events: a queue that waits for an event
runs on when all is done that was in the event's queue when it was recorded. The ring and the write-back are written
for `Streams`; what is right for every order that events allow is right on CudaStreams. EagerStreams and LazyStreams are its two
extremes on a CPU, for tests: copies run when they are queued, or not before somebody waits for them, and until then
their destination is NaN. tests/support/orders.py explores all orders in between.
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

Queue = Literal["compute", "fetch", "back"]
Transport = Literal[
    "in_place", "eager", "lazy", "cuda"
]  # how KV reaches the device: not at all, by a CPU twin, by a link
Copy = tuple[torch.Tensor, torch.Tensor]  # destination and source


class Streams(Protocol):
    """What the ring and the write-back need of a device. No call but finish() and drain() makes the host wait."""

    def event(self) -> Any:
        """A new event; waiting for one that was never recorded waits for nothing."""

    def record(self, event: Any, queue: Queue) -> None:
        """The event comes after all that the queue was given so far."""

    def wait(self, event: Any, queue: Queue) -> None:
        """What the queue is given from now on comes after the event, as it was recorded last."""

    def copy(self, copies: Iterable[Copy], queue: Queue) -> None:
        """Copy; in fetch and back both sides of each copy are contiguous, or torch would allocate, stage and block."""

    def finish(self, event: Any) -> None:
        """Return when the event has come."""

    def write_back_done(self) -> Callable[[], None]:
        """A call, for any thread, that returns when all that is in `back` now has reached the host."""

    def drain(self) -> None:
        """Return when all queues are empty."""


def check_contiguous(copies: Iterable[Copy]) -> Iterable[Copy]:
    """The same copies. Raises AssertionError for one with another layout."""
    for destination, source in copies:
        if not (destination.is_contiguous() and source.is_contiguous()):
            raise AssertionError("a transfer must be contiguous on both sides")
        yield destination, source


class CudaStreams:
    """A device's streams: the current one computes, two more copy, so that both ways of the link work at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._own: dict[Queue, torch.cuda.Stream] = {
            "fetch": torch.cuda.Stream(device),
            "back": torch.cuda.Stream(device),
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
    """CPU twin whose copies run when they are queued: memory that is written too early shows wrong numbers."""

    def event(self) -> None:
        return None

    def record(self, event: None, queue: Queue) -> None:
        """All is done already."""

    def wait(self, event: None, queue: Queue) -> None:
        """There is nothing to wait for."""

    def copy(self, copies: Iterable[Copy], queue: Queue) -> None:
        for destination, source in copies if queue == "compute" else check_contiguous(copies):
            destination.copy_(source)

    def finish(self, event: None) -> None:
        """It has come."""

    def write_back_done(self) -> Callable[[], None]:
        return lambda: None

    def drain(self) -> None:
        """They are empty."""


@dataclass(eq=False)
class _Mark:
    """An event: what number of jobs a queue had been given when it was recorded."""

    queue: Queue = "compute"
    jobs: int = 0


class LazyStreams:
    """CPU twin whose copies run only when somebody waits for them, and whose destinations are NaN until then.

    A missing wait shows NaN; a buffer that is written again before it was copied from shows wrong numbers. What
    computes runs at once, so waiting for it is waiting for nothing.
    """

    def __init__(self) -> None:
        self._jobs: dict[Queue, deque[Copy | _Mark]] = {"fetch": deque(), "back": deque()}
        self._done: dict[Queue, int] = {"fetch": 0, "back": 0}

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
            destination.fill_(torch.nan)
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
                with torch.inference_mode():  # as when it was queued, perhaps
                    job[0].copy_(job[1])

    def write_back_done(self) -> Callable[[], None]:
        self.drain()
        return lambda: None

    def drain(self) -> None:
        for queue in self._jobs:
            self.finish(_Mark(queue, self._done[queue] + len(self._jobs[queue])))


def open_streams(transport: Transport, device: torch.device) -> Streams | None:
    """The queues for a way of staging; "in_place" has none."""
    if transport == "in_place":
        return None
    return CudaStreams(device) if transport == "cuda" else EagerStreams() if transport == "eager" else LazyStreams()
