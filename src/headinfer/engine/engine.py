"""What the layers of a cache share: their options, the KV of each device, and the order of a forward pass."""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from headinfer.attention.backends import SDPA, Backend
from headinfer.engine.device_kv import DeviceKV, HeadCounts, PassShape, Shortage
from headinfer.engine.layer_pass import AttentionSpec
from headinfer.engine.machine import this_machine
from headinfer.engine.options import Options
from headinfer.engine.past import Tile, divide, tiles_of
from headinfer.engine.recorder import MassRecorder
from headinfer.engine.streaming import attend_one_piece, attend_streaming
from headinfer.errors import UnsupportedError
from headinfer.kv.byte_counter import ByteCounter
from headinfer.kv.disk_tier import DiskTier
from headinfer.kv.host_memory import HostTier
from headinfer.kv.layer_kv import LayerKV, TokenRanges
from headinfer.kv.segments import Segment, first_of
from headinfer.kv.slices import DiskSlice
from headinfer.kv.streams import Transport
from headinfer.plan.tiles import FEW_QUERY_TOKENS, TilePlan
from headinfer.utils.kv_format import kv_bits, pair_bytes

__all__ = ["Engine"]


class Engine:
    """Creates the KV of a cache's layers and runs their attention.

    Args:
        options: the options of the cache.
        layers: number of layers with KV in host memory. Their tails count against the budget from the start.
        head_counts: the full and the streaming KV heads of each offloaded layer; None if all heads are full.

    Attributes:
        layers_on: number of layers with KV in host memory by device, if it is known before the first pass.
        counter: counts the bytes of the host and of the first device.
        devices: the KV of each device.
        awaiting: the chunk that a layer was updated with and whose attention has not run yet.
        backends_used: names of the attention backends that have run.
        row_copies: rows that each row will become during the pass or soon after (hf/copies.py).
        attentions: attentions that ran since the start of the forward pass.
        disk: the disk tier, if there is one.
        shortage: what was done when a device ran out of memory.
        recorder: records attention mass; None outside of hf/where.py.
    """

    def __init__(self, options: Options, layers: int, head_counts: Sequence[HeadCounts] | None = None) -> None:
        self.options = options
        self.layers = layers
        self.layers_on: Mapping[torch.device, int] = {}
        self._head_counts = head_counts
        self._head_counts_on: dict[torch.device, list[HeadCounts]] = {}
        self.counter = ByteCounter()
        self.devices: dict[torch.device, DeviceKV] = {}
        self.awaiting: object | None = None
        self.backends_used: set[str] = set()
        self.row_copies = 1
        self.attentions = 0
        self.disk: DiskTier | None = None
        self.shortage = Shortage()
        self.recorder: MassRecorder | None = None
        self._shape = PassShape()
        self._group_queries = 1
        self._begun: set[torch.device] = set()  # the devices that have begun the current pass
        self._layer_order = _LayerOrder()
        self._choices: dict[Hashable, Backend] = {}  # of the current pass

    @property
    def plan(self) -> TilePlan | None:
        """The tile of the last forward pass, on the first device."""
        return next((kv.plan for kv in self.devices.values()), None)

    @property
    def counters(self) -> list[ByteCounter]:
        """The counter of each device. The first one counts host bytes too."""
        return [kv.counter for kv in self.devices.values()] or [self.counter]

    def new_layer_kv(self, k: torch.Tensor, v: torch.Tensor) -> LayerKV:
        """Return an empty LayerKV with the shape, dtype and device of k [B, Hkv, T, Dk] and v [B, Hkv, T, Dv]."""
        return self._device_kv(k, v).new_layer_kv(k, v)

    def place(self, devices: Iterable[torch.device]) -> None:
        """Note the device of each offloaded layer, in order, before the first pass."""
        if self._head_counts is None:
            self.layers_on = Counter(devices)
            return
        for device, counts in zip(devices, self._head_counts, strict=True):
            self._head_counts_on.setdefault(device, []).append(counts)
        self.layers_on = {
            device: sum(counts.full > 0 for counts in layers) for device, layers in self._head_counts_on.items()
        }

    def hold_window(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Count the bytes of a window of streaming heads, as long as it exists. Calling it again does nothing."""
        if getattr(k, "_headinfer_is_counted", False):
            return
        k._headinfer_is_counted = True  # type: ignore[attr-defined]
        kv = self.devices.get(self._device_of(k))
        counter = kv.counter if kv is not None else self.counter
        counter.hold_device("window", k.nbytes + v.nbytes)
        weakref.finalize(k, counter.hold_device, "window", -k.nbytes - v.nbytes).atexit = False

    def begin(self, layer_kv: LayerKV, query_heads: int, query_tokens: int) -> None:
        """Begin a forward pass, before the attention of its first offloaded layer.

        Args:
            layer_kv: the KV of that layer.
            query_heads: query heads of that layer.
            query_tokens: tokens of the chunk.
        """
        self._layer_order.begin_pass()
        self._choices.clear()
        self._shape = PassShape(query_heads, query_tokens, self.row_copies)
        self._group_queries = query_heads // layer_kv.heads
        self._begun = set()

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer_kv: LayerKV,
        spec: AttentionSpec,
        past_tokens: int | None = None,
    ) -> torch.Tensor:
        """Compute attention of a chunk on the tokens before it and on itself; see attend_streaming().

        Args:
            q: [B, Hq, T, Dk].
            k: [B, Hkv, T, Dk].
            v: [B, Hkv, T, Dv].
            layer_kv: the KV of the tokens before.
            spec: what the model asks for.
            past_tokens: how many of the tokens before are attended to; None for all.

        Returns:
            [B, T, Hq, Dv] in q's dtype.
        """
        self.attentions += 1
        device = self._device_of(layer_kv)
        kv = self.devices[device]
        shape = self._shape
        if q.shape[1] != shape.query_heads:
            shape = dataclasses.replace(shape, query_heads=q.shape[1])
        if device not in self._begun:
            kv.begin(layer_kv, shape)
            self._begun.add(device)
        layer_kv.promote()
        if q.shape[2] == 1 and past_tokens is None and self.recorder is None:
            out = attend_one_piece(q, k, v, layer_kv, spec, self.options.backend)
            if out is not None:
                self.backends_used.add(SDPA)
                return out
        if not kv.can_stream(layer_kv, shape):
            kv.begin(layer_kv, shape)
        kv.check()
        self._layer_order.note(layer_kv)
        plan = kv.plan_of(layer_kv, shape)
        if self.recorder is not None:  # it sees what comes to the device
            plan = dataclasses.replace(plan, cpu_share=0.0)
        return attend_streaming(
            q,
            k,
            v,
            layer_kv,
            spec,
            plan=plan,
            ring=kv.ring,
            exchange=kv.exchange,
            counter=kv.counter,
            past_tokens=past_tokens,
            backend=self.options.backend,
            used=self.backends_used,
            choices=self._choices,
            following=self._following(layer_kv, spec.token_ranges) if self.recorder is None else (),
            recorder=self.recorder,
            attention=self.attentions - 1,
        )

    def _following(self, layer_kv: LayerKV, token_ranges: Sequence[TokenRanges] | None) -> Iterator[Tile]:
        """Yield the tiles to prefetch while a layer attends: the first ones of the next layer on its device.

        After the last layer this is the first layer, for the next token. Nothing is prefetched then for the next
        chunk of a prompt, which may use other tiles, and for padded rows, in which other tokens are hidden.
        """
        device = self._device_of(layer_kv)
        coming, is_next_pass = self._layer_order.next(lambda other: self._device_of(other) == device)
        if coming is None or coming.rows != layer_kv.rows:
            return
        is_prefill = self._shape.query_tokens > FEW_QUERY_TOKENS
        if is_next_pass and (token_ranges is not None or (self.disk is None and is_prefill)):
            return
        shape = dataclasses.replace(self._shape, query_heads=self._group_queries * coming.heads)
        plan = self.devices[device].plan_of(coming, shape)
        heads = slice(0, min(plan.heads_per_group, coming.heads))
        seen = first_of(token_ranges, coming.tokens, coming.rows) if token_ranges is not None else None
        for tile in tiles_of(divide(coming, plan, seen), heads, plan):
            if self.disk is not None:  # only reading from the disk begins ahead
                is_wanted = any(isinstance(piece, DiskSlice) for piece in tile.pieces)
            else:
                is_wanted = not tile.resident
            if is_wanted:
                yield tile

    def rows_that_fit(self, layer_kvs: Sequence[LayerKV], wanted: int, new_tokens: int, query_heads: int) -> int:
        """Return how many rows a fork may have that share the past of a cache: 1 to `wanted`.

        Args:
            layer_kvs: the KV of the cache's layers.
            wanted: the number of rows that is wanted.
            new_tokens: tokens that each row will get.
            query_heads: query heads of a layer.
        """
        by_device = self._by_device(layer_kvs)
        rows = wanted
        while rows > 1 and not all(
            self.devices[device].fits_rows(kvs, rows, new_tokens, query_heads) for device, kvs in by_device.items()
        ):
            rows -= 1
        return rows

    def make_room_for_rows(self, layer_kvs: Sequence[LayerKV], rows: int) -> None:
        """Free device memory for the tails of a fork with so many rows."""
        for device, kvs in self._by_device(layer_kvs).items():
            self.devices[device].make_room_for_rows(kvs, rows)

    def _by_device(self, layer_kvs: Sequence[LayerKV]) -> dict[torch.device, list[LayerKV]]:
        found: dict[torch.device, list[LayerKV]] = {}
        for layer_kv in layer_kvs:
            found.setdefault(self._device_of(layer_kv), []).append(layer_kv)
        return found

    def settle(self) -> None:
        """Wait until all write-backs have reached host memory."""
        for kv in self.devices.values():
            kv.write.settle()

    def segment_tier(self, layer_kv: LayerKV) -> HostTier | None:
        """Return the host memory to copy segments of a session to; None if they can be read as they are mapped."""
        kv = self.devices[self._device_of(layer_kv)]
        is_needed = kv.transport == "cuda" or (self.disk is not None and kv.transport != "in_place")
        return kv.tier if is_needed else None

    @property
    def on_full(self) -> Callable[[Sequence[Segment]], None] | None:
        """To be called with segments that are never written again; None if there is no disk tier."""
        return self.disk.seal_full if self.disk is not None else None

    def abandon(self) -> None:
        """Drop all transfers that are under way, after an error in a forward pass."""
        self.awaiting = None
        for kv in self.devices.values():
            kv.abandon()

    def park(self) -> None:
        """Free the device memory that is needed only while passes run. None may be running."""
        for kv in self.devices.values():
            kv.park()

    def give_back(self) -> int:
        """Drop resident KV from the devices, about half of it, and free the memory that torch has cached.

        Call it after a device ran out of memory, and after abandon(), so that no queue reads the resident KV.

        Returns:
            The bytes that were dropped; 0 if no KV was resident.
        """
        given = sum(kv.give_back() for kv in self.devices.values())
        self.shortage.given_back_bytes += given
        if any(device.type == "cuda" for device in self.devices):
            torch.cuda.empty_cache()
        return given

    def drop_prefetched(self) -> None:
        """Drop all prefetched tiles."""
        for kv in self.devices.values():
            if kv.ring is not None:
                kv.ring.drop_prefetched()

    def _device_of(self, tensors: LayerKV | torch.Tensor) -> torch.device:
        """Return the device of a layer's KV, or of a tensor. Tests override it."""
        return tensors.device

    def _device_kv(self, k: torch.Tensor, v: torch.Tensor) -> DeviceKV:
        """Return the KV of the device of k and v. It is created with the first layer of that device."""
        device = self._device_of(k)
        if device in self.devices:
            return self.devices[device]
        options = self.options
        rates = options.rates
        transport = self._transport_to(k.device)
        if transport == "cuda":
            machine = this_machine(k.device)
            dtype = str(k.dtype).removeprefix("torch.")
            if rates is None and dtype in machine.flops_per_s:
                rates = machine.tile_rates(dtype)
            options = dataclasses.replace(options, cpu_threads=options.cpu_threads or machine.cpu_threads_beside_link)
        kv = DeviceKV(
            k.device,
            transport,
            options,
            rates,
            layers=self.layers_on.get(device, self.layers),
            all_layers=self.layers,
            head_counts=self._head_counts_on.get(device, self._head_counts),
            all_head_counts=self._head_counts,
            counter=ByteCounter() if self.devices else self.counter,
            host_counter=self.counter,
        )
        self.devices[device] = kv
        self._use_disk(kv, k, v)
        return kv

    def _transport_to(self, device: torch.device) -> Transport:
        if device.type == "cuda":
            return "cuda"
        if device.type != "cpu":
            raise UnsupportedError(f"the model is on {device}: this version serves cpu and cuda devices")
        return "in_place" if self.options.transport == "auto" else self.options.transport

    def _use_disk(self, kv: DeviceKV, k: torch.Tensor, v: torch.Tensor) -> None:
        """Give a device the disk tier, if the options ask for one."""
        options = self.options
        if options.host_kv_budget_bytes is None or options.disk_tier is None:
            return
        if self.disk is None:
            stored_bytes = pair_bytes(k.shape[3], v.shape[3], k.element_size(), kv_bits(options.kv_dtype))
            heads = self.layers * k.shape[1]
            if self._head_counts is not None:
                heads = sum(counts.full for counts in self._head_counts)
            token_bytes = heads * k.shape[0] * stored_bytes
            reserve_bytes = options.expected_tokens * token_bytes  # for all KV: read buffers take a part of the budget
            folder = Path(options.disk_tier)
            budget_bytes = options.host_kv_budget_bytes
            self.disk = DiskTier(folder, budget_bytes, reserve_bytes, self.counter, self._write_back_done)
        kv.disk = self.disk
        kv.tier.make_room = self.disk.make_room

    def _write_back_done(self) -> Callable[[], None]:
        """Return a function that waits, on any thread, until the write-backs queued so far are in host memory."""
        waits = [kv.streams.write_back_done() for kv in self.devices.values() if kv.streams is not None]

        def wait_for_all() -> None:
            for wait in waits:
                wait()

        return wait_for_all


class _LayerOrder:
    """The order in which layers streamed their past in the previous pass, to predict the next layer of this one."""

    def __init__(self) -> None:
        self._now: list[weakref.ref[LayerKV]] = []
        self._before: list[weakref.ref[LayerKV]] = []

    def begin_pass(self) -> None:
        """Begin a new pass."""
        self._before = self._now
        self._now = []

    def note(self, layer_kv: LayerKV) -> None:
        """Note that a layer streams its past."""
        self._now.append(weakref.ref(layer_kv))

    def next(self, is_wanted: Callable[[LayerKV], bool]) -> tuple[LayerKV | None, bool]:
        """Predict the next wanted layer after the one that attends now.

        Args:
            is_wanted: tells whether a layer counts.

        Returns:
            The KV of the next wanted layer, None if this pass differs from the previous one, and whether that layer
            belongs to the next pass.
        """
        position = len(self._now) - 1
        if position >= len(self._before) or self._before[position] != self._now[position]:
            return None, False
        following = itertools.chain(range(position + 1, len(self._before)), range(position + 1))
        for at in following:
            other = self._before[at]()
            if other is not None and is_wanted(other):
                return other, at <= position
        return None, False
