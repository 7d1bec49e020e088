"""The write-back of new tokens from the device to the host.

packed    recorded in compute    back waits for it before it reads a buffer
drained   recorded in back       compute waits for it before it packs into the buffer again
write_done    recorded in back       who reads what was written waits for it
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
    """Brings new tokens to the host."""

    def __call__(self, destination: torch.Tensor, source: torch.Tensor, write_done: Any) -> None:
        """destination [H, T, D] in host memory, each head contiguous; source [H, T, D] on the device, any strides.

        write_done: an event of event(), recorded when it is there; what reads the destination waits for it.
        """

    def event(self) -> Any: ...

    def settle(self) -> None:
        """Return when all that was written is in host memory."""


class WriteInPlace:
    """Write-back where the host is the compute device: one copy, no link."""

    def __call__(self, destination: torch.Tensor, source: torch.Tensor, write_done: Any = None) -> None:
        destination.copy_(source)

    def event(self) -> None:
        return None

    def settle(self) -> None:
        """It is there."""


class StagingWriter:
    """Writes new tokens to the host through persistent device buffers, repacked so that each copy is contiguous.

    Two buffers of `buffer_bytes` take turns: the compute queue packs one while the back queue empties the other.
    """

    def __init__(self, buffer_bytes: int, device: torch.device, counter: ByteCounter, streams: Streams) -> None:
        self.buffer_bytes, self._counter, self._streams = buffer_bytes, counter, streams
        with torch.inference_mode(False):
            self._buffers = [torch.zeros(buffer_bytes, dtype=torch.uint8, device=device) for _ in range(2)]
        weakref.finalize(self, streams.drain).atexit = False  # the allocator knows the compute queue only
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
        packed_event, drained = self._packed[self._turn], self._drained[self._turn]
        packed = self._buffers[self._turn].view(source.dtype)[: source.numel()].view(source.shape)
        self._streams.wait(drained, "compute")
        self._streams.copy([(packed, source)], "compute")
        self._streams.record(packed_event, "compute")
        self._streams.wait(packed_event, "back")
        self._streams.copy(list(zip(destination, packed, strict=True)), "back")
        self._streams.record(drained, "back")
        self._counter.device_to_host_bytes += packed.numel() * packed.element_size()
        self._counter.copies += packed.shape[0]

    def event(self) -> Any:
        return self._streams.event()

    def settle(self) -> None:
        self._streams.drain()

    def close(self) -> None:
        """Give the buffers back."""
        self._streams.drain()
        self._counter.hold_device("staging", -2 * self.buffer_bytes)
        self._buffers = []
