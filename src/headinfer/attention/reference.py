"""Attention in float64, written for reading: the oracle of tests and of measurements of error. It is slow."""

from __future__ import annotations

import torch

from headinfer.attention.state import AttentionState

__all__ = ["attend_reference", "causal_mask"]


def causal_mask(query_tokens: int, key_tokens: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return a causal mask that is aligned at the lower right: the last query sees every key.

    Returns:
        [query_tokens, key_tokens], bool; True if query i sees key j.
    """
    query = torch.arange(query_tokens, device=device)[:, None] + (key_tokens - query_tokens)
    return query >= torch.arange(key_tokens, device=device)[None, :]


def attend_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    mask: torch.Tensor | None = None,
    softcap: float | None = None,
) -> AttentionState:
    """Compute softmax(softcap(scale * q k^T), masked) v in float64.

    Args:
        q: [B, Hq, Tq, Dk], of any floating dtype.
        k: [B, Hkv, Tk, Dk]; Hq is a multiple of Hkv.
        v: [B, Hkv, Tk, Dv].
        scale: the factor of the scores.
        mask: bool, broadcastable to [B, Hq, Tq, Tk]; True if the query sees the key. None: every query sees every key.
        softcap: caps the scores by softcap * tanh(score / softcap). None: no cap.

    Returns:
        out [B, Hq, Tq, Dv] and lse [B, Hq, Tq] in float64; rows that see no key are empty.
    """
    groups = q.shape[1] // k.shape[1]
    k64 = k.double().repeat_interleave(groups, dim=1)
    v64 = v.double().repeat_interleave(groups, dim=1)
    scores = scale * (q.double() @ k64.mT)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.unsqueeze(-1))
    # -inf - -inf is NaN in rows that see no key.
    weights = weights.masked_fill((lse == -torch.inf).unsqueeze(-1), 0.0)
    return AttentionState(weights @ v64, lse)
