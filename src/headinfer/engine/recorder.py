"""Records the exact attention mass of stretches of the context, while the loop attends to it.

The mass of a stretch S for a query is the sum of its attention weights on the tokens of S. With the log-sum-exps of
attention/state.py it is exp(lse(S) - lse(all)). The loop brings K to the device anyway, so a recording adds only the
scores in float32 and their log-sum-exps. Nothing of it runs without a recorder.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from headinfer.engine.layer_pass import LayerPass
from headinfer.engine.packed import is_packed
from headinfer.engine.past import Tile
from headinfer.kv.device_buffer import pieces_of
from headinfer.kv.segments import Segment
from headinfer.utils.tensors import Piece

__all__ = ["LayerRecording", "Mass", "MassRecorder"]

_MOST_SCORES = 2**22  # computed at once: 16 MiB in float32
_DECODED_TOKENS = 4096  # at once, if K is quantised


@dataclass(frozen=True)
class Mass:
    """The attention mass of all stretches for some heads and queries of one attention.

    Attributes:
        attention: the number of the attention in the forward pass, from 0.
        first_head: the first query head.
        first_query: the position of the first query.
        mass: [heads, queries, stretches], float32. The sum over all stretches is 1, less the mass of sinks (gpt-oss).
    """

    attention: int
    first_head: int
    first_query: int
    mass: torch.Tensor


class MassRecorder:
    """Records the attention mass of stretches for the queries of a cache with one row.

    Args:
        edges: the positions at which the stretches begin, ascending from 0, and the end of the last one, which no
            token of the context may exceed.
        first_query: the position of the first query that is recorded.
        take: called with the mass of each head group of each attention. If a pass is computed again because a device
            ran out of memory, its attentions are recorded again, from number 0 on.
    """

    def __init__(self, edges: Sequence[int], first_query: int, take: Callable[[Mass], None]) -> None:
        self.edges = edges
        self.first_query = first_query
        self.take = take

    def layer(self, layer: LayerPass, attention: int) -> LayerRecording | None:
        """Return the recording of an attention; None if no query of its chunk is recorded."""
        assert layer.q.shape[0] == 1, "mass is recorded for one row"
        has_queries = layer.past_tokens + layer.q.shape[2] > self.first_query
        return LayerRecording(self, layer, attention) if has_queries else None

    def parts(self, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """Split the tokens [start, stop) at the edges. Neighbouring stretches of equal length are one part.

        Yields:
            The first token, the token after the last one, the first stretch, and the number of stretches.
        """
        edges = self.edges
        while start < stop:
            stretch = bisect_right(edges, start) - 1
            end = min(edges[stretch + 1], stop)
            tokens = end - start
            count = 1
            while end + tokens <= stop and edges[stretch + count + 1] - edges[stretch + count] == tokens:
                end += tokens
                count += 1
            yield start, end, stretch, count
            start = end


class LayerRecording:
    """Records the mass of one attention, head group by head group: begin(), add_tile() for each tile, end().

    Args:
        recorder: what is recorded.
        layer: the attention.
        attention: its number in the forward pass.
    """

    def __init__(self, recorder: MassRecorder, layer: LayerPass, attention: int) -> None:
        self._recorder = recorder
        self._layer = layer
        self._attention = attention
        self._first_query = max(recorder.first_query, layer.past_tokens)
        self._starts: dict[Segment, int] = {}  # the position of the token 0 of each segment
        at = 0
        for shared in layer.layer_kv.shared_prefixes():
            for part in shared.slices:
                self._starts[part.segment] = at - part.start
                at += part.tokens
        self._heads = slice(0)
        self._q = layer.q
        self._lse = layer.q

    def begin(self, heads: slice) -> None:
        """Begin with a group of KV heads."""
        layer = self._layer
        queries = slice(heads.start * layer.group_queries, heads.stop * layer.group_queries)
        recorded = layer.q[0, queries, self._first_query - layer.past_tokens :].float() * layer.spec.scale
        self._heads = heads
        self._q = recorded.reshape(heads.stop - heads.start, -1, recorded.shape[2])  # [h, G * queries, Dk]
        stretches = len(self._recorder.edges) - 1
        self._lse = self._q.new_full((*self._q.shape[:2], stretches), -torch.inf)

    def add_tile(self, tile: Tile, pieces: Sequence[Piece]) -> None:
        """Add the tokens of a tile.

        Args:
            tile: the tile.
            pieces: its tokens on the device, in order. What follows them is not part of the tile.
        """
        keys = self._keys(pieces)
        k = next(keys)
        for part in tile.slices:
            start = self._starts[part.segment] + part.start
            stop = start + part.tokens
            while start < stop:
                if not k.shape[1]:
                    k = next(keys)
                taken = min(k.shape[1], stop - start)
                self._add(k[:, :taken], start)
                k = k[:, taken:]
                start += taken

    def _keys(self, pieces: Sequence[Piece]) -> Iterator[torch.Tensor]:
        """Yield the keys of pieces in order. Quantised ones are decoded, some at a time."""
        codec = self._layer.layer_kv.codec
        for k, v in pieces:
            if codec is None or not is_packed((k, v)):
                yield k
                continue
            for start in range(0, k.shape[1], _DECODED_TOKENS):
                block = slice(start, start + _DECODED_TOKENS)
                yield codec.decode(k[:, block], v[:, block], self._q.dtype)[0]

    def end(self) -> None:
        """Add the tail and the chunk itself, and pass the mass of the head group on."""
        layer = self._layer
        past = layer.past_tokens
        start = min(layer.layer_kv.host_tokens, past)
        for k, _ in pieces_of(layer.layer_kv.tail_slices(0, [(0, past)]), self._heads):
            self._add(k, start)
            start += k.shape[1]
        self._add(layer.k[0, self._heads], past)
        total = torch.logsumexp(self._lse, dim=-1, keepdim=True)
        sinks = layer.spec.sinks
        first_head = self._heads.start * layer.group_queries
        heads = self._lse.shape[0] * layer.group_queries
        mass = self._lse.view(heads, -1, self._lse.shape[2])
        total = total.view(heads, -1, 1)
        if sinks is not None:
            total = torch.logaddexp(total, sinks[first_head : first_head + heads, None, None].to(total.dtype))
        self._recorder.take(Mass(self._attention, first_head, self._first_query, torch.exp(mass - total)))

    def _add(self, k: torch.Tensor, start: int) -> None:
        """Add the keys [h, T, Dk] of the tokens from position `start` on."""
        step = max(_MOST_SCORES // (self._q.shape[0] * self._q.shape[1]), 1)
        for begin in range(0, k.shape[1], step):
            self._add_block(k[:, begin : begin + step], start + begin)

    def _add_block(self, k: torch.Tensor, start: int) -> None:
        layer = self._layer
        scores = self._q @ k.to(self._q.dtype).mT
        softcap = layer.spec.softcap
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        stop = start + k.shape[1]
        if stop > self._first_query:
            keys = torch.arange(start, stop, device=k.device)
            queries = torch.arange(self._first_query, layer.past_tokens + layer.q.shape[2], device=k.device)
            is_later = (keys > queries[:, None]).repeat(layer.group_queries, 1)
            scores.masked_fill_(is_later, -torch.inf)
        for first, last, stretch, count in self._recorder.parts(start, stop):
            split = scores[..., first - start : last - start].unflatten(-1, (count, -1))
            part = self._lse[..., stretch : stretch + count]
            torch.logaddexp(part, torch.logsumexp(split, dim=-1), out=part)
