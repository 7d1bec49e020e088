"""The Plan: what fits, what it costs and why, before anything is loaded.

Candidates are chunks and streaming budgets from fixed lists; what memory is left keeps KV heads resident. The plan
is the fastest candidate that fits, so more memory can only help. Planning takes milliseconds: as a context grows,
plan again; any plan gives the same tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from headinfer.plan.fit import chunks, fitting_footprint, refusal, resident, streaming_budgets, tiles
from headinfer.plan.footprint import Footprint
from headinfer.plan.memory import format_bytes
from headinfer.plan.request import Request
from headinfer.plan.roofline import Schedule, Seconds, decode_seconds, prefill_seconds
from headinfer.plan.tiles import RING_SLOTS, TilePlan
from headinfer.plan.units import format_seconds, format_tokens

__all__ = ["Plan", "candidates", "make_plan"]


@dataclass(frozen=True)
class Plan:
    """One way to do a job, with its predicted bytes and seconds.

    prefill, decode: the tiles (for the layer with the most KV). resident_heads: for each layer of the model, KV
    heads that also stay on the device. kernel: the attention kernel, where one is fixed.
    """

    request: Request
    chunk_tokens: int
    prefill: TilePlan
    decode: TilePlan
    resident_heads: tuple[int, ...]
    footprint: Footprint
    prefill_cost: Seconds
    decode_cost: Seconds
    kernel: str | None = None

    @property
    def heads_per_group(self) -> int:
        """KV heads streamed together in prefill."""
        return self.prefill.heads_per_group

    @property
    def tile_tokens(self) -> int:
        """Tokens streamed together in prefill."""
        return self.prefill.tile_tokens

    @property
    def streaming_bytes(self) -> int:
        """Device bytes of ring, tails and write-back: the engine's device_kv_budget."""
        return self.footprint.device_kv_budget_bytes - self.footprint.resident_bytes

    @property
    def total_s(self) -> float:
        """Seconds for the context and the new tokens."""
        return self.prefill_cost.total_s + self.request.new_tokens * self.decode_cost.total_s

    def explain(self) -> list[str]:
        """Why the plan is as it is: sentences for people."""
        request, memory = self.request, self.footprint
        resident, heads = sum(self.resident_heads), sum(layer.kv_heads for layer in request.layers)
        token_bytes = request.shape.kv_bytes_per_token(request.element_bytes) * request.rows
        lines = [
            f"KV: {format_bytes(token_bytes)} a token, {format_bytes(memory.host_kv_bytes + memory.disk_kv_bytes)} for "
            f"{format_tokens(request.context_tokens)} tokens"
            + (f", {format_bytes(memory.disk_kv_bytes)} of it on disk." if memory.disk_kv_bytes else ".")
        ]
        if request.hardware.is_host:
            lines.append("The host is the compute device: KV is read where it lies, nothing is copied.")
        elif resident == heads:
            lines.append(f"All of it fits the device ({format_bytes(memory.resident_bytes)}): nothing is streamed.")
        else:
            lines.append(
                f"It streams from host RAM through {RING_SLOTS} slots, {format_bytes(memory.ring_bytes)} in all, "
                "at any context."
            )
            if resident:
                lines.append(
                    f"{resident} of {heads} KV heads ({format_bytes(memory.resident_bytes)}) stay on the device, which "
                    f"saves {resident / heads:.0%} of the transfer."
                )
            lines.append(f"Tiles of {_tile_text(self.prefill)}; of {_tile_text(self.decode)}.")
        lines.append(
            f"Chunks of {self.chunk_tokens:,} tokens take {format_bytes(memory.activation_bytes)} of activations. "
            f"Prefill takes {format_seconds(self.prefill_cost.total_s)}, {_bound_text(self.prefill_cost)}."
        )
        lines.append(f"A new token takes {format_seconds(self.decode_cost.total_s)}, {_bound_text(self.decode_cost)}.")
        if resident and not request.hardware.is_host:
            lines.append("Resident KV is a prediction only: this version streams all but the newest tokens.")
        if memory.disk_kv_bytes:
            lines.append("KV on disk needs --host-kv-budget and --disk-tier: each token reads all of it once.")
        return lines

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the choices, bytes and seconds."""
        return {
            "context_tokens": self.request.context_tokens,
            "hardware": self.request.hardware.name,
            "dtype": self.request.dtype,
            "chunk_tokens": self.chunk_tokens,
            "prefill": dataclasses.asdict(self.prefill),
            "decode": dataclasses.asdict(self.decode),
            "resident_heads": list(self.resident_heads),
            "kernel": self.kernel,
            "device_kv_budget_bytes": self.footprint.device_kv_budget_bytes,
            "device_bytes": self.footprint.device_bytes,
            "host_bytes": self.footprint.host_bytes,
            "footprint": dataclasses.asdict(self.footprint),
            "prefill_s": self.prefill_cost.total_s,
            "prefill_cost": dataclasses.asdict(self.prefill_cost) | {"bound": self.prefill_cost.bound},
            "decode_s_per_token": self.decode_cost.total_s,
            "decode_cost": dataclasses.asdict(self.decode_cost) | {"bound": self.decode_cost.bound},
            "why": self.explain(),
        }


def make_plan(request: Request) -> Plan:
    """The fastest plan that fits. Raises CapacityError with what would fit, UsageError for options out of range."""
    best = min(candidates(request), key=lambda plan: plan.total_s, default=None)
    if best is None:
        raise refusal(request)
    return best


def candidates(request: Request) -> Iterator[Plan]:
    """Every plan that fits, small chunks and budgets first."""
    for chunk_tokens in chunks(request):
        for streaming_bytes in streaming_budgets(request):
            bare = fitting_footprint(request, chunk_tokens, streaming_bytes)
            if bare is not None:
                heads = resident(request, chunk_tokens, streaming_bytes, bare)
                if streaming_bytes is not None and heads == [layer.kv_heads for layer in request.layers]:
                    continue  # the candidate without a ring does the same in less memory
                plan = _plan(request, chunk_tokens, streaming_bytes, heads)
                if plan is not None:
                    yield plan


def _plan(request: Request, chunk_tokens: int, streaming_bytes: int | None, resident_heads: list[int]) -> Plan | None:
    """The plan of one candidate; None where it does not fit."""
    footprint = fitting_footprint(request, chunk_tokens, streaming_bytes, resident_heads)
    if footprint is None:
        return None
    prefill, decode = (tiles(request, footprint, query_tokens) for query_tokens in (chunk_tokens, 1))
    streams, layers = footprint.ring_bytes > 0, request.layers
    if not streams and not request.hardware.is_host:
        prefill = decode = dataclasses.replace(prefill, why="all KV is resident: one call per layer")
    shares = tuple(1 - n / layer.kv_heads for n, layer in zip(resident_heads, layers, strict=True))
    far = footprint.host_kv_bytes + footprint.disk_kv_bytes
    schedule = Schedule(
        chunk_tokens=chunk_tokens,
        streamed_share=shares if streams else (),
        prefill_tile=(prefill.heads_per_group, prefill.tile_tokens),
        decode_tile=(decode.heads_per_group, decode.tile_tokens),
        merges=streams,
        writes_back=streams,
        disk_share=footprint.disk_kv_bytes / far if far else 0.0,
        prefetches_next_layer=request.prefetches_next_layer,
    )
    more = (schedule, request.dtype, request.bits, request.rows)
    by_layer = dict(zip(request.shape.offloaded_layers, resident_heads, strict=True))
    return Plan(
        request=request,
        chunk_tokens=chunk_tokens,
        prefill=prefill,
        decode=decode,
        resident_heads=tuple(by_layer.get(index, 0) for index in range(len(request.shape.layers))),
        footprint=footprint,
        prefill_cost=prefill_seconds(request.shape, request.hardware, request.context_tokens, *more),
        decode_cost=decode_seconds(request.shape, request.hardware, request.context_tokens, *more),
    )


def _tile_text(tile: TilePlan) -> str:
    heads = f"{tile.heads_per_group} KV head" + ("s" if tile.heads_per_group > 1 else "")
    return f"{heads} x {tile.tile_tokens:,} tokens ({tile.why})"


def _bound_text(cost: Seconds) -> str:
    hidden_s = max(cost.transfer_s - cost.exposed_transfer_s, 0.0)
    text = f"bound by {cost.bound}"
    if cost.transfer_s > 0:
        text += f" ({format_seconds(hidden_s)} of {format_seconds(cost.transfer_s)} of transfer hidden)"
    return text
