"""Moving KV between host and device: the ring of slots that tiles stream through, and the write-back of new tokens.

A ring has a fixed number of slots of fixed bytes. For each tile the loop calls, in this order,

    ticket = ring.fetch(pieces)      starts bringing the pieces in; returns at once
    pieces = ring.wait(ticket)       the tile, readable by the compute stream: pairs of k [h, T, Dk] and v [h, T, Dv]
    ring.release(ticket)             the compute stream's reads are queued; the slot may be used again

and fetches tile i + 1 before it waits for tile i. CudaRing does this with a copy stream and events. Its two CPU
twins are test instruments for the same protocol: EarlyRing copies at fetch, so a slot that is used again too early
shows wrong numbers; LateRing fills the slot with NaN at fetch and copies at wait, so a missing wait shows NaN.
Every copy is contiguous on both sides: one head's tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import torch

from headinfer.errors import CapacityError, StateError
from headinfer.kv.ledger import Ledger

__all__ = [
    "CudaRing",
    "EarlyRing",
    "InPlace",
    "LateRing",
    "Ring",
    "Staging",
    "StagingWriter",
    "Writer",
    "make_ring",
    "write_in_place",
]

Piece = tuple[torch.Tensor, torch.Tensor]
Staging = Literal["none", "early", "late", "cuda"]
Writer = Callable[[torch.Tensor, torch.Tensor], None]


class Ring(Protocol):
    """What the loop needs of a ring. depth: how many tiles ahead it is to be told of."""

    slot_bytes: int
    depth: int

    def fetch(self, pieces: Sequence[Any]) -> int: ...

    def wait(self, ticket: int) -> Sequence[Piece]: ...

    def release(self, ticket: int) -> None: ...

    def copied(self, ticket: int) -> None:
        """Return when what the ticket was fetched from is not read any more."""

    def expect(self, pieces: Sequence[Any]) -> None:
        """This will be fetched after all that was, by the next layer."""

    def abandon(self) -> None:
        """Forget all tickets, after an error between fetch and release."""

    def close(self) -> None: ...


class _Slots:
    """The memory of a ring and the shape of what lies in each slot."""

    def __init__(self, slots: int, slot_bytes: int, device: torch.device, ledger: Ledger) -> None:
        self.slot_bytes, self.ledger = slot_bytes, ledger
        self.memory = [torch.zeros(slot_bytes, dtype=torch.uint8, device=device) for _ in range(slots)]
        ledger.hold_device("ring", slots * slot_bytes)
        self.next_ticket = 0
        self.in_use: dict[int, tuple[int, Piece, Sequence[Piece]]] = {}

    def take(self, pieces: Sequence[Piece]) -> tuple[int, int]:
        """A ticket and its slot number; the slot's tensors have the pieces' layout, one after the other per head."""
        slot = self.next_ticket % len(self.memory)
        if any(used == slot for used, _, _ in self.in_use.values()):
            raise StateError("a tile was fetched into a slot that is still in use: release tiles in order")
        k, v = pieces[0]
        heads, tokens = k.shape[0], sum(k.shape[1] for k, _ in pieces)
        sizes = [heads * tokens * x.shape[2] for x in (k, v)]
        if sum(sizes) * k.element_size() > self.slot_bytes:
            raise StateError(f"a tile of {sum(sizes) * k.element_size()} bytes exceeds a slot of {self.slot_bytes}")
        flat = self.memory[slot].view(k.dtype)
        tile = (
            flat[: sizes[0]].view(heads, tokens, k.shape[2]),
            flat[sizes[0] : sum(sizes)].view(heads, tokens, v.shape[2]),
        )
        ticket, self.next_ticket = self.next_ticket, self.next_ticket + 1
        self.in_use[ticket] = (slot, tile, pieces)
        return ticket, slot

    def fill(self, ticket: int) -> None:
        """Copy the pieces of a ticket into its slot: one contiguous copy per piece, head and side."""
        _, tile, pieces = self.in_use[ticket]
        for inside, sides in zip(tile, zip(*pieces, strict=True), strict=True):
            at = 0
            for source in sides:
                tokens = source.shape[1]
                for head in range(source.shape[0]):
                    copy_contiguous(inside[head, at : at + tokens], source[head])
                at += tokens
                self.ledger.host_to_device_bytes += source.numel() * source.element_size()
                self.ledger.copies += source.shape[0]

    def close(self) -> None:
        """Give the slots back."""
        self.ledger.hold_device("ring", -len(self.memory) * self.slot_bytes)
        self.memory, self.in_use = [], {}


def copy_contiguous(destination: torch.Tensor, source: torch.Tensor) -> None:
    """copy_ that can be asynchronous: both sides contiguous, or torch would allocate, stage and block."""
    if not (destination.is_contiguous() and source.is_contiguous()):
        raise AssertionError("a transfer must be contiguous on both sides")
    destination.copy_(source, non_blocking=True)


class InPlace:
    """No ring: the host is the compute device, and a tile is the pieces themselves."""

    slot_bytes = 0
    depth = 1

    def __init__(self) -> None:
        self._pieces: dict[int, Sequence[Piece]] = {}
        self._next_ticket = 0

    def fetch(self, pieces: Sequence[Any]) -> int:
        self._next_ticket += 1
        self._pieces[self._next_ticket] = pieces
        return self._next_ticket

    def wait(self, ticket: int) -> Sequence[Piece]:
        return self._pieces[ticket]

    def release(self, ticket: int) -> None:
        del self._pieces[ticket]

    def copied(self, ticket: int) -> None:
        """Released is read."""

    def expect(self, pieces: Sequence[Any]) -> None:
        """Nothing to do."""

    def abandon(self) -> None:
        self._pieces.clear()

    def close(self) -> None:
        self._pieces.clear()


class EarlyRing:
    """CPU twin that copies at fetch: a slot overwritten while in use gives wrong numbers."""

    depth = 1

    def __init__(self, slots: int, slot_bytes: int, device: torch.device, ledger: Ledger) -> None:
        self.slot_bytes = slot_bytes
        self._slots = _Slots(slots, slot_bytes, device, ledger)

    def fetch(self, pieces: Sequence[Piece]) -> int:
        ticket, _ = self._slots.take(pieces)
        self._slots.fill(ticket)
        return ticket

    def wait(self, ticket: int) -> Sequence[Piece]:
        return (self._slots.in_use[ticket][1],)

    def release(self, ticket: int) -> None:
        del self._slots.in_use[ticket]

    def copied(self, ticket: int) -> None:
        """Released is copied."""

    def expect(self, pieces: Sequence[Any]) -> None:
        """Nothing to do: the next layer's first tile has its own time."""

    def abandon(self) -> None:
        self._slots.in_use.clear()

    def close(self) -> None:
        self._slots.close()


class LateRing(EarlyRing):
    """CPU twin that copies only at wait and leaves NaN before: a missing wait gives NaN."""

    def fetch(self, pieces: Sequence[Piece]) -> int:
        ticket, _ = self._slots.take(pieces)
        for side in self._slots.in_use[ticket][1]:
            side.fill_(torch.nan)
        return ticket

    def wait(self, ticket: int) -> Sequence[Piece]:
        self._slots.fill(ticket)
        return super().wait(ticket)


class CudaRing:
    """Slots in device memory, filled on a copy stream; the host never waits."""

    depth = 1

    def __init__(
        self, slots: int, slot_bytes: int, device: torch.device, ledger: Ledger, stream: torch.cuda.Stream
    ) -> None:
        self.slot_bytes = slot_bytes
        self._slots = _Slots(slots, slot_bytes, device, ledger)
        self._device, self._stream = device, stream
        self._ready = [torch.cuda.Event() for _ in range(slots)]
        self._free = [torch.cuda.Event() for _ in range(slots)]
        for event in self._free:
            event.record(torch.cuda.current_stream(device))

    def fetch(self, pieces: Sequence[Piece]) -> int:
        ticket, slot = self._slots.take(pieces)
        # Write-back runs on the same stream, so what it wrote is in host memory before it is read here.
        self._stream.wait_event(self._free[slot])
        with torch.cuda.stream(self._stream):
            self._slots.fill(ticket)
            self._ready[slot].record(self._stream)
        return ticket

    def wait(self, ticket: int) -> Sequence[Piece]:
        slot, tile, _ = self._slots.in_use[ticket]
        torch.cuda.current_stream(self._device).wait_event(self._ready[slot])
        return (tile,)

    def release(self, ticket: int) -> None:
        slot, _, _ = self._slots.in_use.pop(ticket)
        self._free[slot].record(torch.cuda.current_stream(self._device))

    def copied(self, ticket: int) -> None:
        # The slot may have been filled again since: then this waits for that too.
        self._ready[ticket % len(self._ready)].synchronize()

    def expect(self, pieces: Sequence[Any]) -> None:
        """Nothing to do yet: the next layer's first tile has its own time."""

    def abandon(self) -> None:
        torch.cuda.synchronize(self._device)
        self._slots.in_use.clear()

    def close(self) -> None:
        torch.cuda.synchronize(self._device)
        self._slots.close()


class StagingWriter:
    """Writes new tokens to the host through persistent device buffers, repacked so that each copy is contiguous.

    Two buffers of `buffer_bytes` take turns. On CUDA the copies run on the ring's copy stream behind the compute
    stream; on the CPU they are plain copies through the same buffers.
    """

    def __init__(
        self, buffer_bytes: int, device: torch.device, ledger: Ledger, stream: torch.cuda.Stream | None
    ) -> None:
        self.buffer_bytes, self.ledger, self._device, self._stream = buffer_bytes, ledger, device, stream
        self._buffers = [torch.zeros(buffer_bytes, dtype=torch.uint8, device=device) for _ in range(2)]
        self._drained = [torch.cuda.Event() for _ in range(2)] if stream is not None else []
        self._turn = 0
        ledger.hold_device("staging", 2 * buffer_bytes)

    def __call__(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """destination [H, T, D] in host memory, each head contiguous; source [H, T, D] on the device, any strides."""
        if source.numel() == 0:
            return
        heads, tokens, dim = source.shape
        row_bytes = heads * dim * source.element_size()
        step = self.buffer_bytes // row_bytes
        if step == 0:
            raise CapacityError(f"a write-back buffer of {self.buffer_bytes} bytes holds no token of {row_bytes} bytes")
        for start in range(0, tokens, step):
            stop = min(start + step, tokens)
            self._turn = 1 - self._turn
            flat = self._buffers[self._turn].view(source.dtype)
            packed = flat[: heads * (stop - start) * dim].view(heads, stop - start, dim)
            if self._stream is None:
                packed.copy_(source[:, start:stop])
                self._drain(destination[:, start:stop], packed)
            else:
                compute = torch.cuda.current_stream(self._device)
                compute.wait_event(self._drained[self._turn])
                packed.copy_(source[:, start:stop])
                self._stream.wait_stream(compute)
                with torch.cuda.stream(self._stream):
                    self._drain(destination[:, start:stop], packed)
                    self._drained[self._turn].record(self._stream)

    def _drain(self, destination: torch.Tensor, packed: torch.Tensor) -> None:
        for head in range(packed.shape[0]):
            copy_contiguous(destination[head], packed[head])
        self.ledger.device_to_host_bytes += packed.numel() * packed.element_size()
        self.ledger.copies += packed.shape[0]

    def close(self) -> None:
        """Give the buffers back."""
        self.ledger.hold_device("staging", -2 * self.buffer_bytes)
        self._buffers = []


def write_in_place(destination: torch.Tensor, source: torch.Tensor) -> None:
    """Write-back where the host is the compute device: one copy, no link."""
    destination.copy_(source)


def make_ring(
    staging: Staging,
    slots: int,
    slot_bytes: int,
    device: torch.device,
    ledger: Ledger,
    stream: torch.cuda.Stream | None,
) -> Ring:
    """The ring for a way of staging ("none" has no ring)."""
    if staging == "cuda":
        assert stream is not None
        return CudaRing(slots, slot_bytes, device, ledger, stream)
    rings: dict[str, Callable[[int, int, torch.device, Ledger], Ring]] = {"early": EarlyRing, "late": LateRing}
    return rings[staging](slots, slot_bytes, device, ledger)
