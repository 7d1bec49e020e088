"""The shape of a tile: how many KV heads by how many tokens stream through a ring slot at a time.

The size of a slot in bytes is fixed. Its shape is chosen before each forward pass and never within one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from headinfer.errors import CapacityError, UsageError
from headinfer.plan.model_shape import LayerShape

__all__ = [
    "DEFAULT_BUDGET_BYTES",
    "FEW_QUERY_TOKENS",
    "MERGE_BYTES",
    "RING_SLOTS",
    "TILE_LAUNCHES",
    "FixedTile",
    "LayerWork",
    "TilePlan",
    "TileRates",
    "check_tiles",
    "choose_tiles",
    "filled_share",
    "layer_seconds",
    "ring_slot_bytes",
]

DEFAULT_BUDGET_BYTES = 256 * 1024 * 1024
RING_SLOTS = 2
FEW_QUERY_TOKENS = 16
"""A pass with up to this many query tokens is bound by the bytes of K and V: decode, or verifying a few guesses."""

MERGE_BYTES = 10
"""Device bytes per element of a tile's output to merge it in one fused kernel.

The tile's output in a half type (2) and the running state in float32 (4) are read; the state is written (4).
"""

TILE_LAUNCHES = 6
"""Kernels and events that the host queues for one tile: attention, the merge, and four events. Two copies per head
are added to them. The events are: slot free and slot filled, each recorded and waited for."""

_QUERY_BLOCK = 128  # query rows that one multiprocessor works on at a time in the flash kernels
_SMALLEST_TILE_TOKENS = 16
_SHORTENED = (1, 2, 4, 8)  # a tile may be shorter than its slot by these factors, so that its first copy is shorter
_CLEARLY = 0.98  # another shape must save 2 %, since the cost model is not more exact than that
_FIRST_LAYER = 1 / 32  # the share of the first layer in a model of 32 layers
_AHEAD = 1.5  # the host must queue this much faster than the device works
_ALIGN_BYTES = 256


@dataclass(frozen=True)
class TileRates:
    """The rates of a machine that decide the shape of tiles. Other rates give other tiles, and so other bits.

    The defaults are those of an RTX 4090.

    Attributes:
        flops_per_s: FLOP/s of attention in a half type.
        device_bytes_per_s: bytes per second of device memory.
        link_bytes_per_s: bytes per second from host to device.
        launch_s: seconds of the host to queue one kernel or copy.
        multiprocessors: number of streaming multiprocessors, which a kernel must fill.
    """

    flops_per_s: float = 140e12
    device_bytes_per_s: float = 850e9
    link_bytes_per_s: float = 25e9
    launch_s: float = 20e-6
    multiprocessors: int = 128


@dataclass(frozen=True)
class LayerWork:
    """The attention of one layer in one forward pass, as far as it decides the shape of tiles.

    Attributes:
        kv_heads: number of KV heads.
        group_queries: query heads per KV head.
        head_token_bytes: bytes of K and V of one token of one head.
        element_bytes: bytes of one element of K and V.
        rows: rows of the batch.
        query_tokens: tokens of the chunk.
        past_tokens: tokens before the chunk.
    """

    kv_heads: int
    group_queries: int
    head_token_bytes: int
    element_bytes: int
    rows: int
    query_tokens: int
    past_tokens: int

    @classmethod
    def of_layer(
        cls, layer: LayerShape, element_bytes: int, *, rows: int, query_tokens: int, past_tokens: int
    ) -> LayerWork:
        """Return the work of a layer with this shape."""
        return cls(
            kv_heads=layer.kv_heads,
            group_queries=layer.query_heads // layer.kv_heads,
            head_token_bytes=(layer.key_dim + layer.value_dim) * element_bytes,
            element_bytes=element_bytes,
            rows=rows,
            query_tokens=query_tokens,
            past_tokens=past_tokens,
        )

    @property
    def is_prefill(self) -> bool:
        """Whether the pass has more than a few query tokens."""
        return self.query_tokens > FEW_QUERY_TOKENS

    @property
    def head_dims(self) -> int:
        """Dk + Dv."""
        return self.head_token_bytes // self.element_bytes


@dataclass(frozen=True)
class FixedTile:
    """The sides of a tile that the user fixes. None leaves a side to choose_tiles().

    Attributes:
        heads_per_group: KV heads that are streamed together.
        tile_tokens: tokens that are streamed together.
    """

    heads_per_group: int | None = None
    tile_tokens: int | None = None


@dataclass(frozen=True)
class TilePlan:
    """The shape of the tiles of a forward pass.

    Attributes:
        heads_per_group: KV heads of a tile.
        tile_tokens: tokens of a tile, at most.
        why: why this shape was chosen, for people.
        is_even: whether a past is cut into tiles of about equal length. In prefill a short last tile is computed
            before the first tile of the next head group has arrived. Decode waits for the link in any case.
    """

    heads_per_group: int
    tile_tokens: int
    why: str
    is_even: bool = False


def ring_slot_bytes(budget_bytes: int, fixed_bytes: int) -> int:
    """Return the bytes of one ring slot.

    Args:
        budget_bytes: the streaming budget.
        fixed_bytes: the part of it that tails and write-back buffers take.

    Raises:
        CapacityError: nothing is left for the ring.
    """
    slot = (budget_bytes - fixed_bytes) // RING_SLOTS // _ALIGN_BYTES * _ALIGN_BYTES
    if slot <= 0:
        raise CapacityError(
            f"a device KV budget of {budget_bytes} bytes is used up by the {fixed_bytes} bytes of tails and write-back "
            f"buffers: give at least {fixed_bytes + 2 * RING_SLOTS * 2**20} bytes"
        )
    return slot


def choose_tiles(
    work: LayerWork, slot_bytes: int | None, rates: TileRates | None = None, fixed: FixedTile | None = None
) -> TilePlan:
    """Choose the shape of the tiles of one forward pass.

    Candidates are the shapes that fit a slot: the KV heads split evenly, and the tile is as long as the slot, or a
    half, a quarter or an eighth of it. The candidate with the fewest `layer_seconds` wins. Among about equal ones the
    longest tile wins. In decode it has the most heads, since these are queued together. In prefill it has the fewest
    heads that fill the device, since their float32 state is smallest. (Section 3.3 of arXiv 2502.12574 adapts the
    heads only.)

    Args:
        work: the attention of the layer.
        slot_bytes: bytes of a ring slot; None if segments are read in place.
        rates: the machine's rates; None takes the defaults of TileRates.
        fixed: what the user fixes.

    Raises:
        UsageError: a fixed number is out of range.
        CapacityError: a slot does not hold a tile.
    """
    rates = rates or TileRates()
    fixed = fixed or FixedTile()
    _check_fixed(fixed, work)
    if slot_bytes is None:
        why = "segments are read in place, all at once"
        return TilePlan(fixed.heads_per_group or work.kv_heads, fixed.tile_tokens or max(work.past_tokens, 1), why)
    shapes = _candidates(work, slot_bytes, fixed, rates)
    best = shapes[0]
    best_s = layer_seconds(work, rates, *best)
    for shape in shapes[1:]:
        shape_s = layer_seconds(work, rates, *shape)
        if shape_s < _CLEARLY * best_s:
            best = shape
            best_s = shape_s
    names = {"heads": fixed.heads_per_group, "tokens": fixed.tile_tokens}
    given = [name for name, value in names.items() if value is not None]
    why = f"{' and '.join(given)} fixed by option" if given else f"the cheapest of {len(shapes)} by the model of cost"
    return TilePlan(*best, why, is_even=work.is_prefill)


def check_tiles(work: LayerWork, slot_bytes: int | None, fixed: FixedTile) -> None:
    """Raise the error that choose_tiles() raises for these arguments, if any, without choosing.

    Raises:
        UsageError: a fixed number is out of range.
        CapacityError: a slot does not hold a tile.
    """
    _check_fixed(fixed, work)
    if slot_bytes is not None:
        _longest_tiles(work, slot_bytes, fixed)


def _check_fixed(fixed: FixedTile, work: LayerWork) -> None:
    limits = {"heads_per_group": (fixed.heads_per_group, work.kv_heads), "tile_tokens": (fixed.tile_tokens, None)}
    for name, (value, most) in limits.items():
        if value is not None and (value < 1 or (most is not None and value > most)):
            allowed = f"1 to {most}" if most else "at least 1"
            raise UsageError(f"{name} is {value}: it must be {allowed} for this model")


def _needed_tokens(work: LayerWork, fixed: FixedTile) -> int:
    """Return the tokens that a tile has at least."""
    return min(fixed.tile_tokens or _SMALLEST_TILE_TOKENS, max(work.past_tokens, 1))


def _longest_tiles(work: LayerWork, slot_bytes: int, fixed: FixedTile) -> dict[int, int]:
    """Return the tokens of the longest tile that fits a slot, by its number of heads. Numbers with which no tile
    fits are left out."""
    heads_to_try = [heads for heads in range(work.kv_heads, 0, -1) if work.kv_heads % heads == 0]
    if fixed.heads_per_group is not None:
        heads_to_try = [fixed.heads_per_group]
    needed = _needed_tokens(work, fixed)
    past = max(work.past_tokens, 1)
    longest = {heads: min(slot_bytes // (heads * work.head_token_bytes), past) for heads in heads_to_try}
    fitting = {heads: tokens for heads, tokens in longest.items() if tokens >= needed}
    if not fitting:
        least = heads_to_try[-1] * needed * work.head_token_bytes
        raise CapacityError(
            f"a tile of {heads_to_try[-1]} heads x {needed} tokens needs {least} bytes and a ring slot has "
            f"{slot_bytes}: raise device_kv_budget_bytes (or host_kv_budget_bytes, with a disk tier), or lower "
            "heads_per_group or tile_tokens"
        )
    return fitting


def _candidates(work: LayerWork, slot_bytes: int, fixed: FixedTile, rates: TileRates) -> list[tuple[int, int]]:
    """Return the shapes (heads, tokens) that fit a slot, in the order in which they are preferred."""
    longest = _longest_tiles(work, slot_bytes, fixed)
    needed = _needed_tokens(work, fixed)
    shapes = []
    for heads in sorted(longest, key=_preference(work, rates)):
        lengths = [-(-longest[heads] // factor) for factor in _SHORTENED] if fixed.tile_tokens is None else [needed]
        shapes += [(heads, tokens) for tokens in lengths if tokens >= needed]
    return shapes


def _preference(work: LayerWork, rates: TileRates) -> Callable[[int], tuple[bool, int]]:
    """Return a sort key for numbers of heads: in prefill the fewest that fill the device, otherwise the most."""

    def key(heads: int) -> tuple[bool, int]:
        query_heads = work.rows * heads * work.group_queries
        fills = work.is_prefill and filled_share(rates, query_heads, work.query_tokens) == 1.0
        return not fills, heads if fills else -heads

    return key


def filled_share(rates: TileRates, query_heads: int, query_tokens: int) -> float:
    """Return the share of the device that prefill keeps busy. Two blocks of queries fill a multiprocessor."""
    return min(1.0, query_heads * math.ceil(query_tokens / _QUERY_BLOCK) / (2 * rates.multiprocessors))


def layer_seconds(work: LayerWork, rates: TileRates, heads: int, tile_tokens: int) -> float:
    """Return the seconds of one layer's attention on a streamed past, as far as the shape of its tiles changes them.

    Computing and merging, copying, and queueing run at the same time, so the longest of them counts. The copy of the
    first tile is added for the first layer of a pass only; in other layers it runs while the layer before computes.
    Few heads leave a part of the device idle in prefill. Short tiles are merged more often.

    Args:
        work: the attention of the layer.
        rates: the machine's rates.
        heads: KV heads of a tile.
        tile_tokens: tokens of a tile.
    """
    past = max(work.past_tokens, 1)
    passes = -(-past // tile_tokens)
    kv_bytes = work.rows * work.kv_heads * past * work.head_token_bytes
    queries = work.rows * work.kv_heads * work.group_queries * work.query_tokens
    attention_s = 2 * queries * past * work.head_dims / rates.flops_per_s
    if work.is_prefill:
        attention_s /= filled_share(rates, work.rows * heads * work.group_queries, work.query_tokens)
    attention_s = max(attention_s, kv_bytes / rates.device_bytes_per_s)
    output_elements = queries * (work.head_dims / 2)
    merge_s = passes * output_elements * MERGE_BYTES / rates.device_bytes_per_s
    copy_s = kv_bytes / rates.link_bytes_per_s
    groups = math.ceil(work.kv_heads / heads)
    launch_s = passes * groups * (TILE_LAUNCHES + 2 * heads) * work.rows * rates.launch_s
    first_s = heads * tile_tokens * work.head_token_bytes / rates.link_bytes_per_s
    return max(attention_s + merge_s, copy_s, _AHEAD * launch_s) + _FIRST_LAYER * first_s
