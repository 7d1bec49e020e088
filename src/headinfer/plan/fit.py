"""Whether a job fits its budgets, and if not, what would."""

from __future__ import annotations

import dataclasses

from headinfer.errors import CapacityError
from headinfer.plan.footprint import (
    Footprint,
    host_kv_tokens,
    resident_tokens,
    streaming_footprint,
    tail_bytes,
    weight_bytes,
)
from headinfer.plan.request import Request
from headinfer.plan.tiles import RING_SLOTS, FixedTile, LayerWork, TilePlan, choose_tiles
from headinfer.utils.units import format_bytes, format_tokens

__all__ = [
    "CHUNK_TOKENS",
    "STREAMING_BYTES",
    "chunks",
    "fitting_footprint",
    "longest_context",
    "refusal",
    "resident",
    "resident_room_bytes",
    "streaming_budgets",
    "tiles",
]

CHUNK_TOKENS = (128, 256, 512, 1024, 2048, 4096, 8192, 16_384)
HOST_CHUNK_TOKENS = 4096  # on a CPU, longer chunks save nothing: the weights are read seldom enough
STREAMING_BYTES = tuple(2**power * 2**20 for power in range(11))  # 1 MiB to 1 GiB
HOST_OVERHEAD_BYTES = 2 * 2**30  # the process with torch and transformers, and room for the system
_LONGEST_TOKENS = 2**36


def chunks(request: Request) -> list[int]:
    """Candidate chunks, the smallest first; the first that holds the whole context is the last that helps."""
    if request.chunk_tokens is not None:
        return [request.chunk_tokens]
    most = HOST_CHUNK_TOKENS if request.hardware.is_host else CHUNK_TOKENS[-1]
    whole = next((chunk for chunk in CHUNK_TOKENS if chunk >= request.context_tokens or chunk == most), most)
    return [chunk for chunk in CHUNK_TOKENS if chunk <= whole]


def streaming_budgets(request: Request) -> list[int | None]:
    """Candidate budgets for ring, tails and write-back; None where KV is read in place.

    Where everything is resident the ring is planned for as well, since a conversation may outgrow its plan.
    """
    if request.hardware.is_host:
        return [None]
    most = request.device_kv_budget_bytes
    if request.streaming_budget_bytes is not None:
        return [request.streaming_budget_bytes] if most is None or request.streaming_budget_bytes <= most else []
    sizes = list(STREAMING_BYTES)
    if most is not None:  # nearly all of it, or what fits; from a fixed list, so that a larger budget is never worse
        sizes = [size * eighths // 8 for size in STREAMING_BYTES for eighths in range(8, 16)]
    return [size for size in sizes if most is None or size <= most]


def fitting_footprint(
    request: Request, chunk_tokens: int, streaming_bytes: int | None, resident: tuple[int, ...] | None = None
) -> Footprint | None:
    """The footprint of a candidate, or None where it exceeds a budget. resident: tokens by offloaded layer."""
    found = _footprint(request, chunk_tokens, streaming_bytes, resident)
    if found is None or found.device_bytes > request.room_bytes:
        return None
    budget = request.device_kv_budget_bytes
    if not request.hardware.is_host and budget is not None and found.device_kv_budget_bytes > budget:
        return None
    room = _host_room(request, found)
    kept = room if request.host_kv_budget_bytes is None else min(room, request.host_kv_budget_bytes)
    overflow = max(found.host_kv_bytes - kept, 0)
    if room < 0 or overflow > request.disk_bytes:
        return None
    return dataclasses.replace(found, host_kv_bytes=found.host_kv_bytes - overflow, disk_kv_bytes=overflow)


def tiles(request: Request, found: Footprint, query_tokens: int) -> TilePlan:
    """The tile of a pass over the whole context, for the layer with the most KV; raises as choose_tiles does."""
    layer = max(request.layers, key=lambda layer: layer.kv_bytes_per_token(1))
    work = LayerWork.of_layer(
        layer,
        request.element_bytes,
        rows=request.rows,
        query_tokens=query_tokens,
        past_tokens=request.context_tokens,
    )
    fixed = FixedTile(request.heads_per_group, request.tile_tokens)
    slot_bytes = found.ring_bytes // RING_SLOTS or None
    return choose_tiles(work, slot_bytes, request.hardware.tile_rates(request.dtype), fixed)


def resident(request: Request, streaming_bytes: int | None, bare: Footprint) -> tuple[int, ...]:
    """Tokens of each offloaded layer that stay on the device: as many as the memory beside `bare` holds.

    The same bytes in all layers: a layer's transfer hides behind its own attention.
    """
    if streaming_bytes is None or not request.keeps_resident:
        return (0,) * len(request.layers)
    room = request.room_bytes - (bare.device_bytes - bare.device_kv_budget_bytes)
    if request.device_kv_budget_bytes is not None:
        room = min(room, request.device_kv_budget_bytes)
    found = _resident(request, room - streaming_bytes)
    return _resident(request, resident_room_bytes(request, found))  # the engine is given no more than is used


def resident_room_bytes(request: Request, tokens: tuple[int, ...]) -> int:
    """The least room for resident KV with which each layer keeps that many tokens: equal parts of the largest's."""
    return len(tokens) * max(kept * size for kept, size in zip(tokens, _row_bytes(request), strict=True))


def _resident(request: Request, room_bytes: int) -> tuple[int, ...]:
    host_tokens, sizes = host_kv_tokens(request.context_tokens), _row_bytes(request)
    return tuple(resident_tokens(room_bytes, len(sizes), size, 1, host_tokens) for size in sizes)


def _row_bytes(request: Request) -> list[int]:
    """Bytes of K and V of one token of all rows, by offloaded layer."""
    return [layer.kv_bytes_per_token(request.element_bytes) * request.rows for layer in request.layers]


def longest_context(request: Request) -> int:
    """The most tokens (to 1 in 16,384) that fit with this request's other fields; 0 where none do."""

    def fits(tokens: int) -> bool:
        return _fits(dataclasses.replace(request, context_tokens=tokens))

    if not fits(1):
        return 0
    low, high = 1, _LONGEST_TOKENS
    while high - low > max(low // 2**14, 1):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _fits(request: Request) -> bool:
    return any(fitting_footprint(request, chunks(request)[0], budget) for budget in streaming_budgets(request))


def refusal(request: Request) -> CapacityError:
    """Why nothing fits, and what would."""
    machine = "this machine" if request.hardware.is_host else f"the {request.hardware.name}"
    room, overhead = request.room_bytes, request.hardware.overhead_bytes
    weights = weight_bytes(request.shape, request.bits)
    if weights + overhead > room:
        return CapacityError(
            f"the weights need {format_bytes(weights)} at {request.bits} bits each, and {machine} has "
            f"{format_bytes(max(room - overhead, 0))} for them: use a smaller model, fewer bits or more memory"
        )
    free = dataclasses.replace(request, heads_per_group=None, tile_tokens=None)
    if free != request and _fits(free):
        return CapacityError(
            f"no ring slot holds the tile asked for (heads_per_group {request.heads_per_group or 'adaptive'}, "
            f"tile_tokens {request.tile_tokens or 'adaptive'}): lower them, or raise the device KV budget"
        )
    request = free
    budget = request.streaming_budget_bytes or request.device_kv_budget_bytes
    request = dataclasses.replace(request, device_kv_budget_bytes=None, streaming_budget_bytes=None)
    chunk = chunks(request)[0]
    candidates = [_footprint(request, chunk, size) for size in streaming_budgets(request)]
    least = min(
        (found for found in candidates if found is not None), key=lambda found: found.device_bytes, default=None
    )
    if least is None:
        tails = format_bytes(sum(tail_bytes(request.shape, request.element_bytes, request.rows)))
        return CapacityError(f"the newest tokens of {request.rows} rows alone need {tails} on the device: use fewer")
    tokens = format_tokens(request.context_tokens)
    longest = longest_context(request)
    advice = f"at most {format_tokens(longest)} tokens fit" if longest else "no context fits"
    if least.device_bytes > room and not request.hardware.is_host:
        return CapacityError(
            f"{tokens} tokens in chunks of {chunk:,} need {format_bytes(least.device_bytes)} of device memory (weights "
            f"{format_bytes(weights)}, activations {format_bytes(least.activation_bytes)}, KV "
            f"{format_bytes(least.device_kv_bytes)}, overhead {format_bytes(overhead)}), and {machine} has "
            f"{format_bytes(room)}: {advice}; use fewer rows, a smaller model or more memory"
        )
    host_room = _host_room(request, least)
    if least.host_kv_bytes > host_room + request.disk_bytes or host_room < 0:
        disk = f" and {format_bytes(request.disk_bytes)} of disk" if request.disk_bytes else ""
        needed = least.host_kv_bytes + request.host_bytes - host_room - request.disk_bytes
        return CapacityError(
            f"{tokens} tokens need {format_bytes(least.host_kv_bytes)} of host RAM for KV; this machine has "
            f"{format_bytes(max(host_room, 0))} for it{disk}: {advice}, or give it {format_bytes(needed)} of RAM"
        )
    return CapacityError(
        f"a device KV budget of {format_bytes(budget or 0)} is too small: {format_bytes(least.device_kv_budget_bytes)} "
        "would do"
    )


def _footprint(
    request: Request, chunk_tokens: int, streaming_bytes: int | None, resident: tuple[int, ...] | None = None
) -> Footprint | None:
    """The footprint of a candidate, all KV in host RAM; None where a ring slot would hold no tile."""
    is_host = request.hardware.is_host
    try:
        found = streaming_footprint(
            request.shape,
            request.context_tokens,
            chunk_tokens=chunk_tokens,
            streaming_bytes=streaming_bytes,
            resident_tokens=resident,
            element_bytes=request.element_bytes,
            weight_bits=request.bits,
            overhead_bytes=request.hardware.overhead_bytes,
            host_overhead_bytes=0 if is_host else HOST_OVERHEAD_BYTES,
            rows=request.rows,
        )
        if resident is None:
            tiles(request, found, 1)  # of all tiles, decode's has the most heads: where it fits, prefill's does
    except CapacityError:
        return None
    return found


def _host_room(request: Request, found: Footprint) -> int:
    """Host RAM that is left for KV; negative where there is too little for the rest."""
    beside = found.device_bytes if request.hardware.is_host else found.host_overhead_bytes
    return request.host_bytes - beside
