"""The cost model: predicted seconds of prefill and decode, their components, and the resource that bounds them.

In each layer of each forward pass three streams run at the same time, and the longest one counts:

    compute stream      The linear layers, then attention on the chunk and on the past, and the merging of tiles.
    copy stream         Tiles that are not resident, from the host to the device. They are copied during attention; a
                        prefetched first tile is copied during the linear layers before it.
    write-back stream   New KV, from the device to the host, during attention and linear layers. It uses the other
                        direction of the link.

In decode the host's CPU may attend to a share of the past meanwhile (cpu_share.py), as a fourth chain.

The past grows by one chunk per forward pass, so the seconds of each stream are linear in the number of past tokens. The
sums over chunks have closed forms, see overlap.py.

Attention in prefill leaves multiprocessors idle in its last wave of blocks, and a slower kernel serves the chunk itself
and the rest of the past that is no multiple of block_tokens, half of block_tokens on average (tiles.py).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from headinfer.plan.cpu_share import CLEARLY, HostWay, best_share, cpu_slowdown, host_tokens, shared_rates
from headinfer.plan.hardware import Hardware
from headinfer.plan.model_shape import LayerShape, ModelShape
from headinfer.plan.overlap import LayerChunks
from headinfer.plan.seconds import Seconds, SecondsSum
from headinfer.plan.tiles import (
    MERGE_BYTES,
    TILE_LAUNCHES,
    TileRates,
    busy_share_of_groups,
    kernel_calls,
    rest_factor,
    tile_copies,
)

__all__ = [
    "Schedule",
    "decode_seconds",
    "fastest_share",
    "prefill_seconds",
]

# Kernels that eager PyTorch queues for one decoder layer of transformers: norms, projections, rotary embedding, MLP and
# residuals.
LAYER_LAUNCHES = 40
# What the streaming heads of a layer take to queue, in kernels: about 40 operations of torch for window, positions,
# mask, attention and output, of which half are small ones on the host.
WINDOW_LAUNCHES = 20
# Kernels, copies and events that are queued for a head group that is copied whole: K and V in and out, and attention.
GROUP_LAUNCHES = 10
# Kernels and copies that are queued for what the host's CPU computes: packing, two copies, merging, output.
HOST_LAUNCHES = 8
_TILE_KERNELS = 2  # attention and the merge; events take little time on the host
_RESULT_ITEM_BYTES = 4


@dataclass(frozen=True)
class Schedule:
    """What a method copies, and when.

    Attributes:
        chunk_tokens: tokens of one forward pass in prefill.
        resident_tokens: for each offloaded layer, the number of a row's first tokens that stay on the device and do
            not cross the link; empty if the method uses no link.
        prefill_tile: KV heads and tokens of a tile in prefill.
        decode_tile: KV heads and tokens of a tile in decode.
        merges: whether a tile holds a part of a head's tokens, so that the results of tiles are merged, as headinfer
            does. Tiles are then queued ahead of the device. The paper's groups, which hold all tokens of their heads,
            are not, as its table 7 shows (arXiv 2502.12574).
        writes_back: whether new KV is written back to the host.
        kv_scale: bytes of stored KV for each byte of KV in the model's dtype.
        kv_bits: bits of an element of KV that is stored quantised; 0 if it is not. Resident KV counts as such KV too.
        disk_share: the share of the streamed bytes that is read from disk.
        prefetches_next_layer: whether a layer's first tile is copied while the layer before it computes.
        cpu_share: in decode, the share of the streamed tokens that the host's CPU attends to.
        decode_tokens: new tokens of each row in a decode step: more than one if guesses are verified.
    """

    chunk_tokens: int
    resident_tokens: tuple[int, ...] = ()
    prefill_tile: tuple[int, int] = (1, 1)
    decode_tile: tuple[int, int] = (1, 1)
    merges: bool = False
    writes_back: bool = False
    kv_scale: float = 1.0
    kv_bits: int = 0
    disk_share: float = 0.0
    prefetches_next_layer: bool = False
    cpu_share: float = 0.0
    decode_tokens: int = 1


def prefill_seconds(
    shape: ModelShape,
    hardware: Hardware,
    tokens: int,
    schedule: Schedule,
    dtype: str = "bfloat16",
    weight_bits: int = 16,
    rows: int = 1,
) -> Seconds:
    """Predict the seconds of a prefill.

    Args:
        shape: the model.
        hardware: the machine.
        tokens: tokens of each row of the batch, read in chunks.
        schedule: what is copied, and when.
        dtype: the model's dtype.
        weight_bits: bits of a stored weight.
        rows: rows of the batch.

    Returns:
        The seconds of all chunks.
    """
    bytes_per_s = hardware.attained_device_bytes_per_s
    attention_flops_per_s = hardware.attained_attention_flops_per_s(dtype)
    weight_bytes_per_s = hardware.attained_weight_bytes_per_s(dtype)
    element_bytes = 4 if dtype == "float32" else 2
    transfer_s_per_byte, transfer_name = _transfer(hardware, schedule)
    rates = hardware.tile_rates(dtype)
    chunks = max(math.ceil(tokens / schedule.chunk_tokens), 1)
    chunk = tokens / chunks
    total = SecondsSum()

    linear_flop_s = 2 * shape.active_weights * chunk * rows / hardware.attained_flops_per_s(dtype)
    linear_byte_s = sum(layer.weights for layer in shape.layers) * weight_bits / 8 / weight_bytes_per_s
    head_s = shape.head_weights * weight_bits / 8 / weight_bytes_per_s
    total.linear_s = chunks * (max(linear_flop_s, linear_byte_s) + head_s)
    total.device_memory_s = chunks * head_s
    if linear_flop_s >= linear_byte_s:
        total.compute_s += chunks * linear_flop_s
    else:
        total.device_memory_s += chunks * linear_byte_s

    launches = chunks * _layer_launches(shape) * hardware.launch_s
    total.launch_s = launches
    total.exposed_launch_s = launches if hardware.is_host else max(0.0, launches - total.linear_s)

    linear_s = max(linear_flop_s, linear_byte_s) / len(shape.layers)
    for layer, count, resident in _distinct(shape, schedule):
        heads, tile_tokens = schedule.prefill_tile
        heads = layer.kv_heads if resident is None else min(heads, layer.kv_heads)
        busy = 1.0 if hardware.is_host else _busy_share(rates, layer, heads, chunk)
        pair_s = layer.flops_per_pair * rows / (attention_flops_per_s * busy)
        causal_s = pair_s * _own_pairs(layer, chunk, tokens) / rates.rest_share
        past_sum = chunk * chunks * (chunks - 1) / 2
        seen_sum = 0.0 if layer.window_tokens else past_sum
        kv_bytes = layer.stored_bytes_per_token(element_bytes, schedule.kv_bits) * schedule.kv_scale * rows
        flop_slope = pair_s * chunk
        byte_slope = kv_bytes / hardware.attained_kv_bytes_per_s
        # A past that is no multiple of block_tokens has a rest of half of them, on average, and each tile has its own.
        rest_first_s = flop_slope * (rest_factor(rates, 1, 1) - 1) * rates.block_tokens / 2 if seen_sum else 0.0
        decoded_slope = 0.0 if resident is None else _dequantise_s(layer, hardware, schedule, element_bytes) * rows
        attention_s = chunks * causal_s + (max(flop_slope, byte_slope) + decoded_slope) * seen_sum
        total.attention_s += count * attention_s
        total.device_memory_s += count * decoded_slope * seen_sum
        if flop_slope >= byte_slope:
            total.compute_s += count * (attention_s - decoded_slope * seen_sum)
        else:
            total.compute_s += count * chunks * causal_s
            total.device_memory_s += count * byte_slope * seen_sum
        if resident is None:
            rest_s = (chunks - 1) * rest_first_s
            total.attention_s += count * rest_s
            total.compute_s += count * rest_s
            continue
        rest_slope = flop_slope * (rest_factor(rates, tile_tokens, tile_tokens % rates.block_tokens) - 1)
        copies = tile_copies(heads, tile_tokens) if schedule.merges else 2
        groups = math.ceil(layer.kv_heads / heads)
        output_s = rows * layer.query_heads * layer.value_dim * chunk * MERGE_BYTES / bytes_per_s
        merge_s = output_s if schedule.merges else 0.0
        back_s = chunk * kv_bytes / (hardware.link_back_bytes_per_s * hardware.link_share)
        tile_s = min(tile_tokens, max(tokens - resident, 0)) * heads / layer.kv_heads * kv_bytes * transfer_s_per_byte
        layer_chunks = LayerChunks(
            chunks=chunks,
            chunk_tokens=chunk,
            resident_tokens=resident,
            attention_first_s=causal_s,
            attention_s_per_token=max(flop_slope, byte_slope) + decoded_slope,
            merge_first_s=merge_s,
            merge_s_per_token=merge_s * kernel_calls(rates, tile_tokens) / tile_tokens,
            rest_first_s=rest_first_s,
            rest_s_per_token=rest_slope,
            fetch_s_per_token=kv_bytes * transfer_s_per_byte + groups * rows * copies * rates.copy_s / tile_tokens,
            back_s=back_s if schedule.writes_back else 0.0,
            early_s=min(tile_s, linear_s) if schedule.prefetches_next_layer else 0.0,
            back_early_s=linear_s,
        )
        total.attention_s += count * layer_chunks.rest_s
        total.compute_s += count * layer_chunks.rest_s
        total.merge_s += count * layer_chunks.merge_s
        total.transfer_s += count * layer_chunks.transfer_s
        exposed_s = layer_chunks.exposed_s
        if schedule.merges and not schedule.prefetches_next_layer:
            # Only the chunk's attention on itself hides the first tile of a layer.
            exposed_s += max(0.0, tile_s - causal_s * heads / layer.kv_heads) * layer_chunks.streaming_chunks
        total.exposed_transfer_s += count * exposed_s
        passes = layer_chunks.streamed_tokens / tile_tokens
        passes += layer_chunks.streaming_chunks if schedule.merges else chunks
        tile_launch_s = groups * passes * _tile_launches(schedule, copies) * hardware.launch_s
        total.launch_s += count * tile_launch_s
        covered_s = 0.0
        if schedule.merges:
            covered_s = attention_s + layer_chunks.rest_s + layer_chunks.merge_s + exposed_s
        total.exposed_launch_s += count * max(0.0, tile_launch_s - covered_s)
    return total.seconds(transfer_name)


def decode_seconds(
    shape: ModelShape,
    hardware: Hardware,
    past_tokens: int,
    schedule: Schedule,
    dtype: str = "bfloat16",
    weight_bits: int = 16,
    rows: int = 1,
) -> Seconds:
    """Predict the seconds of a decode step.

    Args:
        shape: the model.
        hardware: the machine.
        past_tokens: tokens of each row before the new one.
        schedule: what is copied, and when.
        dtype: the model's dtype.
        weight_bits: bits of a stored weight.
        rows: rows of the batch, each of which gets schedule.decode_tokens.

    Returns:
        The seconds of one forward pass.
    """
    flops_per_s = hardware.attained_flops_per_s(dtype)
    element_bytes = 4 if dtype == "float32" else 2
    own_s_per_byte, transfer_name = _transfer(hardware, schedule)
    weights = shape.active_weights + shape.head_weights
    new_tokens = rows * schedule.decode_tokens
    flop_s = 2 * weights * new_tokens / flops_per_s
    byte_s = weights * weight_bits / 8 / hardware.attained_weight_bytes_per_s(dtype)
    total = SecondsSum(linear_s=max(flop_s, byte_s))
    if flop_s > byte_s:
        total.compute_s = flop_s
    else:
        total.device_memory_s = byte_s
    total.launch_s = _layer_launches(shape) * hardware.launch_s
    total.exposed_launch_s = total.launch_s if hardware.is_host else max(0.0, total.launch_s - total.linear_s)
    linear_s = total.linear_s / len(shape.layers)
    for layer, count, resident in _distinct(shape, schedule):
        token_bytes = layer.stored_bytes_per_token(element_bytes, schedule.kv_bits) * schedule.kv_scale * rows
        seen = layer.seen_tokens(past_tokens)
        wanted = max(seen - resident, 0) if resident is not None else 0
        on_host = host_tokens(schedule.cpu_share, wanted)
        on_device = seen - on_host
        streamed = wanted - on_host
        kv_bytes = on_device * token_bytes
        flop_s = layer.flops_per_pair * on_device * new_tokens / flops_per_s
        group = layer.query_heads // layer.kv_heads
        slowdown = cpu_slowdown(hardware, group, group * schedule.decode_tokens) if hardware.is_host else 1.0
        byte_s = kv_bytes / hardware.attained_kv_bytes_per_s * slowdown
        decoded_s = (
            0.0 if hardware.is_host else streamed * _dequantise_s(layer, hardware, schedule, element_bytes) * rows
        )
        attention_s = max(flop_s, byte_s) + decoded_s
        total.attention_s += count * attention_s
        total.device_memory_s += count * decoded_s
        if flop_s > byte_s:
            total.compute_s += count * flop_s
        else:
            total.device_memory_s += count * byte_s
        chain_s = 0.0
        transfer_s_per_byte = own_s_per_byte
        if on_host:
            rates = shared_rates(hardware, group * schedule.decode_tokens)
            way = host_way(layer, hardware, wanted, schedule, element_bytes, rows, rates.link_bytes_per_s)
            cpu_s_per_byte = 1 / rates.cpu_bytes_per_s if rates.cpu_bytes_per_s else math.inf
            chain_s = on_host * token_bytes * cpu_s_per_byte + way.fixed_s + streamed / wanted * way.queue_s
            transfer_s_per_byte = max(own_s_per_byte, 1 / rates.link_bytes_per_s)
        if not streamed:
            total.exposed_transfer_s += count * max(0.0, chain_s - attention_s)
            continue
        heads, tile_tokens = schedule.decode_tile
        heads = min(heads, layer.kv_heads)
        copies = tile_copies(heads, tile_tokens) if schedule.merges else 2
        tiles = math.ceil(layer.kv_heads / heads) * math.ceil(streamed / tile_tokens)
        transfer_s = streamed / on_device * kv_bytes * transfer_s_per_byte + tiles * rows * copies * hardware.copy_s
        total.transfer_s += count * transfer_s
        # While the last tile is computed, only the first tile of the next layer can be copied.
        tile_share = min(tile_tokens, streamed) / streamed * heads / layer.kv_heads
        last_s = attention_s * streamed / on_device * tile_share
        early_s = min(transfer_s * tile_share, linear_s + last_s) if schedule.prefetches_next_layer else 0.0
        exposed_s = max(0.0, transfer_s - attention_s + last_s - early_s, chain_s - attention_s)
        total.exposed_transfer_s += count * exposed_s
        tile_launch_s = tiles * _tile_launches(schedule, copies) * hardware.launch_s
        total.launch_s += count * tile_launch_s
        covered_s = attention_s + exposed_s if schedule.merges else 0.0
        total.exposed_launch_s += count * max(0.0, tile_launch_s - covered_s)
    return total.seconds(transfer_name)


def _dequantise_s(layer: LayerShape, hardware: Hardware, schedule: Schedule, element_bytes: int) -> float:
    """Return the seconds in which a token of one row is dequantised for a kernel that takes exact KV.

    Quantised bytes are read and exact ones written, at the rate at which attention reads KV.
    """
    if not schedule.kv_bits or not layer.is_offloaded:
        return 0.0
    read = layer.stored_bytes_per_token(element_bytes, schedule.kv_bits)
    written = layer.stored_bytes_per_token(element_bytes, 0)
    return (read + written) / hardware.attained_kv_bytes_per_s


def host_way(
    layer: LayerShape,
    hardware: Hardware,
    streamed_tokens: int,
    schedule: Schedule,
    element_bytes: int,
    rows: int,
    link_bytes_per_s: float,
) -> HostWay:
    """Return what the host's chain takes for a layer beside the CPU's kernel and the linear layers.

    The queries and the results are one copy each, and the merge and the output are a few kernels. Tiles are queued
    before the kernel begins. A result may wait for a tile that is being copied. But if the link is behind, the merge
    waits for that tile in any case, and if the link is ahead, all slots are full and nothing is being copied.

    Args:
        layer: the layer.
        hardware: the machine.
        streamed_tokens: tokens of each row that the layer streams without the CPU.
        schedule: the tiles of decode.
        element_bytes: bytes of an element of K and V.
        rows: rows of the batch.
        link_bytes_per_s: the rate of the link meanwhile.
    """
    heads, tile_tokens = schedule.decode_tile
    heads = min(heads, layer.kv_heads)
    tiles = math.ceil(layer.kv_heads / heads) * math.ceil(streamed_tokens / tile_tokens) * rows
    query_rows = rows * layer.query_heads * schedule.decode_tokens
    query_s = query_rows * layer.key_dim * element_bytes / (hardware.link_back_bytes_per_s * hardware.link_share)
    result_s = query_rows * (layer.value_dim + 1) * _RESULT_ITEM_BYTES / link_bytes_per_s
    fixed_s = query_s + result_s + 2 * hardware.copy_s + HOST_LAUNCHES * hardware.launch_s
    return HostWay(fixed_s, tiles * (_TILE_KERNELS + tile_copies(heads, tile_tokens)) * hardware.launch_s)


def fastest_share(
    shape: ModelShape,
    hardware: Hardware,
    past_tokens: int,
    schedule: Schedule,
    dtype: str = "bfloat16",
    weight_bits: int = 16,
    rows: int = 1,
) -> float:
    """Return the share of the CPU with which decode is fastest, for the layer that streams most; see best_share().

    Args:
        shape: the model.
        hardware: the machine.
        past_tokens: tokens of each row before the new ones.
        schedule: what is copied, and when, without the CPU.
        dtype: the model's dtype.
        weight_bits: bits of a stored weight.
        rows: rows of the batch.
    """
    if hardware.is_host or schedule.disk_share:
        return 0.0
    element_bytes = 4 if dtype == "float32" else 2
    streamed_bytes = {}
    for layer, _, resident in _distinct(shape, schedule):
        if resident is not None:
            streamed = max(layer.seen_tokens(past_tokens) - resident, 0)
            token_bytes = layer.stored_bytes_per_token(element_bytes, schedule.kv_bits) * rows
            streamed_bytes[layer, streamed] = streamed * token_bytes
    layer, streamed = max(streamed_bytes, key=lambda one: streamed_bytes[one])
    if not streamed:
        return 0.0
    rates = shared_rates(hardware, layer.query_heads // layer.kv_heads * schedule.decode_tokens)
    way = host_way(layer, hardware, streamed, schedule, element_bytes, rows, rates.link_bytes_per_s)
    without = dataclasses.replace(schedule, cpu_share=0.0)
    seconds = decode_seconds(shape, hardware, past_tokens, without, dtype, weight_bits, rows)
    linear_s = max(seconds.linear_s / len(shape.layers), LAYER_LAUNCHES * hardware.launch_s)
    with_linear = HostWay(way.fixed_s + linear_s, way.queue_s)
    share = best_share(streamed_bytes[layer, streamed], rates, with_linear)
    if not share:
        return 0.0
    # The closed form does not count what the link and the device take beside the bytes of K and V.
    found = decode_seconds(
        shape, hardware, past_tokens, dataclasses.replace(schedule, cpu_share=share), dtype, weight_bits, rows
    )
    return share if found.total_s < CLEARLY * seconds.total_s else 0.0


def _layer_launches(shape: ModelShape) -> int:
    """Return what is queued for all layers in a pass, without tiles."""
    with_window = sum(layer.streaming_heads > 0 for layer in shape.layers)
    return len(shape.layers) * LAYER_LAUNCHES + with_window * WINDOW_LAUNCHES


def _tile_launches(schedule: Schedule, copies: float) -> float:
    return TILE_LAUNCHES + copies if schedule.merges else GROUP_LAUNCHES


def _busy_share(rates: TileRates, layer: LayerShape, heads: int, chunk: float) -> float:
    """Return the share of the device that a chunk's attention keeps busy, with `heads` KV heads at a time."""
    if not layer.flops_per_pair:
        return 1.0
    query_rows = math.ceil(layer.query_heads / layer.kv_heads * chunk)
    return busy_share_of_groups(rates, layer.kv_heads, min(heads, layer.kv_heads), query_rows)


def _distinct(shape: ModelShape, schedule: Schedule) -> list[tuple[LayerShape, int, int | None]]:
    """Group the layers of equal shape and resident tokens.

    Returns:
        For each group its layer, the number of layers, and the resident tokens, None if the layer does not stream. A
        layer with streaming heads counts as two: its full heads, and its streaming heads, which are on the device.
    """
    residents = iter(schedule.resident_tokens)
    found: dict[tuple[LayerShape, int | None], int] = {}
    for layer in shape.layers:
        for part in layer.attention_parts:
            resident = next(residents) if part.is_offloaded and schedule.resident_tokens else None
            found[part, resident] = found.get((part, resident), 0) + 1
    return [(layer, count, resident) for (layer, resident), count in found.items()]


def _transfer(hardware: Hardware, schedule: Schedule) -> tuple[float, str]:
    """Return the seconds per byte from the host to the device, and the name of what bounds them."""
    link = hardware.link_bytes_per_s * hardware.link_share
    dram = hardware.dram_bytes_per_s * hardware.dram_share
    ways = {"link": 1 / link, "DRAM": 1 / dram, "disk": schedule.disk_share / hardware.disk_read_bytes_per_s}
    slowest = max(ways, key=lambda name: ways[name])
    return ways[slowest], slowest


def _own_pairs(layer: LayerShape, chunk: float, tokens: int) -> float:
    """Return the pairs of tokens that a chunk's attention scores apart from the growing past.

    In a layer without a window these are the pairs within the chunk; in a layer with a window they are all pairs.
    """
    if not layer.window_tokens:
        return chunk * chunk / 2
    window = min(layer.window_tokens, tokens)
    return chunk * (window - window * window / 2 / tokens)
