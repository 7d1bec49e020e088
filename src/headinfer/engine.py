"""What the layers of one cache share: host tier, ring, write-back, and the plan of the current forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from headinfer.attention.backends import backend_names
from headinfer.errors import CapacityError, UnsupportedError, UsageError
from headinfer.kv.head_store import TAIL_UNIT_TOKENS, HeadStore, Runs
from headinfer.kv.ledger import Ledger
from headinfer.kv.tiers import HostTier
from headinfer.kv.transfer import Ring, Staging, StagingWriter, Writer, make_ring, write_in_place
from headinfer.machine import this_machine
from headinfer.model_shape import ModelShape
from headinfer.plan.tiles import DEFAULT_BUDGET_BYTES, RING_SLOTS, TilePlan, TileRates, choose_tiles, ring_slot_bytes
from headinfer.streaming import attend_streaming

__all__ = ["Engine", "Options"]

_WRITE_BACK_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True)
class Options:
    """What a user can fix; None leaves the choice to the engine.

    device_kv_budget: bytes of KV on the device, ring + tails + write-back buffers, at any context length.
    heads_per_group, tile_tokens: the tile. backend: the attention kernel to try first.
    staging: "auto" reads segments in place on the CPU and streams through a ring on CUDA; "early" and "late"
    force the ring's CPU twins (see kv/transfer.py). expected_tokens: the final length, where it is known. rates: what
    tiles are chosen for. The same options give the same tiles, merges and kernels, so the same bits on one machine.
    """

    device_kv_budget: int | None = None
    heads_per_group: int | None = None
    tile_tokens: int | None = None
    backend: str | None = None
    staging: Literal["auto", "none", "early", "late"] = "auto"
    expected_tokens: int = 0
    rates: TileRates | None = None

    def __post_init__(self) -> None:
        if isinstance(self.rates, dict):  # from JSON
            object.__setattr__(self, "rates", TileRates(**self.rates))
        for name in ("device_kv_budget", "heads_per_group", "tile_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}: it must be a positive number")
        if self.expected_tokens < 0:
            raise UsageError(f"expected_tokens is {self.expected_tokens}: it must not be negative")
        if self.backend is not None and self.backend not in backend_names():
            raise UsageError(f"no attention backend {self.backend!r}: choose one of {', '.join(backend_names())}")
        if self.staging not in ("auto", "none", "early", "late"):
            raise UsageError(f"staging is {self.staging!r}: it must be auto, none, early or late")


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
            self._open(k.device, k.dtype)
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
        )

    def begin(self, store: HeadStore, query_heads: int, query_tokens: int) -> None:
        """Before a forward pass: fit the ring to the budget and choose the tile for this pass."""
        head_token_bytes = (store.key_dim + store.value_dim) * store.dtype.itemsize
        slot_bytes = None
        if self._staging != "none":
            budget = self.options.device_kv_budget or DEFAULT_BUDGET_BYTES
            # One more than there are layers, since reordering rows copies a tail; and forks have tails too.
            tails = max(
                (self.layers + 1) * store.tail_bytes * self.row_copies,
                self.ledger.device_bytes["tail"] + store.tail_bytes,
            )
            fixed = tails + self.ledger.device_bytes["staging"]
            slot_bytes = ring_slot_bytes(budget, fixed)
            if self._ring is None or self._ring.slot_bytes != slot_bytes:  # the batch has changed, or a fork
                if self._ring is not None:
                    self._ring.close()
                assert self._device is not None
                self._ring = make_ring(self._staging, RING_SLOTS, slot_bytes, self._device, self.ledger, self._stream)
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
        if self._ring is not None and held > budget:
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
        )

    def abandon(self) -> None:
        """After an error in the middle of a forward pass: nothing is under way any more."""
        self.awaiting = None
        if self._ring is not None:
            self._ring.abandon()

    def _open(self, device: torch.device, dtype: torch.dtype) -> None:
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


def _write_back_bytes(budget: int) -> int:
    """Bytes of one of the two write-back buffers."""
    return min(_WRITE_BACK_BYTES, budget // 16 // 256 * 256)
