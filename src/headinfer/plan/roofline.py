"""The cost model: seconds of prefill and decode by component, what hides behind what, and what bounds them.

In each layer of each forward pass two things run side by side, and the longer one counts:

    compute stream   linear layers, then attention on the chunk and on the past, and merging tiles
    copy stream      tiles host -> device, new KV device -> host; only beside attention, as the loop is written

The past grows by one chunk per forward pass, so both are straight lines in it; sums over chunks are closed forms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from headinfer.model_shape import LayerShape, ModelShape
from headinfer.plan.hardware import Hardware
from headinfer.plan.tiles import MERGE_BYTES, TILE_LAUNCHES

__all__ = ["OperatingPoint", "Schedule", "Seconds", "decode_seconds", "operating_points", "prefill_seconds"]

# Kernels that eager PyTorch queues for one decoder layer of transformers (norms, projections, rotary embedding,
# MLP, residuals). For a head group that is copied whole: K and V in and out, attention, events.
LAYER_LAUNCHES = 40
GROUP_LAUNCHES = 10


@dataclass(frozen=True)
class Schedule:
    """What a method moves and when.

    chunk_tokens: tokens of one forward pass in prefill. streamed_share: the share of each layer's KV heads that
    crosses the link, by offloaded layer; empty where nothing does. prefill_tile, decode_tile: (heads, tokens).
    merges: whether tiles cut a head's tokens, as headinfer's do; queueing them is taken to run ahead of the device,
    and queueing the paper's whole groups not to, as its table 7 shows. writes_back: whether new KV goes to the
    host. kv_scale: bytes of KV against the model's dtype. disk_share: of the streamed bytes. prefetches_next_layer:
    whether a layer's first tile comes while the layer before computes.
    """

    chunk_tokens: int
    streamed_share: tuple[float, ...] = ()
    prefill_tile: tuple[int, int] = (1, 1)
    decode_tile: tuple[int, int] = (1, 1)
    merges: bool = False
    writes_back: bool = False
    kv_scale: float = 1.0
    disk_share: float = 0.0
    prefetches_next_layer: bool = False


@dataclass(frozen=True)
class Seconds:
    """Seconds of a prefill or of one token; the parts add up to total_s.

    linear_s, attention_s and merge_s on the compute stream; exposed_transfer_s, exposed_launch_s: what of the copies
    and of the host's queueing is not hidden behind them. The busy times say how long each resource works in all:
    compute_s and device_memory_s (kernels, by what bounds them), transfer_s (the copy stream), launch_s (the host).
    """

    linear_s: float
    attention_s: float
    merge_s: float
    exposed_transfer_s: float
    exposed_launch_s: float
    compute_s: float
    device_memory_s: float
    transfer_s: float
    launch_s: float
    transfer_name: str

    @property
    def total_s(self) -> float:
        """The sum of the parts."""
        return self.linear_s + self.attention_s + self.merge_s + self.exposed_transfer_s + self.exposed_launch_s

    @property
    def bound(self) -> str:
        """The resource that is busy longest: compute, device memory, link, DRAM, disk, or launches."""
        busy = {
            "compute": self.compute_s,
            "device memory": self.device_memory_s,
            self.transfer_name: self.transfer_s,
            "launches": self.launch_s,
        }
        return max(busy, key=lambda name: busy[name])


@dataclass
class _Sum:
    """Adds up the parts of one phase."""

    linear_s: float = 0.0
    attention_s: float = 0.0
    merge_s: float = 0.0
    exposed_transfer_s: float = 0.0
    exposed_launch_s: float = 0.0
    compute_s: float = 0.0
    device_memory_s: float = 0.0
    transfer_s: float = 0.0
    launch_s: float = 0.0

    def seconds(self, transfer_name: str) -> Seconds:
        return Seconds(**vars(self), transfer_name=transfer_name)


def prefill_seconds(
    shape: ModelShape, hardware: Hardware, tokens: int, schedule: Schedule, dtype: str = "bfloat16",
    weight_bits: int = 16, rows: int = 1,
) -> Seconds:  # fmt: skip
    """Seconds to read `tokens` tokens in chunks; each row of the batch has that many."""
    bytes_per_s = hardware.attained_device_bytes_per_s
    attention_flops_per_s = hardware.attained_attention_flops_per_s(dtype)
    weight_bytes_per_s = hardware.attained_weight_bytes_per_s(dtype)
    element_bytes = 4 if dtype == "float32" else 2
    transfer_s_per_byte, transfer_name = _transfer(hardware, schedule)
    chunks = max(math.ceil(tokens / schedule.chunk_tokens), 1)
    chunk = tokens / chunks
    total = _Sum()

    linear_flop_s = 2 * shape.active_weights * chunk * rows / hardware.attained_flops_per_s(dtype)
    linear_byte_s = sum(layer.weights for layer in shape.layers) * weight_bits / 8 / weight_bytes_per_s
    head_s = shape.head_weights * weight_bits / 8 / weight_bytes_per_s
    total.linear_s = chunks * (max(linear_flop_s, linear_byte_s) + head_s)
    total.device_memory_s = chunks * head_s
    if linear_flop_s >= linear_byte_s:
        total.compute_s += chunks * linear_flop_s
    else:
        total.device_memory_s += chunks * linear_byte_s

    launches = chunks * len(shape.layers) * LAYER_LAUNCHES * hardware.launch_s
    total.launch_s = launches
    total.exposed_launch_s = launches if hardware.is_host else max(0.0, launches - total.linear_s)

    for layer, count, share in _distinct(shape, schedule):
        square_s = layer.flops_per_pair * _own_pairs(layer, chunk, tokens) * rows / attention_flops_per_s
        past_sum = chunk * chunks * (chunks - 1) / 2
        seen_sum = 0.0 if layer.window_tokens else past_sum
        kv_bytes = layer.kv_bytes_per_token(element_bytes) * schedule.kv_scale * rows
        flop_slope = layer.flops_per_pair * chunk * rows / attention_flops_per_s
        byte_slope = kv_bytes / hardware.attained_kv_bytes_per_s
        attention_s = chunks * square_s + max(flop_slope, byte_slope) * seen_sum
        total.attention_s += count * attention_s
        if flop_slope >= byte_slope:
            total.compute_s += count * attention_s
        else:
            total.compute_s += count * chunks * square_s
            total.device_memory_s += count * byte_slope * seen_sum
        if share is None:
            continue
        heads, tile_tokens = schedule.prefill_tile
        output_s = share * rows * layer.query_heads * layer.value_dim * chunk * MERGE_BYTES / bytes_per_s
        merge_slope = output_s / tile_tokens if schedule.merges else 0.0
        merge_first = output_s if schedule.merges else 0.0  # at least one tile, as soon as there is a past
        merge_s = merge_slope * past_sum + merge_first * (chunks - 1)
        total.merge_s += count * merge_s
        compute_first, compute_slope = square_s + merge_first, max(flop_slope, byte_slope) + merge_slope
        back_s = chunk * kv_bytes / (hardware.link_back_bytes_per_s * hardware.link_share)
        copy_first, copy_slope = (back_s if schedule.writes_back else 0.0), share * kv_bytes * transfer_s_per_byte
        total.transfer_s += count * (chunks * copy_first + copy_slope * past_sum)
        steeper = copy_slope - compute_slope  # the first chunk has no past: nothing to fetch or merge
        exposed_s = max(0.0, copy_first - square_s)
        exposed_s += _positive_sum(copy_first - compute_first + steeper * chunk, steeper, chunk, chunks - 1)
        # The first tile of a layer has only the chunk's own attention to hide behind, and what is prefetched.
        tile_s = min(tile_tokens, tokens) * heads / layer.kv_heads * kv_bytes * transfer_s_per_byte
        cover_s = square_s * heads / layer.kv_heads
        cover_s += linear_flop_s / len(shape.layers) if schedule.prefetches_next_layer else 0.0
        first_s = max(0.0, tile_s - cover_s) * (chunks - 1) if schedule.merges and share else 0.0
        total.exposed_transfer_s += count * (exposed_s + first_s)
        groups = math.ceil(share * layer.kv_heads / heads)
        tiles = groups * (past_sum / tile_tokens + chunks)
        tile_launch_s = tiles * _tile_launches(schedule, heads) * hardware.launch_s
        total.launch_s += count * tile_launch_s
        covered_s = attention_s + merge_s + exposed_s if schedule.merges else 0.0
        total.exposed_launch_s += count * max(0.0, tile_launch_s - covered_s)
    return total.seconds(transfer_name)


def decode_seconds(
    shape: ModelShape, hardware: Hardware, past_tokens: int, schedule: Schedule, dtype: str = "bfloat16",
    weight_bits: int = 16, rows: int = 1,
) -> Seconds:  # fmt: skip
    """Seconds for one token after `past_tokens` tokens."""
    flops_per_s = hardware.attained_flops_per_s(dtype)
    element_bytes = 4 if dtype == "float32" else 2
    transfer_s_per_byte, transfer_name = _transfer(hardware, schedule)
    weights = shape.active_weights + shape.head_weights
    flop_s = 2 * weights * rows / flops_per_s
    byte_s = weights * weight_bits / 8 / hardware.attained_weight_bytes_per_s(dtype)
    total = _Sum(linear_s=max(flop_s, byte_s))
    total.compute_s, total.device_memory_s = (flop_s, 0.0) if flop_s > byte_s else (0.0, byte_s)
    total.launch_s = len(shape.layers) * LAYER_LAUNCHES * hardware.launch_s
    total.exposed_launch_s = total.launch_s if hardware.is_host else max(0.0, total.launch_s - total.linear_s)
    for layer, count, share in _distinct(shape, schedule):
        seen = layer.seen_tokens(past_tokens)
        kv_bytes = seen * layer.kv_bytes_per_token(element_bytes) * schedule.kv_scale * rows
        flop_s, byte_s = layer.flops_per_pair * seen * rows / flops_per_s, kv_bytes / hardware.attained_kv_bytes_per_s
        attention_s = max(flop_s, byte_s)
        total.attention_s += count * attention_s
        if flop_s > byte_s:
            total.compute_s += count * flop_s
        else:
            total.device_memory_s += count * byte_s
        if share is None:
            continue
        heads, tile_tokens = schedule.decode_tile
        groups = math.ceil(share * layer.kv_heads / heads)
        tiles = groups * math.ceil(seen / tile_tokens)
        transfer_s = share * kv_bytes * transfer_s_per_byte
        total.transfer_s += count * transfer_s
        exposed_s = max(0.0, transfer_s - attention_s)
        if share and tiles:  # the last tile is computed when nothing comes any more; the first may come early
            tile_share = min(tile_tokens, seen) / max(seen, 1) * heads / layer.kv_heads
            exposed_s = max(exposed_s, transfer_s - attention_s * (1 - min(tile_share, share)))
            if schedule.prefetches_next_layer:
                early_s = min(transfer_s * min(tile_share / share, 1.0), total.linear_s / len(shape.layers))
                exposed_s = max(0.0, exposed_s - early_s)
        total.exposed_transfer_s += count * exposed_s
        tile_launch_s = tiles * _tile_launches(schedule, heads) * hardware.launch_s
        total.launch_s += count * tile_launch_s
        covered_s = attention_s + exposed_s if schedule.merges else 0.0
        total.exposed_launch_s += count * max(0.0, tile_launch_s - covered_s)
    return total.seconds(transfer_name)


def _tile_launches(schedule: Schedule, heads: int) -> int:
    return TILE_LAUNCHES + 2 * heads if schedule.merges else GROUP_LAUNCHES


def _distinct(shape: ModelShape, schedule: Schedule) -> list[tuple[LayerShape, int, float | None]]:
    """Layers with equal shape and streamed share, and how many; the share is None where nothing is offloaded."""
    shares = iter(schedule.streamed_share)
    found: dict[tuple[LayerShape, float | None], int] = {}
    for layer in shape.layers:
        share = next(shares) if layer.is_offloaded and schedule.streamed_share else None
        found[layer, share] = found.get((layer, share), 0) + 1
    return [(layer, count, share) for (layer, share), count in found.items()]


def _transfer(hardware: Hardware, schedule: Schedule) -> tuple[float, str]:
    """Seconds per byte from the host to the device, and what bounds it."""
    link, dram = hardware.link_bytes_per_s * hardware.link_share, hardware.dram_bytes_per_s * hardware.dram_share
    ways = {"link": 1 / link, "DRAM": 1 / dram, "disk": schedule.disk_share / hardware.disk_read_bytes_per_s}
    slowest = max(ways, key=lambda name: ways[name])
    return ways[slowest], slowest


def _own_pairs(layer: LayerShape, chunk: float, tokens: int) -> float:
    """Pairs of tokens that a layer scores in each chunk beside the growing past: all of them, where it has a window."""
    if not layer.window_tokens:
        return chunk * chunk / 2
    window = min(layer.window_tokens, tokens)
    return chunk * (window - window * window / 2 / tokens)


def _positive_sum(first: float, slope: float, step: float, count: int) -> float:
    """Sum of max(0, first + slope * p) for p = 0, step, 2 step, ... (count terms)."""
    if slope == 0.0:
        return max(0.0, first) * count
    crossing = -first / slope / step
    begin, end = (0, min(count, max(0, math.ceil(crossing)))) if slope < 0 else (max(0, math.ceil(crossing)), count)
    terms = max(end - begin, 0)
    return max(0.0, terms * first + slope * step * (begin + end - 1) * terms / 2)


@dataclass(frozen=True)
class OperatingPoint:
    """One layer's attention as a point under the roofline; rates in FLOP/s, bytes_moved in `memory` per pass."""

    phase: str
    tokens: int
    memory: str
    flops: float
    bytes_moved: float
    flops_per_s: float
    bound: str

    @property
    def intensity(self) -> float:
        """FLOP per byte."""
        return self.flops / self.bytes_moved


def operating_points(
    layer: LayerShape, flops_per_s: float, device_bytes_per_s: float, link_bytes_per_s: float,
    contexts: Sequence[int], element_bytes: int = 2, *, heads: int | None = None,
) -> list[OperatingPoint]:  # fmt: skip
    """Prefill and decode of one layer (or of `heads` of its KV heads) from device memory and from the host.

    As the paper counts: every query sees every key (no causal half); device bytes are Q, K, V and the output, link
    bytes K and V. Attained: min(FLOP/s, intensity * bytes/s).
    """
    part = (heads or layer.kv_heads) / layer.kv_heads
    points = []
    for phase in ("prefill", "decode"):
        for tokens in contexts:
            queries = tokens if phase == "prefill" else 1
            flops = layer.flops_per_pair * queries * tokens * part
            kv = layer.kv_bytes_per_token(element_bytes) * tokens * part
            io = layer.query_heads * (layer.key_dim + layer.value_dim) * queries * element_bytes * part
            for memory, moved, rate in (("device", kv + io, device_bytes_per_s), ("link", kv, link_bytes_per_s)):
                attained = min(flops_per_s, flops / moved * rate)
                bound = "compute" if attained == flops_per_s else ("device memory" if memory == "device" else "link")
                points.append(OperatingPoint(phase, tokens, memory, flops, moved, attained, bound))
    return points
