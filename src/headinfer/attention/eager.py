"""The eager backend: attention by float32 matrix products, on any device, for any head dim, with soft caps.

backends.py documents the shapes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from headinfer.attention.problem import expand_heads
from headinfer.attention.state import AttentionState
from headinfer.utils.tensors import Piece

__all__ = ["attend_causal", "attend_full"]

_MIN_BLOCK_TOKENS = 16
_MAX_BLOCK_TOKENS = 1024
_MAX_BLOCK_SCORES = 2**24  # bounds the memory for scores if there are many query rows


def _block_tokens(rows: int) -> int:
    """Return the number of keys to compute scores for at a time; rows are the query rows of all heads."""
    return min(_MAX_BLOCK_TOKENS, max(_MAX_BLOCK_SCORES // rows, _MIN_BLOCK_TOKENS))


def _attend_block(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, softcap: float | None, hidden: torch.Tensor | None
) -> AttentionState:
    """Attend to k [..., Tk, Dk], v [..., Tk, Dv] with q [..., Tq, Dk]; hidden [Tq, Tk] marks the keys not seen."""
    scores = (q.float() @ k.float().mT) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.softmax(scores, dim=-1).masked_fill((lse == -torch.inf).unsqueeze(-1), 0.0)
    return AttentionState(weights @ v.float(), lse)


def attend_full(q: torch.Tensor, pieces: Sequence[Piece], scale: float, softcap: float | None) -> AttentionState:
    """Attend to all keys of the pieces, a block of keys at a time; see `AttendFull` in backends.py."""
    state = AttentionState.empty(q.shape[:-1], pieces[0][1].shape[-1], q.device)
    step = _block_tokens(q.shape[0] * q.shape[1])
    for k, v in pieces:
        for start in range(0, k.shape[1], step):
            block = slice(start, start + step)
            state.merge_(_attend_block(q, k[:, block], v[:, block], scale, softcap, None))
    return state


def attend_causal(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, softcap: float | None
) -> AttentionState:
    """Attend causally within a chunk, a block of keys at a time; see `AttendCausal` in backends.py."""
    k = expand_heads(q, k)
    v = expand_heads(q, v)
    tokens = q.shape[2]
    state = AttentionState.empty(q.shape[:-1], v.shape[-1], q.device)
    step = _block_tokens(q.shape[:-1].numel())
    for start in range(0, tokens, step):
        block = slice(start, start + step)
        positions = torch.arange(tokens, device=q.device)
        hidden = positions[:, None] < positions[None, block]
        state.merge_(_attend_block(q, k[:, :, block], v[:, :, block], scale, softcap, hidden))
    return state
