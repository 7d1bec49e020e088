"""Plans a job before anything is loaded: the fastest way that fits, what it costs, and why it was chosen.

Candidates are chunks and streaming budgets from fixed lists. Each keeps as many tokens resident as the rest of the
memory holds. The plan is the fastest candidate that fits, so more memory never makes a plan slower. The share of the
host's CPU in decode is chosen for this candidate. Planning takes milliseconds. Any plan gives the same tokens, so a job
can be planned again when its context grows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from headinfer.plan.cpu_share import share_at_rows
from headinfer.plan.fit import (
    chunks,
    fitting_footprint,
    refusal,
    resident,
    resident_room_bytes,
    stored_again_bytes,
    streaming_budgets,
    tiles,
)
from headinfer.plan.footprint import Footprint, host_kv_tokens
from headinfer.plan.guesses import MOST_GUESSES, guesses_as_dict, guesses_sentences
from headinfer.plan.hardware import Hardware
from headinfer.plan.model_shape import ModelShape
from headinfer.plan.operating_points import hiding_chunk_tokens
from headinfer.plan.request import Request
from headinfer.plan.roofline import (
    Schedule,
    decode_seconds,
    fastest_share,
    prefill_seconds,
)
from headinfer.plan.seconds import Seconds
from headinfer.plan.tiles import RING_SLOTS, TilePlan
from headinfer.utils.head_pattern import HeadPattern
from headinfer.utils.units import format_bytes, format_seconds, format_tokens

__all__ = ["Plan", "candidates", "make_plan", "sparse_as_dict"]


@dataclass(frozen=True)
class Plan:
    """One way to do a job, with its predicted bytes and seconds.

    Attributes:
        request: the job.
        chunk_tokens: tokens of a prefill chunk.
        prefill: the tile of prefill, for the layer with the most KV.
        decode: the tile of decode, for the layer with the most KV.
        resident_tokens: for each layer of the model, the first tokens of a row that stay on the device; 0 for layers
            that are not offloaded.
        streaming_budget_bytes: bytes of ring, tails and buffers; None if KV is read in place.
        footprint: the bytes of each component.
        prefill_cost: seconds of prefill.
        decode_cost: seconds of a decode step, with cpu_share.
        schedule: what is copied, and when.
        kernel: the attention kernel, if one is fixed.
    """

    request: Request
    chunk_tokens: int
    prefill: TilePlan
    decode: TilePlan
    resident_tokens: tuple[int, ...]
    streaming_budget_bytes: int | None
    footprint: Footprint
    prefill_cost: Seconds
    decode_cost: Seconds
    schedule: Schedule
    kernel: str | None = None

    @property
    def cpu_share(self) -> float:
        """In decode, the share of the streamed tokens that the host's CPU attends to; 0 if the link brings all."""
        return self.schedule.cpu_share

    @cached_property
    def with_cpu_share(self) -> float:
        """The share with which decode is predicted to be fastest. In a run it is used if its rates were measured."""
        if self.cpu_share or self.request.cpu_share is not None:
            return self.cpu_share
        return fastest_share(*self._of_decode(self.schedule))

    def decode_cost_with(self, cpu_share: float) -> Seconds:
        """Predict the seconds of one new token with another share of the CPU, and the same tiles."""
        if cpu_share == self.cpu_share:
            return self.decode_cost
        return decode_seconds(*self._of_decode(dataclasses.replace(self.schedule, cpu_share=cpu_share)))

    @cached_property
    def guess_costs(self) -> tuple[float, ...]:
        """The seconds of a decode step that verifies 0, 1, 2 ... guesses, in units of those without guesses."""
        rows = self.query_rows
        seconds = []
        for tokens in range(1, MOST_GUESSES + 2):
            share = share_at_rows(self.cpu_share, rows, rows * tokens)
            schedule = dataclasses.replace(self.schedule, decode_tokens=tokens, cpu_share=share)
            seconds.append(decode_seconds(*self._of_decode(schedule)).total_s)
        return tuple(one / seconds[0] for one in seconds)

    @property
    def can_guess(self) -> bool:
        """Whether decode can verify guesses: in one row, and without linear-attention layers."""
        return self.request.rows == 1 and all(layer.kind != "linear_attention" for layer in self.request.shape.layers)

    def _of_decode(self, schedule: Schedule) -> tuple[ModelShape, Hardware, int, Schedule, str, int, int]:
        request = self.request
        dtype = request.dtype
        return (request.shape, request.hardware, request.context_tokens, schedule, dtype, request.bits, request.rows)

    @property
    def heads_per_group(self) -> int:
        """KV heads streamed together in prefill."""
        return self.prefill.heads_per_group

    @property
    def tile_tokens(self) -> int:
        """Tokens streamed together in prefill."""
        return self.prefill.tile_tokens

    @property
    def device_kv_budget_bytes(self) -> int:
        """The device budget of the engine, with which each layer keeps its resident_tokens and no more."""
        if self.streaming_budget_bytes is None:
            return self.footprint.device_kv_budget_bytes
        kept = tuple(self.resident_tokens[index] for index in self.request.shape.offloaded_layers)
        return self.streaming_budget_bytes + resident_room_bytes(self.request, kept)

    @property
    def is_all_resident(self) -> bool:
        """Whether all host tokens are on the device too, so that nothing is streamed and there is no ring."""
        return self.streaming_budget_bytes is not None and not self.footprint.ring_bytes

    @property
    def total_s(self) -> float:
        """Seconds of prefill and of all new tokens."""
        return self.prefill_cost.total_s + self.request.new_tokens * self.decode_cost.total_s

    def explain(self) -> list[str]:
        """Return sentences that say what the plan does, and why."""
        request = self.request
        memory = self.footprint
        kept_bytes = memory.resident_bytes
        kv_bytes = memory.host_kv_bytes + memory.disk_kv_bytes
        token_bytes = request.shape.stored_bytes_per_token(request.element_bytes, request.kv_bits) * request.rows
        lines = [
            f"KV: {format_bytes(token_bytes)} a token, {format_bytes(kv_bytes)} for "
            f"{format_tokens(request.context_tokens)} tokens"
            + (f", {format_bytes(memory.disk_kv_bytes)} of it on disk." if memory.disk_kv_bytes else ".")
        ]
        lines += self._approximate_sentences()
        if request.hardware.is_host:
            lines.append("The host is the compute device: KV is read in place, nothing is copied.")
        elif self.is_all_resident:
            lines.append("All of it stays on the device: nothing is streamed.")
        else:
            lines.append(
                f"It streams from host RAM through {RING_SLOTS} slots, {format_bytes(memory.ring_bytes)} in all, "
                "at any context."
            )
            if kept_bytes:
                lines.append(
                    f"The first {self.resident_text} tokens ({format_bytes(kept_bytes)}) stay on the device, which "
                    f"saves {stored_again_bytes(request, memory) / kv_bytes:.0%} of a new token's transfer."
                )
            lines.append(f"Tiles of {_tile_text(self.prefill)}; of {_tile_text(self.decode)}.")
            if not memory.disk_kv_bytes:
                machine = request.hardware
                dtype = request.dtype
                hiding = max(hiding_chunk_tokens(layer, machine, dtype, request.kv_bits) for layer in request.layers)
                lines.append(f"Chunks of {hiding:,} tokens or more hide the transfer behind attention.")
        lines.append(
            f"Chunks of {self.chunk_tokens:,} tokens take {format_bytes(memory.activation_bytes)} of activations. "
            f"Prefill takes {format_seconds(self.prefill_cost.total_s)}, {_bound_text(self.prefill_cost)}."
        )
        lines.append(f"A new token takes {format_seconds(self.decode_cost.total_s)}, {_bound_text(self.decode_cost)}.")
        lines += self._cpu_sentences()
        if self.can_guess:
            lines += guesses_sentences(self.guess_costs)
        if memory.disk_kv_bytes:
            lines.append("KV on disk needs --host-kv-budget and --disk-tier: each token reads all of it once.")
        return lines

    def _approximate_sentences(self) -> list[str]:
        """Return what is approximate about the job; nothing if it is exact."""
        request = self.request
        pattern = request.sparse_heads
        lines = []
        if request.kv_bits:
            lines.append(
                f"KV is approximate: it is stored in {request.kv_dtype}, without what is on the device. What follows "
                "is not what the model computes exactly."
            )
        if pattern is not None:
            streaming = sum(layer.streaming_heads for layer in request.shape.layers)
            lines.append(
                f"Attention is approximate: {streaming:,} of {pattern.heads:,} KV heads are sparse. They see the first "
                f"{pattern.sink_tokens:,} and the newest {pattern.recent_tokens:,} tokens only, which stay on the "
                f"device and take {format_bytes(self.footprint.window_bytes)} there. What follows is not what the "
                "model computes exactly."
            )
            if pattern.info.get("assumed"):
                lines.append(
                    "How many heads are sparse is assumed, evenly over the layers. headinfer heads finds out which "
                    "heads of a model can be, and what it costs."
                )
        return lines

    def _cpu_sentences(self) -> list[str]:
        """Return a sentence about the share of the CPU, if there is one."""
        share = self.with_cpu_share
        if not share:
            return []
        with_s = format_seconds(self.decode_cost_with(share).total_s)
        without_s = format_seconds(self.decode_cost_with(0.0).total_s)
        source = "" if self.cpu_rates_are_measured else ", by a model of DRAM"
        if self.cpu_share:
            return [
                f"The host's CPU attends to {share:.0%} of what would stream, while the link brings the rest: "
                f"{with_s} a token with it and {without_s} without it{source}."
            ]
        return [
            f"If the host's CPU attended to {share:.0%} of what streams, a new token would take {with_s} in place of "
            f"{without_s}{source}: headinfer probe measures it, and runs use it then."
        ]

    @property
    def cpu_rates_are_measured(self) -> bool:
        """Whether a probe has measured the rates of with_cpu_share. Otherwise they are those of a model of DRAM."""
        return bool(self.request.hardware.cpu_beside_link_bytes_per_s)

    @property
    def query_rows(self) -> int:
        """Query rows per KV head in a decode step, in the layer with the most KV."""
        layer = max(self.request.layers, key=lambda layer: layer.kv_bytes_per_token(1))
        return layer.query_heads // layer.kv_heads * self.request.decode_tokens

    @property
    def resident_text(self) -> str:
        """The number of resident tokens of the offloaded layers, for people."""
        kept = {min(self.resident_tokens[i], self.request.context_tokens) for i in self.request.shape.offloaded_layers}
        return " to ".join(f"{tokens:,}" for tokens in sorted({min(kept), max(kept)}))

    def as_dict(self) -> dict[str, Any]:
        """Return the choices, bytes and seconds, for JSON."""
        return {
            "context_tokens": self.request.context_tokens,
            "hardware": self.request.hardware.name,
            "dtype": self.request.dtype,
            "kv_dtype": self.request.kv_dtype,
            "sparse_heads": sparse_as_dict(self.request.sparse_heads),
            "approximate": self.request.is_approximate,
            "chunk_tokens": self.chunk_tokens,
            "prefill": dataclasses.asdict(self.prefill),
            "decode": dataclasses.asdict(self.decode),
            "resident_tokens": list(self.resident_tokens),
            "kernel": self.kernel,
            "device_kv_budget_bytes": self.device_kv_budget_bytes,
            "streaming_budget_bytes": self.streaming_budget_bytes,
            "device_bytes": self.footprint.device_bytes,
            "host_bytes": self.footprint.host_bytes,
            "footprint": dataclasses.asdict(self.footprint),
            "prefill_s": self.prefill_cost.total_s,
            "prefill_cost": dataclasses.asdict(self.prefill_cost) | {"bound": self.prefill_cost.bound},
            "decode_s_per_token": self.decode_cost.total_s,
            "decode_cost": dataclasses.asdict(self.decode_cost) | {"bound": self.decode_cost.bound},
            **self.cpu_as_dict(),
            "guesses": guesses_as_dict(self.guess_costs) if self.can_guess else None,
            "why": self.explain(),
        }

    def cpu_as_dict(self) -> dict[str, Any]:
        """Return the share of the host's CPU, and decode with and without it, for JSON."""
        return {
            "cpu_share": self.cpu_share,
            "link_only_decode_s_per_token": self.decode_cost_with(0.0).total_s,
            "with_cpu": {
                "cpu_share": self.with_cpu_share,
                "decode_s_per_token": self.decode_cost_with(self.with_cpu_share).total_s,
                "is_measured": self.cpu_rates_are_measured,
            },
        }


def sparse_as_dict(pattern: HeadPattern | None) -> dict[str, Any] | None:
    """Return what a head pattern means for a plan, for JSON; None if all heads are full."""
    if pattern is None:
        return None
    return {
        "streaming_share": pattern.share,
        "sink_tokens": pattern.sink_tokens,
        "recent_tokens": pattern.recent_tokens,
        "digest": pattern.digest,
        "assumed": bool(pattern.info.get("assumed")),
    }


def make_plan(request: Request) -> Plan:
    """Return the fastest plan that fits.

    Raises:
        CapacityError: no plan fits. The message says what would.
        UsageError: a fixed tile is out of range.
    """
    best = min(candidates(request), key=lambda plan: plan.total_s, default=None)
    if best is None:
        raise refusal(request)
    return _with_cpu(best)


def candidates(request: Request) -> Iterator[Plan]:
    """Return all plans that fit, those with small chunks and budgets first."""
    for chunk_tokens in chunks(request):
        for streaming_bytes in streaming_budgets(request):
            bare = fitting_footprint(request, chunk_tokens, streaming_bytes)
            if bare is None:
                continue
            plan = _plan(request, chunk_tokens, streaming_bytes, bare)
            yield plan
            if plan.is_all_resident:
                break  # a larger ring would not be used either


def _plan(request: Request, chunk_tokens: int, streaming_bytes: int | None, bare: Footprint) -> Plan:
    """Return the plan of one candidate that fits. `bare` is its footprint without resident tokens."""
    kept = resident(request, streaming_bytes, bare)
    footprint = fitting_footprint(request, chunk_tokens, streaming_bytes, kept)
    assert footprint is not None, "resident tokens fit beside the rest"
    return _scheduled(request, chunk_tokens, streaming_bytes, bare, footprint, kept, request.cpu_share or 0.0)


def _with_cpu(plan: Plan) -> Plan:
    """Return the plan with the share of the CPU that is fastest, if its rates were measured and a budget holds it."""
    request = plan.request
    if request.cpu_share is not None or not request.hardware.cpu_beside_link_bytes_per_s or not plan.with_cpu_share:
        return plan
    # The buffers of the exchange make the ring a little smaller.
    kept = tuple(plan.resident_tokens[index] for index in request.shape.offloaded_layers)
    candidate = (request, plan.chunk_tokens, plan.streaming_budget_bytes)
    bare = fitting_footprint(*candidate, with_cpu=True)
    footprint = fitting_footprint(*candidate, kept, with_cpu=True)
    if bare is None or footprint is None:
        return plan
    return _scheduled(*candidate, bare, footprint, kept, plan.with_cpu_share)


def _scheduled(
    request: Request,
    chunk_tokens: int,
    streaming_bytes: int | None,
    bare: Footprint,
    footprint: Footprint,
    kept: tuple[int, ...],
    cpu_share: float,
) -> Plan:
    """Return the plan of one candidate with a share of the CPU."""
    tokens = request.context_tokens
    is_host = request.hardware.is_host
    is_all_resident = not is_host and footprint.ring_bytes == 0
    prefill = tiles(request, bare, chunk_tokens)
    decode = dataclasses.replace(tiles(request, bare, request.decode_tokens), cpu_share=cpu_share)
    if is_all_resident:
        heads = max(layer.kv_heads for layer in request.layers)
        prefill = TilePlan(heads, tokens, "all KV is resident: nothing is streamed")
        decode = prefill
    # The newest tokens are in the tail, which is not streamed either: a layer whose host tokens are all resident
    # streams nothing.
    on_device = tuple(max(tokens, n) if n >= host_kv_tokens(tokens) else n for n in kept)
    streamed_bytes = footprint.host_kv_bytes + footprint.disk_kv_bytes - stored_again_bytes(request, footprint)
    schedule = Schedule(
        chunk_tokens=chunk_tokens,
        resident_tokens=() if is_host else on_device,
        prefill_tile=(prefill.heads_per_group, prefill.tile_tokens),
        decode_tile=(decode.heads_per_group, decode.tile_tokens),
        merges=not is_host,
        writes_back=not is_host,
        disk_share=min(footprint.disk_kv_bytes / streamed_bytes, 1.0) if streamed_bytes else 0.0,
        prefetches_next_layer=request.prefetches_next_layer,
        cpu_share=0.0 if is_host else cpu_share,
        decode_tokens=request.decode_tokens,
        kv_bits=request.kv_bits,
    )
    more = (schedule, request.dtype, request.bits, request.rows)
    by_layer = dict(zip(request.shape.offloaded_layers, kept, strict=True))
    return Plan(
        request=request,
        chunk_tokens=chunk_tokens,
        prefill=prefill,
        decode=decode,
        resident_tokens=tuple(by_layer.get(index, 0) for index in range(len(request.shape.layers))),
        streaming_budget_bytes=streaming_bytes,
        footprint=footprint,
        prefill_cost=prefill_seconds(request.shape, request.hardware, tokens, *more),
        decode_cost=decode_seconds(request.shape, request.hardware, tokens, *more),
        schedule=schedule,
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
