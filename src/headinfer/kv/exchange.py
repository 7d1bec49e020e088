"""The exchange between a device and its host, if the host computes a part of attention on the KV in its own memory.

The engine reserves the buffers before a pass (device_kv.py). For each layer the loop calls, in this order:

    sent = exchange.send(queries, value_dim, after)    begins to copy the queries to the host; returns at once
    ...                                                queues all other work of the layer
    queries = exchange.receive(sent)                   waits on the host until they have arrived
    results = exchange.results(sent)                   where the host writes its partial results
    results = exchange.reply(sent)                     begins to copy them back; the compute queue waits for them

Queries and results cross once for each row of the batch, however many parts of the past the host attends to for it.

Events order the work of the queues (streams.py):

    packed      recorded in compute    `host` waits for it before it copies the queries
    write_done  recorded in back       `host` waits for it, so that the host reads nothing that is still being written
    arrived     recorded in host       the host waits for it: the only event that it waits for in a layer
    replied     recorded in host       `compute` waits for it before it merges the results

There are two buffers on each side, which take turns. A buffer is used again two layers later, when nothing uses it any
more: the `host` queue copies in order, and it copies queries only after the compute queue has packed them, which is
after the compute queue has merged the results of the layer before.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from headinfer.errors import StateError
from headinfer.kv.byte_counter import ByteCounter
from headinfer.kv.streams import Streams

__all__ = ["HostExchange", "Sent"]

_BUFFERS = 2
_RESULT_ITEM_BYTES = 4  # float32


@dataclass(frozen=True)
class Sent:
    """Queries that were sent to the host. A buffer begins with their results, out and then lse, before the queries.

    Attributes:
        turn: the number of the buffer.
        shape: their shape [B, Hq, T, Dk].
        dtype: their dtype.
        value_dim: the head dim of the values, Dv.
    """

    turn: int
    shape: torch.Size
    dtype: torch.dtype
    value_dim: int

    @property
    def result_bytes(self) -> int:
        """Bytes of the results."""
        return math.prod(self.shape[:3]) * (self.value_dim + 1) * _RESULT_ITEM_BYTES

    @property
    def query_bytes(self) -> int:
        """Bytes of the queries."""
        return self.shape.numel() * self.dtype.itemsize


class HostExchange:
    """Copies queries to the host and partial results to the device, through buffers that are kept.

    Args:
        device: the device.
        counter: counts the buffers on the device and the copied bytes.
        streams: the queues of the device.
        allocate: allocates a uint8 buffer in host memory that a device can copy from and to, given its bytes.
    """

    def __init__(
        self, device: torch.device, counter: ByteCounter, streams: Streams, allocate: Callable[[int], torch.Tensor]
    ) -> None:
        self._device = device
        self._counter = counter
        self._streams = streams
        self._allocate = allocate
        self._buffer_bytes = 0
        self._on_device: list[torch.Tensor] = []
        self._on_host: list[torch.Tensor] = []
        self._turn = 0
        self._packed = [streams.event() for _ in range(_BUFFERS)]
        self._arrived = [streams.event() for _ in range(_BUFFERS)]
        self._replied = [streams.event() for _ in range(_BUFFERS)]
        # torch's allocator orders reuse of freed memory by the compute queue only, so drain the others first.
        weakref.finalize(self, streams.drain).atexit = False

    @property
    def device_bytes(self) -> int:
        """Bytes of the buffers on the device."""
        return len(self._on_device) * self._buffer_bytes

    def reserve(self, nbytes: int) -> None:
        """Make the buffers larger if all of them together have fewer bytes.

        Args:
            nbytes: bytes of all buffers of one side, as layer_exchange_bytes() in plan/footprint.py counts them.
        """
        buffer_bytes = nbytes // _BUFFERS
        if buffer_bytes <= self._buffer_bytes:
            return
        self.close()
        on_host = [self._allocate(buffer_bytes) for _ in range(_BUFFERS)]
        with torch.inference_mode(False):
            self._on_device = [
                torch.zeros(buffer_bytes, dtype=torch.uint8, device=self._device) for _ in range(_BUFFERS)
            ]
        self._on_host = on_host
        self._buffer_bytes = buffer_bytes
        self._counter.hold_device("exchange", self.device_bytes)

    def send(self, queries: torch.Tensor, value_dim: int, after: Sequence[Any]) -> Sent:
        """Begin to copy queries to the host.

        Args:
            queries: [B, Hq, T, Dk] on the device, of any strides.
            value_dim: the head dim of the values, Dv.
            after: events of the write-back of the KV that the host will read.

        Raises:
            StateError: the buffers that were reserved are too small.
        """
        turn = (self._turn + 1) % _BUFFERS
        sent = Sent(turn, queries.shape, queries.dtype, value_dim)
        nbytes = sent.result_bytes + sent.query_bytes
        if nbytes > self._buffer_bytes:
            raise StateError(f"queries and results of {nbytes} bytes exceed a buffer of {self._buffer_bytes}")
        self._turn = turn
        packed = _queries(self._on_device[turn], sent)
        self._streams.copy([(packed, queries)], "compute")
        self._streams.record(self._packed[turn], "compute")
        self._streams.wait(self._packed[turn], "host")
        for event in after:
            self._streams.wait(event, "host")
        self._copy(_queries(self._on_host[turn], sent), packed)
        self._streams.record(self._arrived[turn], "host")
        self._counter.device_to_host_bytes += sent.query_bytes
        return sent

    def receive(self, sent: Sent) -> torch.Tensor:
        """Wait on the host for queries, and return them [B, Hq, T, Dk] in host memory."""
        self._streams.finish(self._arrived[sent.turn])
        return _queries(self._on_host[sent.turn], sent)

    def results(self, sent: Sent) -> tuple[torch.Tensor, torch.Tensor]:
        """Return where the host writes its results: out [B, Hq, T, Dv] and lse [B, Hq, T], float32.

        Call it after receive(). Until then the memory may be in use.
        """
        return _results(self._on_host[sent.turn], sent)

    def reply(self, sent: Sent) -> tuple[torch.Tensor, torch.Tensor]:
        """Begin to copy the results to the device, and let the compute queue wait for them.

        Returns:
            out [B, Hq, T, Dv] and lse [B, Hq, T] on the device. They are valid until two layers later.
        """
        on_host, on_device = (_result_items(side[sent.turn], sent) for side in (self._on_host, self._on_device))
        self._copy(on_device, on_host)
        self._streams.record(self._replied[sent.turn], "host")
        self._streams.wait(self._replied[sent.turn], "compute")
        self._counter.host_to_device_bytes += sent.result_bytes
        return _results(self._on_device[sent.turn], sent)

    def close(self) -> None:
        """Wait until nothing uses the buffers, and free them."""
        if not self._on_device:
            return
        self._streams.drain()
        self._counter.hold_device("exchange", -self.device_bytes)
        self._on_device = []
        self._on_host = []
        self._buffer_bytes = 0

    def _copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        self._streams.copy([(destination, source)], "host")
        self._counter.copies += 1


def _queries(buffer: torch.Tensor, sent: Sent) -> torch.Tensor:
    """Return the queries in a buffer of bytes."""
    return buffer[sent.result_bytes :][: sent.query_bytes].view(sent.dtype).view(sent.shape)


def _result_items(buffer: torch.Tensor, sent: Sent) -> torch.Tensor:
    """Return the results in a buffer of bytes as one tensor."""
    return buffer[: sent.result_bytes].view(torch.float32)


def _results(buffer: torch.Tensor, sent: Sent) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out and lse in a buffer of bytes."""
    rows = sent.shape[:3]
    out, lse = _result_items(buffer, sent).split([rows.numel() * sent.value_dim, rows.numel()])
    return out.view(*rows, sent.value_dim), lse.view(rows)
