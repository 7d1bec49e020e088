"""The loop: attention over the past, tile by tile, while the next tile is copied to the device.

For each head group of a layer:

    state = attention of the chunk on itself (causal)
    for each tile (head group x token block) of the host segments:
        fetch tile i + 1                                                        fetch queue
        state = merge(state, attention on tile i)                               compute queue
    write the state into the output

The tail is on the device, behind the resident tokens. In decode the new token is written behind the tail. If all tokens
of a layer are resident, these are all keys, and the loop is one kernel call.

If the host is the compute device (CPU), nothing is copied: a tile consists of the segments themselves, and one call
reads all of them.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from headinfer.attention.backends import Backend, Problem, capability_of, choose, sdpa_serves
from headinfer.attention.state import AttentionState
from headinfer.kv.device_buffer import BufferSlice, pieces_of
from headinfer.kv.layer_kv import LayerKV, TokenRanges
from headinfer.kv.segments import SegmentSlice, SharedPrefix, first_of
from headinfer.kv.slices import AnyPiece
from headinfer.kv.transfer import InPlace, Ring
from headinfer.plan.tiles import FEW_QUERY_TOKENS, TilePlan
from headinfer.utils.tensors import Piece

__all__ = ["BLOCK_TOKENS", "AttentionSpec", "LayerPass", "Tile", "attend_one_piece", "attend_streaming", "tiles_of"]

BLOCK_TOKENS = (32_768, 16_384, 8192)
"""Lengths of the pieces that kernels with one plan per shape are given. Merging a piece of 32K tokens costs about a
hundredth of its attention."""

_KEPT_SEGMENT_TOKENS = 4096  # a smaller segment is copied with its neighbours, since a tile takes launches too


class AttentionSpec(NamedTuple):
    """What a model asks of an attention, beside Q, K and V.

    Attributes:
        scale: factor of the scores.
        softcap: soft cap c of the scores: tanh(score / c) * c. None applies no cap.
        sinks: one more score per query head, [Hq], of a key with value 0 (gpt-oss).
        token_ranges: for each row of the batch, the half-open ranges of tokens that are seen, over the past and the
            chunk. None sees all tokens.
    """

    scale: float
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    token_ranges: Sequence[TokenRanges] | None = None


@dataclass(frozen=True)
class Tile:
    """Some tokens of one head group, for the rows that share them.

    Attributes:
        rows: the rows of the batch.
        pieces: what must be fetched; empty for a resident tile.
        after: events of the write-back of these pieces.
        key: equal for tiles of the same tokens of the same segments, as long as their content is the same.
        resident: what is on the device.
    """

    rows: tuple[int, ...]
    pieces: tuple[AnyPiece, ...] = ()
    after: tuple[Any, ...] = ()
    key: Hashable = None
    resident: tuple[BufferSlice, ...] = ()


@dataclass
class LayerPass:
    """The attention of one layer in one forward pass.

    Attributes:
        q: queries [B, Hq, T, Dk], contiguous.
        k: keys of the chunk [B, Hkv, T, Dk].
        v: values of the chunk [B, Hkv, T, Dv].
        layer_kv: the KV of the tokens before.
        spec: what the model asks for.
        past_tokens: how many of these tokens are attended to.
        backend: attention backends to try first.
        used: collects the names of the backends that ran.
        staged_tokens: tokens of the chunk that were written behind the tail: 1 or 0.
        choices: the backends that were chosen so far, by problem.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    layer_kv: LayerKV
    spec: AttentionSpec
    past_tokens: int
    backend: str | None = None
    used: set[str] = field(default_factory=set)
    staged_tokens: int = 0
    choices: dict[Hashable, Backend] = field(default_factory=dict)

    @property
    def is_decode(self) -> bool:
        """Whether there are so few query tokens that a kernel call costs more than what it computes."""
        return self.q.shape[2] <= FEW_QUERY_TOKENS

    @property
    def group_queries(self) -> int:
        """Query heads per KV head."""
        return self.q.shape[1] // self.k.shape[1]

    def kernel(self, query_rows: int, key_tokens: int = 0) -> Backend:
        """Return the backend for a problem. Its name is added to `used`."""
        backend = self.choice(query_rows, key_tokens)
        self.used.add(backend.name)
        return backend

    def choice(self, query_rows: int, key_tokens: int) -> Backend:
        """Return the backend for a problem. It is chosen once in a pass, since most layers have the same problems.

        Args:
            query_rows: query rows per KV head; 0 for the chunk on itself.
            key_tokens: tokens of one piece of keys; 0 for several pieces, or any number.
        """
        q = self.q
        softcap = self.spec.softcap is not None
        key = (query_rows, key_tokens, q.device, q.dtype, q.shape[3], self.v.shape[3], softcap)
        backend = self.choices.get(key)
        if backend is None:
            problem = Problem(
                q.device.type,
                q.dtype,
                query_rows,
                q.shape[3],
                self.v.shape[3],
                softcap,
                capability_of(q.device),
                key_tokens,
                key_tokens in BLOCK_TOKENS,  # kernels with one plan per shape serve these lengths only
            )
            backend = choose(problem, self.backend)
            self.choices[key] = backend
        return backend


def attend_streaming(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layer_kv: LayerKV,
    spec: AttentionSpec,
    *,
    plan: TilePlan,
    ring: Ring | None,
    past_tokens: int | None = None,
    backend: str | None = None,
    used: set[str] | None = None,
    choices: dict[Hashable, Backend] | None = None,
    following: Iterable[Tile] = (),
) -> torch.Tensor:
    """Compute causal attention of a chunk on the tokens before it and on itself.

    Args:
        q: [B, Hq, T, Dk].
        k: [B, Hkv, T, Dk].
        v: [B, Hkv, T, Dv].
        layer_kv: the KV of the tokens before.
        spec: what the model asks for.
        plan: the shape of the tiles.
        ring: brings tiles to the device. None reads the segments in place.
        past_tokens: how many of the tokens before are attended to; None for all.
        backend: attention backends to try first, separated by commas.
        used: collects the names of the backends that ran.
        choices: collects the backends that were chosen, by problem, for the other layers of the pass.
        following: the first tiles of the layer that runs next. The ring prefetches them.

    Returns:
        [B, T, Hq, Dv] in q's dtype. Query rows that see no key give 0.
    """
    used = used if used is not None else set()
    is_staged = q.shape[2] == 1 and past_tokens is None and layer_kv.stage(k, v)
    q = q.contiguous()  # packed once, not for each tile
    past = layer_kv.tokens if past_tokens is None else past_tokens
    choices = choices if choices is not None else {}
    layer = LayerPass(q, k, v, layer_kv, spec, past, backend, used, int(is_staged), choices)
    past_ranges = spec.token_ranges
    if past != layer_kv.tokens:
        past_ranges = first_of(spec.token_ranges, past, q.shape[0])
    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])
    groups = _head_groups(k.shape[1], plan.heads_per_group)
    tiles_by_group = [list(tiles_of(layer_kv, heads, plan, past_ranges)) for heads in groups]
    fetcher = _Fetcher(ring if ring is not None else InPlace(), tiles_by_group, following)
    for heads, tiles in zip(groups, tiles_by_group, strict=True):
        state, on_device = _own_state(layer, heads, past_ranges)
        for tile in tiles:
            # The tail of a row follows its resident tokens in memory: one piece. In decode it joins the first tile that
            # is fetched, since launches are what a kernel costs.
            near = _Near()
            if len(tile.rows) == 1 and (tile.resident or layer.is_decode):
                near = on_device.pop(tile.rows[0], near)
            if tile.resident:
                pieces = pieces_of((*tile.resident, *near.tail), heads)
                own = near.chunk
            else:
                pieces = list(fetcher.next_tile())
                own = near.pieces(heads)
            for some in _calls(layer, len(tile.rows), pieces):
                state = _attend_tile(layer, heads, state, tile.rows, (*some, *own))
                own = ()
            if not tile.resident:
                fetcher.release()
        for row, near in on_device.items():
            state = _attend_tile(layer, heads, state, (row,), near.pieces(heads))
        state = state or _empty(layer, heads)
        queries = slice(heads.start * layer.group_queries, heads.stop * layer.group_queries)
        merged = state.out if spec.sinks is None else state.with_sinks(spec.sinks[queries, None])
        out[:, :, queries] = merged.transpose(1, 2)
    return out


def attend_one_piece(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer_kv: LayerKV, spec: AttentionSpec, backend: str | None
) -> torch.Tensor | None:
    """Compute attention of a new token as without offloading, if the device holds all tokens of each row in one piece.

    Args:
        q: [B, Hq, 1, Dk].
        k: [B, Hkv, 1, Dk].
        v: [B, Hkv, 1, Dv].
        layer_kv: the KV of the tokens before.
        spec: what the model asks for.
        backend: attention backends to try first, separated by commas.

    Returns:
        [B, 1, Hq, Dv]; None if the tokens are not in one piece, or if torch's sdpa does not serve the layer.
    """
    if spec.token_ranges is not None or spec.softcap is not None or spec.sinks is not None:
        return None
    if not sdpa_serves(q.device.type, q.dtype, layer_kv.key_dim, layer_kv.value_dim, backend):
        return None
    whole = layer_kv.stage_in_one_piece(k, v)
    if whole is None:
        return None
    is_grouped = q.shape[1] != layer_kv.heads
    out = torch.nn.functional.scaled_dot_product_attention(q, *whole, scale=spec.scale, enable_gqa=is_grouped)
    return out.transpose(1, 2)


class _Fetcher:
    """Fetches the tiles of a layer in order, `ring.depth` tiles ahead, and then tells the ring what follows."""

    def __init__(self, ring: Ring, tiles_by_group: Sequence[Sequence[Tile]], following: Iterable[Tile]) -> None:
        self._ring = ring
        self._tiles = (tile for tiles in tiles_by_group for tile in tiles if not tile.resident)
        self._following = iter(following)
        first = itertools.islice(self._tiles, ring.depth)
        self._handles = deque(ring.fetch(tile.pieces, tile.after, tile.key) for tile in first)

    def next_tile(self) -> Sequence[Piece]:
        """Begin to fetch one more tile, and wait for the oldest one."""
        ring = self._ring
        tile = next(self._tiles, None)
        if tile is not None:
            self._handles.append(ring.fetch(tile.pieces, tile.after, tile.key))
        else:
            tile = next(self._following, None)
            if tile is not None:
                ring.prefetch(tile.pieces, tile.after, tile.key)
        return ring.wait(self._handles[0])

    def release(self) -> None:
        """Give back the slot of the tile that next_tile() returned."""
        self._ring.release(self._handles.popleft())


def _head_groups(kv_heads: int, heads_per_group: int) -> list[slice]:
    starts = range(0, kv_heads, heads_per_group)
    return [slice(start, min(start + heads_per_group, kv_heads)) for start in starts]


def tiles_of(
    layer_kv: LayerKV, heads: slice, plan: TilePlan, token_ranges: Sequence[TokenRanges] | None
) -> Iterator[Tile]:
    """Return the host segments of a head group as tiles.

    Resident tokens are one tile. The plan cuts the others, or keeps large segments as tiles of their own.

    Args:
        layer_kv: the KV of the layer.
        heads: the KV heads of the group.
        plan: the shape of the tiles.
        token_ranges: for each row, the ranges of tokens that are seen; None for all.
    """
    for shared in layer_kv.shared_prefixes(token_ranges):
        resident, streamed = _split_by_residency(shared)
        if resident:
            yield Tile(shared.rows, resident=tuple(part.segment.resident(part.start, part.stop) for part in resident))
        most = plan.length(sum(part.tokens for part in streamed))
        slices: list[SegmentSlice] = []
        room = most
        for part in streamed:
            start = part.start
            if plan.keeps_segments and _KEPT_SEGMENT_TOKENS <= part.tokens == part.segment.tokens <= most:
                if slices:
                    yield _tile(shared.rows, heads, slices)
                yield _tile(shared.rows, heads, [part])
                slices = []
                room = most
                continue
            while start < part.stop:
                stop = min(part.stop, start + room)
                slices.append(SegmentSlice(part.segment, start, stop))
                room -= stop - start
                start = stop
                if room == 0:
                    yield _tile(shared.rows, heads, slices)
                    slices = []
                    room = most
        if slices:
            yield _tile(shared.rows, heads, slices)


def _split_by_residency(shared: SharedPrefix) -> tuple[list[SegmentSlice], list[SegmentSlice]]:
    """Return the slices, or parts of them, that are on the device, and those that are on the host only."""
    resident: list[SegmentSlice] = []
    streamed: list[SegmentSlice] = []
    for part in shared.slices:
        stop = min(max(part.segment.resident_tokens, part.start), part.stop)
        if part.start < stop:
            resident.append(SegmentSlice(part.segment, part.start, stop))
        if stop < part.stop:
            streamed.append(SegmentSlice(part.segment, stop, part.stop))
    return resident, streamed


def _tile(rows: tuple[int, ...], heads: slice, slices: Sequence[SegmentSlice]) -> Tile:
    """Return a tile that must be fetched."""
    pieces = tuple(part.segment.piece(heads, part.start, part.stop) for part in slices)
    events = [part.segment.write_done for part in slices if part.segment.write_done is not None]
    key = tuple((part.segment, part.segment.version, heads.start, heads.stop, part.start, part.stop) for part in slices)
    return Tile(rows, pieces, tuple(dict.fromkeys(events)), key)


def _calls(layer: LayerPass, rows: int, pieces: Sequence[Piece]) -> Iterator[Sequence[Piece]]:
    """Return the pieces, split into kernel calls: one call, or blocks of BLOCK_TOKENS for a kernel that wants them."""
    query_rows = rows * layer.group_queries * layer.q.shape[2]
    if layer.is_decode or layer.choice(query_rows, BLOCK_TOKENS[0]) is layer.choice(query_rows, 0):
        yield pieces
        return
    for k, v in pieces:
        start = 0
        while start < k.shape[1]:
            left = k.shape[1] - start
            stop = start + next((tokens for tokens in BLOCK_TOKENS if tokens <= left), left)
            yield [(k[:, start:stop], v[:, start:stop])]
            start = stop


def _attend_tile(
    layer: LayerPass, heads: slice, state: AttentionState | None, rows: Sequence[int], pieces: Sequence[Piece]
) -> AttentionState:
    """Merge attention on pieces that some rows share into the state of a head group.

    Args:
        layer: the layer's attention.
        heads: the KV heads of the group.
        state: [B, h * G, T, Dv]; None if nothing was seen yet.
        rows: the rows that share the pieces.
        pieces: keys and values [h, T, D].
    """
    kv_heads = heads.stop - heads.start
    group = layer.group_queries
    queries = slice(heads.start * group, heads.stop * group)
    packed = [layer.q[row, queries].reshape(kv_heads, -1, layer.q.shape[3]) for row in rows]
    q = packed[0] if len(packed) == 1 else torch.cat(packed, dim=1)
    key_tokens = pieces[0][0].shape[1] if len(pieces) == 1 else 0
    kernel = layer.kernel(q.shape[1], key_tokens)
    part = kernel.attend_full(q, pieces, layer.spec.scale, layer.spec.softcap)
    if state is None and layer.q.shape[0] == 1:  # the first part of a single row is the state itself
        state = part.running()
        shape = (1, kv_heads * group, -1)
        return AttentionState(state.out.view(*shape, state.out.shape[2]), state.lse.view(shape))
    state = state or _empty(layer, heads)
    share = q.shape[1] // len(rows)
    for index, row in enumerate(rows):
        of_row = part if len(rows) == 1 else part[:, index * share : (index + 1) * share]
        target = AttentionState(state.out[row].view(kv_heads, share, -1), state.lse[row].view(kv_heads, share))
        target.merge_(of_row)
    return state


def _empty(layer: LayerPass, heads: slice) -> AttentionState:
    """Return the state of a head group that has seen no key."""
    rows, _, tokens, _ = layer.q.shape
    shape = (rows, (heads.stop - heads.start) * layer.group_queries, tokens)
    return AttentionState.empty(shape, layer.v.shape[3], layer.q.device)


@dataclass(frozen=True)
class _Near:
    """What a row sees on the device beside its resident tokens: the tail, and a chunk of one token, unless the tail has
    it."""

    tail: tuple[BufferSlice, ...] = ()
    chunk: tuple[Piece, ...] = ()

    def pieces(self, heads: slice) -> tuple[Piece, ...]:
        return (*pieces_of(self.tail, heads), *self.chunk)


def _own_state(
    layer: LayerPass, heads: slice, past_ranges: Sequence[TokenRanges] | None
) -> tuple[AttentionState | None, dict[int, _Near]]:
    """Attend from the chunk to itself, and return what else is on the device without being resident.

    A chunk of one token is returned too.

    Returns:
        The state [B, h * G, T, Dv] of the head group, None for a chunk of one token, and what of each row the state
        lacks.
    """
    token_ranges = layer.spec.token_ranges
    rows, _, tokens, _ = layer.q.shape
    past = layer.past_tokens
    q = layer.q[:, heads.start * layer.group_queries : heads.stop * layer.group_queries]
    k = layer.k[:, heads]
    v = layer.v[:, heads]
    on_device: dict[int, _Near] = {}
    for row in range(rows):
        row_ranges = past_ranges[row] if past_ranges is not None else None
        tail = layer.layer_kv.tail_slices(row, row_ranges, layer.staged_tokens)
        sees_itself = token_ranges is None or any(start <= past < stop for start, stop in token_ranges[row])
        chunk = ((k[row], v[row]),) if tokens == 1 and sees_itself and not layer.staged_tokens else ()
        if tail or chunk:
            on_device[row] = _Near(tuple(tail), chunk)
    if tokens == 1:
        return None, on_device
    chunk_is_seen = token_ranges is None or all(
        any(start <= past and past + tokens <= stop for start, stop in ranges) for ranges in token_ranges
    )
    if chunk_is_seen:
        return layer.kernel(0).attend_causal(q, k, v, layer.spec.scale, layer.spec.softcap), on_device
    state = _empty(layer, heads)
    if token_ranges is not None:
        for row in range(rows):
            for start, stop in token_ranges[row]:
                _attend_range_in_chunk(layer, state, q, k, v, row, max(start - past, 0), min(stop - past, tokens))
    return state, on_device


def _attend_range_in_chunk(
    layer: LayerPass,
    state: AttentionState,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    row: int,
    start: int,
    stop: int,
) -> None:
    """Merge the keys [start, stop) of a chunk: causal for the queries among them, all of them for later queries."""
    if start >= stop:
        return
    spec = layer.spec
    one = slice(row, row + 1)
    here = slice(start, stop)
    among = layer.kernel(0).attend_causal(q[one, :, here], k[one, :, here], v[one, :, here], spec.scale, spec.softcap)
    state[one, :, here].merge_(among)
    if stop < q.shape[2]:
        later = q[row, :, stop:].reshape(k.shape[1], -1, q.shape[3])
        pieces = [(k[row, :, here], v[row, :, here])]
        part = layer.kernel(later.shape[1]).attend_full(later, pieces, spec.scale, spec.softcap)
        shape = (q.shape[1], q.shape[2] - stop)
        state[row, :, stop:].merge_(AttentionState(part.out.reshape(*shape, -1), part.lse.reshape(shape)))
