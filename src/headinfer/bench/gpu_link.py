"""The GPU suite `link`: copies between host and device; and the rates that all GPU suites are compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from headinfer.attention.backends import Problem, capability_of
from headinfer.bench.cpu_model import DRAM_BUFFER_BYTES, dram_reader
from headinfer.bench.job import GpuJob, Rates
from headinfer.bench.measurement import Measurement
from headinfer.bench.timing import median_s
from headinfer.engine.machine import this_machine
from headinfer.kv.byte_counter import ByteCounter
from headinfer.kv.host_memory import HostTier
from headinfer.kv.numa import node_of
from headinfer.kv.segments import Segment
from headinfer.kv.streams import open_streams
from headinfer.kv.transfer import SlotRing
from headinfer.plan.footprint import tail_bytes, write_back_bytes
from headinfer.plan.tiles import RING_SLOTS, LayerWork, TilePlan, TileRates, choose_tiles, ring_slot_bytes
from headinfer.utils.units import format_bytes

__all__ = ["link", "link_copy", "measure_rates", "rate_measurements", "tile_of"]

_ROUNDS = 5
_COPIES_EACH_WAY = 16  # many, so that it matters little that one way runs alone at the end
_PREFILL_QUERY_TOKENS = 4096
_LONG_TOKENS = 2**20
# Names, segments that a tile is copied from, and tokens of each segment that are not copied. Heads of a whole segment
# are one copy; of other segments, K and V of each head are one.
_WAYS_TO_COPY = (
    ("pinned, through the ring", 1, 0),
    ("pinned, through the ring, a copy for each K and V", 1, 128),
    ("pinned, through the ring, from two segments", 2, 128),
)


def host_tier(job: GpuJob) -> HostTier:
    """Return a source of host memory like that of segments. Its `pin_refusal` is set when it first allocates."""
    if not job.is_cuda:
        return HostTier(ByteCounter())
    return HostTier(ByteCounter(), device=job.device, node=node_of(job.device))


def measure_rates(job: GpuJob) -> Rates:
    """Measure a big matrix product, a big copy on the device, and a big copy over the link in each direction."""
    job.say("rates: matrix product, device memory, link ...")
    rates = Rates(_matrix_flops_per_s(job), _device_bytes_per_s(job), *_link_bytes_per_s(job))
    job.clean()
    return rates


def rate_measurements(rates: Rates) -> list[Measurement]:
    """Return these rates as measurements of their own."""
    figures = (
        ("matrix product", rates.flops_per_s / 1e12, "TFLOP/s"),
        ("device memory, read and written", rates.device_bytes_per_s / 1e9, "GB/s"),
        ("pinned, to the device", rates.link_bytes_per_s / 1e9, "GB/s"),
        ("pinned, to the host", rates.back_bytes_per_s / 1e9, "GB/s"),
    )
    return [Measurement("rates", "of this run", *figure, rounds=_ROUNDS) for figure in figures]


def _matrix_flops_per_s(job: GpuJob) -> float:
    size = job.sizes.matrix
    square = torch.randn(size, size, device=job.device, dtype=job.sizes.dtype)
    return 2 * size**3 / median_s(lambda: torch.matmul(square, square), job.timed, rounds=_ROUNDS)


def _device_bytes_per_s(job: GpuJob) -> float:
    """Return the bytes read and bytes written per second."""
    source, target = (torch.ones(max(job.sizes.copy_bytes), dtype=torch.uint8, device=job.device) for _ in range(2))
    return 2 * source.numel() / _copy_s(job, target, source)


def _link_bytes_per_s(job: GpuJob) -> tuple[float, float]:
    """Return the bytes per second to the device and to the host, from and to pinned memory."""
    device = torch.ones(max(job.sizes.copy_bytes), dtype=torch.uint8, device=job.device)
    host = host_tier(job).allocate((device.numel(),), torch.uint8)
    return device.numel() / _copy_s(job, device, host), device.numel() / _copy_s(job, host, device)


def link_copy(job: GpuJob) -> tuple[int, Callable[[], object]]:
    """Return a number of bytes, and a function that copies that many from pinned memory to the device."""
    nbytes = max(job.sizes.copy_bytes)
    host = host_tier(job).allocate((nbytes,), torch.uint8)
    device = torch.empty(nbytes, dtype=torch.uint8, device=job.device)
    return nbytes, lambda: device.copy_(host, non_blocking=True)


def link(job: GpuJob) -> list[Measurement]:
    """Measure copies in each direction and in both at once, from pageable and pinned memory; tiles; and the DRAM."""
    measurements: list[Measurement] = []
    for nbytes in job.sizes.copy_bytes:
        measurements += _copies(job, nbytes)
        job.clean()
    for query_tokens in (1, _PREFILL_QUERY_TOKENS):
        measurements += [_tiles(job, query_tokens, *way) for way in _WAYS_TO_COPY]
    read = dram_reader()
    dram_s = median_s(read, job.timed, rounds=_ROUNDS)
    rate = DRAM_BUFFER_BYTES / dram_s / 1e9
    threads = f"{torch.get_num_threads()} threads"
    size = format_bytes(DRAM_BUFFER_BYTES)
    return [*measurements, Measurement("link", size, "host DRAM, read", rate, "GB/s", rounds=_ROUNDS, note=threads)]


def _copies(job: GpuJob, nbytes: int) -> list[Measurement]:
    """Measure copies of one size."""
    point = format_bytes(nbytes)
    device = torch.ones(nbytes, dtype=torch.uint8, device=job.device)
    tier = host_tier(job)
    pinned = tier.allocate((nbytes,), torch.uint8)
    note = "" if job.is_cuda else "no link: a copy in host memory"
    measurements: list[Measurement] = []
    for kind, host in (("pageable", torch.ones(nbytes, dtype=torch.uint8)), ("pinned", pinned)):
        if kind == "pinned" and tier.pin_refusal:
            measurements.append(Measurement("link", point, kind, note=f"could not be pinned: {tier.pin_refusal}"))
            continue
        rates = {
            "to the device": nbytes / _copy_s(job, device, host),
            "to the host": nbytes / _copy_s(job, host, device),
        }
        both_ways = _both_ways(job, device, host)
        measurements += [
            Measurement("link", point, f"{kind}, {way}", rate / 1e9, "GB/s", rounds=rounds, note=note)
            for found, rounds in ((rates, _ROUNDS), (both_ways, 1))
            for way, rate in found.items()
        ]
    return measurements


def _copy_s(job: GpuJob, target: torch.Tensor, source: torch.Tensor) -> float:
    """Return the seconds of a copy."""
    return median_s(lambda: target.copy_(source, non_blocking=True), job.timed, rounds=_ROUNDS)


def _both_ways(job: GpuJob, device: torch.Tensor, host: torch.Tensor) -> dict[str, float]:
    """Return the bytes per second of each direction while both run: what each has copied when the first one has ended.

    On a CPU the copies run one after the other.
    """
    other_device = torch.empty_like(device)
    half = host.numel() // 2  # the two directions use different halves of the host's buffer
    ways = {
        "to the device, both at once": (device[:half], host[:half]),
        "to the host, both at once": (host[half:], other_device[half:]),
    }
    job.synchronize()
    stamps: dict[str, list[Any]] = {way: [] for way in ways}
    queues = {way: job.stream() for way in ways}
    starts = {way: stamp() for way, (_, stamp) in queues.items()}
    for _ in range(_COPIES_EACH_WAY):
        for way, (target, source) in ways.items():
            queue, stamp = queues[way]
            with queue:
                target.copy_(source, non_blocking=True)
            stamps[way].append(stamp())
    job.synchronize()
    ends = {way: [job.between_s(starts[way], stamp) for stamp in stamped] for way, stamped in stamps.items()}
    first_end_s = min(end_s[-1] for end_s in ends.values())
    nbytes = half * host.element_size()
    return {way: nbytes * sum(seconds <= first_end_s for seconds in end_s) / first_end_s for way, end_s in ends.items()}


def tile_of(job: GpuJob, query_tokens: int, past_tokens: int = _LONG_TOKENS) -> tuple[TilePlan, int, Problem]:
    """Return the tile of a pass with the floor budget, the bytes of a ring slot, and the problem that a kernel gets."""
    shape = job.shape
    sizes = job.sizes
    element_bytes = sizes.dtype.itemsize
    layer = shape.layers[shape.offloaded_layers[0]]
    held = sum(tail_bytes(shape, element_bytes)) + 2 * write_back_bytes(sizes.floor_bytes)
    slot_bytes = ring_slot_bytes(sizes.floor_bytes, held)
    group = layer.query_heads // layer.kv_heads
    work = LayerWork.of_layer(layer, element_bytes, rows=1, query_tokens=query_tokens, past_tokens=past_tokens)
    plan = choose_tiles(work, slot_bytes, _tile_rates(job))
    problem = Problem(
        job.device.type,
        sizes.dtype,
        group * query_tokens,
        layer.key_dim,
        layer.value_dim,
        capability=capability_of(job.device),
        key_tokens=plan.tile_tokens,
    )
    return plan, slot_bytes, problem


def _tile_rates(job: GpuJob) -> TileRates | None:
    """Return the rates for which the engine chooses tiles on this device."""
    machine = this_machine(job.device)
    dtype = str(job.sizes.dtype).removeprefix("torch.")
    return machine.tile_rates(dtype) if job.is_cuda and dtype in machine.flops_per_s else None


def _tiles(job: GpuJob, query_tokens: int, who: str, parts: int, left_tokens: int) -> Measurement:
    """Fetch tiles through the ring as the engine does, from all or a part of some segments. Computes nothing."""
    plan, slot_bytes, problem = tile_of(job, query_tokens)
    point = ("decode" if query_tokens == 1 else "prefill") + "'s tiles"
    counter = ByteCounter()
    streams = open_streams("cuda" if job.is_cuda else "eager", job.device)
    assert streams is not None
    tier = host_tier(job)
    heads = plan.heads_per_group
    tokens = plan.tile_tokens // parts
    dims = (problem.key_dim, problem.value_dim)
    segments = [Segment(tier, heads, tokens + left_tokens, *dims, problem.dtype) for _ in range(parts)]
    if segments[0].is_pageable:
        return Measurement("link", point, who, note=f"could not be pinned: {tier.pin_refusal}")
    pieces = [(segment.k[:, :tokens], segment.v[:, :tokens]) for segment in segments]
    ring = SlotRing(RING_SLOTS, slot_bytes, job.device, counter, streams)
    rounds = max(2, max(job.sizes.copy_bytes) // slot_bytes)

    def stream() -> None:
        for _ in range(rounds):
            handle = ring.fetch(pieces)
            ring.wait(handle)
            ring.release(handle)

    job.timed(stream)
    bytes_before = counter.host_to_device_bytes
    copies_before = counter.copies
    seconds = job.timed(stream)
    nbytes = counter.host_to_device_bytes - bytes_before
    copies = counter.copies - copies_before
    ring.close()
    note = f"{heads} heads x {plan.tile_tokens:,} tokens: copies of {format_bytes(nbytes // copies)}"
    details = {
        "heads_per_group": heads,
        "tile_tokens": plan.tile_tokens,
        "copies_per_tile": copies // rounds,
        "bytes_per_copy": nbytes // copies,
    }
    return Measurement("link", point, who, nbytes / seconds / 1e9, "GB/s", rounds=1, note=note, details=details)
