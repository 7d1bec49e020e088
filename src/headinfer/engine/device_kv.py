"""The KV of one device: its queues, ring, buffers and resident tokens, within one budget.

budget    = streaming part + resident part
streaming = ring + tails + write-back buffers + buffers of the exchange with the host + windows of streaming heads
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from headinfer.attention.native import unavailable_reason
from headinfer.attention.quantised import Codec
from headinfer.engine.machine import free_device_bytes
from headinfer.engine.options import Options
from headinfer.errors import CapacityError, UnsupportedError
from headinfer.kv.byte_counter import ByteCounter
from headinfer.kv.device_buffer import TAIL_TOKENS
from headinfer.kv.disk_tier import DiskTier
from headinfer.kv.exchange import HostExchange
from headinfer.kv.head_window import window_tokens
from headinfer.kv.host_memory import HostTier, releasing_bytes
from headinfer.kv.layer_kv import LayerKV
from headinfer.kv.numa import node_of
from headinfer.kv.read_ahead import ReadAhead, read_slot_bytes
from headinfer.kv.resident import LayerResidency, Residency
from headinfer.kv.streams import Streams, Transport, open_streams
from headinfer.kv.transfer import InPlace, Ring, SlotRing
from headinfer.kv.write_back import StagingWriter, WriteInPlace, Writer
from headinfer.plan.cpu_share import share_at_rows
from headinfer.plan.footprint import host_kv_tokens, layer_exchange_bytes, write_back_bytes
from headinfer.plan.memory import available_host_bytes
from headinfer.plan.tiles import (
    DEFAULT_BUDGET_BYTES,
    FEW_QUERY_TOKENS,
    RING_SLOTS,
    FixedTile,
    LayerWork,
    TilePlan,
    TileRates,
    choose_tiles,
    ring_slot_bytes,
)
from headinfer.utils.kv_format import dims_refusal, kv_bits, pair_bytes

__all__ = ["DeviceKV", "HeadCounts", "PassShape", "Shortage", "default_budget_bytes"]

_RESERVE_SHARE = 8  # 1/8 of the device is left to activations if no plan has counted them
_LEAST_RESERVE_BYTES = 2 * 2**30
_LEAST_RESIDENT_SHARE = 8  # less than 1/8 of the resident KV is given back at once if memory runs out
_RESERVED_HOST_SHARE = 0.9  # of the free host memory: the expected length is often only an upper bound


@dataclass(frozen=True)
class PassShape:
    """What a forward pass asks of its attention.

    Attributes:
        query_heads: query heads of a layer.
        query_tokens: tokens of the chunk.
        row_copies: rows that each row will become during the pass or soon after; each needs a tail (hf/copies.py).
    """

    query_heads: int = 1
    query_tokens: int = 1
    row_copies: int = 1


class HeadCounts(NamedTuple):
    """The KV heads of an offloaded layer (Options.sparse_heads).

    Attributes:
        full: heads that see all tokens, whose KV is in host memory.
        streaming: heads that see the first and the newest tokens, whose KV is in a window on the device.
    """

    full: int
    streaming: int


@dataclass
class Shortage:
    """What was done when a device ran out of memory (hf/recovery.py).

    Attributes:
        retries: chunks or decode steps that were computed again.
        given_back_bytes: bytes of resident KV that were dropped from the devices.
        chunk_tokens: tokens that a chunk has at most since; 0 if chunks were not shortened.
        has_warned: whether the user has been told.
    """

    retries: int = 0
    given_back_bytes: int = 0
    chunk_tokens: int = 0
    has_warned: bool = False


def default_budget_bytes(device: torch.device) -> int:
    """Return the KV budget of a CUDA device if the user gives none: what is free, less a reserve for activations."""
    total = torch.cuda.get_device_properties(device).total_memory
    reserve = max(total // _RESERVE_SHARE, _LEAST_RESERVE_BYTES)
    return max(free_device_bytes(device) - reserve, DEFAULT_BUDGET_BYTES)


class DeviceKV:
    """The KV of the layers of one cache that are on one device.

    Args:
        device: the device.
        transport: how KV reaches the device.
        options: the options of the cache.
        rates: the rates that tiles are chosen for.
        layers: number of layers with KV in host memory on this device.
        all_layers: number of such layers on all devices.
        counter: counts device bytes and copies.
        host_counter: counts host bytes, for all devices.
        head_counts: the KV heads of each offloaded layer on this device; None if all heads are full. The layers have
            equally many then, as far as budgets are concerned.
        all_head_counts: those on all devices.
    """

    def __init__(
        self,
        device: torch.device,
        transport: Transport,
        options: Options,
        rates: TileRates | None,
        *,
        layers: int,
        all_layers: int,
        counter: ByteCounter,
        host_counter: ByteCounter,
        head_counts: Sequence[HeadCounts] | None = None,
        all_head_counts: Sequence[HeadCounts] | None = None,
    ) -> None:
        self.device = device
        self.transport = transport
        self.expected_tokens = options.expected_tokens
        self.kv_bits = kv_bits(options.kv_dtype)
        self.layers = layers
        self.all_layers = all_layers
        self._head_counts = head_counts
        self._all_head_counts = all_head_counts
        pattern = options.sparse_heads
        self._window_tokens = window_tokens(pattern.sink_tokens, pattern.recent_tokens) if pattern is not None else 0
        self.rates = rates
        self.counter = counter
        self.fixed_tile = FixedTile(options.heads_per_group, options.tile_tokens)
        is_cuda = transport == "cuda"
        budget_bytes = options.device_kv_budget_bytes
        if budget_bytes is None:
            budget_bytes = default_budget_bytes(device) if is_cuda else DEFAULT_BUDGET_BYTES
        self.device_kv_budget_bytes = budget_bytes
        self.streaming_budget_bytes = min(options.streaming_budget_bytes or DEFAULT_BUDGET_BYTES, budget_bytes)
        self.streams: Streams | None = open_streams(transport, device)
        self.tier = HostTier(
            host_counter, device=device if is_cuda else None, node=node_of(device) if is_cuda else None
        )
        self.disk: DiskTier | None = None
        self.ring: Ring | None = None
        self.exchange: HostExchange | None = None
        self._cpu_share = options.cpu_share
        self._cpu_rows = options.cpu_rows
        self._cpu_threads = options.cpu_threads
        self.plan: TilePlan | None = None
        self._plans: dict[int, TilePlan] = {}  # those of the pass, by the number of KV heads
        self._slot_bytes: int | None = None
        self._has_slots = False  # whether the plan's tiles can come from the host
        self.write: Writer = WriteInPlace()
        self.residency: Residency | None = None
        self._abandoned_bytes = 0  # resident bytes when a pass was abandoned last
        self._most_resident_bytes = 0  # when memory first ran out
        if self.streams is not None:
            buffer_bytes = write_back_bytes(self.streaming_budget_bytes)
            self.write = StagingWriter(buffer_bytes, device, counter, self.streams)
            room_bytes = budget_bytes - self.streaming_budget_bytes
            self.residency = Residency(room_bytes, device, counter, self.streams)
            self.exchange = HostExchange(device, counter, self.streams, self.tier.buffer)

    @property
    def held_bytes(self) -> int:
        """Device bytes of all KV."""
        return sum(self.counter.device_bytes.values())

    def new_layer_kv(self, k: torch.Tensor, v: torch.Tensor) -> LayerKV:
        """Return an empty LayerKV with the shape, dtype and device of k [B, Hkv, T, Dk] and v [B, Hkv, T, Dv]."""
        residency = None
        if self.residency is not None:
            layer_bytes = self.residency.room_bytes * k.shape[1] // self._heads_of_layers(k.shape[1])
            residency = LayerResidency(self.residency, layer_bytes, host_kv_tokens(self.expected_tokens))
        codec: Codec | None = None
        if self.kv_bits:
            refusal = dims_refusal(k.shape[3], v.shape[3])
            if refusal:
                raise UnsupportedError(refusal)
            codec = Codec(self.kv_bits, k.shape[3], v.shape[3], k.dtype)
        stored_bytes = pair_bytes(k.shape[3], v.shape[3], k.element_size(), self.kv_bits)
        all_heads = self.all_layers * k.shape[1]
        if self._all_head_counts is not None:
            all_heads = sum(counts.full for counts in self._all_head_counts)
        expected_bytes = all_heads * k.shape[0] * stored_bytes * self.expected_tokens
        fits_host = expected_bytes < _RESERVED_HOST_SHARE * self._host_room_bytes()
        return LayerKV(
            k,
            v,
            tier=self.tier,
            counter=self.counter,
            write=self.write,
            expected_tokens=self.expected_tokens,
            on_full=self.disk.seal_full if self.disk is not None else None,
            residency=residency,
            reserves=self.transport == "cuda" and fits_host,
            codec=codec,
        )

    def _heads_of_layers(self, heads: int) -> int:
        """Return the full KV heads of all layers on this device, if a layer has so many and no pattern says more."""
        if self._head_counts is None:
            return self.layers * heads
        return sum(counts.full for counts in self._head_counts)

    def _most_heads(self, heads: int) -> int:
        """Return the full KV heads of the layer with the most, if a layer has so many and no pattern says more."""
        if self._head_counts is None:
            return heads
        return max(heads, *(counts.full for counts in self._head_counts))

    def _window_bytes(self, layer_kv: LayerKV, rows: int) -> int:
        """Return the bytes of the windows of all layers for so many rows. There are two of each while a pass runs,
        since errors return to the one before."""
        if self._head_counts is None:
            return 0
        token_bytes = (layer_kv.key_dim + layer_kv.value_dim) * layer_kv.dtype.itemsize
        heads = sum(counts.streaming for counts in self._head_counts)
        return 2 * rows * heads * self._window_tokens * token_bytes

    def _host_room_bytes(self) -> int:
        """Return host memory that is free, or holds KV of this cache already."""
        counter = self.tier.counter
        return available_host_bytes() + counter.host_bytes - counter.host_untouched_bytes + releasing_bytes()

    def begin(self, layer_kv: LayerKV, shape: PassShape) -> None:
        """Fit ring and exchange to the budget and choose the tile, before the first attention of a forward pass.

        Args:
            layer_kv: the KV of the layer that attends next.
            shape: what the pass asks for.

        Raises:
            CapacityError: the budget does not hold a ring, also if no token stays resident.
        """
        if layer_kv.tokens:  # each layer has reserved its host memory in the first pass
            self.tier.prepare_ahead()
        # There is one tail more than there are layers, since reordering rows copies a tail. Forks have tails too.
        # Rows that become several leave their own tails behind, in the buffers of their resident tokens.
        held = self.counter.device_bytes
        head_tail = layer_kv.tail_bytes // layer_kv.heads
        heads = self._heads_of_layers(layer_kv.heads)
        largest_tail = self._most_heads(layer_kv.heads) * head_tail
        tails = (heads * head_tail + largest_tail) * shape.row_copies
        if shape.row_copies > 1 and self.residency is not None and self.residency.room_bytes:
            tails += heads * head_tail
        tails = max(tails, held["tail"] + largest_tail)
        exchange = max(self._exchange_bytes(layer_kv, shape), held["exchange"])
        windows = max(self._window_bytes(layer_kv, layer_kv.rows * shape.row_copies), held["window"])
        taken = tails + held["staging"] + exchange + windows
        most_resident = max(self.device_kv_budget_bytes - taken, 0)
        if self.residency is not None and self.residency.held_bytes > most_resident:
            self._shrink_residency(most_resident)
        if exchange > held["exchange"]:
            self._grow_exchange(exchange)
        if self.streams is None or layer_kv.is_all_resident:
            self._choose(layer_kv, shape, None)
            if self.streams is None:
                self._use_ring(None)
            return
        try:
            self._begin_streaming(layer_kv, shape, taken)
        except CapacityError:
            if self.residency is None or not self.residency.held_bytes:
                raise
            needed = max(DEFAULT_BUDGET_BYTES, 2 * taken)
            self._shrink_residency(max(self.device_kv_budget_bytes - needed, 0))
            self._begin_streaming(layer_kv, shape, taken)

    def fits_rows(self, layer_kvs: Sequence[LayerKV], rows: int, new_tokens: int, query_heads: int) -> bool:
        """Return whether a fork with so many rows, which share the past, leaves half of the budget to the ring.

        Args:
            layer_kvs: the KV of the layers on this device.
            rows: rows of the fork.
            new_tokens: tokens that each row will get.
            query_heads: query heads of a layer.
        """
        row_tails = [kv.tail_bytes // max(kv.rows, 1) for kv in layer_kvs]
        tails = rows * (sum(row_tails) + max(row_tails))
        on_host = rows * (new_tokens + TAIL_TOKENS) * sum(row_tails) // TAIL_TOKENS  # segments are not small
        if on_host > self._room_for_rows_bytes():
            return False
        if self.streams is None:
            return on_host + tails <= _RESERVED_HOST_SHARE * self._host_room_bytes()
        held = self.counter.device_bytes
        exchange = 0
        if self._cpu_share:
            first = layer_kvs[0]
            query_rows = rows * query_heads * FEW_QUERY_TOKENS
            exchange = layer_exchange_bytes(query_rows, first.key_dim, first.value_dim, first.dtype.itemsize)
        windows = held["window"] + self._window_bytes(layer_kvs[0], rows)
        taken = held["tail"] + tails + held["staging"] + exchange + windows
        return 2 * taken <= self.device_kv_budget_bytes

    def _room_for_rows_bytes(self) -> int:
        """Return the host memory that new rows may take. With a disk tier this is half of its budget, since the newest
        segment of each row cannot move to the disk."""
        if self.disk is not None:
            return self.disk.host_budget // 2
        return int(_RESERVED_HOST_SHARE * self._host_room_bytes())

    def make_room_for_rows(self, layer_kvs: Sequence[LayerKV], rows: int) -> None:
        """Free device memory for the tails of a fork: the ring, which the next pass makes anew, and resident KV."""
        tails = sum((rows + kv.rows) * kv.tail_bytes // max(kv.rows, 1) for kv in layer_kvs)
        tails += self._window_bytes(layer_kvs[0], rows) if layer_kvs else 0
        if self.held_bytes + tails > self.device_kv_budget_bytes:
            self._close_ring()
            over = self.held_bytes + tails - self.device_kv_budget_bytes
            if self.residency is not None and over > 0:
                self._shrink_residency(max(self.residency.held_bytes - over, 0))

    def can_stream(self, layer_kv: LayerKV, shape: PassShape) -> bool:
        """Return whether ring and exchange serve the host part of a layer. If not, begin() must be called."""
        if self.streams is None or layer_kv.is_all_resident:
            return True
        has_exchange = self._exchange_bytes(layer_kv, shape) <= self.counter.device_bytes["exchange"]
        return has_exchange and self._has_slots and not self._is_outdated()

    def check(self) -> None:
        """Raise CapacityError if the KV holds more than its budget."""
        if self.streams is not None and self.held_bytes > self.device_kv_budget_bytes:
            raise CapacityError(
                f"the KV cache holds {self.held_bytes} device bytes, over its budget of "
                f"{self.device_kv_budget_bytes}: raise the budget"
            )

    def abandon(self) -> None:
        """Drop all transfers that are under way, and pause the preparation of host memory."""
        self.tier.pause()
        if self.residency is not None:
            self._abandoned_bytes = self.residency.held_bytes
        if self.ring is not None:
            self.ring.abandon()

    def park(self) -> None:
        """Free the ring and the resident tokens. The next pass makes the ring anew, within the same budget."""
        self.tier.pause()
        self._close_ring()
        if self.residency is not None:
            room_bytes = self.residency.room_bytes
            self.residency.shrink(0)
            self.residency.room_bytes = room_bytes

    def give_back(self) -> int:
        """Keep at most half as much KV resident after the device ran out of memory, and lower the budget.

        Returns:
            The bytes that are free because of it. What the abandoned pass had made resident counts.
        """
        if self.residency is None:
            return 0
        held = max(self.residency.held_bytes, self._abandoned_bytes)
        self._abandoned_bytes = 0
        self._most_resident_bytes = max(self._most_resident_bytes, held)
        room_bytes = held // 2
        if room_bytes < self._most_resident_bytes // _LEAST_RESIDENT_SHARE:
            room_bytes = 0
        self.residency.shrink(room_bytes)
        self.device_kv_budget_bytes = min(self.device_kv_budget_bytes, self.streaming_budget_bytes + room_bytes)
        return held - self.residency.held_bytes

    def _begin_streaming(self, layer_kv: LayerKV, shape: PassShape, taken: int) -> None:
        slot_bytes = ring_slot_bytes(self.streaming_budget_bytes, taken)
        self._choose(layer_kv, shape, slot_bytes)
        self._use_ring(slot_bytes)

    def _share_of_cpu(self, layer_kv: LayerKV, shape: PassShape) -> float:
        """Return the share of the streamed tokens that the host's CPU attends to in a pass.

        Unless the user has given one, it is 1 if the system refuses to pin host memory, from which the CPU reads faster
        than the device does.
        """
        if self.exchange is None or shape.query_tokens > FEW_QUERY_TOKENS:
            return 0.0
        is_given = self._cpu_share is not None and self._cpu_rows is None
        if self.tier.pin_refusal and not is_given and not unavailable_reason(layer_kv.dtype):
            return 1.0
        return share_at_rows(self._cpu_share or 0.0, self._cpu_rows, _query_rows(layer_kv, shape))

    def _exchange_bytes(self, layer_kv: LayerKV, shape: PassShape) -> int:
        """Return the bytes of the exchange that a layer needs on the device; 0 if the host attends to nothing.

        In prefill they are those of a new token, so that the ring is the same before and after the first one.
        """
        if shape.query_tokens > FEW_QUERY_TOKENS:
            shape = dataclasses.replace(shape, query_tokens=1)
        if layer_kv.is_all_resident or not self._share_of_cpu(layer_kv, shape):
            return 0
        query_heads = shape.query_heads // layer_kv.heads * self._most_heads(layer_kv.heads)
        query_rows = layer_kv.rows * shape.row_copies * query_heads * shape.query_tokens
        return layer_exchange_bytes(query_rows, layer_kv.key_dim, layer_kv.value_dim, layer_kv.dtype.itemsize)

    def _grow_exchange(self, nbytes: int) -> None:
        """Make the buffers of the exchange larger. The ring, which fills the streaming budget, is closed before."""
        assert self.exchange is not None
        self._close_ring()
        self.exchange.reserve(nbytes)

    def _close_ring(self) -> None:
        if self.ring is not None:
            self.ring.close()
            self.ring = None

    def _shrink_residency(self, room_bytes: int) -> None:
        """Keep at most room_bytes resident, and give the rest of the budget to streaming. The host has all KV."""
        assert self.residency is not None
        self.residency.shrink(room_bytes)
        self.streaming_budget_bytes = self.device_kv_budget_bytes - room_bytes

    def _is_outdated(self) -> bool:
        """Return whether pinning host memory has failed since the ring was made."""
        return bool(self.tier.pin_refusal) and not isinstance(self.ring, ReadAhead)

    @property
    def _read_slot_bytes(self) -> int | None:
        """Bytes of a host buffer of ReadAhead; None if tiles are copied from where they are."""
        if self.disk is None and not self.tier.pin_refusal:
            return None
        return read_slot_bytes(self.disk.host_budget if self.disk is not None else None)

    def plan_of(self, layer_kv: LayerKV, shape: PassShape) -> TilePlan:
        """Return the tile of a layer, after begin(). Layers with equally many full heads have the same.

        Args:
            layer_kv: the KV of the layer.
            shape: what the pass asks of it.
        """
        assert self.plan is not None
        if self._head_counts is None:
            return self.plan
        if layer_kv.heads not in self._plans:
            self._plans[layer_kv.heads] = self._chosen(layer_kv, shape, self._slot_bytes)
        return self._plans[layer_kv.heads]

    def _choose(self, layer_kv: LayerKV, shape: PassShape, slot_bytes: int | None) -> None:
        self._has_slots = slot_bytes is not None
        self._slot_bytes = slot_bytes
        self.plan = self._chosen(layer_kv, shape, slot_bytes)
        self._plans = {layer_kv.heads: self.plan}

    def _chosen(self, layer_kv: LayerKV, shape: PassShape, slot_bytes: int | None) -> TilePlan:
        """Return the tile for the layers with as many heads as one layer."""
        bounds = [nbytes for nbytes in (slot_bytes, self._read_slot_bytes) if nbytes is not None]
        element_bytes = layer_kv.dtype.itemsize
        work = LayerWork(
            kv_heads=layer_kv.heads,
            group_queries=shape.query_heads // layer_kv.heads,
            head_token_bytes=pair_bytes(layer_kv.key_dim, layer_kv.value_dim, element_bytes, self.kv_bits),
            element_bytes=element_bytes,
            quantised_dims=layer_kv.key_dim + layer_kv.value_dim if self.kv_bits else 0,
            rows=layer_kv.rows,
            query_tokens=shape.query_tokens,
            past_tokens=layer_kv.tokens,
        )
        fixed = self.fixed_tile
        if fixed.heads_per_group is not None and fixed.heads_per_group <= self._most_heads(layer_kv.heads):
            fixed = dataclasses.replace(fixed, heads_per_group=min(fixed.heads_per_group, layer_kv.heads))
        plan = choose_tiles(work, min(bounds, default=None), self.rates, fixed)
        share = self._share_of_cpu(layer_kv, shape)
        rows = None if self._cpu_rows is None else max(self._cpu_rows, _query_rows(layer_kv, shape))
        return dataclasses.replace(plan, cpu_share=share, cpu_rows=rows, cpu_threads=self._cpu_threads)

    def _use_ring(self, slot_bytes: int | None) -> None:
        """Keep the ring if it is as wanted. It changes with the batch, forks, and memory that is not pinned."""
        if self.ring is not None and self.ring.slot_bytes == (slot_bytes or 0) and not self._is_outdated():
            return
        self._close_ring()  # before the new one is made, which may not fit beside it
        ring: Ring = InPlace()
        if slot_bytes is not None:
            assert self.streams is not None
            ring = SlotRing(RING_SLOTS, slot_bytes, self.device, self.counter, self.streams)
        if self._read_slot_bytes is not None:
            ring = ReadAhead(ring, self.tier, self._read_slot_bytes, self.streams)
        self.ring = ring


def _query_rows(layer_kv: LayerKV, shape: PassShape) -> int:
    """Return the query rows per KV head of one row of the batch."""
    return shape.query_heads // layer_kv.heads * shape.query_tokens
