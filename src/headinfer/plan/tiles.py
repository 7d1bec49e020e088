"""The shape of a tile: how many KV heads by how many tokens stream through a ring slot at a time.

The size of a slot in bytes is fixed. Its shape is chosen before each forward pass and never within one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from headinfer.errors import CapacityError, UsageError
from headinfer.plan.model_shape import LayerShape
from headinfer.utils.kv_format import UNIT, pair_bytes, rounded_down, rounded_up

__all__ = [
    "DEFAULT_BUDGET_BYTES",
    "FEW_QUERY_TOKENS",
    "MERGE_BYTES",
    "RING_SLOTS",
    "SEGMENT_TOKENS",
    "TILE_LAUNCHES",
    "FixedTile",
    "LayerWork",
    "TilePlan",
    "TileRates",
    "busy_share",
    "busy_share_of_groups",
    "check_tiles",
    "choose_tiles",
    "kernel_calls",
    "layer_seconds",
    "rest_factor",
    "ring_slot_bytes",
    "tile_copies",
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
"""Kernels and events that the host queues for one tile: attention, the merge, and four events. The copies are added to
them. The events are: slot free and slot filled, each recorded and waited for."""

SEGMENT_TOKENS = 16_384
"""Tokens of the largest segment of host memory (kv/layer_kv.py; a test compares the two constants)."""

_QUERY_BLOCK = 128  # query rows of one block of a prefill kernel
_SMALLEST_TILE_TOKENS = 16
_SHORTENED = (1, 2, 4, 8)  # a tile may be shorter than its slot by these factors, so that its first copy is shorter
_CLEARLY = 0.98  # another shape must save 2 %, since the cost model is not more exact than that
_FIRST_LAYER = 1 / 32  # the share of the first layer in a model of 32 layers
_AHEAD = 1.5  # the host must queue this much faster than the device works
_ALIGN_BYTES = 256
_EVEN_TOKENS = 128


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
        blocks_at_once: blocks of 128 query rows that one multiprocessor computes at the same time in prefill.
        idle_gain: how much faster a last wave of such blocks is for its idle multiprocessors, see busy_share().
        block_tokens: the fastest kernel of prefill serves multiples of this many keys; 1 if it serves any number.
        rest_share: rate of the kernel that serves the remaining keys, as a share of flops_per_s.
        copy_s: seconds that each copy takes on the link beside its bytes.
    """

    flops_per_s: float = 140e12
    device_bytes_per_s: float = 850e9
    link_bytes_per_s: float = 25e9
    launch_s: float = 20e-6
    multiprocessors: int = 128
    blocks_at_once: int = 2
    idle_gain: float = 1.0
    block_tokens: int = 1
    rest_share: float = 1.0
    copy_s: float = 2.8e-6


@dataclass(frozen=True)
class LayerWork:
    """The attention of one layer in one forward pass, as far as it decides the shape of tiles.

    Attributes:
        kv_heads: number of KV heads.
        group_queries: query heads per KV head.
        head_token_bytes: bytes of K and V of one token of one head, as they are stored.
        element_bytes: bytes of one element of K and V in the model's dtype.
        rows: rows of the batch.
        query_tokens: tokens of the chunk.
        past_tokens: tokens before the chunk.
        quantised_dims: Dk + Dv if K and V are stored quantised, otherwise 0. Tiles have whole blocks then.
    """

    kv_heads: int
    group_queries: int
    head_token_bytes: int
    element_bytes: int
    rows: int
    query_tokens: int
    past_tokens: int
    quantised_dims: int = 0

    @classmethod
    def of_layer(
        cls,
        layer: LayerShape,
        element_bytes: int,
        *,
        rows: int,
        query_tokens: int,
        past_tokens: int,
        bits: int = 0,
    ) -> LayerWork:
        """Return the work of a layer with this shape, whose KV is stored in `bits` bits, or in the model's dtype."""
        return cls(
            kv_heads=layer.kv_heads,
            group_queries=layer.query_heads // layer.kv_heads,
            head_token_bytes=pair_bytes(layer.key_dim, layer.value_dim, element_bytes, bits),
            element_bytes=element_bytes,
            rows=rows,
            query_tokens=query_tokens,
            past_tokens=past_tokens,
            quantised_dims=layer.key_dim + layer.value_dim if bits else 0,
        )

    @property
    def is_prefill(self) -> bool:
        """Whether the pass has more than a few query tokens."""
        return self.query_tokens > FEW_QUERY_TOKENS

    @property
    def query_rows(self) -> int:
        """The query rows of one KV head and one row of the batch."""
        return self.group_queries * self.query_tokens

    @property
    def head_dims(self) -> int:
        """Dk + Dv."""
        return self.quantised_dims or self.head_token_bytes // self.element_bytes

    @property
    def unit_tokens(self) -> int:
        """A tile has a multiple of so many tokens."""
        return UNIT if self.quantised_dims else 1


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
        even_tokens: if not 0, a past is cut into tiles of about equal length, a multiple of this. In prefill a short
            last tile is computed before the first tile of the next head group has arrived. Decode waits for the link
            in any case.
        keeps_segments: whether large segments that fit a tile become tiles of their own, which are a single copy each.
        cpu_share: the share of the streamed tokens that the host's CPU attends to in host memory instead. They are not
            copied. 0 in prefill.
        cpu_rows: the query rows per KV head of one row of the batch, if cpu_share becomes smaller for tokens that
            several rows share (share_at_rows() in cpu_share.py). None: it is the same for all.
        cpu_threads: the threads with which it does that; None for torch.get_num_threads().
    """

    heads_per_group: int
    tile_tokens: int
    why: str
    even_tokens: int = 0
    keeps_segments: bool = False
    cpu_share: float = 0.0
    cpu_rows: int | None = None
    cpu_threads: int | None = None

    def length(self, tokens: int) -> int:
        """Return the length of the tiles that `tokens` tokens are cut into. The last tile may be shorter."""
        if not self.even_tokens or not tokens:
            return self.tile_tokens
        tiles = -(-tokens // self.tile_tokens)
        even = -(-tokens // tiles // self.even_tokens) * self.even_tokens
        return min(even, self.tile_tokens)


def ring_slot_bytes(budget_bytes: int, fixed_bytes: int) -> int:
    """Return the bytes of one ring slot.

    Args:
        budget_bytes: the streaming budget.
        fixed_bytes: the part of it that tails, windows of streaming heads, write-back buffers and buffers of the
            exchange with the host take.

    Raises:
        CapacityError: nothing is left for the ring.
    """
    slot = (budget_bytes - fixed_bytes) // RING_SLOTS // _ALIGN_BYTES * _ALIGN_BYTES
    if slot <= 0:
        raise CapacityError(
            f"a device KV budget of {budget_bytes} bytes is used up by the {fixed_bytes} bytes of tails, windows, "
            "write-back buffers and buffers for the share of the host's CPU: give at least "
            f"{fixed_bytes + 2 * RING_SLOTS * 2**20} bytes"
        )
    return slot


def choose_tiles(
    work: LayerWork, slot_bytes: int | None, rates: TileRates | None = None, fixed: FixedTile | None = None
) -> TilePlan:
    """Choose the shape of the tiles of one forward pass.

    Candidates are the shapes that fit a slot: the KV heads split evenly, and the tile is as long as the slot, or a
    half, a quarter or an eighth of it, or a segment, or the longest multiple of rates.block_tokens. The candidate with
    the fewest `layer_seconds` wins. Among about equal ones the longest tile wins, and in decode first one of a
    segment's length. In decode it has the most heads, since these are queued together. In prefill it has the fewest
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
        whole = rounded_up(max(work.past_tokens, 1), work.unit_tokens)
        return TilePlan(fixed.heads_per_group or work.kv_heads, fixed.tile_tokens or whole, why)
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
    if not work.is_prefill:
        return TilePlan(*best, why, keeps_segments=best[1] == SEGMENT_TOKENS and fixed.tile_tokens is None)
    whole_blocks = rates.block_tokens > _EVEN_TOKENS and best[1] % rates.block_tokens == 0
    return TilePlan(*best, why, even_tokens=rates.block_tokens if whole_blocks else _EVEN_TOKENS)


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
    needed = min(fixed.tile_tokens or _SMALLEST_TILE_TOKENS, max(work.past_tokens, 1))
    return rounded_up(needed, work.unit_tokens)


def _longest_tiles(work: LayerWork, slot_bytes: int, fixed: FixedTile) -> dict[int, int]:
    """Return the tokens of the longest tile that fits a slot, by its number of heads. Numbers with which no tile
    fits are left out."""
    heads_to_try = [heads for heads in range(work.kv_heads, 0, -1) if work.kv_heads % heads == 0]
    if fixed.heads_per_group is not None:
        heads_to_try = [fixed.heads_per_group]
    needed = _needed_tokens(work, fixed)
    past = rounded_up(max(work.past_tokens, 1), work.unit_tokens)
    longest = {heads: min(slot_bytes // (heads * work.head_token_bytes), past) for heads in heads_to_try}
    longest = {heads: rounded_down(tokens, work.unit_tokens) for heads, tokens in longest.items()}
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
        lengths = _lengths(work, rates, longest[heads]) if fixed.tile_tokens is None else [needed]
        shapes += [(heads, tokens) for tokens in lengths if tokens >= needed]
    return shapes


def _lengths(work: LayerWork, rates: TileRates, longest: int) -> list[int]:
    """Return the lengths of tiles to try, in the order in which they are preferred."""
    lengths = [rounded_up(-(-longest // factor), work.unit_tokens) for factor in _SHORTENED]
    if rates.block_tokens > 1 and longest >= rates.block_tokens:
        lengths.append(longest // rates.block_tokens * rates.block_tokens)
    lengths.sort(reverse=True)
    if longest >= SEGMENT_TOKENS:
        lengths.insert(len(lengths) if work.is_prefill else 0, SEGMENT_TOKENS)
    return lengths


def _preference(work: LayerWork, rates: TileRates) -> Callable[[int], tuple[bool, int]]:
    """Return a sort key for numbers of heads: in prefill the fewest that fill the device, otherwise the most.

    More heads never fill the device worse than fewer (see busy_share()), so all heads are the measure.
    """
    enough = _CLEARLY * busy_share(rates, work.kv_heads, work.query_rows) if work.is_prefill else 0.0

    def key(heads: int) -> tuple[bool, int]:
        fills = work.is_prefill and busy_share(rates, heads, work.query_rows) >= enough
        return not fills, heads if fills else -heads

    return key


def busy_share(rates: TileRates, heads: int, query_rows: int) -> float:
    """Return the share of the device that a prefill kernel keeps busy.

    A kernel works on blocks of 128 query rows. The multiprocessors compute one wave of blocks after the other:

        waves = heads * ceil(query_rows / 128) / (multiprocessors * blocks_at_once)
        share = waves / (whole waves + time of the last wave)
        time of the last wave = 1 - idle_gain * its idle share, after a whole wave; 1 if there is no other

    If idle multiprocessors saved nothing (idle_gain 0), this would be waves / ceil(waves). But the others get their
    share of power and bandwidth. With one block at once and an idle_gain of 0.25, all chunks that an H200 has
    measured are predicted within 6 %: 1, 2 and 8 heads after 64K to 1M tokens (tests/plan/test_measured.py). The
    default is that only a first wave loses time: table 6 of arXiv 2502.12574 has the same seconds for 1 to 8 heads on
    an RTX 4090, although one head has 1.25 waves of two blocks.

    Args:
        rates: the machine's rates.
        heads: KV heads that one kernel call computes.
        query_rows: query rows of each of them.
    """
    wave_blocks = rates.multiprocessors * rates.blocks_at_once
    blocks = heads * -(-query_rows // _QUERY_BLOCK)
    if blocks <= wave_blocks:
        return blocks / wave_blocks
    whole, last = divmod(blocks, wave_blocks)
    last_s = 1 - rates.idle_gain * (1 - last / wave_blocks) if last else 0.0
    return blocks / wave_blocks / (whole + last_s)


def busy_share_of_groups(rates: TileRates, kv_heads: int, heads: int, query_rows: int) -> float:
    """Return the share of the device that prefill keeps busy if `heads` of `kv_heads` heads are computed at a time."""
    whole, left = divmod(kv_heads, heads)
    if not left:
        return busy_share(rates, heads, query_rows)
    whole_s = whole * heads / busy_share(rates, heads, query_rows)
    return kv_heads / (whole_s + left / busy_share(rates, left, query_rows))


def rest_factor(rates: TileRates, tokens: float, rest: float) -> float:
    """Return the factor by which attention takes longer if `rest` of its `tokens` keys are served by the slower
    kernel."""
    return 1 + (1 / rates.rest_share - 1) * rest / tokens


def tile_copies(heads: int, tile_tokens: int) -> float:
    """Return the copies of a tile: one if it is a segment, otherwise K and V of each head in each segment, on
    average."""
    if tile_tokens == SEGMENT_TOKENS:
        return 1
    slices = 1 if SEGMENT_TOKENS % tile_tokens == 0 else 1 + tile_tokens / SEGMENT_TOKENS
    return 2 * heads * slices


def kernel_calls(rates: TileRates, tokens: int) -> int:
    """Return the kernel calls of a tile in prefill. Each result is merged.

    A kernel that serves blocks is given 4, 2 or 1 of them at a time, and another one the rest (engine/streaming.py).
    """
    block = rates.block_tokens
    if block == 1:
        return 1
    return tokens // (4 * block) + (tokens % (4 * block) // block).bit_count() + (tokens % block > 0)


def layer_seconds(work: LayerWork, rates: TileRates, heads: int, tile_tokens: int) -> float:
    """Return the seconds of one layer's attention on a streamed past, as far as the shape of its tiles changes them.

    Computing and merging, copying, and queueing run at the same time, so the longest of them counts. The copy of the
    first tile is added for the first layer of a pass only; in other layers it runs while the layer before computes.

    In prefill head groups and rows are computed one after the other, and each leaves a part of the device idle, see
    busy_share(). Short tiles are merged more often. If the fastest kernel serves only multiples of block_tokens keys, a
    slower one serves the rest of each tile. In decode these rules do not apply, since kernels split the keys.

    Args:
        work: the attention of the layer.
        rates: the machine's rates.
        heads: KV heads of a tile.
        tile_tokens: tokens of a tile.
    """
    past = max(work.past_tokens, 1)
    passes = -(-past // tile_tokens)
    kv_bytes = work.rows * work.kv_heads * past * work.head_token_bytes
    queries = work.rows * work.kv_heads * work.query_rows
    attention_s = 2 * queries * past * work.head_dims / rates.flops_per_s
    calls = passes
    if work.is_prefill:
        full, last = divmod(past, tile_tokens)
        rest = full * (tile_tokens % rates.block_tokens) + last % rates.block_tokens
        attention_s /= busy_share_of_groups(rates, work.kv_heads, heads, work.query_rows)
        attention_s *= rest_factor(rates, past, rest)
        calls = full * kernel_calls(rates, tile_tokens) + kernel_calls(rates, last)
    attention_s = max(attention_s, kv_bytes / rates.device_bytes_per_s)
    output_elements = queries * (work.head_dims / 2)
    merge_s = calls * output_elements * MERGE_BYTES / rates.device_bytes_per_s
    tiles = passes * math.ceil(work.kv_heads / heads) * work.rows
    copies = tile_copies(heads, tile_tokens)
    copy_s = kv_bytes / rates.link_bytes_per_s + tiles * copies * rates.copy_s
    launch_s = tiles * (TILE_LAUNCHES + copies) * rates.launch_s
    first_s = heads * tile_tokens * work.head_token_bytes / rates.link_bytes_per_s
    return max(attention_s + merge_s, copy_s, _AHEAD * launch_s) + _FIRST_LAYER * first_s
