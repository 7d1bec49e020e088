"""What the layers of one cache share: their options, the KV of each device, and the order of a forward pass."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch

from headinfer.engine.device_kv import DeviceKV
from headinfer.engine.machine import this_machine
from headinfer.engine.options import Options
from headinfer.engine.streaming import Tile, attend_streaming, tiles_of
from headinfer.errors import UnsupportedError
from headinfer.kv.byte_counter import ByteCounter
from headinfer.kv.disk_tier import DiskTier
from headinfer.kv.layer_kv import TAIL_UNIT_TOKENS, LayerKV, TokenRanges, first_of
from headinfer.kv.segments import Segment
from headinfer.kv.slices import DiskSlice
from headinfer.kv.streams import Transport
from headinfer.kv.tiers import HostTier
from headinfer.plan.footprint import write_back_bytes
from headinfer.plan.model_shape import ModelShape
from headinfer.plan.tiles import (
    DEFAULT_BUDGET_BYTES,
    FEW_QUERY_TOKENS,
    TilePlan,
    choose_tiles,
    ring_slot_bytes,
)

__all__ = ["Engine"]


class Engine:
    """Creates the stores of a cache's layers and runs their attention."""

    def __init__(self, options: Options, layers: int) -> None:
        """layers: how many stores there will be; their tails are part of the budget from the start."""
        self.options, self.layers = options, layers
        self.layers_on: Mapping[torch.device, int] = {}  # how many of them, where that is known before
        self.counter = ByteCounter()  # of the host, and of the first device
        self.devices: dict[torch.device, DeviceKV] = {}
        self.awaiting: object | None = None  # what was updated and whose attention has not run yet
        self.backends_used: set[str] = set()
        self.row_copies = 1  # rows that each row will become before long, and that need tails: hf/copies.py
        self.attentions = 0  # since the start of the forward pass
        self.disk: DiskTier | None = None
        self._queries = (1, 1)  # heads and tokens of the forward pass
        self._begun: set[torch.device] = set()  # in this pass
        self._order: tuple[list[weakref.ref[LayerKV]], list[weakref.ref[LayerKV]]] = ([], [])

    @property
    def plan(self) -> TilePlan | None:
        """The tile of the last forward pass, on the first device."""
        return next((kv.plan for kv in self.devices.values()), None)

    @property
    def counters(self) -> list[ByteCounter]:
        """What each device counts; the first one counts the host too."""
        return [kv.counter for kv in self.devices.values()] or [self.counter]

    def check_budget(self, shape: ModelShape, element_bytes: int, chunk_tokens: int, total_tokens: int) -> None:
        """Raise, before anything is loaded, where the options cannot serve one row of this shape.

        The same choice of tiles as in a forward pass, for the last chunk of a prefill and for a decode step.
        """
        layer = next(shape.layers[index] for index in shape.offloaded_layers)
        tails = (self.layers + 1) * 2 * TAIL_UNIT_TOKENS * layer.kv_bytes_per_token(element_bytes)
        budget = self.options.device_kv_budget_bytes or DEFAULT_BUDGET_BYTES
        streaming = min(self.options.streaming_budget_bytes or DEFAULT_BUDGET_BYTES, budget)
        slot_bytes = ring_slot_bytes(streaming, tails + 2 * write_back_bytes(streaming))
        for query_tokens in (chunk_tokens, 1):
            choose_tiles(
                kv_heads=layer.kv_heads,
                group_queries=layer.query_heads // layer.kv_heads,
                head_token_bytes=(layer.key_dim + layer.value_dim) * element_bytes,
                rows=1,
                query_tokens=query_tokens,
                past_tokens=total_tokens,
                slot_bytes=slot_bytes,
                element_bytes=element_bytes,
                rates=self.options.rates,
                heads_per_group=self.options.heads_per_group,
                tile_tokens=self.options.tile_tokens,
            )

    def new_layer_kv(self, k: torch.Tensor, v: torch.Tensor) -> LayerKV:
        """An empty store with the shape, dtype and device of k [B, Hkv, T, Dk] and v [B, Hkv, T, Dv]."""
        return self._device_kv(k, v).new_layer_kv(k, v)

    def begin(self, layer_kv: LayerKV, query_heads: int, query_tokens: int) -> None:
        """Before a forward pass, with the store of its first offloaded layer."""
        self._order = ([], self._order[0])
        self._queries, self._begun = (query_heads, query_tokens), set()
        self._begin_on(layer_kv)

    def _begin_on(self, layer_kv: LayerKV) -> DeviceKV:
        device = self._device_of(layer_kv)
        kv = self.devices[device]
        if device not in self._begun or not kv.can_fetch(layer_kv):
            fixed = {"heads_per_group": self.options.heads_per_group, "tile_tokens": self.options.tile_tokens}
            kv.begin(layer_kv, *self._queries, self.row_copies, fixed)
            self._begun.add(device)
        return kv

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer_kv: LayerKV,
        *,
        scale: float,
        softcap: float | None,
        sinks: torch.Tensor | None,
        token_ranges: Sequence[TokenRanges] | None,
        past_tokens: int | None = None,
    ) -> torch.Tensor:
        """Attention of a chunk on a store and on itself; see `attend_streaming`."""
        self.attentions += 1
        layer_kv.promote()
        kv = self._begin_on(layer_kv)
        kv.check()
        assert kv.plan is not None
        return attend_streaming(
            q,
            k,
            v,
            layer_kv,
            plan=kv.plan,
            ring=kv.ring,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            token_ranges=token_ranges,
            past_tokens=past_tokens,
            backend=self.options.backend,
            used=self.backends_used,
            following=self._following(layer_kv, token_ranges),
        )

    def _following(self, layer_kv: LayerKV, token_ranges: Sequence[TokenRanges] | None) -> Iterable[Tile]:
        """The first tiles to fetch of the store on its device that came after this one in the pass before.

        After the last one there it is the first one, for the next token; for the next chunk other tiles may be
        chosen. Padding hides other tokens then.
        """
        now, before = self._order
        position = len(now)
        now.append(weakref.ref(layer_kv))
        if position >= len(before) or before[position]() is not layer_kv:
            return ()
        cycle = itertools.chain(range(position + 1, len(before)), range(position + 1))
        here = self._device_of(layer_kv)
        at = next(at for at in cycle if (one := before[at]()) is not None and self._device_of(one) == here)
        coming, is_last = before[at](), at <= position
        if coming is None or coming.rows != layer_kv.rows:
            return ()
        if is_last and (token_ranges is not None or (self.disk is None and self._queries[1] > FEW_QUERY_TOKENS)):
            return ()
        plan = self.devices[self._device_of(layer_kv)].plan
        assert plan is not None
        heads = slice(0, min(plan.heads_per_group, coming.heads))
        seen = first_of(token_ranges, coming.tokens, coming.rows) if token_ranges is not None else None
        tiles = tiles_of(coming, heads, plan, seen)
        if self.disk is not None:  # the rest is in memory: only reading is begun ahead
            return (tile for tile in tiles if any(isinstance(piece, DiskSlice) for piece in tile.pieces))
        return (tile for tile in tiles if not tile.near)

    def settle(self) -> None:
        """Wait until all that was written back is in host memory."""
        for kv in self.devices.values():
            kv.write.settle()

    def segment_tier(self, layer_kv: LayerKV) -> HostTier | None:
        """Memory that segments of a file must be copied to; None where they can be read where they are mapped."""
        kv = self.devices[self._device_of(layer_kv)]
        is_needed = kv.transport == "cuda" or (self.disk is not None and kv.transport != "in_place")
        return kv.tier if is_needed else None

    @property
    def on_full(self) -> Callable[[Sequence[Segment]], None] | None:
        """What wants to know of segments that will not be written to any more."""
        return self.disk.full if self.disk is not None else None

    def abandon(self) -> None:
        """After an error in the middle of a forward pass: nothing is under way any more."""
        self.awaiting = None
        for kv in self.devices.values():
            kv.abandon()

    def forget_expected(self) -> None:
        """Nothing that was begun ahead is held any longer."""
        for kv in self.devices.values():
            if kv.ring is not None:
                kv.ring.forget()

    def _device_of(self, what: LayerKV | torch.Tensor) -> torch.device:
        """The device that a store's layer, or its K, lies on."""
        return what.device

    def _device_kv(self, k: torch.Tensor, v: torch.Tensor) -> DeviceKV:
        """What the device of k and v has; made when its first layer comes."""
        device = self._device_of(k)
        options = self.options
        if device in self.devices:
            return self.devices[device]
        rates, transport = options.rates, self._transport_to(device)
        if transport == "cuda":
            machine, name = this_machine(device), str(k.dtype).removeprefix("torch.")
            if rates is None and name in machine.flops_per_s:
                rates = machine.tile_rates(name)
        kv = DeviceKV(
            device,
            transport,
            layers=self.layers_on.get(device, self.layers),
            all_layers=self.layers,
            budget=options.device_kv_budget_bytes,
            streaming_budget=options.streaming_budget_bytes,
            expected_tokens=options.expected_tokens,
            rates=rates,
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
        options = self.options
        if options.host_kv_budget_bytes is None or options.disk_tier is None:
            return
        if self.disk is None:
            token_bytes = self.layers * k.shape[0] * k.shape[1] * (k.shape[3] + v.shape[3]) * k.element_size()
            reserve = options.expected_tokens * token_bytes  # all of it: read buffers take a part of the budget
            self.disk = DiskTier(
                Path(options.disk_tier), options.host_kv_budget_bytes, reserve, self.counter, self._write_back_done
            )
        kv.disk = self.disk
        kv.tier.make_room = self.disk.make_room

    def _write_back_done(self) -> Callable[[], None]:
        """What waits, on any thread, until all that was written back so far is in host memory."""
        waits = [kv.streams.write_back_done() for kv in self.devices.values() if kv.streams is not None]

        def write_done() -> None:
            for wait in waits:
                wait()

        return write_done
