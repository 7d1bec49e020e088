"""What the KV of one device has there: queues, ring, write-back, resident tokens, and one budget for them.

budget    = streaming part + room for resident KV
streaming = ring + tails + write-back buffers
"""

from __future__ import annotations

from typing import Any

import torch

from headinfer.engine.machine import free_device_bytes
from headinfer.errors import CapacityError
from headinfer.kv.byte_counter import ByteCounter
from headinfer.kv.disk_tier import DiskTier
from headinfer.kv.layer_kv import LayerKV
from headinfer.kv.numa import node_of
from headinfer.kv.read_ahead import ReadAhead, read_slot_bytes
from headinfer.kv.resident import Residency, Share
from headinfer.kv.streams import Streams, Transport, open_streams
from headinfer.kv.tiers import HostTier
from headinfer.kv.transfer import InPlace, Ring, SlotRing
from headinfer.kv.write_back import StagingWriter, WriteInPlace, Writer
from headinfer.plan.footprint import host_kv_tokens, write_back_bytes
from headinfer.plan.memory import available_host_bytes
from headinfer.plan.tiles import DEFAULT_BUDGET_BYTES, RING_SLOTS, TilePlan, TileRates, choose_tiles, ring_slot_bytes

__all__ = ["DeviceKV", "default_budget"]

_RESERVE_SHARE = 8  # of a device's memory: left to activations where no plan has counted them
_LEAST_RESERVE_BYTES = 2 * 2**30
_RESERVED_HOST_SHARE = 0.9  # of the host memory that is free: lengths are often only upper bounds


def default_budget(device: torch.device) -> int:
    """Bytes that KV may take on a CUDA device where nobody said how many: what is free, less a reserve."""
    reserve = max(torch.cuda.get_device_properties(device).total_memory // _RESERVE_SHARE, _LEAST_RESERVE_BYTES)
    return max(free_device_bytes(device) - reserve, DEFAULT_BUDGET_BYTES)


class DeviceKV:
    """The KV of the layers of one cache that lie on one device."""

    def __init__(
        self,
        device: torch.device,
        transport: Transport,
        *,
        layers: int,
        all_layers: int,
        budget: int | None,
        streaming_budget: int | None,
        expected_tokens: int,
        rates: TileRates | None,
        counter: ByteCounter,
        host_counter: ByteCounter,
    ) -> None:
        """budget: device bytes of all KV, None for what is free (on a CPU: 256 MiB); streaming_budget: the part of it
        that is not for resident KV, None for 256 MiB. layers: stores that there may be, all_layers: on other devices
        too. host_counter counts host memory.
        """
        self.device, self.transport, self.expected_tokens = device, transport, expected_tokens
        self.layers, self.all_layers = layers, all_layers
        self.rates, self.counter = rates, counter
        is_cuda = transport == "cuda"
        if budget is None:
            budget = default_budget(device) if is_cuda else DEFAULT_BUDGET_BYTES
        self.budget = budget
        self.streaming_bytes = min(streaming_budget or DEFAULT_BUDGET_BYTES, budget)
        self.streams: Streams | None = open_streams(transport, device)
        self.tier = HostTier(
            host_counter, device=device if is_cuda else None, node=node_of(device) if is_cuda else None
        )
        self.disk: DiskTier | None = None
        self.ring: Ring | None = None
        self.plan: TilePlan | None = None
        self._has_slots = False  # whether the plan's tiles can come from the host
        self.write: Writer = WriteInPlace()
        self.residency: Residency | None = None
        if self.streams is not None:
            self.write = StagingWriter(write_back_bytes(self.streaming_bytes), device, counter, self.streams)
            self.residency = Residency(budget - self.streaming_bytes, device, counter, self.streams)

    @property
    def held_bytes(self) -> int:
        """Device bytes of all KV."""
        return sum(self.counter.device_bytes.values())

    def new_layer_kv(self, k: torch.Tensor, v: torch.Tensor) -> LayerKV:
        """An empty store for k [B, Hkv, T, Dk] and v [B, Hkv, T, Dv] that lie here."""
        share = None
        if self.residency is not None:
            share = Share(
                self.residency, self.residency.room_bytes // self.layers, host_kv_tokens(self.expected_tokens)
            )
        token_bytes = k.shape[0] * k.shape[1] * (k.shape[3] + v.shape[3]) * k.element_size()
        expected_bytes = self.all_layers * token_bytes * self.expected_tokens
        return LayerKV(
            k,
            v,
            tier=self.tier,
            counter=self.counter,
            write=self.write,
            expected_tokens=self.expected_tokens,
            on_full=self.disk.full if self.disk is not None else None,
            share=share,
            reserves=self.transport == "cuda" and expected_bytes < _RESERVED_HOST_SHARE * self._host_room_bytes(),
        )

    def _host_room_bytes(self) -> int:
        """Host memory that is free, or holds KV of this cache already."""
        return available_host_bytes() + self.tier.counter.host_bytes

    def begin(
        self, layer_kv: LayerKV, query_heads: int, query_tokens: int, row_copies: int, fixed: dict[str, int | None]
    ) -> None:
        """Before the first attention of a forward pass here: fit the ring to the budget and choose the tile.

        row_copies: rows that each row will become before long, and that need tails. fixed: what choose_tiles() is told.
        """
        # One tail more than there are layers, since reordering rows copies a tail; and forks have tails too.
        held = self.counter.device_bytes
        tails = max((self.layers + 1) * layer_kv.tail_bytes * row_copies, held["tail"] + layer_kv.tail_bytes)
        taken = tails + held["staging"]
        residency, queries = self.residency, (query_heads, query_tokens)
        if residency is not None and residency.held_bytes > max(self.budget - taken, 0):
            self._let_go(max(self.budget - taken, 0))
        if self.streams is None or layer_kv.is_all_resident:
            self._choose(layer_kv, *queries, None, fixed)
            if self.streams is None:
                self._use_ring(None)
            return
        try:
            self._begin_streaming(layer_kv, *queries, taken, fixed)
        except CapacityError:
            if residency is None or not residency.held_bytes:
                raise
            self._let_go(max(self.budget - max(DEFAULT_BUDGET_BYTES, 2 * taken), 0))
            self._begin_streaming(layer_kv, *queries, taken, fixed)

    def can_fetch(self, layer_kv: LayerKV) -> bool:
        """Whether what a store has on the host only can come as things are; else begin() is to be called with it."""
        if self.streams is None or layer_kv.is_all_resident:
            return True
        return self._has_slots and not self._is_outdated()

    def check(self) -> None:
        """Raise CapacityError where the KV holds more than its budget."""
        if self.streams is not None and self.held_bytes > self.budget:
            raise CapacityError(
                f"the KV cache holds {self.held_bytes} device bytes, over its budget of {self.budget}: raise the budget"
            )

    def abandon(self) -> None:
        """Nothing is under way any more."""
        if self.ring is not None:
            self.ring.abandon()

    def _begin_streaming(
        self, layer_kv: LayerKV, query_heads: int, query_tokens: int, taken: int, fixed: dict[str, int | None]
    ) -> None:
        slot_bytes = ring_slot_bytes(self.streaming_bytes, taken)
        self._choose(layer_kv, query_heads, query_tokens, slot_bytes, fixed)
        self._use_ring(slot_bytes)

    def _let_go(self, room_bytes: int) -> None:
        """Resident KV gives way to the rest; the host has it all."""
        assert self.residency is not None
        self.residency.let_go(room_bytes)
        self.streaming_bytes = self.budget - room_bytes

    def _is_outdated(self) -> bool:
        """Whether memory could not be pinned since the ring was made."""
        return bool(self.tier.pin_refusal) and not isinstance(self.ring, ReadAhead)

    def _choose(
        self,
        layer_kv: LayerKV,
        query_heads: int,
        query_tokens: int,
        slot_bytes: int | None,
        fixed: dict[str, int | None],
    ) -> None:
        self._has_slots = slot_bytes is not None
        bound: list[int] = [] if slot_bytes is None else [slot_bytes]
        if self.disk is not None or self.tier.pin_refusal:
            bound.append(read_slot_bytes(self.disk.host_budget if self.disk is not None else None))
        self.plan = choose_tiles(
            kv_heads=layer_kv.heads,
            group_queries=query_heads // layer_kv.heads,
            head_token_bytes=(layer_kv.key_dim + layer_kv.value_dim) * layer_kv.dtype.itemsize,
            rows=layer_kv.rows,
            query_tokens=query_tokens,
            past_tokens=layer_kv.tokens,
            slot_bytes=min(bound, default=None),
            element_bytes=layer_kv.dtype.itemsize,
            rates=self.rates,
            **fixed,
        )

    def _use_ring(self, slot_bytes: int | None) -> None:
        """Keep the ring where it is as wanted: it changes with the batch, forks, and memory that is not pinned."""
        if self.ring is not None and self.ring.slot_bytes == (slot_bytes or 0) and not self._is_outdated():
            return
        if self.ring is not None:
            self.ring.close()
        ring: Any = InPlace()
        if slot_bytes is not None:
            assert self.streams is not None
            ring = SlotRing(RING_SLOTS, slot_bytes, self.device, self.counter, self.streams)
        if self.disk is not None or self.tier.pin_refusal:
            nbytes = read_slot_bytes(self.disk.host_budget if self.disk is not None else None)
            ring = ReadAhead(ring, self.tier, nbytes, self.streams)
        self.ring = ring
