"""SparseHeadLayer: a layer of a HeadCache some of whose KV heads see the first and the newest tokens only.

LayerKV holds the full heads, as in any other layer. The streaming heads have a window on the device
(kv/head_window.py), and nothing else of theirs is stored, moved or computed. A layer may have no full head, and then
has no LayerKV.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from headinfer.attention.sink_window import attend_sink_window, sink_window_output
from headinfer.engine.engine import Engine
from headinfer.engine.layer_pass import AttentionSpec
from headinfer.engine.options import Options
from headinfer.errors import StateError, UnsupportedError
from headinfer.hf.layers import HeadLayer
from headinfer.kv.head_window import HeadWindow, positions_of
from headinfer.kv.segments import TokenRanges
from headinfer.plan.model_shape import ModelShape
from headinfer.utils.head_pattern import HeadPattern
from headinfer.utils.kv_format import kv_bits

__all__ = ["SparseHeadLayer", "StreamingHeads", "check_approximations"]

_WINDOW = {"window_k": "k", "window_v": "v", "window_positions": "positions", "window_indices": "indices"}


def check_approximations(options: Options, shape: ModelShape, ranks: int = 1) -> None:
    """Check that the approximate options fit a model.

    Args:
        options: the options of a cache.
        shape: the model, or one rank's share of it.
        ranks: the processes that share the model.

    Raises:
        UnsupportedError: they are not served for this model.
        UsageError: the head pattern is for another model.
    """
    shape.check_kv_bits(kv_bits(options.kv_dtype))
    if options.sparse_heads is not None:
        if ranks > 1:
            raise UnsupportedError(
                f"sparse_heads is not served for a model that {ranks} processes share: use one process, or leave it out"
            )
        shape.check_pattern(options.sparse_heads)


@dataclass
class StreamingHeads:
    """Which KV heads of a layer are full and which are streaming.

    Attributes:
        full: the full heads, in ascending order.
        streaming: the streaming heads, in ascending order.
        sink_tokens: the first tokens, which streaming heads see.
        recent_tokens: the newest tokens that they see.
    """

    full: tuple[int, ...]
    streaming: tuple[int, ...]
    sink_tokens: int
    recent_tokens: int
    _indices: dict[tuple[tuple[int, ...], int, torch.device], torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of_layer(cls, pattern: HeadPattern, layer: int) -> StreamingHeads:
        """Return the heads of a decoder layer."""
        full = pattern.full_heads(layer)
        return cls(full, pattern.streaming_heads(layer), pattern.sink_tokens, pattern.recent_tokens)

    def of_queries(self, heads: tuple[int, ...], queries: int, device: torch.device) -> slice | torch.Tensor:
        """Return the query heads of some KV heads, for indexing: a slice if they are neighbours.

        Args:
            heads: the KV heads, in ascending order.
            queries: query heads of a KV head; 1 gives the KV heads themselves.
            device: the device of the tensor that is indexed.
        """
        if heads[-1] - heads[0] + 1 == len(heads):
            return slice(heads[0] * queries, (heads[-1] + 1) * queries)
        key = (heads, queries, device)
        if key not in self._indices:
            first = torch.tensor(heads)[:, None] * queries
            self._indices[key] = (first + torch.arange(queries)).flatten().to(device)
        return self._indices[key]


class SparseHeadLayer(HeadLayer):
    """A full-attention layer of a HeadCache with streaming heads.

    Args:
        engine: the engine of the cache.
        is_first: whether this is the first layer with a LayerKV.
        heads: its full and streaming heads.

    Attributes:
        heads: see above.
        seen_tokens: tokens of each row.
        window_k: the window's keys [B, streaming heads, T, Dk]; None before the first chunk. Sessions keep it, as the
            three fields that follow, with those names.
        window_v: its values [B, streaming heads, T, Dv].
        window_positions: the positions of its tokens; see HeadWindow.
        window_indices: the numbers of its tokens; see HeadWindow.
    """

    seen_tokens = 0
    window_k: torch.Tensor | None = None
    window_v: torch.Tensor | None = None
    window_positions: torch.Tensor | None = None
    window_indices: torch.Tensor | None = None

    def __init__(self, engine: Engine, is_first: bool, heads: StreamingHeads) -> None:
        super().__init__(engine, is_first)
        self.heads = heads

    @property
    def window(self) -> HeadWindow | None:
        """The KV of the streaming heads; None before the first chunk."""
        k, v, positions, indices = (getattr(self, name) for name in _WINDOW)
        if k is None:
            return None
        self.engine.hold_window(k, v)  # it may come from a session
        return HeadWindow(k, v, positions.cpu(), indices.cpu())

    def _use_window(self, window: HeadWindow) -> None:
        for name, attribute in _WINDOW.items():
            setattr(self, name, getattr(window, attribute))
        self.engine.hold_window(window.k, window.v)

    def _begin_if_empty(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        if self.is_initialized:
            return
        heads = self.heads
        if key_states.shape[1] != len(heads.full) + len(heads.streaming):
            raise UnsupportedError(
                f"a layer of the model gives {key_states.shape[1]} KV heads to the cache, and the head pattern has "
                f"{len(heads.full) + len(heads.streaming)}: sparse_heads is not served for it, so leave it out"
            )
        if heads.full:
            full = heads.of_queries(heads.full, 1, key_states.device)
            self.lazy_initialization(key_states[:, full], value_states[:, full])
        self.dtype = key_states.dtype
        self.device = key_states.device
        self.is_initialized = True
        streaming = heads.of_queries(heads.streaming, 1, key_states.device)
        self._use_window(HeadWindow.empty(key_states[:, streaming], value_states[:, streaming]))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
        """Attend from the chunk to what each head sees, then append the chunk to the layer's KV and window.

        Args:
            q: [B, Hq, T, Dk].
            k: [B, Hkv, T, Dk], as update() returned it.
            v: [B, Hkv, T, Dv], as update() returned it.
            spec: what the model asks for.

        Returns:
            [B, T, Hq, Dv].
        """
        before = self.window
        if self.pending is None or before is None:
            raise StateError("the attention of a HeadCache layer ran without an update: each needs one of its own")
        heads = self.heads
        group_queries = q.shape[1] // k.shape[1]
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])
        full: tuple[torch.Tensor, torch.Tensor] | None = None
        if heads.full:
            assert self.layer_kv is not None
            queries = heads.of_queries(heads.full, group_queries, q.device)
            kept = heads.of_queries(heads.full, 1, q.device)
            full = (k[:, kept], v[:, kept])
            full_q = q[:, queries]
            if self.leads:
                self.engine.begin(self.layer_kv, full_q.shape[1], full_q.shape[2])
            out[:, :, queries] = self.engine.attend(full_q, *full, self.layer_kv, _of_queries(spec, queries))
        else:
            self.engine.attentions += 1
        queries = heads.of_queries(heads.streaming, group_queries, q.device)
        kept = heads.of_queries(heads.streaming, 1, q.device)
        positions = self._positions(spec.token_ranges, q.shape[0], q.shape[2])
        whole = before.extended(k[:, kept], v[:, kept], positions, self.seen_tokens)
        out[:, :, queries] = self._attend_window(q[:, queries], whole, positions, _of_queries(spec, queries))
        after = whole.trimmed(heads.sink_tokens, heads.recent_tokens, q.shape[2])
        if full is not None and self.layer_kv is not None:
            self.layer_kv.append(*full)
        self._use_window(after)
        self.seen_tokens += q.shape[2]
        self.pending.is_stored = True
        self.pending = None
        self.engine.awaiting = None
        return out

    def _attend_window(
        self, q: torch.Tensor, whole: HeadWindow, positions: torch.Tensor, spec: AttentionSpec
    ) -> torch.Tensor:
        """Return the attention [B, T, Hq, Dv] of the streaming heads' queries q [B, Hq, T, Dk]."""
        operands = (q, whole.k, whole.v, positions, whole.positions)
        sink = self.heads.sink_tokens
        recent = self.heads.recent_tokens
        if spec.softcap is None and spec.sinks is None:
            out = sink_window_output(*operands, sink_tokens=sink, recent_tokens=recent, scale=spec.scale)
        else:
            state = attend_sink_window(
                *operands, sink_tokens=sink, recent_tokens=recent, scale=spec.scale, softcap=spec.softcap
            )
            out = state.out if spec.sinks is None else state.with_sinks(spec.sinks[:, None])
        return out.to(q.dtype).transpose(1, 2)

    def _positions(self, token_ranges: Sequence[TokenRanges] | None, rows: int, tokens: int) -> torch.Tensor:
        return positions_of(token_ranges, rows, self.seen_tokens, tokens)

    @property
    def rows(self) -> int:
        """Rows of the batch; 0 before the first chunk."""
        return self.window_k.shape[0] if self.window_k is not None else 0

    def get_seq_length(self) -> int:
        """Return the number of tokens of each row."""
        return self.seen_tokens

    def reset(self) -> None:
        """Empty the layer and free its memory."""
        super().reset()
        for name in (*_WINDOW, "seen_tokens"):
            self.__dict__.pop(name, None)

    def crop_refusal(self, tokens: int) -> str:
        """Return why the newest `tokens` tokens cannot be removed; empty if they can."""
        window = self.window
        kept = max(self.seen_tokens - tokens, 0)
        heads = self.heads
        if tokens <= 0 or window is None or window.can_crop(kept, heads.sink_tokens, heads.recent_tokens):
            return ""
        return (
            f"its streaming heads keep only their first {heads.sink_tokens} and about their newest "
            f"{heads.recent_tokens} tokens, so {tokens:,} tokens cannot be removed: keep a fork() of the cache instead"
        )

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens: a negative number is how many, a positive number is the length to keep.

        Raises:
            StateError: the window does not hold what is seen then. Nothing is changed.
        """
        window = self.window
        if window is None:
            return
        removed = int(tokens_to_remove)
        kept = max(self.seen_tokens + removed, 0) if removed <= 0 else min(removed, self.seen_tokens)
        refusal = self.crop_refusal(self.seen_tokens - kept)
        if refusal:
            raise StateError(f"cannot crop: {refusal}")
        if kept == self.seen_tokens:
            return
        if self.layer_kv is not None:
            self.layer_kv.crop(kept)
        self._use_window(window.cropped(kept))
        self.seen_tokens = kept

    def _select_rows(self, rows: list[int]) -> None:
        super()._select_rows(rows)
        window = self.window
        if window is not None and rows != list(range(self.rows)):
            self._use_window(window.select_rows(rows))


def _of_queries(spec: AttentionSpec, queries: slice | torch.Tensor) -> AttentionSpec:
    """Return what a model asks of some query heads."""
    if spec.sinks is None:
        return spec
    sinks = spec.sinks[queries if isinstance(queries, slice) else queries.to(spec.sinks.device)]
    return spec._replace(sinks=sinks)
