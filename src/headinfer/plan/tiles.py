"""The shape of a tile: how many KV heads by how many tokens stream through a ring slot at a time.

A slot is a number of bytes; its shape is chosen here, anew before each forward pass and never within one.
"""

from __future__ import annotations

from dataclasses import dataclass

from headinfer.errors import CapacityError, UsageError

__all__ = ["DEFAULT_BUDGET_BYTES", "FEW_QUERY_TOKENS", "RING_SLOTS", "TilePlan", "choose_tiles", "ring_slot_bytes"]

DEFAULT_BUDGET_BYTES = 256 * 1024 * 1024
RING_SLOTS = 2
FEW_QUERY_TOKENS = 16  # up to here a pass is bound by the bytes of K and V: decode, or checking a few guesses
_QUERY_BLOCK = 128  # query rows that one multiprocessor works on at a time in the flash kernels
_SMALLEST_TILE_TOKENS = 16
_ALIGN_BYTES = 256


@dataclass(frozen=True)
class TilePlan:
    """heads_per_group KV heads by up to tile_tokens tokens, and why."""

    heads_per_group: int
    tile_tokens: int
    why: str


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
    multiprocessors: int = 1,
    heads_per_group: int | None = None,
    tile_tokens: int | None = None,
) -> TilePlan:
    """The tile for one forward pass.

    kv_heads: KV heads of a layer, each with group_queries query heads. head_token_bytes: K and V of one token of
    one head. rows: the batch. slot_bytes: bytes of a ring slot, or None where segments are read in place.
    heads_per_group, tile_tokens: fixed by the user, or None to choose.

    Adaptive choice (DESIGN section 3; the paper's section 3.3 adapts the heads only): all heads in one group while
    the past fits a slot. Else in prefill as few heads as keep the device busy, for the longest tiles: merging a
    tile costs the same for any number of its tokens. Else, in decode, all heads and few tokens: merging is
    nothing there, and large copies with few launches are all. Raises UsageError for a number out of range and
    CapacityError where a slot holds no tile.
    """
    for name, value, most in (("heads_per_group", heads_per_group, kv_heads), ("tile_tokens", tile_tokens, None)):
        if value is not None and (value < 1 or (most is not None and value > most)):
            raise UsageError(f"{name} is {value}: it must be {f'1 to {most}' if most else 'at least 1'} for this model")
    if slot_bytes is None:
        return TilePlan(
            heads_per_group or kv_heads, tile_tokens or max(past_tokens, 1), "segments are read in place, all at once"
        )

    def longest(heads: int) -> int:
        return slot_bytes // (heads * head_token_bytes)

    if heads_per_group is not None:
        heads, why = heads_per_group, "heads per group fixed by option"
    elif past_tokens <= longest(kv_heads):
        heads, why = kv_heads, "all heads of a layer fit a slot"
    elif tile_tokens is not None:
        heads, why = kv_heads, "tokens of a tile fixed by option, all heads"
    elif query_tokens > FEW_QUERY_TOKENS:
        heads = next(
            (
                heads
                for heads in range(1, kv_heads + 1)
                if kv_heads % heads == 0
                and rows * heads * group_queries * query_tokens >= 2 * multiprocessors * _QUERY_BLOCK
            ),
            kv_heads,
        )
        why = "prefill: as few heads as keep the device busy, for long tiles"
    else:
        heads, why = kv_heads, "decode: all heads, few and large copies"
    tokens = min(tile_tokens or longest(heads), max(past_tokens, 1))
    needed = tile_tokens if tile_tokens is not None else min(_SMALLEST_TILE_TOKENS, max(past_tokens, 1))
    if min(needed, max(past_tokens, 1)) > longest(heads):
        raise CapacityError(
            f"a tile of {heads} heads x {needed} tokens needs {heads * needed * head_token_bytes} bytes and a ring "
            f"slot has {slot_bytes}: raise device_kv_budget, or lower heads_per_group or tile_tokens"
        )
    return TilePlan(heads, tokens, why)
