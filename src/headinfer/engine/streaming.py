"""The loop: attention over the past, tile by tile, while the next tile is copied to the device.

For each head group of a layer:

    state = attention of the chunk on itself (causal)
    for each tile (head group x token block) of the host segments:
        fetch tile i + 1                                                        fetch queue
        state = merge(state, attention on tile i)                               compute queue
    in decode: merge what the host has computed on its share of the past       (host_attention.py)
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
from dataclasses import dataclass

import torch

from headinfer.attention.backends import Backend, sdpa_serves
from headinfer.attention.state import AttentionState
from headinfer.engine.host_attention import HostAttention
from headinfer.engine.layer_pass import BLOCK_TOKENS, AttentionSpec, LayerPass
from headinfer.engine.packed import visible_pieces
from headinfer.engine.past import Tile, divide, host_parts, tiles_of
from headinfer.engine.recorder import MassRecorder
from headinfer.kv.byte_counter import ByteCounter
from headinfer.kv.device_buffer import BufferSlice, pieces_of
from headinfer.kv.exchange import HostExchange
from headinfer.kv.layer_kv import LayerKV, TokenRanges
from headinfer.kv.segments import first_of
from headinfer.kv.transfer import InPlace, Ring
from headinfer.plan.tiles import TilePlan
from headinfer.utils.tensors import Piece

__all__ = ["attend_one_piece", "attend_streaming"]


def attend_streaming(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layer_kv: LayerKV,
    spec: AttentionSpec,
    *,
    plan: TilePlan,
    ring: Ring | None,
    exchange: HostExchange | None = None,
    counter: ByteCounter | None = None,
    past_tokens: int | None = None,
    backend: str | None = None,
    used: set[str] | None = None,
    choices: dict[Hashable, Backend] | None = None,
    following: Iterable[Tile] = (),
    recorder: MassRecorder | None = None,
    attention: int = 0,
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
        exchange: lets the host attend to the part of the past that the plan gives it; None if it gives none.
        counter: counts what the host attends to.
        past_tokens: how many of the tokens before are attended to; None for all.
        backend: attention backends to try first, separated by commas.
        used: collects the names of the backends that ran.
        choices: collects the backends that were chosen, by problem, for the other layers of the pass.
        following: the first tiles of the layer that runs next. The ring prefetches them.
        recorder: records the attention mass of stretches. The plan must give the host no share.
        attention: the number of the attention in the forward pass, for the recorder.

    Returns:
        [B, T, Hq, Dv] in q's dtype. Query rows that see no key give 0.
    """
    used = used if used is not None else set()
    is_staged = q.shape[2] == 1 and past_tokens is None and layer_kv.stage(k, v)
    q = q.contiguous()  # packed once, not for each tile
    past = layer_kv.tokens if past_tokens is None else past_tokens
    choices = choices if choices is not None else {}
    layer = LayerPass(q, k, v, layer_kv, spec, past, backend, used, int(is_staged), choices)
    recording = recorder.layer(layer, attention) if recorder is not None else None
    past_ranges = spec.token_ranges
    if past != layer_kv.tokens:
        past_ranges = first_of(spec.token_ranges, past, q.shape[0])
    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])
    groups = _head_groups(k.shape[1], plan.heads_per_group)
    past_parts = divide(layer_kv, plan, past_ranges)
    parts = host_parts(past_parts)
    host: HostAttention | None = None
    if parts:
        assert exchange is not None, "a plan gives the host a share only if there is an exchange"
        host = HostAttention(layer, parts, exchange, counter or ByteCounter(), plan.cpu_threads)
    tiles_by_group = [list(tiles_of(past_parts, heads, plan)) for heads in groups]
    states: list[AttentionState] = []
    fetcher = _Fetcher(ring if ring is not None else InPlace(), tiles_by_group, following)
    for heads, tiles in zip(groups, tiles_by_group, strict=True):
        if recording is not None:
            recording.begin(heads)
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
                pieces = visible_pieces(fetcher.next_tile(), tile.slices, layer_kv.codec)
                own = near.pieces(heads)
            for some in _calls(layer, len(tile.rows), pieces):
                state = _attend_tile(layer, heads, state, tile.rows, (*some, *own))
                own = ()
            if recording is not None:
                recording.add_tile(tile, pieces)
            if not tile.resident:
                fetcher.release()
        for row, near in on_device.items():
            state = _attend_tile(layer, heads, state, (row,), near.pieces(heads))
        if recording is not None:
            recording.end()
        if host is None:
            _write(layer, heads, state, out)
        else:
            states.append(state or _empty(layer, heads))
    if host is not None:
        fetcher.prefetch_following()
        computed = host.compute()
        for heads, state in zip(groups, states, strict=True):
            state.merge_(computed[:, heads.start * layer.group_queries : heads.stop * layer.group_queries])
            _write(layer, heads, state, out)
    return out


def _write(layer: LayerPass, heads: slice, state: AttentionState | None, out: torch.Tensor) -> None:
    """Write the result of a head group into the output [B, T, Hq, Dv] of a layer."""
    state = state or _empty(layer, heads)
    queries = slice(heads.start * layer.group_queries, heads.stop * layer.group_queries)
    sinks = layer.spec.sinks
    result = state.out if sinks is None else state.with_sinks(sinks[queries, None])
    out[:, :, queries] = result.transpose(1, 2)


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

    def prefetch_following(self) -> None:
        """Prefetch what follows as far as there are slots, after all tiles of the layer. The link works on that until
        the host has computed its part."""
        for tile in self._following:
            if not self._ring.prefetch(tile.pieces, tile.after, tile.key):
                return


def _head_groups(kv_heads: int, heads_per_group: int) -> list[slice]:
    starts = range(0, kv_heads, heads_per_group)
    return [slice(start, min(start + heads_per_group, kv_heads)) for start in starts]


def _calls(layer: LayerPass, rows: int, pieces: Sequence[Piece]) -> Iterator[Sequence[Piece]]:
    """Return the pieces, split into kernel calls: one call, or blocks of BLOCK_TOKENS for a kernel that wants them."""
    query_rows = rows * layer.group_queries * layer.q.shape[2]
    if (
        layer.is_decode
        or layer.layer_kv.codec is not None
        or layer.choice(query_rows, BLOCK_TOKENS[0]) is layer.choice(query_rows, 0)
    ):
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
    q = layer.packed(rows, heads)
    key_tokens = pieces[0][0].shape[1] if len(pieces) == 1 else 0
    part = layer.attend_full(q, pieces, key_tokens)
    if state is None and layer.q.shape[0] == 1:  # the first part of a single row is the state itself
        state = part.running()
        shape = (1, q.shape[0] * layer.group_queries, -1)
        return AttentionState(state.out.view(*shape, state.out.shape[2]), state.lse.view(shape))
    state = state or _empty(layer, heads)
    layer.merge(heads, state, rows, part)
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
