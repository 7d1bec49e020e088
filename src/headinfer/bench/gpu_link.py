"""The link between host and device, and the other rates that the suites are held against."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from headinfer.attention.backends import Problem, capability_of
from headinfer.bench.cpu_model import DRAM_BUFFER_BYTES, dram_reader
from headinfer.bench.job import Job, Line, Rates
from headinfer.engine.machine import this_machine
from headinfer.kv.byte_counter import ByteCounter
from headinfer.kv.numa import node_of
from headinfer.kv.segments import Segment
from headinfer.kv.streams import open_streams
from headinfer.kv.tiers import HostTier
from headinfer.kv.transfer import SlotRing
from headinfer.plan.footprint import tail_bytes, write_back_bytes
from headinfer.plan.tiles import RING_SLOTS, TilePlan, TileRates, choose_tiles, ring_slot_bytes
from headinfer.utils.units import format_bytes

__all__ = ["link", "link_copy", "measure_rates", "tile_of"]

_ROUNDS = 5
_BOTH_WAYS = 16  # copies each way, so that what one way does alone at the end is little
_LONG_TOKENS = 2**20


def host_tier(job: Job) -> HostTier:
    """Where host memory comes from as segments have it; after it gave some, it says whether it could be pinned."""
    return (
        HostTier(ByteCounter(), device=job.device, node=node_of(job.device)) if job.is_cuda else HostTier(ByteCounter())
    )


def measure_rates(job: Job) -> Rates:
    """A big matrix product, a big copy on the device, and one big copy each way of the link."""
    job.say("rates: matrix product, device memory, link ...")
    rates = Rates(_matrix_flops_per_s(job), _device_bytes_per_s(job), *_link_bytes_per_s(job))
    job.clean()
    return rates


def _matrix_flops_per_s(job: Job) -> float:
    size = job.sizes.matrix
    square = torch.randn(size, size, device=job.device, dtype=job.sizes.dtype)
    return 2 * size**3 / _median(job, lambda: torch.matmul(square, square))


def _device_bytes_per_s(job: Job) -> float:
    """Bytes read and bytes written."""
    here, there = (torch.ones(max(job.sizes.copy_bytes), dtype=torch.uint8, device=job.device) for _ in range(2))
    return 2 * here.numel() / _copy_s(job, there, here)


def _link_bytes_per_s(job: Job) -> tuple[float, float]:
    """To the device and to the host, pinned."""
    device = torch.ones(max(job.sizes.copy_bytes), dtype=torch.uint8, device=job.device)
    host = host_tier(job).allocate((device.numel(),), torch.uint8)
    return device.numel() / _copy_s(job, device, host), device.numel() / _copy_s(job, host, device)


def link_copy(job: Job) -> tuple[int, Callable[[], object]]:
    """Bytes, and a call that copies so many pinned ones to the device: what streaming is held against."""
    nbytes = max(job.sizes.copy_bytes)
    host = host_tier(job).allocate((nbytes,), torch.uint8)
    device = torch.empty(nbytes, dtype=torch.uint8, device=job.device)
    return nbytes, lambda: device.copy_(host, non_blocking=True)


def link(job: Job) -> list[Line]:
    """Copies each way and both at once, from pageable and from pinned memory; tiles; the host's DRAM."""
    lines: list[Line] = []
    for nbytes in job.sizes.copy_bytes:
        device = torch.ones(nbytes, dtype=torch.uint8, device=job.device)
        tier = host_tier(job)
        memory = tier.allocate((nbytes,), torch.uint8)
        note = "" if job.is_cuda else "no link: a copy in host memory"
        kinds = {"pageable": torch.ones(nbytes, dtype=torch.uint8), "pinned": memory}
        for kind, host in kinds.items():
            refused = tier.pin_refusal if kind == "pinned" else ""
            if refused:
                lines.append(Line("link", format_bytes(nbytes), kind, note=f"could not be pinned: {refused}"))
                continue
            rates = {
                "to the device": nbytes / _copy_s(job, device, host),
                "to the host": nbytes / _copy_s(job, host, device),
            }
            rates |= _both_ways(job, device, host)
            lines += [
                Line("link", format_bytes(nbytes), f"{kind}, {way}", rate / 1e9, "GB/s", note=note)
                for way, rate in rates.items()
            ]
        del device, memory, kinds
        job.clean()
    lines += [_tiles(job, query_tokens) for query_tokens in (1, 4096)]
    read = dram_reader()
    dram_s = min(job.timed(read) for _ in range(3))
    lines.append(Line("link", format_bytes(DRAM_BUFFER_BYTES), "host DRAM, read", DRAM_BUFFER_BYTES / dram_s / 1e9,
                      "GB/s", note=f"{torch.get_num_threads()} threads"))  # fmt: skip
    return lines


def _median(job: Job, call: Callable[[], object]) -> float:
    """Seconds of a call, after one that warms up."""
    job.timed(call)
    return statistics.median(job.timed(call) for _ in range(_ROUNDS))


def _copy_s(job: Job, target: torch.Tensor, source: torch.Tensor) -> float:
    """Seconds of a copy."""
    return _median(job, lambda: target.copy_(source, non_blocking=True))


def _both_ways(job: Job, device: torch.Tensor, host: torch.Tensor) -> dict[str, float]:
    """Bytes per second of each way while both run: what each has copied when the first of them has done all of it.

    On a CPU one way waits for the other.
    """
    device_too = torch.empty_like(device)
    half = host.numel() // 2  # the two ways touch different halves
    ways = {
        "to the device, both at once": (device[:half], host[:half]),
        "to the host, both at once": (host[half:], device_too[half:]),
    }
    job.synchronize()
    stamps: dict[str, list[Any]] = {way: [] for way in ways}
    queues = {way: job.stream() for way in ways}
    starts = {way: stamp() for way, (_, stamp) in queues.items()}
    for _ in range(_BOTH_WAYS):
        for way, (target, source) in ways.items():
            queue, stamp = queues[way]
            with queue:
                target.copy_(source, non_blocking=True)
            stamps[way].append(stamp())
    job.synchronize()
    ends = {way: [job.between_s(starts[way], stamp) for stamp in found] for way, found in stamps.items()}
    first_end_s = min(found[-1] for found in ends.values())
    nbytes = half * host.element_size()
    return {way: nbytes * sum(s <= first_end_s for s in found) / first_end_s for way, found in ends.items()}


def tile_of(job: Job, query_tokens: int, past_tokens: int = _LONG_TOKENS) -> tuple[TilePlan, int, Problem]:
    """The tile of a pass with the floor budget, the ring's slot bytes, and what a kernel is asked for it."""
    shape, sizes = job.shape, job.sizes
    layer = shape.layers[shape.offloaded_layers[0]]
    held = sum(tail_bytes(shape, sizes.dtype.itemsize)) + 2 * write_back_bytes(sizes.floor_bytes)
    slot_bytes = ring_slot_bytes(sizes.floor_bytes, held)
    group, dims = layer.query_heads // layer.kv_heads, (layer.key_dim, layer.value_dim)
    rows = group * query_tokens
    plan = choose_tiles(
        kv_heads=layer.kv_heads,
        group_queries=group,
        head_token_bytes=(layer.key_dim + layer.value_dim) * sizes.dtype.itemsize,
        rows=1,
        query_tokens=query_tokens,
        past_tokens=past_tokens,
        slot_bytes=slot_bytes,
        element_bytes=sizes.dtype.itemsize,
        rates=_tile_rates(job),
    )
    problem = Problem(job.device.type, sizes.dtype, rows, *dims, capability=capability_of(job.device),
                      key_tokens=plan.tile_tokens)  # fmt: skip
    return plan, slot_bytes, problem


def _tile_rates(job: Job) -> TileRates | None:
    """What the engine chooses tiles for on this device."""
    machine, name = this_machine(job.device), str(job.sizes.dtype).removeprefix("torch.")
    return machine.tile_rates(name) if job.is_cuda and name in machine.flops_per_s else None


def _tiles(job: Job, query_tokens: int) -> Line:
    """Tiles through the ring as the engine fetches them, with nothing computed: one contiguous copy a head and side."""
    plan, slot_bytes, problem = tile_of(job, query_tokens)
    counter, streams = ByteCounter(), open_streams("cuda" if job.is_cuda else "eager", job.device)
    assert streams is not None
    tier = host_tier(job)
    segment = Segment(tier, plan.heads_per_group, plan.tile_tokens, problem.key_dim, problem.value_dim, problem.dtype)
    if segment.is_pageable:
        return Line("link", "tiles", "pinned, through the ring", note=f"could not be pinned: {tier.pin_refusal}")
    ring = SlotRing(RING_SLOTS, slot_bytes, job.device, counter, streams)
    rounds = max(2, max(job.sizes.copy_bytes) // slot_bytes)

    def stream() -> None:
        for _ in range(rounds):
            handle = ring.fetch([(segment.k, segment.v)])
            ring.wait(handle)
            ring.release(handle)

    job.timed(stream)
    before = counter.host_to_device_bytes
    rate = 1 / job.timed(stream) * (counter.host_to_device_bytes - before)
    ring.close()
    head_bytes = plan.tile_tokens * problem.key_dim * problem.dtype.itemsize
    what = "decode" if query_tokens == 1 else "prefill"
    note = f"{plan.heads_per_group} heads x {plan.tile_tokens:,} tokens: copies of {format_bytes(head_bytes)}"
    return Line("link", f"{what}'s tiles", "pinned, through the ring", rate / 1e9, "GB/s", note=note,
                details={"heads_per_group": plan.heads_per_group, "tile_tokens": plan.tile_tokens})  # fmt: skip
