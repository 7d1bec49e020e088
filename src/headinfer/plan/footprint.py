"""The memory model: bytes on the device, in host RAM and on disk, by component and method.

The bytes on the device are these sums:

    device            weights + activations of a chunk + KV on the device + overhead
    KV on the device  resident KV + ring + tails + write-back buffers + buffers of the exchange with the host
                      + windows of streaming heads + windows and states of other layers
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from headinfer.plan.model_shape import LayerShape, ModelShape
from headinfer.plan.tiles import RING_SLOTS, SEGMENT_TOKENS, ring_slot_bytes
from headinfer.utils.kv_format import DECODED_ELEMENTS

__all__ = [
    "BASELINES",
    "OFFLOADED",
    "Footprint",
    "activation_bytes",
    "baseline_footprint",
    "exchange_bytes",
    "host_kv_tokens",
    "layer_exchange_bytes",
    "resident_tokens",
    "streaming_footprint",
    "tail_bytes",
    "weight_bytes",
    "write_back_bytes",
]

TAIL_UNIT_TOKENS = 128  # as in kv/layer_kv.py, which a test checks
# K of one layer of Llama-3-8B for a chunk of 8,192 tokens, which is then packed without a wait.
_WRITE_BACK_BYTES = 16 * 2**20
_EXCHANGE_BUFFERS = 2  # as in kv/exchange.py
_RESULT_ITEM_BYTES = 4  # as in kv/exchange.py
BASELINES = ("standard", "chunked prefill", "4-bit KV", "layer-wise offload", "head-wise (paper)")
_CHUNKED = ("chunked prefill", "head-wise (paper)")
OFFLOADED = ("layer-wise offload", "head-wise (paper)")
ActivationRule = Callable[[ModelShape, int, int], int]


@dataclass(frozen=True)
class Footprint:
    """Bytes that a job needs at its longest context, by component.

    Attributes:
        weights_bytes: the weights.
        activation_bytes: the activations of a chunk, at their peak, with KV that is dequantised.
        overhead_bytes: device memory for the driver, libraries and the allocator.
        resident_bytes: KV that stays on the device; it is written through to host RAM as well.
        ring_bytes: the ring that streams KV to the device.
        tail_bytes: the newest tokens of all layers, on the device.
        spare_tail_bytes: memory for one more tail, since reordering rows copies a tail.
        staging_bytes: the two write-back buffers.
        exchange_bytes: the buffers for queries that the host's CPU answers, and for its results: as many bytes on the
            device as in host RAM.
        window_bytes: KV of streaming heads (utils/head_pattern.py), on the device.
        local_bytes: KV and states of the layers without full attention, on the device.
        host_kv_bytes: KV in host RAM.
        disk_kv_bytes: KV on disk.
        host_overhead_bytes: host RAM for the process and the system.
    """

    weights_bytes: int
    activation_bytes: int
    overhead_bytes: int = 0
    resident_bytes: int = 0
    ring_bytes: int = 0
    tail_bytes: int = 0
    spare_tail_bytes: int = 0
    staging_bytes: int = 0
    exchange_bytes: int = 0
    window_bytes: int = 0
    local_bytes: int = 0
    host_kv_bytes: int = 0
    disk_kv_bytes: int = 0
    host_overhead_bytes: int = 0

    @property
    def device_kv_budget_bytes(self) -> int:
        """The bytes that count against device_kv_budget_bytes: all device KV of the full-attention layers."""
        buffers = self.ring_bytes + self.staging_bytes + self.exchange_bytes
        return self.resident_bytes + buffers + self.tail_bytes + self.spare_tail_bytes + self.window_bytes

    @property
    def device_kv_bytes(self) -> int:
        """All KV on the device, with the windows and states of the layers without full attention."""
        return self.device_kv_budget_bytes + self.local_bytes

    @property
    def device_bytes(self) -> int:
        """The device memory in all."""
        return self.weights_bytes + self.activation_bytes + self.overhead_bytes + self.device_kv_bytes

    @property
    def host_bytes(self) -> int:
        """The host RAM in all. If the device is the host's CPU, `device_bytes` is host RAM too and comes on top."""
        return self.host_kv_bytes + self.exchange_bytes + self.host_overhead_bytes

    @property
    def total_kv_bytes(self) -> int:
        """KV of the whole context in all tiers. Resident KV that host RAM holds as well is counted once."""
        offloaded = self.host_kv_bytes + self.disk_kv_bytes
        return (offloaded or self.resident_bytes) + self.window_bytes + self.local_bytes


def weight_bytes(shape: ModelShape, weight_bits: int) -> int:
    """Return the bytes of all weights."""
    return shape.weights * weight_bits // 8


def activation_bytes(shape: ModelShape, chunk_tokens: int, element_bytes: int) -> int:
    """Return the peak of a forward pass over a chunk, which is that of the MLP or of attention.

    H is the hidden size and I the MLP's inner size. The MLP holds gate, up and their product (3 I elements a token),
    and the residual and norms (4 H), in the model's dtype. Attention holds the residual and its norm (2 H), Q, K, V and
    the output, in the model's dtype, and two float32 states (out and lse) of a head group: the running one and a
    tile's. All heads are counted as one group.

    Args:
        shape: the model.
        chunk_tokens: tokens of the chunk, over all rows.
        element_bytes: bytes of an element in the model's dtype.

    Returns:
        The bytes. The windows of sliding layers and streaming heads, and the scores of the last token over the
        vocabulary, in the model's dtype and in float32, are added to the peak.
    """
    mlp = (3 * shape.intermediate_size + 4 * shape.hidden_size) * element_bytes
    attention = max(_attention_token_bytes(shape, layer, element_bytes) for layer in shape.layers)
    # A sliding layer concatenates its window and the chunk, and so do streaming heads.
    parts = [part for layer in shape.layers for part in layer.attention_parts]
    windows = (part.kv_bytes_per_token(element_bytes) * part.window_tokens for part in parts)
    return chunk_tokens * max(mlp, attention) + max(windows) + shape.vocab_size * (element_bytes + 4)


def _attention_token_bytes(shape: ModelShape, layer: LayerShape, element_bytes: int) -> int:
    heads = layer.query_heads
    value_dim = layer.value_dim
    kv = layer.kv_heads * (layer.key_dim + value_dim)
    io = 2 * shape.hidden_size + heads * (layer.key_dim + value_dim) + kv
    states = 2 * heads * (value_dim + 1) * 4 if layer.is_offloaded or layer.streaming_heads else 0
    return io * element_bytes + states


def baseline_footprint(
    shape: ModelShape,
    method: str,
    tokens: int,
    *,
    chunk_tokens: int,
    element_bytes: int = 2,
    weight_bits: int = 16,
    heads_per_group: int = 1,
    overhead_bytes: int = 0,
    host_overhead_bytes: int = 0,
    rows: int = 1,
    activations: ActivationRule = activation_bytes,
) -> Footprint:
    """Return what one of BASELINES needs, as arXiv 2502.12574 defines them in section 4.2.

    4-bit KV has four bits an element and no scales. Offloading keeps the KV of two layers (layer-wise) or of two head
    groups of one layer (head-wise) on the device: one is computed while the other is copied.

    Args:
        shape: the model.
        method: one of BASELINES.
        tokens: the context, of each row.
        chunk_tokens: tokens of a chunk, for the methods that read in chunks.
        element_bytes: bytes of an element of the KV and the activations.
        weight_bits: bits of a stored weight.
        heads_per_group: KV heads of a group of the head-wise method.
        overhead_bytes: device memory for the driver, libraries and the allocator.
        host_overhead_bytes: host RAM for the process and the system.
        rows: rows of the batch.
        activations: the rule for the bytes of activations.

    Returns:
        The footprint.
    """
    kv_bytes = tokens * shape.kv_bytes_per_token(element_bytes) * rows
    largest = max(_offloaded(shape), key=lambda x: x.kv_bytes_per_token(1))
    layer_bytes = tokens * largest.kv_bytes_per_token(element_bytes) * rows
    group = min(heads_per_group, largest.kv_heads)
    ring_bytes = {
        "layer-wise offload": 2 * layer_bytes,
        "head-wise (paper)": 2 * layer_bytes * group // largest.kv_heads,
    }
    resident = kv_bytes // (2 * element_bytes) if method == "4-bit KV" else kv_bytes
    read_at_once = min(chunk_tokens, tokens) if method in _CHUNKED else tokens
    return Footprint(
        weights_bytes=weight_bytes(shape, weight_bits),
        activation_bytes=activations(shape, read_at_once * rows, element_bytes),
        overhead_bytes=overhead_bytes,
        resident_bytes=0 if method in OFFLOADED else resident,
        ring_bytes=ring_bytes.get(method, 0),
        window_bytes=shape.window_bytes(element_bytes) * rows,
        local_bytes=shape.local_kv_bytes(tokens, element_bytes) * rows,
        host_kv_bytes=kv_bytes if method in OFFLOADED else 0,
        host_overhead_bytes=host_overhead_bytes,
    )


def write_back_bytes(budget_bytes: int) -> int:
    """Return the bytes of one of the two write-back buffers under a streaming budget."""
    return min(_WRITE_BACK_BYTES, budget_bytes // 16 // 256 * 256)


def exchange_bytes(shape: ModelShape, element_bytes: int, query_tokens: int, rows: int = 1) -> int:
    """Return the device bytes for the queries that the host's CPU answers, and for its results (kv/exchange.py).

    Args:
        shape: the model.
        element_bytes: bytes of an element of the queries.
        query_tokens: new tokens of each row.
        rows: rows of the batch.
    """

    def of_layer(layer: LayerShape) -> int:
        query_rows = rows * layer.query_heads * query_tokens
        return layer_exchange_bytes(query_rows, layer.key_dim, layer.value_dim, element_bytes)

    return max(map(of_layer, _offloaded(shape)), default=0)


def layer_exchange_bytes(query_rows: int, key_dim: int, value_dim: int, element_bytes: int) -> int:
    """Return the device bytes of one layer's queries, of their results and of the log-sum-exps, in all buffers.

    Args:
        query_rows: query rows of all heads and of the whole batch.
        key_dim: the head dim of the queries.
        value_dim: the head dim of the values.
        element_bytes: bytes of an element of the queries.
    """
    return _EXCHANGE_BUFFERS * query_rows * (key_dim * element_bytes + (value_dim + 1) * _RESULT_ITEM_BYTES)


def tail_bytes(shape: ModelShape, element_bytes: int, rows: int = 1) -> tuple[int, int]:
    """Return the device bytes of all tails, and of the largest one."""
    tails = [2 * TAIL_UNIT_TOKENS * layer.kv_bytes_per_token(element_bytes) * rows for layer in _offloaded(shape)]
    return sum(tails), max(tails, default=0)


def host_kv_tokens(tokens: int) -> int:
    """Return the tokens for which a layer's KV allocates host memory at a known final length.

    A segment for the rest of the length, of at most 16,384 tokens, is allocated when it is first written to. The tokens
    in the tail need no host memory, so a context that fits the tail allocates none.
    """
    if tokens <= 2 * TAIL_UNIT_TOKENS:
        return 0
    written = (tokens // TAIL_UNIT_TOKENS - 1) * TAIL_UNIT_TOKENS
    return min(-(-tokens // TAIL_UNIT_TOKENS) * TAIL_UNIT_TOKENS, -(-written // SEGMENT_TOKENS) * SEGMENT_TOKENS)


def resident_tokens(room_bytes: int, layers: int, token_bytes: int, rows: int, host_tokens: int) -> int:
    """Return the number of each row's first tokens that one offloaded layer keeps on the device, for all KV heads.

    Args:
        room_bytes: device memory for the resident KV of all layers, which is divided in equal parts.
        layers: the number of offloaded layers.
        token_bytes: bytes of K and V of one token of one row of this layer.
        rows: rows of the batch.
        host_tokens: tokens that the host holds, see `host_kv_tokens`. If all of them are resident, nothing streams.

    Returns:
        The tokens, a multiple of TAIL_UNIT_TOKENS unless all are resident.
    """
    fitting = max(room_bytes, 0) // (layers * token_bytes * rows) // TAIL_UNIT_TOKENS * TAIL_UNIT_TOKENS
    return min(fitting, host_tokens)


def streaming_footprint(
    shape: ModelShape,
    tokens: int,
    *,
    chunk_tokens: int,
    streaming_bytes: int | None,
    resident_tokens: Sequence[int] | None = None,
    element_bytes: int = 2,
    weight_bits: int = 16,
    overhead_bytes: int = 0,
    host_overhead_bytes: int = 0,
    rows: int = 1,
    exchange: int = 0,
    kv_bits: int = 0,
) -> Footprint:
    """Return what headinfer needs.

    Args:
        shape: the model.
        tokens: the context, of each row.
        chunk_tokens: tokens of a chunk.
        streaming_bytes: the device budget for ring, tails, windows and buffers; None if KV is read in place.
        resident_tokens: for each offloaded layer, the tokens that also stay on the device. If these are all tokens that
            the host holds, no ring is allocated. None for a ring and no resident tokens.
        element_bytes: bytes of an element of the KV and the activations.
        weight_bits: bits of a stored weight.
        overhead_bytes: device memory for the driver, libraries and the allocator.
        host_overhead_bytes: host RAM for the process and the system.
        rows: rows of the batch.
        exchange: bytes of the exchange with the host, see exchange_bytes(); 0 if its CPU attends to nothing.
        kv_bits: bits of an element of KV in host memory; 0 for the dtype of the activations. KV on the device is not
            quantised. Some of what streams is dequantised at a time, and counts as an activation.

    Returns:
        The footprint, with all KV in host RAM.

    Raises:
        CapacityError: the streaming budget leaves nothing for the ring.
    """
    tails, spare = tail_bytes(shape, element_bytes, rows)
    windows = shape.window_bytes(element_bytes) * rows
    host_tokens = host_kv_tokens(tokens)
    staging = 0
    ring = 0
    if streaming_bytes is not None:
        staging = 2 * write_back_bytes(streaming_bytes)
        ring = RING_SLOTS * ring_slot_bytes(streaming_bytes, tails + spare + staging + exchange + windows)
    resident = 0
    if resident_tokens is not None:
        offloaded = zip(_offloaded(shape), resident_tokens, strict=True)
        resident = sum(kept * layer.kv_bytes_per_token(element_bytes) * rows for layer, kept in offloaded)
        ring = 0 if min(resident_tokens) >= host_tokens else ring
    decoded = 2 * DECODED_ELEMENTS * element_bytes if kv_bits else 0
    host_kv = host_tokens * shape.stored_bytes_per_token(element_bytes, kv_bits) * rows
    return Footprint(
        weights_bytes=weight_bytes(shape, weight_bits),
        activation_bytes=activation_bytes(shape, min(chunk_tokens, tokens) * rows, element_bytes) + decoded,
        overhead_bytes=overhead_bytes,
        resident_bytes=resident,
        ring_bytes=ring,
        tail_bytes=tails,
        spare_tail_bytes=spare,
        staging_bytes=staging,
        exchange_bytes=exchange,
        window_bytes=windows,
        local_bytes=shape.local_kv_bytes(tokens, element_bytes) * rows,
        host_kv_bytes=host_kv,
        host_overhead_bytes=host_overhead_bytes,
    )


def _offloaded(shape: ModelShape) -> list[LayerShape]:
    """Return the layers whose KV is offloaded, with the heads that see the whole context."""
    return [layer.full_part for layer in shape.layers if layer.is_offloaded]
