"""The memory model: what lies on the device, in host RAM and on disk, by component and by method.

device = weights + activations of a chunk + KV on the device + overhead
KV on the device = resident + ring + tails + write-back buffers + what non-full layers keep there
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from headinfer.plan.model_shape import LayerShape, ModelShape
from headinfer.plan.tiles import RING_SLOTS, ring_slot_bytes

__all__ = [
    "BASELINES",
    "OFFLOADED",
    "Footprint",
    "activation_bytes",
    "baseline_footprint",
    "host_kv_tokens",
    "resident_tokens",
    "streaming_footprint",
    "tail_bytes",
    "weight_bytes",
    "write_back_bytes",
]

TAIL_UNIT_TOKENS = 128  # as kv/head_store.py; a test holds them together
SEGMENT_TOKENS = 16_384  # the largest, as there
_WRITE_BACK_BYTES = 16 * 2**20  # K of one layer of Llama-3-8B in a chunk of 8,192 tokens: packed without a wait
BASELINES = ("standard", "chunked prefill", "4-bit KV", "layer-wise offload", "head-wise (paper)")
_CHUNKED = ("chunked prefill", "head-wise (paper)")
OFFLOADED = ("layer-wise offload", "head-wise (paper)")
ActivationRule = Callable[[ModelShape, int, int], int]


@dataclass(frozen=True)
class Footprint:
    """Bytes of a job at its longest, by component. Resident KV is also in host RAM, written through.

    spare_tail_bytes: kept free in the budget, since reordering rows copies a tail.
    """

    weights_bytes: int
    activation_bytes: int
    overhead_bytes: int = 0
    resident_bytes: int = 0
    ring_bytes: int = 0
    tail_bytes: int = 0
    spare_tail_bytes: int = 0
    staging_bytes: int = 0
    local_bytes: int = 0
    host_kv_bytes: int = 0
    disk_kv_bytes: int = 0
    host_overhead_bytes: int = 0

    @property
    def device_kv_budget_bytes(self) -> int:
        """What counts against device_kv_budget_bytes: all KV of the full-attention layers on the device."""
        return sum((self.resident_bytes, self.ring_bytes, self.tail_bytes, self.spare_tail_bytes, self.staging_bytes))

    @property
    def device_kv_bytes(self) -> int:
        """All KV on the device: also the windows and states of the other layers."""
        return self.device_kv_budget_bytes + self.local_bytes

    @property
    def device_bytes(self) -> int:
        """Device memory in all."""
        return self.weights_bytes + self.activation_bytes + self.overhead_bytes + self.device_kv_bytes

    @property
    def host_bytes(self) -> int:
        """Host RAM in all (beside the device's, where the device is the host)."""
        return self.host_kv_bytes + self.host_overhead_bytes

    @property
    def total_kv_bytes(self) -> int:
        """KV of the whole context, wherever it lies; resident KV that the host has too is counted once."""
        offloaded = self.host_kv_bytes + self.disk_kv_bytes
        return (offloaded or self.resident_bytes) + self.local_bytes


def weight_bytes(shape: ModelShape, weight_bits: int) -> int:
    """Bytes of all weights."""
    return shape.weights * weight_bits // 8


def activation_bytes(shape: ModelShape, chunk_tokens: int, element_bytes: int) -> int:
    """Peak of a forward pass over a chunk: the larger of the MLP's and the attention's (DESIGN, section 3).

    MLP: gate, up and their product (3 I) beside the residual and norms (4 H), in the model's dtype. Attention: the
    residual and its norm (2 H), Q, K, V and the output in the model's dtype, and two float32 states of a head group
    (out and lse; the running one and the tile's), counted for all heads in one group.
    """
    mlp = (3 * shape.intermediate_size + 4 * shape.hidden_size) * element_bytes
    attention = max(_attention_token_bytes(shape, layer, element_bytes) for layer in shape.layers)
    # A sliding layer joins its window and the chunk; the last token's scores over the vocabulary, in float32 too.
    windows = (layer.kv_bytes_per_token(element_bytes) * layer.window_tokens for layer in shape.layers)
    return chunk_tokens * max(mlp, attention) + max(windows) + shape.vocab_size * (element_bytes + 4)


def _attention_token_bytes(shape: ModelShape, layer: LayerShape, element_bytes: int) -> int:
    heads, value_dim = layer.query_heads, layer.value_dim
    own = layer.kv_heads * (layer.key_dim + value_dim)
    io = 2 * shape.hidden_size + heads * (layer.key_dim + value_dim) + own
    return io * element_bytes + (2 * heads * (value_dim + 1) * 4 if layer.is_offloaded else 0)


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
    """What one of BASELINES needs at a context of `tokens`, as the paper defines them (section 4.2).

    4-bit KV counts four bits an element and no scales. Offloading holds two layers' KV (layer-wise) or two head
    groups' KV of one layer (head-wise) on the device: one is computed while the other comes.
    """
    kv_bytes = tokens * shape.kv_bytes_per_token(element_bytes) * rows
    largest = max((layer for layer in shape.layers if layer.is_offloaded), key=lambda x: x.kv_bytes_per_token(1))
    layer_bytes = tokens * largest.kv_bytes_per_token(element_bytes) * rows
    group = min(heads_per_group, largest.kv_heads)
    ring = {"layer-wise offload": 2 * layer_bytes, "head-wise (paper)": 2 * layer_bytes * group // largest.kv_heads}
    resident = kv_bytes // (2 * element_bytes) if method == "4-bit KV" else kv_bytes
    read_at_once = min(chunk_tokens, tokens) if method in _CHUNKED else tokens
    return Footprint(
        weights_bytes=weight_bytes(shape, weight_bits),
        activation_bytes=activations(shape, read_at_once * rows, element_bytes),
        overhead_bytes=overhead_bytes,
        resident_bytes=0 if method in OFFLOADED else resident,
        ring_bytes=ring.get(method, 0),
        local_bytes=shape.local_kv_bytes(tokens, element_bytes) * rows,
        host_kv_bytes=kv_bytes if method in OFFLOADED else 0,
        host_overhead_bytes=host_overhead_bytes,
    )


def write_back_bytes(budget_bytes: int) -> int:
    """Bytes of one of the two write-back buffers under a streaming budget."""
    return min(_WRITE_BACK_BYTES, budget_bytes // 16 // 256 * 256)


def tail_bytes(shape: ModelShape, element_bytes: int, rows: int = 1) -> tuple[int, int]:
    """Device bytes of all tails, and of one more."""
    tails = [2 * TAIL_UNIT_TOKENS * layer.kv_bytes_per_token(element_bytes) * rows for layer in _offloaded(shape)]
    return sum(tails), max(tails, default=0)


def host_kv_tokens(tokens: int) -> int:
    """Tokens that a store of known final length allocates in host memory: none while the tail holds them all.

    A segment of the rest of the length, or of 16,384 tokens, is allocated when it is written to; the tail's tokens
    are not.
    """
    if tokens <= 2 * TAIL_UNIT_TOKENS:
        return 0
    written = (tokens // TAIL_UNIT_TOKENS - 1) * TAIL_UNIT_TOKENS
    return min(-(-tokens // TAIL_UNIT_TOKENS) * TAIL_UNIT_TOKENS, -(-written // SEGMENT_TOKENS) * SEGMENT_TOKENS)


def resident_tokens(room_bytes: int, layers: int, token_bytes: int, rows: int, host_tokens: int) -> int:
    """Tokens of one offloaded layer that stay on the device as well: the first ones of each row, all KV heads.

    room_bytes: of the device for all of them, shared in equal parts among the offloaded `layers`. token_bytes: K and V
    of one token of one row of this layer. host_tokens: what the host will hold, see `host_kv_tokens`; where all of it
    is resident, nothing streams. In whole flush units.
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
) -> Footprint:
    """What headinfer needs.

    streaming_bytes: device budget for ring, tails and write-back, or None where KV is read in place. resident_tokens:
    for each offloaded layer, tokens kept on the device as well; where these are all that the host holds, the ring is
    never allocated. None: no layer keeps any, and there is a ring. Raises CapacityError where a budget leaves nothing
    for the ring.
    """
    (tails, spare), host_tokens = tail_bytes(shape, element_bytes, rows), host_kv_tokens(tokens)
    staging = ring = 0
    if streaming_bytes is not None:
        staging = 2 * write_back_bytes(streaming_bytes)
        ring = RING_SLOTS * ring_slot_bytes(streaming_bytes, tails + spare + staging)
    resident = 0
    if resident_tokens is not None:
        offloaded = zip(_offloaded(shape), resident_tokens, strict=True)
        resident = sum(kept * layer.kv_bytes_per_token(element_bytes) * rows for layer, kept in offloaded)
        ring = 0 if min(resident_tokens) >= host_tokens else ring
    host_kv = host_tokens * shape.kv_bytes_per_token(element_bytes) * rows
    return Footprint(
        weights_bytes=weight_bytes(shape, weight_bits),
        activation_bytes=activation_bytes(shape, min(chunk_tokens, tokens) * rows, element_bytes),
        overhead_bytes=overhead_bytes,
        resident_bytes=resident,
        ring_bytes=ring,
        tail_bytes=tails,
        spare_tail_bytes=spare,
        staging_bytes=staging,
        local_bytes=shape.local_kv_bytes(tokens, element_bytes) * rows,
        host_kv_bytes=host_kv,
        host_overhead_bytes=host_overhead_bytes,
    )


def _offloaded(shape: ModelShape) -> list[LayerShape]:
    return [layer for layer in shape.layers if layer.is_offloaded]
