"""The shape of a tile: how many KV heads by how many tokens stream through a ring slot at a time.

A slot is a number of bytes; its shape is chosen here, anew before each forward pass and never within one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from headinfer.errors import CapacityError, UsageError

__all__ = [
    "DEFAULT_BUDGET_BYTES",
    "FEW_QUERY_TOKENS",
    "MERGE_BYTES",
    "RING_SLOTS",
    "TILE_LAUNCHES",
    "TilePlan",
    "TileRates",
    "choose_tiles",
    "ring_slot_bytes",
]

DEFAULT_BUDGET_BYTES = 256 * 1024 * 1024
RING_SLOTS = 2
FEW_QUERY_TOKENS = 16  # up to here a pass is bound by the bytes of K and V: decode, or checking a few guesses
# Device bytes per element of a tile's output to merge it in one fused kernel: the tile's in a half type (2) and the
# running state in float32 (4) are read, the state is written (4).
MERGE_BYTES = 10
# What the host queues for one tile: the attention kernel, the merge, and four events (a slot is free, a slot is filled,
# each recorded and waited for); two copies per head come on top.
TILE_LAUNCHES = 6
_QUERY_BLOCK = 128  # query rows that one multiprocessor works on at a time in the flash kernels
_SMALLEST_TILE_TOKENS = 16
_SHORTENED = (1, 2, 4, 8)  # a tile may be that much shorter than its slot, so that less of the first one is waited for
_CLEARLY = 0.98  # fewer heads, or shorter tiles, must save this much, since the model of cost is no exacter
_FIRST_LAYER = 1 / 32  # a model has about so many
_AHEAD = 1.5  # queueing must stay ahead of the device
_ALIGN_BYTES = 256


@dataclass(frozen=True)
class TileRates:
    """What the machine attains, as far as tiles are concerned. Part of the arithmetic: other rates, other tiles.

    multiprocessors: what a kernel must fill. launch_s: host seconds to queue one kernel or copy.
    """

    flops_per_s: float = 140e12  # an RTX 4090's, in half types
    device_bytes_per_s: float = 850e9
    link_bytes_per_s: float = 25e9
    launch_s: float = 20e-6
    multiprocessors: int = 128


@dataclass(frozen=True)
class TilePlan:
    """heads_per_group KV heads by up to tile_tokens tokens, and why.

    is_even: a past is cut into tiles of about one length. In prefill a short last one would be computed before the next
    one, of another head group, has come; decode waits for the link in any case, and keeps its first tiles as they were.
    """

    heads_per_group: int
    tile_tokens: int
    why: str
    is_even: bool = False


def ring_slot_bytes(budget_bytes: int, fixed_bytes: int) -> int:
    """Bytes of one ring slot: the budget less what is held in any case (tails, staging), over RING_SLOTS.

    Raises CapacityError where nothing is left.
    """
    slot = (budget_bytes - fixed_bytes) // RING_SLOTS // _ALIGN_BYTES * _ALIGN_BYTES
    if slot <= 0:
        raise CapacityError(
            f"a device KV budget of {budget_bytes} bytes is used up by the {fixed_bytes} bytes of tails and write-back "
            f"buffers: give at least {fixed_bytes + 2 * RING_SLOTS * 2**20} bytes"
        )
    return slot


def choose_tiles(
    *,
    kv_heads: int,
    group_queries: int,
    head_token_bytes: int,
    rows: int,
    query_tokens: int,
    past_tokens: int,
    slot_bytes: int | None,
    element_bytes: int = 2,
    rates: TileRates | None = None,
    heads_per_group: int | None = None,
    tile_tokens: int | None = None,
) -> TilePlan:
    """The tile for one forward pass.

    kv_heads: KV heads of a layer, each with group_queries query heads. head_token_bytes: K and V of one token of
    one head, of element_bytes each element. rows: the batch. slot_bytes: bytes of a ring slot, or None where segments
    are read in place. rates: None is a well-known device's. heads_per_group, tile_tokens: fixed by the user, or None
    to choose.

    Of the tiles that fit a slot (the KV heads split evenly; as long as the slot, or a half, a quarter or an eighth of
    it) the one that takes the least seconds, see `layer_seconds`; of about equal ones the longest: in decode with the
    most heads, which are queued together, in prefill with the fewest that fill the device, whose float32 state is
    smallest (the paper's section 3.3 adapts the heads only). Raises UsageError for a number out of range and
    CapacityError where a slot holds no tile.
    """
    for name, value, most in (("heads_per_group", heads_per_group, kv_heads), ("tile_tokens", tile_tokens, None)):
        if value is not None and (value < 1 or (most is not None and value > most)):
            raise UsageError(f"{name} is {value}: it must be {f'1 to {most}' if most else 'at least 1'} for this model")
    past = max(past_tokens, 1)
    if slot_bytes is None:
        return TilePlan(heads_per_group or kv_heads, tile_tokens or past, "segments are read in place, all at once")

    def longest(heads: int) -> int:
        return min(slot_bytes // (heads * head_token_bytes), past)

    rates = rates or TileRates()
    is_prefill = query_tokens > FEW_QUERY_TOKENS

    def preference(heads: int) -> tuple[bool, int]:
        fills = is_prefill and filled_share(rates, rows * heads * group_queries, query_tokens) == 1.0
        return not fills, heads if fills else -heads

    def seconds(heads: int, tokens: int) -> float:
        return layer_seconds(
            rates,
            heads=heads,
            tile_tokens=tokens,
            kv_heads=kv_heads,
            group_queries=group_queries,
            head_token_bytes=head_token_bytes,
            element_bytes=element_bytes,
            rows=rows,
            query_tokens=query_tokens,
            past_tokens=past,
        )

    needed = min(tile_tokens if tile_tokens is not None else _SMALLEST_TILE_TOKENS, past)
    wanted = [n for n in range(kv_heads, 0, -1) if kv_heads % n == 0] if heads_per_group is None else [heads_per_group]
    fitting = [heads for heads in wanted if longest(heads) >= needed]
    if not fitting:
        least = wanted[-1] * needed * head_token_bytes
        raise CapacityError(
            f"a tile of {wanted[-1]} heads x {needed} tokens needs {least} bytes and a ring slot has {slot_bytes}: "
            "raise device_kv_budget_bytes (or host_kv_budget_bytes, with a disk tier), or lower heads_per_group or tile_tokens"
        )
    shapes = [
        (heads, tokens)
        for heads in sorted(fitting, key=preference)
        for tokens in ([needed] if tile_tokens is not None else [-(-longest(heads) // part) for part in _SHORTENED])
        if tokens >= needed
    ]
    best = shapes[0]
    for shape in shapes[1:]:
        if seconds(*shape) < _CLEARLY * seconds(*best):
            best = shape
    fixed = [name for name, value in (("heads", heads_per_group), ("tokens", tile_tokens)) if value is not None]
    why = f"{' and '.join(fixed)} fixed by option" if fixed else f"the cheapest of {len(shapes)} by the model of cost"
    return TilePlan(*best, why, is_prefill)


def filled_share(rates: TileRates, query_heads: int, query_tokens: int) -> float:
    """The share of the device that attention in prefill keeps busy: two blocks of queries for each multiprocessor."""
    return min(1.0, query_heads * math.ceil(query_tokens / _QUERY_BLOCK) / (2 * rates.multiprocessors))


def layer_seconds(
    rates: TileRates,
    *,
    heads: int,
    tile_tokens: int,
    kv_heads: int,
    group_queries: int,
    head_token_bytes: int,
    element_bytes: int,
    rows: int,
    query_tokens: int,
    past_tokens: int,
) -> float:
    """Seconds of one layer's attention on a streamed past, as far as the shape of its tiles matters.

    The longest of computing and merging, copying, and queueing; and the copy of the first tile, which comes while the
    layer before computes, but in a pass's first layer. Few heads leave a part of the device idle in prefill; short
    tiles are merged more often.
    """
    passes = -(-past_tokens // tile_tokens)
    kv_bytes = rows * kv_heads * past_tokens * head_token_bytes
    queries = rows * kv_heads * group_queries * query_tokens
    attention_s = 2 * queries * past_tokens * (head_token_bytes // element_bytes) / rates.flops_per_s
    if query_tokens > FEW_QUERY_TOKENS:
        attention_s /= filled_share(rates, rows * heads * group_queries, query_tokens)
    attention_s = max(attention_s, kv_bytes / rates.device_bytes_per_s)
    output_elements = queries * (head_token_bytes // element_bytes / 2)
    merge_s = passes * output_elements * MERGE_BYTES / rates.device_bytes_per_s
    copy_s = kv_bytes / rates.link_bytes_per_s
    launch_s = passes * math.ceil(kv_heads / heads) * (TILE_LAUNCHES + 2 * heads) * rows * rates.launch_s
    first_s = heads * tile_tokens * head_token_bytes / rates.link_bytes_per_s
    return max(attention_s + merge_s, copy_s, _AHEAD * launch_s) + _FIRST_LAYER * first_s
