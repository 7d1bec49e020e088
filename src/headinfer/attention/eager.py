"""Attention from matrix products in float32: any device, any width, with soft cap. Shapes as in backends.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from headinfer.attention.problem import expand_heads
from headinfer.attention.state import AttentionState
from headinfer.utils.tensors import Piece

__all__ = ["attend_causal", "attend_full"]

_TOKENS = 1024  # keys at a time at most
_SCORES = 2**24  # scores at a time, where there are many query rows


def _tokens(rows: int) -> int:
    """Keys at a time for so many query rows over all heads."""
    return min(_TOKENS, max(_SCORES // rows, 16))


def _block(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, softcap: float | None, hidden: torch.Tensor | None
) -> AttentionState:
    """q [..., Tq, Dk], k [..., Tk, Dk], v [..., Tk, Dv]; hidden [Tq, Tk] is True where a key is not seen."""
    scores = (q.float() @ k.float().mT) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.softmax(scores, dim=-1).masked_fill((lse == -torch.inf).unsqueeze(-1), 0.0)
    return AttentionState(weights @ v.float(), lse)


def attend_full(q: torch.Tensor, pieces: Sequence[Piece], scale: float, softcap: float | None) -> AttentionState:
    """q [H, N, Dk], pieces of k [H, T, Dk] and v [H, T, Dv]: a block of keys at a time."""
    state = AttentionState.empty(q.shape[:-1], pieces[0][1].shape[-1], q.device)
    step = _tokens(q.shape[0] * q.shape[1])
    for k, v in pieces:
        for start in range(0, k.shape[1], step):
            block = slice(start, start + step)
            state.merge_(_block(q, k[:, block], v[:, block], scale, softcap, None))
    return state


def attend_causal(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, softcap: float | None
) -> AttentionState:
    """q [B, Hq, T, Dk], k [B, Hkv, T, Dk], v [B, Hkv, T, Dv], causal."""
    k, v, tokens = expand_heads(q, k), expand_heads(q, v), q.shape[2]
    state = AttentionState.empty(q.shape[:-1], v.shape[-1], q.device)
    step = _tokens(q.shape[:-1].numel())
    for start in range(0, tokens, step):
        block = slice(start, start + step)
        positions = torch.arange(tokens, device=q.device)
        hidden = positions[:, None] < positions[None, block]
        state.merge_(_block(q, k[:, :, block], v[:, :, block], scale, softcap, hidden))
    return state
