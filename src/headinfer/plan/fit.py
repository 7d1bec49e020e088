"""Whether a job fits its budgets, and if not, what would."""

from __future__ import annotations

import dataclasses

from headinfer.errors import CapacityError
from headinfer.plan.footprint import Footprint, streaming_footprint, tail_bytes, weight_bytes
from headinfer.plan.memory import format_bytes
from headinfer.plan.request import Request
from headinfer.plan.tiles import RING_SLOTS, TilePlan, choose_tiles
from headinfer.plan.units import format_tokens

__all__ = [
    "CHUNK_TOKENS",
    "STREAMING_BYTES",
    "chunks",
    "fitting_footprint",
    "longest_context",
    "refusal",
    "resident",
    "streaming_budgets",
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
    """Candidate budgets for ring, tails and write-back. None: everything is resident, or read in place."""
    if request.hardware.is_host:
        return [None]
    most = request.device_kv_budget_bytes
    sizes = list(STREAMING_BYTES)
    if most is not None:  # nearly all of it, or what fits; from a fixed list, so that a larger budget is never worse
        sizes = [size * eighths // 8 for size in STREAMING_BYTES for eighths in range(8, 16)]
    streaming: list[int | None] = [size for size in sizes if most is None or size <= most]
    return [*streaming, None] if request.keeps_resident else streaming


def fitting_footprint(
    request: Request, chunk_tokens: int, streaming_bytes: int | None, resident_heads: list[int] | None = None
) -> Footprint | None:
    """The footprint of a candidate, or None where it exceeds a budget. resident_heads None: as few as can be."""
    found = _footprint(request, chunk_tokens, streaming_bytes, resident_heads)
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
    return choose_tiles(
        kv_heads=layer.kv_heads,
        group_queries=layer.query_heads // layer.kv_heads,
        head_token_bytes=(layer.key_dim + layer.value_dim) * request.element_bytes,
        rows=request.rows,
        query_tokens=query_tokens,
        past_tokens=request.context_tokens,
        slot_bytes=found.ring_bytes // RING_SLOTS or None,
        element_bytes=request.element_bytes,
        rates=request.hardware.tile_rates(request.dtype),
        heads_per_group=request.heads_per_group,
        tile_tokens=request.tile_tokens,
    )


def resident(request: Request, chunk_tokens: int, streaming_bytes: int | None, bare: Footprint) -> list[int]:
    """KV heads of each offloaded layer that stay on the device: as many as the memory beside `bare` holds.

    The same number in all layers, then one more from the first on: a layer's transfer hides behind its own attention.
    """
    layers = request.layers
    if request.hardware.is_host or not request.keeps_resident:
        return [0] * len(layers)
    if streaming_bytes is None:
        return [layer.kv_heads for layer in layers]
    room = request.room_bytes - bare.device_bytes
    if request.device_kv_budget_bytes is not None:
        room = min(room, request.device_kv_budget_bytes - bare.device_kv_budget_bytes)
    head_bytes = [
        request.context_tokens * layer.kv_bytes_per_token(request.element_bytes) // layer.kv_heads * request.rows
        for layer in layers
    ]
    chosen = [0] * len(layers)
    for wanted in range(1, max(layer.kv_heads for layer in layers) + 1):
        for index, layer in enumerate(layers):
            if wanted <= layer.kv_heads:
                if head_bytes[index] > room:
                    return chosen
                chosen[index] = wanted
                room -= head_bytes[index]
    return chosen


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
    budget, request = request.device_kv_budget_bytes, dataclasses.replace(request, device_kv_budget_bytes=None)
    chunk = chunks(request)[0]
    candidates = [_footprint(request, chunk, size, None) for size in streaming_budgets(request)]
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
    request: Request, chunk_tokens: int, streaming_bytes: int | None, resident_heads: list[int] | None
) -> Footprint | None:
    """The footprint of a candidate, all KV in host RAM; None where a ring slot would hold no tile."""
    is_host, layers = request.hardware.is_host, request.layers
    if resident_heads is None:
        resident_heads = [0 if is_host or streaming_bytes is not None else layer.kv_heads for layer in layers]
    try:
        found = streaming_footprint(
            request.shape,
            request.context_tokens,
            chunk_tokens=chunk_tokens,
            streaming_bytes=streaming_bytes,
            resident_heads=resident_heads,
            element_bytes=request.element_bytes,
            weight_bits=request.bits,
            overhead_bytes=request.hardware.overhead_bytes,
            host_overhead_bytes=0 if is_host else HOST_OVERHEAD_BYTES,
            rows=request.rows,
        )
        tiles(request, found, 1)  # of all tiles, decode's has the most heads: where it fits, prefill's does
    except CapacityError:
        return None
    return found


def _host_room(request: Request, found: Footprint) -> int:
    """Host RAM that is left for KV; negative where there is too little for the rest."""
    beside = found.device_bytes if request.hardware.is_host else found.host_overhead_bytes
    return request.host_bytes - beside
