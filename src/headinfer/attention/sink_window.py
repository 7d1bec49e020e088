"""Attention of streaming heads: the first and the newest tokens only (StreamingLLM, arXiv 2309.17453).

The query at position i sees the key at position j <= i if j < sink_tokens or i - j < recent_tokens. Queries are
computed in blocks, and each block reads only the keys that one of its queries may see, so memory does not grow with the
square of the tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from headinfer.attention.problem import HALVES
from headinfer.attention.state import AttentionState

__all__ = ["attend_sink_window", "sink_window_output"]

_BLOCK_QUERIES = 256
_LEAST_BLOCK_QUERIES = 16
_MOST_SCORES = 2**24  # of one block, in float32


def attend_sink_window(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_positions: torch.Tensor,
    k_positions: torch.Tensor,
    *,
    sink_tokens: int,
    recent_tokens: int,
    scale: float,
    softcap: float | None = None,
) -> AttentionState:
    """Compute attention to the first and the newest tokens, in float32.

    Args:
        q: [B, Hq, Tq, Dk].
        k: [B, Hkv, Tk, Dk]; Hq is a multiple of Hkv.
        v: [B, Hkv, Tk, Dv].
        q_positions: the position of each query in its row, [B, Tq], int64; -1 sees nothing. On the CPU, the engine does
            not wait for the device.
        k_positions: the position of each key in its row, [B, Tk], int64; -1 is not seen.
        sink_tokens: the first positions, which all later queries see.
        recent_tokens: the newest positions that a query sees, with its own.
        scale: factor of the scores.
        softcap: soft cap c of the scores: tanh(score / c) * c. None applies no cap.

    Returns:
        out [B, Hq, Tq, Dv] and lse [B, Hq, Tq], float32. Queries that see no key give 0 and -inf.
    """
    state = AttentionState.empty(q.shape[:3], v.shape[3], q.device)
    for block in _blocks(q, k, v, q_positions, k_positions, sink_tokens, recent_tokens):
        scores = (block.q.float() @ block.k.float().mT) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if block.seen is not None:
            scores = scores.masked_fill(~block.seen, -torch.inf)
        lse = torch.logsumexp(scores, dim=-1)
        weights = torch.softmax(scores, dim=-1).masked_fill((lse == -torch.inf).unsqueeze(-1), 0.0)
        shape = (q.shape[0], q.shape[1], -1)
        state.out[:, :, block.queries] = (weights @ block.v.float()).reshape(*shape, v.shape[3])
        state.lse[:, :, block.queries] = lse.reshape(shape)
    return state


def sink_window_output(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_positions: torch.Tensor,
    k_positions: torch.Tensor,
    *,
    sink_tokens: int,
    recent_tokens: int,
    scale: float,
) -> torch.Tensor:
    """Compute the output of attend_sink_window() without its log-sum-exp, by torch's scaled_dot_product_attention.

    Args:
        q: see attend_sink_window(), as for the other arguments.
        k: the keys.
        v: the values.
        q_positions: the positions of the queries.
        k_positions: the positions of the keys.
        sink_tokens: the first positions, which all later queries see.
        recent_tokens: the newest positions that a query sees, with its own.
        scale: factor of the scores.

    Returns:
        [B, Hq, Tq, Dv] in q's dtype.
    """
    out = q.new_empty(*q.shape[:3], v.shape[3])
    is_slow = q.device.type == "cpu" and q.dtype in HALVES  # torch's CPU kernels are faster in float32
    for block in _blocks(q, k, v, q_positions, k_positions, sink_tokens, recent_tokens):
        operands = (block.q, block.k, block.v)
        if is_slow:
            operands = (block.q.float(), block.k.float(), block.v.float())
        found = torch.nn.functional.scaled_dot_product_attention(*operands, attn_mask=block.seen, scale=scale)
        if block.seen is not None:
            found = found.masked_fill(~block.seen.any(dim=-1, keepdim=True), 0.0)
        out[:, :, block.queries] = found.reshape(q.shape[0], q.shape[1], -1, v.shape[3])
    return out


@dataclass(frozen=True)
class _Block:
    """Some queries, and the keys that they may see.

    Attributes:
        queries: where the queries are.
        q: [B, Hkv, G * t, Dk]: the queries of the G heads that share a KV head, by head and then by token.
        k: [B, Hkv, n, Dk].
        v: [B, Hkv, n, Dv].
        seen: [B, 1, G * t, n], bool; None if all queries see all keys.
    """

    queries: slice
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    seen: torch.Tensor | None


def _blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_positions: torch.Tensor,
    k_positions: torch.Tensor,
    sink_tokens: int,
    recent_tokens: int,
) -> Iterator[_Block]:
    """Yield the blocks of all queries that may see a key, or of which one may."""
    rows, query_heads, query_tokens, _ = q.shape
    kv_heads = k.shape[1]
    groups = query_heads // kv_heads
    q_at = q_positions.cpu()
    k_at = k_positions.cpu()
    size = min(_BLOCK_QUERIES, query_tokens)
    while size > _LEAST_BLOCK_QUERIES and rows * query_heads * size * _keys(k, size, sink_tokens, recent_tokens) > (
        _MOST_SCORES
    ):
        size //= 2
    for start in range(0, query_tokens, size):
        queries = slice(start, min(start + size, query_tokens))
        asked = q_at[:, queries]
        found = _seen_slices(asked, k_at, sink_tokens, recent_tokens)
        k_here = _taken(k, found)
        v_here = _taken(v, found)
        keys_at = torch.cat([k_at[:, part] for part in found], dim=1)
        if query_tokens > _LEAST_BLOCK_QUERIES:  # large masks are computed on the device
            asked = asked.to(q.device, non_blocking=True)
            keys_at = keys_at.to(q.device, non_blocking=True)
        query = asked[:, :, None]
        key = keys_at[:, None, :]
        seen = (key >= 0) & (key <= query) & ((key < sink_tokens) | (query - key < recent_tokens))
        packed = q[:, :, queries].reshape(rows, kv_heads, -1, q.shape[3])
        is_all_seen = seen.device.type == "cpu" and bool(seen.all())
        mask = None if is_all_seen else seen[:, None].repeat(1, 1, groups, 1).to(q.device)
        yield _Block(queries, packed, k_here, v_here, mask)


def _keys(k: torch.Tensor, queries: int, sink_tokens: int, recent_tokens: int) -> int:
    """Return about how many keys a block of so many queries reads."""
    return min(k.shape[2], sink_tokens + recent_tokens + queries)


def _seen_slices(
    q_positions: torch.Tensor, k_positions: torch.Tensor, sink_tokens: int, recent_tokens: int
) -> list[slice]:
    """Return which keys some queries of a batch may see: one or two slices, which hold all of them.

    Args:
        q_positions: [B, t] on the CPU.
        k_positions: [B, Tk] on the CPU.
        sink_tokens: see attend_sink_window().
        recent_tokens: see attend_sink_window().
    """
    last = q_positions.amax(dim=1, keepdim=True)
    first = q_positions.masked_fill(q_positions < 0, torch.iinfo(torch.int64).max).amin(dim=1, keepdim=True)
    is_seen = (k_positions >= 0) & (k_positions <= last)
    is_recent = is_seen & (k_positions > first - recent_tokens)
    is_sink = is_seen & (k_positions < sink_tokens)
    slices = [found for found in (_hull(is_sink), _hull(is_recent)) if found is not None]
    if len(slices) == 2 and slices[1].start <= slices[0].stop:
        slices = [slice(min(slices[0].start, slices[1].start), max(slices[0].stop, slices[1].stop))]
    return slices or [slice(0, 1)]  # a key that is not seen, so that kernels have one


def _hull(chosen: torch.Tensor) -> slice | None:
    """Return the slice from the first to the last column of [B, T], bool, that a row has chosen; None if none has."""
    columns = chosen.any(dim=0).nonzero()
    return slice(int(columns[0]), int(columns[-1]) + 1) if columns.numel() else None


def _taken(tensor: torch.Tensor, slices: list[slice]) -> torch.Tensor:
    """Return slices of the tokens of [B, H, T, D], one behind the other."""
    if len(slices) == 1:
        return tensor[:, :, slices[0]]
    return torch.cat([tensor[:, :, part] for part in slices], dim=2)
