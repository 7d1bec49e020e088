"""The loop: attention over the past, tile by tile, while the next tile is on its way.

For each head group of a layer:

    state = attention of the chunk on itself (causal); the tail, in decode with the first tile: nothing to transfer
    for each tile (head group x token block) of the host segments:
        fetch tile i + 1                                                        copy stream
        state = merge(state, attention on tile i)                               compute stream
    write the state into the output

Where the host is the compute device (CPU) nothing moves: a tile is the segments themselves, all in one call.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from headinfer.attention.backends import Backend, Problem, capability_of, choose
from headinfer.attention.state import AttentionState
from headinfer.kv.layer_kv import LayerKV, TokenRanges, first_of
from headinfer.kv.segments import ResidentBuffer, SegmentSlice, SharedPrefix
from headinfer.kv.slices import DiskSlice, PageableSlice
from headinfer.kv.transfer import InPlace, Ring
from headinfer.plan.tiles import FEW_QUERY_TOKENS, TilePlan
from headinfer.utils.tensors import Piece

__all__ = ["BLOCK_TOKENS", "Tile", "attend_streaming", "tiles_of"]

# What kernels that want equal shapes are given; merging 32K tokens costs a hundredth of their attention.
BLOCK_TOKENS = (32_768, 16_384, 8192)
_EVEN_TOKENS = 128


@dataclass(frozen=True)
class Tile:
    """Some tokens of one head group, for the rows that share them.

    near: what lies on the device; else pieces are to be fetched. after: events of their write-back. key: equal for
    tiles of the same tokens of the same segments, as long as these hold the same.
    """

    rows: tuple[int, ...]
    pieces: tuple[Piece | DiskSlice | PageableSlice, ...] = ()
    after: tuple[Any, ...] = ()
    key: Hashable = None
    near: tuple[Piece, ...] = ()


@dataclass
class Layer:
    """The operands of one layer's attention and where its partial results go."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    layer_kv: LayerKV
    scale: float
    softcap: float | None
    backend: str | None
    past_tokens: int
    used: set[str] = field(default_factory=set)

    @property
    def is_few(self) -> bool:
        """Whether a call costs more than what it computes: decode."""
        return self.q.shape[2] <= FEW_QUERY_TOKENS

    def problem(self, query_rows: int, key_tokens: int = 0) -> Problem:
        """What a kernel must do for this many query rows per KV head (0: the chunk on itself).

        Kernels that plan anew for each shape serve pieces of BLOCK_TOKENS, which come again and again.
        """
        device, dims, is_full = self.q.device, (self.k.shape[3], self.v.shape[3]), key_tokens in BLOCK_TOKENS
        return Problem(
            device.type,
            self.q.dtype,
            query_rows,
            *dims,
            self.softcap is not None,
            capability_of(device),
            key_tokens,
            is_full,
        )

    def kernel(self, query_rows: int, key_tokens: int = 0) -> Backend:
        """The backend for a problem; its name is noted. key_tokens: of one piece; 0: of several, or any number."""
        backend = self.choice(query_rows, key_tokens)
        self.used.add(backend.name)
        return backend

    def choice(self, query_rows: int, key_tokens: int) -> Backend:
        """The same; nothing is noted."""
        return choose(self.problem(query_rows, key_tokens), self.backend)


def attend_streaming(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layer_kv: LayerKV,
    *,
    plan: TilePlan,
    ring: Ring | None,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    token_ranges: Sequence[TokenRanges] | None = None,
    past_tokens: int | None = None,
    backend: str | None = None,
    used: set[str] | None = None,
    following: Iterable[Tile] = (),
) -> torch.Tensor:
    """Causal attention of a chunk on the store's first past_tokens tokens (None: all of them) and on itself.

    q [B, Hq, T, Dk], k [B, Hkv, T, Dk], v [B, Hkv, T, Dv]. sinks [Hq]: scores of a key with value 0. token_ranges: for each
    row the half-open token ranges that are seen, over the past tokens and the chunk's; None: all of them.
    ring None: the segments lie on the compute device and are read in place. Returns [B, T, Hq, Dv] in q's dtype;
    query rows that see no key give 0. `used` collects the names of the kernels that ran. following: the first tiles of
    the layer after this one, for a ring that reads ahead from a disk.
    """
    q = q.contiguous()  # packed once, not per tile
    past = layer_kv.tokens if past_tokens is None else past_tokens
    layer = Layer(q, k, v, layer_kv, scale, softcap, backend, past, used if used is not None else set())
    past_ranges = token_ranges if past == layer_kv.tokens else first_of(token_ranges, past, q.shape[0])
    group = q.shape[1] // k.shape[1]
    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])
    groups = [slice(h, min(h + plan.heads_per_group, k.shape[1])) for h in range(0, k.shape[1], plan.heads_per_group)]
    work = [list(tiles_of(layer_kv, heads, plan, past_ranges)) for heads in groups]
    way: Ring = ring if ring is not None else InPlace()
    coming = (tile for tiles in work for tile in tiles if not tile.near)
    after = iter(following)
    handles = deque(way.fetch(tile.pieces, tile.after, tile.key) for tile in itertools.islice(coming, way.depth))
    for heads, tiles in zip(groups, work, strict=True):
        state, own = _own_state(layer, heads, token_ranges, past_ranges)
        for tile in tiles:
            near = own.pop(tile.rows[0], ()) if layer.is_few and len(tile.rows) == 1 else ()
            if not tile.near:
                if (later := next(coming, None)) is not None:
                    handles.append(way.fetch(later.pieces, later.after, later.key))
                elif (expected := next(after, None)) is not None:
                    way.expect(expected.pieces, expected.after, expected.key)
            here = tile.near or way.wait(handles[0])
            for pieces in _calls(layer, len(tile.rows), here):
                state = _attend_tile(layer, heads, state, tile.rows, (*pieces, *near))
            if not tile.near:
                way.release(handles.popleft())
        for row, near in own.items():
            state = _attend_tile(layer, heads, state, (row,), near)
        state = state or _empty(layer, heads)
        queries = slice(heads.start * group, heads.stop * group)
        merged = state.out if sinks is None else state.with_sinks(sinks[queries, None])
        out[:, :, queries] = merged.transpose(1, 2)
    return out


def tiles_of(
    layer_kv: LayerKV, heads: slice, plan: TilePlan, token_ranges: Sequence[TokenRanges] | None
) -> Iterator[Tile]:
    """The segments of a head group as tiles: what lies on the device whole, the rest as the plan cuts it."""
    for shared in layer_kv.shared_prefixes(token_ranges):
        resident, streamed = _split_by_residency(shared)
        if resident:
            yield Tile(shared.rows, near=tuple(_joined(resident, heads)))
        pieces: list[SegmentSlice] = []
        room = most = _tile_tokens(plan, sum(part.tokens for part in streamed))
        for part in streamed:
            start = part.start
            while start < part.stop:
                stop = min(part.stop, start + room)
                pieces.append(SegmentSlice(part.segment, start, stop))
                room, start = room - (stop - start), stop
                if room == 0:
                    yield _tile(shared.rows, heads, pieces)
                    pieces, room = [], most
        if pieces:
            yield _tile(shared.rows, heads, pieces)


def _tile_tokens(plan: TilePlan, tokens: int) -> int:
    """The length of the tiles that so many tokens are cut into; the last one may be shorter."""
    if not plan.is_even or not tokens:
        return plan.tile_tokens
    tiles = -(-tokens // plan.tile_tokens)
    return min(-(-tokens // tiles // _EVEN_TOKENS) * _EVEN_TOKENS, plan.tile_tokens)


def _split_by_residency(shared: SharedPrefix) -> tuple[list[SegmentSlice], list[SegmentSlice]]:
    """The spans of a shared prefix, or parts of them, on the device and on the host only."""
    resident: list[SegmentSlice] = []
    streamed: list[SegmentSlice] = []
    for part in shared.slices:
        stop = min(max(part.segment.resident_tokens, part.start), part.stop)
        if part.start < stop:
            resident.append(SegmentSlice(part.segment, part.start, stop))
        if stop < part.stop:
            streamed.append(SegmentSlice(part.segment, stop, part.stop))
    return resident, streamed


def _joined(slices: Sequence[SegmentSlice], heads: slice) -> Iterator[Piece]:
    """Resident spans as few pieces: neighbours in an resident buffer are one."""
    resident_buffer: ResidentBuffer | None = None
    begin = end = 0
    for part in slices:
        start = part.segment.resident_start + part.start
        if part.segment.resident_buffer is not resident_buffer or start != end:
            if resident_buffer is not None:
                yield resident_buffer.k[heads, begin:end], resident_buffer.v[heads, begin:end]
            resident_buffer, begin = part.segment.resident_buffer, start
        end = start + part.tokens
    if resident_buffer is not None:
        yield resident_buffer.k[heads, begin:end], resident_buffer.v[heads, begin:end]


def _calls(layer: Layer, rows: int, pieces: Sequence[Piece]) -> Iterator[Sequence[Piece]]:
    """Pieces in as many calls as serve them best: one, or blocks where a kernel wants equal shapes."""
    query_rows = rows * layer.q.shape[1] // layer.k.shape[1] * layer.q.shape[2]
    if layer.is_few or layer.choice(query_rows, BLOCK_TOKENS[0]) is layer.choice(query_rows, 0):
        yield pieces
        return
    for k, v in pieces:
        start = 0
        while left := k.shape[1] - start:
            stop = start + next((tokens for tokens in BLOCK_TOKENS if tokens <= left), left)
            yield [(k[:, start:stop], v[:, start:stop])]
            start = stop


def _tile(rows: tuple[int, ...], heads: slice, slices: Sequence[SegmentSlice]) -> Tile:
    """A tile that has to be fetched."""
    pieces = tuple(part.segment.piece(heads, part.start, part.stop) for part in slices)
    after = dict.fromkeys(part.segment.write_done for part in slices if part.segment.write_done is not None)
    key = tuple((s.segment, s.segment.version, heads.start, heads.stop, s.start, s.stop) for s in slices)
    return Tile(rows, pieces, tuple(after), key)


def _attend_tile(
    layer: Layer, heads: slice, state: AttentionState | None, rows: Sequence[int], pieces: Sequence[Piece]
) -> AttentionState:
    """The state [B, h * G, T, Dv] of a head group (None: nothing yet) with attention on pieces that some rows share."""
    kv_heads = heads.stop - heads.start
    group = layer.q.shape[1] // layer.k.shape[1]
    packed = [
        layer.q[row, heads.start * group : heads.stop * group].reshape(kv_heads, -1, layer.q.shape[3]) for row in rows
    ]
    q = packed[0] if len(packed) == 1 else torch.cat(packed, dim=1)
    key_tokens = pieces[0][0].shape[1] if len(pieces) == 1 else 0
    part = layer.kernel(q.shape[1], key_tokens).attend_full(q, pieces, layer.scale, layer.softcap)
    if state is None and layer.q.shape[0] == 1:  # a token's first part is the state: launches are what it costs
        state, shape = part.running(), (1, kv_heads * group, -1)
        return AttentionState(state.out.view(*shape, state.out.shape[2]), state.lse.view(shape))
    state = state or _empty(layer, heads)
    share = q.shape[1] // len(rows)
    for index, row in enumerate(rows):
        mine = part[:, index * share : (index + 1) * share]
        AttentionState(state.out[row].view(kv_heads, share, -1), state.lse[row].view(kv_heads, share)).merge_(mine)
    return state


def _empty(layer: Layer, heads: slice) -> AttentionState:
    """The state of a head group that has seen nothing."""
    rows, query_heads, tokens, _ = layer.q.shape
    shape = (rows, (heads.stop - heads.start) * query_heads // layer.k.shape[1], tokens)
    return AttentionState.empty(shape, layer.v.shape[3], layer.q.device)


def _own_state(
    layer: Layer, heads: slice, token_ranges: Sequence[TokenRanges] | None, past_ranges: Sequence[TokenRanges] | None
) -> tuple[AttentionState | None, dict[int, tuple[Piece, ...]]]:
    """The chunk on itself, and per row what else lies on the device: the tail, and a chunk of one token.

    Returns the state [B, h * G, T, Dv] of the head group, None for one token, and the pieces that it still lacks.
    """
    rows, _, tokens, _ = layer.q.shape
    group = layer.q.shape[1] // layer.k.shape[1]
    q = layer.q[:, heads.start * group : heads.stop * group]
    k, v = layer.k[:, heads], layer.v[:, heads]
    past = layer.past_tokens
    resident: dict[int, tuple[Piece, ...]] = {}
    for row in range(rows):
        seen = token_ranges[row] if token_ranges is not None else None
        near = layer.layer_kv.tail(row, past_ranges[row] if past_ranges is not None else None)
        pieces = [(tail_k[heads], tail_v[heads]) for tail_k, tail_v in near]
        if tokens == 1 and (seen is None or any(start <= past < stop for start, stop in seen)):
            pieces.append((k[row], v[row]))
        if pieces:
            resident[row] = tuple(pieces)
    if tokens > 1 and (
        token_ranges is None or all(any(a <= past and past + tokens <= b for a, b in row) for row in token_ranges)
    ):
        return layer.kernel(0).attend_causal(q, k, v, layer.scale, layer.softcap), resident
    if tokens == 1:
        return None, resident
    state = _empty(layer, heads)
    if token_ranges is not None:
        for row in range(rows):
            for start, stop in token_ranges[row]:
                _attend_range_in_chunk(layer, state, q, k, v, row, max(start - past, 0), min(stop - past, tokens))
    return state, resident


def _attend_range_in_chunk(
    layer: Layer, state: AttentionState, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, row: int, lo: int, hi: int
) -> None:
    """Merge the keys [lo, hi) of a chunk: causal for the queries among them, all of them for the later ones."""
    if lo >= hi:
        return
    one, kv_heads, dim = slice(row, row + 1), k.shape[1], q.shape[3]
    among = layer.kernel(0).attend_causal(
        q[one, :, lo:hi], k[one, :, lo:hi], v[one, :, lo:hi], layer.scale, layer.softcap
    )
    state[one, :, lo:hi].merge_(among)
    if hi < q.shape[2]:
        later = q[row, :, hi:].reshape(kv_heads, -1, dim)
        part = layer.kernel(later.shape[1]).attend_full(
            later, [(k[row, :, lo:hi], v[row, :, lo:hi])], layer.scale, layer.softcap
        )
        shape = (q.shape[1], q.shape[2] - hi)
        state[row, :, hi:].merge_(AttentionState(part.out.reshape(*shape, -1), part.lse.reshape(shape)))
