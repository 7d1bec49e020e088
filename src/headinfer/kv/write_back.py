"""The write-back: copies new tokens from the device to the host.

Events order the work of the queues (streams.py):

    packed      recorded in compute    `back` waits for it before it reads a buffer
    drained     recorded in back       `compute` waits for it before it packs into the buffer again
    write_done  recorded in back       queues that read the written tokens wait for it
"""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch

from headinfer.errors import CapacityError
from headinfer.kv.byte_counter import ByteCounter
from headinfer.kv.streams import Streams

__all__ = ["StagingWriter", "WriteInPlace", "Writer"]


class Writer(Protocol):
    """Copies new tokens from the device to the host."""

    def __call__(self, destination: torch.Tensor, source: torch.Tensor, write_done: Any) -> None:
        """Copy K or V of new tokens to the host.

        Args:
            destination: [H, T, D] in host memory; each head is contiguous.
            source: [H, T, D] on the device, of any strides.
            write_done: an event from event(). It is recorded when the copy is queued; queues that read the destination
                wait for it.
        """

    def event(self) -> Any:
        """Return a new event to pass as write_done."""

    def settle(self) -> None:
        """Wait until all copies have reached host memory."""


class WriteInPlace:
    """The write-back if the host is the compute device: one copy, which is done when the call returns."""

    def __call__(self, destination: torch.Tensor, source: torch.Tensor, write_done: Any = None) -> None:
        destination.copy_(source)

    def event(self) -> None:
        return None

    def settle(self) -> None:
        """Do nothing: copies are done when they are queued."""


class StagingWriter:
    """Copies new tokens to the host through two device buffers, packed so that each copy is contiguous.

    The `compute` queue packs tokens into one buffer while the `back` queue copies the other to the host.

    Args:
        buffer_bytes: the size of each buffer.
        device: the device of the buffers.
        counter: counts the buffers and the copied bytes.
        streams: the queues of the device.
    """

    def __init__(self, buffer_bytes: int, device: torch.device, counter: ByteCounter, streams: Streams) -> None:
        self.buffer_bytes = buffer_bytes
        self._counter = counter
        self._streams = streams
        with torch.inference_mode(False):
            self._buffers = [torch.zeros(buffer_bytes, dtype=torch.uint8, device=device) for _ in range(2)]
        # torch's allocator orders reuse of freed memory by the compute queue only, so drain the others first.
        weakref.finalize(self, streams.drain).atexit = False
        self._packed = [streams.event() for _ in range(2)]
        self._drained = [streams.event() for _ in range(2)]
        self._turn = 0
        counter.hold_device("staging", 2 * buffer_bytes)

    def __call__(self, destination: torch.Tensor, source: torch.Tensor, write_done: Any) -> None:
        if source.numel() == 0:
            return
        heads, tokens, dim = source.shape
        row_bytes = heads * dim * source.element_size()
        step = self.buffer_bytes // row_bytes
        if step == 0:
            raise CapacityError(f"a write-back buffer of {self.buffer_bytes} bytes holds no token of {row_bytes} bytes")
        for start in range(0, tokens, step):
            part = slice(start, min(start + step, tokens))
            self._turn = 1 - self._turn
            self._write(destination[:, part], source[:, part])
        self._streams.record(write_done, "back")

    def _write(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        packed_event = self._packed[self._turn]
        drained_event = self._drained[self._turn]
        packed = self._buffers[self._turn].view(source.dtype)[: source.numel()].view(source.shape)
        self._streams.wait(drained_event, "compute")
        self._streams.copy([(packed, source)], "compute")
        self._streams.record(packed_event, "compute")
        self._streams.wait(packed_event, "back")
        self._streams.copy(list(zip(destination, packed, strict=True)), "back")
        self._streams.record(drained_event, "back")
        self._counter.device_to_host_bytes += packed.numel() * packed.element_size()
        self._counter.copies += packed.shape[0]

    def event(self) -> Any:
        return self._streams.event()

    def settle(self) -> None:
        self._streams.drain()

    def close(self) -> None:
        """Free the buffers."""
        self._streams.drain()
        self._counter.hold_device("staging", -2 * self.buffer_bytes)
        self._buffers = []
