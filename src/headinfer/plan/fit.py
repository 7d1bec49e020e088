"""Checks whether a job fits its budgets. If it does not, the error says what would fit."""

from __future__ import annotations

import dataclasses

from headinfer.errors import CapacityError
from headinfer.plan.footprint import (
    Footprint,
    exchange_bytes,
    host_kv_tokens,
    resident_tokens,
    streaming_footprint,
    tail_bytes,
    weight_bytes,
)
from headinfer.plan.request import Request
from headinfer.plan.tiles import RING_SLOTS, FixedTile, LayerWork, TilePlan, check_tiles, choose_tiles
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
    "stored_again_bytes",
    "streaming_budgets",
    "tiles",
]

CHUNK_TOKENS = (128, 256, 512, 1024, 2048, 4096, 8192, 16_384)
"""Candidates for the tokens of a prefill chunk."""

HOST_CHUNK_TOKENS = 4096
"""The longest chunk on a CPU. Longer chunks save nothing there, since reading the weights is a small part."""

STREAMING_BYTES = tuple(2**power * 2**20 for power in range(11))
"""Candidates for the streaming budget: 1 MiB to 1 GiB."""

HOST_OVERHEAD_BYTES = 2 * 2**30
"""Host memory of the process with torch and transformers, and of the system."""

_LONGEST_TOKENS = 2**36


def chunks(request: Request) -> list[int]:
    """Return candidates for the tokens of a chunk, in ascending order, none longer than the context needs."""
    if request.chunk_tokens is not None:
        return [request.chunk_tokens]
    most = HOST_CHUNK_TOKENS if request.hardware.is_host else CHUNK_TOKENS[-1]
    whole = next((chunk for chunk in CHUNK_TOKENS if chunk >= request.context_tokens or chunk == most), most)
    return [chunk for chunk in CHUNK_TOKENS if chunk <= whole]


def streaming_budgets(request: Request) -> list[int | None]:
    """Return candidates for the bytes of ring, tails and buffers. None stands for KV that is read in place.

    A ring is planned for also if all KV is resident, since a conversation may outgrow its plan.
    """
    if request.hardware.is_host:
        return [None]
    most = request.device_kv_budget_bytes
    if request.streaming_budget_bytes is not None:
        return [request.streaming_budget_bytes] if most is None or request.streaming_budget_bytes <= most else []
    sizes = list(STREAMING_BYTES)
    if most is not None:  # finer steps, from a fixed list, so that a larger budget is never worse
        sizes = [size * eighths // 8 for size in STREAMING_BYTES for eighths in range(8, 16)]
    return [size for size in sizes if most is None or size <= most]


def fitting_footprint(
    request: Request,
    chunk_tokens: int,
    streaming_bytes: int | None,
    resident: tuple[int, ...] | None = None,
    *,
    with_cpu: bool | None = None,
) -> Footprint | None:
    """Return the footprint of a candidate.

    Args:
        request: the job.
        chunk_tokens: tokens of a chunk.
        streaming_bytes: bytes of ring, tails and buffers; None if KV is read in place.
        resident: resident tokens of each offloaded layer; None for none.
        with_cpu: whether the host's CPU attends to a share; None if the request asks for a share.

    Returns:
        The footprint, or None if it exceeds a budget.
    """
    found = _footprint(request, chunk_tokens, streaming_bytes, resident, with_cpu=with_cpu)
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
    """Return the tile of a forward pass at the end of the context, for the layer with the most KV.

    Raises:
        CapacityError, UsageError: As choose_tiles().
    """
    rates = request.hardware.tile_rates(request.dtype)
    return choose_tiles(_largest_work(request, query_tokens), _slot_bytes(found), rates, _fixed_tile(request))


def _largest_work(request: Request, query_tokens: int) -> LayerWork:
    """Return the attention of the layer with the most KV at the end of the context."""
    layer = max(request.layers, key=lambda layer: layer.kv_bytes_per_token(1))
    return LayerWork.of_layer(
        layer,
        request.element_bytes,
        rows=request.rows,
        query_tokens=query_tokens,
        past_tokens=request.context_tokens,
        bits=request.kv_bits,
    )


def _slot_bytes(found: Footprint) -> int | None:
    return found.ring_bytes // RING_SLOTS or None


def _fixed_tile(request: Request) -> FixedTile:
    return FixedTile(request.heads_per_group, request.tile_tokens)


def resident(request: Request, streaming_bytes: int | None, bare: Footprint) -> tuple[int, ...]:
    """Return the resident tokens of each offloaded layer: as many as the free memory holds.

    All layers get the same bytes, since the transfer of a layer is hidden by its own attention. With sparse heads, the
    bytes are in proportion to the full heads of the layers.

    Args:
        request: the job.
        streaming_bytes: bytes of ring, tails and buffers; None if KV is read in place.
        bare: the footprint without resident tokens.
    """
    if streaming_bytes is None or not request.keeps_resident:
        return (0,) * len(request.layers)
    room = request.room_bytes - (bare.device_bytes - bare.device_kv_budget_bytes)
    if request.device_kv_budget_bytes is not None:
        room = min(room, request.device_kv_budget_bytes)
    found = _resident(request, room - streaming_bytes)
    return _resident(request, resident_room_bytes(request, found))  # the engine is given no more than is used


def resident_room_bytes(request: Request, tokens: tuple[int, ...]) -> int:
    """Return the fewest bytes of resident memory with which each layer keeps its number of tokens.

    The layer that needs the most for its part decides.
    """
    parts = _parts(request)
    needed = [kept * size for kept, size in zip(tokens, _token_bytes(request), strict=True)]
    return max(-(-nbytes * sum(parts) // part) for nbytes, part in zip(needed, parts, strict=True))


def _parts(request: Request) -> list[int]:
    """Return the parts of the resident memory that the offloaded layers have, as engine/device_kv.py divides it."""
    if request.sparse_heads is None:
        return [1] * len(request.layers)
    return [layer.full_heads for layer in request.layers]


def _resident(request: Request, room_bytes: int) -> tuple[int, ...]:
    host_tokens = host_kv_tokens(request.context_tokens)
    parts = _parts(request)
    layers = zip(_token_bytes(request), parts, strict=True)
    room_bytes = max(room_bytes, 0)
    return tuple(resident_tokens(room_bytes * part // sum(parts), 1, size, 1, host_tokens) for size, part in layers)


def _token_bytes(request: Request) -> list[int]:
    """Return the bytes of K and V of one token of all rows, for each offloaded layer."""
    return [layer.kv_bytes_per_token(request.element_bytes) * request.rows for layer in request.layers]


def stored_again_bytes(request: Request, found: Footprint) -> int:
    """Return the bytes that the resident tokens take where all KV is stored too."""
    if not request.kv_bits:
        return found.resident_bytes
    exact = request.shape.kv_bytes_per_token(request.element_bytes)
    stored = request.shape.stored_bytes_per_token(request.element_bytes, request.kv_bits)
    return found.resident_bytes * stored // exact


def longest_context(request: Request) -> int:
    """Return the longest context that fits with the other fields of the request, exact to one part in 16,384; 0
    if none fits."""

    def fits(tokens: int) -> bool:
        return _fits(dataclasses.replace(request, context_tokens=tokens))

    if not fits(1):
        return 0
    low = 1
    high = _LONGEST_TOKENS
    while high - low > max(low // 2**14, 1):
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


def _fits(request: Request) -> bool:
    return any(fitting_footprint(request, chunks(request)[0], budget) for budget in streaming_budgets(request))


def refusal(request: Request) -> CapacityError:
    """Return the error for a job of which no candidate fits. It says why, and what would fit."""
    machine = "this machine" if request.hardware.is_host else f"the {request.hardware.name}"
    room = request.room_bytes
    overhead = request.hardware.overhead_bytes
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
        windows = request.shape.window_bytes(request.element_bytes) * request.rows
        tails = format_bytes(sum(tail_bytes(request.shape, request.element_bytes, request.rows)) + windows)
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
    kept_bytes = host_room if request.host_kv_budget_bytes is None else min(host_room, request.host_kv_budget_bytes)
    if kept_bytes >= 0 and kept_bytes < host_room and least.host_kv_bytes > kept_bytes + request.disk_bytes:
        return CapacityError(
            f"{tokens} tokens need {format_bytes(least.host_kv_bytes)} for KV, of which the host KV budget keeps "
            f"{format_bytes(kept_bytes)} in memory, and the disk has {format_bytes(request.disk_bytes)} free for the "
            f"other {format_bytes(least.host_kv_bytes - kept_bytes)}: {advice}; raise the host KV budget, or use "
            "another disk"
        )
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
    request: Request,
    chunk_tokens: int,
    streaming_bytes: int | None,
    resident: tuple[int, ...] | None = None,
    *,
    with_cpu: bool | None = None,
) -> Footprint | None:
    """Return the footprint of a candidate with all KV in host memory; None if a ring slot does not hold a tile."""
    is_host = request.hardware.is_host
    exchange = 0
    if not is_host and (bool(request.cpu_share) if with_cpu is None else with_cpu):
        exchange = exchange_bytes(request.shape, request.element_bytes, request.decode_tokens, request.rows)
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
            exchange=exchange,
            kv_bits=request.kv_bits,
        )
        if resident is None:
            # A tile of decode has the most heads: if it fits, the one of prefill does.
            check_tiles(_largest_work(request, request.decode_tokens), _slot_bytes(found), _fixed_tile(request))
    except CapacityError:
        return None
    return found


def _host_room(request: Request, found: Footprint) -> int:
    """Return host memory that is left for KV; negative if the rest does not fit."""
    beside = found.device_bytes if request.hardware.is_host else found.host_overhead_bytes + found.exchange_bytes
    return request.host_bytes - beside
