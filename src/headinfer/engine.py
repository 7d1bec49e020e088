"""What the layers of one cache share: host tier, ring, write-back, and the plan of the current forward pass."""

from __future__ import annotations

import dataclasses
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from headinfer.attention.backends import preferences
from headinfer.errors import CapacityError, UnsupportedError, UsageError
from headinfer.kv.disk import FarPiece
from headinfer.kv.disk_tier import DiskTier, ReadAhead, read_slot_bytes
from headinfer.kv.head_store import TAIL_UNIT_TOKENS, HeadStore, Runs, first_of
from headinfer.kv.ledger import Ledger
from headinfer.kv.segments import Segment
from headinfer.kv.tiers import HostTier
from headinfer.kv.transfer import InPlace, Ring, Staging, StagingWriter, Writer, make_ring, write_in_place
from headinfer.machine import this_machine
from headinfer.model_shape import ModelShape
from headinfer.plan.tiles import DEFAULT_BUDGET_BYTES, RING_SLOTS, TilePlan, TileRates, choose_tiles, ring_slot_bytes
from headinfer.streaming import Tile, attend_streaming, tiles_of

__all__ = ["Engine", "Options"]

_WRITE_BACK_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True)
class Options:
    """What a user can fix; None leaves the choice to the engine.

    device_kv_budget: bytes of KV on the device, ring + tails + write-back buffers, at any context length.
    heads_per_group, tile_tokens: the tile. backend: the attention kernels to try first.
    staging: "auto" reads segments in place on the CPU and streams through a ring on CUDA; "early" and "late"
    force the ring's CPU twins (see kv/transfer.py). expected_tokens: the final length, where it is known. rates: what
    tiles are chosen for. host_kv_budget, disk_tier: bytes of KV in host memory, and the folder where what exceeds them
    goes; both or none. The same options give the same tiles, merges and kernels, so the same bits on one machine.
    """

    device_kv_budget: int | None = None
    heads_per_group: int | None = None
    tile_tokens: int | None = None
    backend: str | None = None
    staging: Literal["auto", "none", "early", "late"] = "auto"
    expected_tokens: int = 0
    rates: TileRates | None = None
    host_kv_budget: int | None = None
    disk_tier: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.rates, dict):  # from JSON
            object.__setattr__(self, "rates", TileRates(**self.rates))
        for name in ("device_kv_budget", "heads_per_group", "tile_tokens", "host_kv_budget"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}: it must be a positive number")
        if self.expected_tokens < 0:
            raise UsageError(f"expected_tokens is {self.expected_tokens}: it must not be negative")
        if (self.host_kv_budget is None) != (self.disk_tier is None):
            raise UsageError(
                "host_kv_budget and disk_tier go together: so much KV in host memory, the rest in a folder on a disk"
            )
        preferences(self.backend)  # raises where a name is unknown
        if self.staging not in ("auto", "none", "early", "late"):
            raise UsageError(f"staging is {self.staging!r}: it must be auto, none, early or late")

    def arithmetic(self) -> dict[str, Any]:
        """What a session keeps, for JSON: all but where KV lies, which is another matter on another day."""
        fields = dataclasses.asdict(self)
        return {name: value for name, value in fields.items() if name not in ("host_kv_budget", "disk_tier")}


class Engine:
    """Creates the stores of a cache's layers and runs their attention."""

    def __init__(self, options: Options, layers: int) -> None:
        """layers: how many stores there will be; their tails are part of the budget from the start."""
        self.options, self.layers = options, layers
        self.ledger = Ledger()
        self.plan: TilePlan | None = None
        self.awaiting: object | None = None  # what was updated and whose attention has not run yet
        self.backends_used: set[str] = set()
        self.row_copies = 1  # rows that each row will become before long, and that need tails: hf/copies.py
        self.attentions = 0  # since the start of the forward pass
        self._tier: HostTier | None = None
        self._ring: Ring | None = None
        self._write: Writer = write_in_place
        self._rates = options.rates
        self._device: torch.device | None = None
        self._staging: Staging = "none"
        self.disk: DiskTier | None = None
        self._order: tuple[list[weakref.ref[HeadStore]], list[weakref.ref[HeadStore]]] = ([], [])
        self._stream: torch.cuda.Stream | None = None

    def check_budget(self, shape: ModelShape, element_bytes: int, chunk_tokens: int, total_tokens: int) -> None:
        """Raise, before anything is loaded, where the options cannot serve one row of this shape.

        The same choice of tiles as in a forward pass, for the last chunk of a prefill and for a decode step.
        """
        layer = next(shape.layers[index] for index in shape.offloaded_layers)
        tails = (self.layers + 1) * 2 * TAIL_UNIT_TOKENS * layer.kv_bytes_per_token(element_bytes)
        budget = self.options.device_kv_budget or DEFAULT_BUDGET_BYTES
        slot_bytes = ring_slot_bytes(budget, tails + 2 * _write_back_bytes(budget))
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

    def new_store(self, k: torch.Tensor, v: torch.Tensor) -> HeadStore:
        """An empty store with the shape, dtype and device of k [B, Hkv, T, Dk] and v [B, Hkv, T, Dv]."""
        if self._device is None:
            self._open(k, v)
        if k.device != self._device:
            raise UnsupportedError(
                f"the model's layers lie on {self._device} and {k.device}: this version serves models on one device, "
                "so load it with device_map set to that device"
            )
        assert self._tier is not None
        return HeadStore(
            k,
            v,
            tier=self._tier,
            ledger=self.ledger,
            write=self._write,
            expected_tokens=self.options.expected_tokens,
            on_full=self.on_full,
        )

    def begin(self, store: HeadStore, query_heads: int, query_tokens: int) -> None:
        """Before a forward pass: fit the ring to the budget and choose the tile for this pass."""
        head_token_bytes = (store.key_dim + store.value_dim) * store.dtype.itemsize
        slot_bytes = self._ring_slot_bytes(store) if self._staging != "none" else None
        if self._ring is None or (slot_bytes is not None and self._ring.slot_bytes != slot_bytes):
            self._make_ring(slot_bytes)  # the first, or the batch has changed, or there is a fork
        if self.disk is not None:
            slot_bytes = min(slot_bytes or sys.maxsize, read_slot_bytes(self.disk.host_budget))
        self._order = ([], self._order[0])
        self.plan = choose_tiles(
            kv_heads=store.heads,
            group_queries=query_heads // store.heads,
            head_token_bytes=head_token_bytes,
            rows=store.rows,
            query_tokens=query_tokens,
            past_tokens=store.tokens,
            slot_bytes=slot_bytes,
            element_bytes=store.dtype.itemsize,
            rates=self._rates,
            heads_per_group=self.options.heads_per_group,
            tile_tokens=self.options.tile_tokens,
        )

    def _ring_slot_bytes(self, store: HeadStore) -> int:
        budget = self.options.device_kv_budget or DEFAULT_BUDGET_BYTES
        # One more than there are layers, since reordering rows copies a tail; and forks have tails too.
        tails = max(
            (self.layers + 1) * store.tail_bytes * self.row_copies,
            self.ledger.device_bytes["tail"] + store.tail_bytes,
        )
        return ring_slot_bytes(budget, tails + self.ledger.device_bytes["staging"])

    def _make_ring(self, slot_bytes: int | None) -> None:
        if self._ring is not None:
            self._ring.close()
        assert self._device is not None
        assert self._tier is not None
        if slot_bytes is None:
            self._ring = InPlace()
        else:
            self._ring = make_ring(self._staging, RING_SLOTS, slot_bytes, self._device, self.ledger, self._stream)
        if self.disk is not None:
            self._ring = ReadAhead(self._ring, self._tier, read_slot_bytes(self.disk.host_budget))

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        store: HeadStore,
        *,
        scale: float,
        softcap: float | None,
        sinks: torch.Tensor | None,
        runs: Sequence[Runs] | None,
        past_tokens: int | None = None,
    ) -> torch.Tensor:
        """Attention of a chunk on a store and on itself; see `attend_streaming`."""
        self.attentions += 1
        assert self.plan is not None
        held = sum(self.ledger.device_bytes.values())
        budget = self.options.device_kv_budget or DEFAULT_BUDGET_BYTES
        if self._staging != "none" and held > budget:
            raise CapacityError(
                f"the KV cache holds {held} device bytes, over its budget of {budget}: raise the budget"
            )
        return attend_streaming(
            q,
            k,
            v,
            store,
            plan=self.plan,
            ring=self._ring,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            runs=runs,
            past_tokens=past_tokens,
            backend=self.options.backend,
            used=self.backends_used,
            following=self._following(store, runs),
        )

    def _following(self, store: HeadStore, runs: Sequence[Runs] | None) -> Iterable[Tile]:
        """The first tiles on disk of the store that was attended to after this one in the pass before."""
        now, before = self._order
        place = len(now)
        now.append(weakref.ref(store))
        if self.disk is None or place >= len(before) or before[place]() is not store:
            return ()
        coming = before[(place + 1) % len(before)]()
        if coming is None or coming.rows != store.rows or (coming is before[0]() and runs is not None):
            return ()
        assert self.plan is not None
        heads = slice(0, min(self.plan.heads_per_group, coming.heads))
        seen = first_of(runs, coming.tokens, coming.rows) if runs is not None else None
        tiles = tiles_of(coming, heads, self.plan.tile_tokens, seen)
        return (tile for tile in tiles if any(isinstance(piece, FarPiece) for piece in tile.pieces))

    def settle(self) -> None:
        """Wait until all that was written back is in host memory."""
        if self._stream is not None:
            self._stream.synchronize()

    @property
    def segment_tier(self) -> HostTier | None:
        """Memory that segments of a file must be copied to; None where they can be read where they are mapped."""
        is_needed = self._staging == "cuda" or (self.disk is not None and self._staging != "none")
        return self._tier if is_needed else None

    @property
    def on_full(self) -> Callable[[Sequence[Segment]], None] | None:
        """What wants to know of segments that will not be written to any more."""
        return self.disk.full if self.disk is not None else None

    def abandon(self) -> None:
        """After an error in the middle of a forward pass: nothing is under way any more."""
        self.awaiting = None
        if self._ring is not None:
            self._ring.abandon()

    def _open(self, k: torch.Tensor, v: torch.Tensor) -> None:
        device, dtype = k.device, k.dtype
        self._device = device
        if device.type == "cuda":
            self._staging = "cuda"
            self._stream = torch.cuda.Stream(device)
            machine, name = this_machine(device), str(dtype).removeprefix("torch.")
            if self._rates is None and name in machine.flops_per_s:
                self._rates = machine.tile_rates(name)
        elif device.type != "cpu":
            raise UnsupportedError(f"the model is on {device}: this version serves cpu and cuda devices")
        elif self.options.staging != "auto":
            self._staging = self.options.staging
        self._tier = HostTier(self.ledger, pin=device.type == "cuda")
        if self._staging != "none":
            budget = self.options.device_kv_budget or DEFAULT_BUDGET_BYTES
            self._write = StagingWriter(_write_back_bytes(budget), device, self.ledger, self._stream)
        if self.options.host_kv_budget is not None and self.options.disk_tier is not None:
            token_bytes = self.layers * k.shape[0] * k.shape[1] * (k.shape[3] + v.shape[3]) * dtype.itemsize
            reserve = self.options.expected_tokens * token_bytes  # all of it: read buffers take a part of the budget
            folder, budget = Path(self.options.disk_tier), self.options.host_kv_budget
            self.disk = DiskTier(folder, budget, reserve, self.ledger, self._written_back)
            self._tier.make_room = self.disk.make_room

    def _written_back(self) -> Callable[[], None]:
        """What waits until all that was written back so far is in host memory."""
        if self._stream is None:
            return lambda: None
        event = torch.cuda.Event()
        event.record(self._stream)
        return event.synchronize


def _write_back_bytes(budget: int) -> int:
    """Bytes of one of the two write-back buffers."""
    return min(_WRITE_BACK_BYTES, budget // 16 // 256 * 256)
