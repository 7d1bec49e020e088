"""The oracle: attention in float64, written for reading. Slow; tests and measurements of error only."""

from __future__ import annotations

import torch

from headinfer.attention.state import AttentionState

__all__ = ["attend_reference", "causal_mask"]


def causal_mask(query_tokens: int, key_tokens: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """[Tq, Tk] bool, True where query i may see key j: lower-right aligned, the last query sees every key."""
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
    """softmax(cap(scale * q k^T) where mask) v in float64.

    q [B, Hq, Tq, Dk], k [B, Hkv, Tk, Dk], v [B, Hkv, Tk, Dv], any float dtype; Hq a multiple of Hkv.
    mask: bool, broadcastable to [B, Hq, Tq, Tk], True where a key is seen. softcap: cap * tanh(s / cap).
    Returns out [B, Hq, Tq, Dv] and lse [B, Hq, Tq], float64; rows that see no key are empty.
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
    weights = weights.masked_fill((lse == -torch.inf).unsqueeze(-1), 0.0)  # -inf - -inf: the row sees no key
    return AttentionState(weights @ v64, lse)
