"""Partial softmax attention that can be merged exactly.

Over a set S of keys, with scores s_j = scale * q . k_j:

    lse(S) = log sum_{j in S} exp(s_j)          out(S) = sum_{j in S} exp(s_j - lse(S)) v_j

and for disjoint sets A and B, with w = exp(lse(B) - lse(A u B)) = sigmoid(lse(B) - lse(A)):

    out(A u B) = (1 - w) out(A) + w out(B)      lse(A u B) = logaddexp(lse(A), lse(B))

(online softmax, Milakov and Gimelshein, arXiv 1805.02867; the split over keys is FlashDecoding's). Attention
over any split of the keys, merged in any order, is attention over all of them, up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from headinfer.attention import triton_calls

__all__ = ["AttentionState", "join", "merge"]


@dataclass
class AttentionState:
    """Attention over some of the keys.

    out: [..., D] float32 (float64 in the oracle), 0 where no key was seen.
    lse: [...] of the same dtype, -inf where no key was seen.

    A part that will only be merged into another may have `out` in the half type of the kernel that made it, and any
    strides; what is merged into is float32: `running()`.
    """

    out: torch.Tensor
    lse: torch.Tensor

    @classmethod
    def empty(
        cls, shape: Sequence[int], dim: int, device: torch.device | str, dtype: torch.dtype = torch.float32
    ) -> AttentionState:
        """The identity of merge: no key seen yet. out is [*shape, dim]."""
        return cls(
            torch.zeros(*shape, dim, device=device, dtype=dtype),
            torch.full(tuple(shape), -torch.inf, device=device, dtype=dtype),
        )

    def __getitem__(self, index: object) -> AttentionState:
        """A view of some rows: the same index into the leading dims of both tensors."""
        return AttentionState(self.out[index], self.lse[index])  # type: ignore[index]

    def running(self) -> AttentionState:
        """A state that others can be merged into: float32 and contiguous; itself where it is that already."""
        out = self.out.to(torch.float32, memory_format=torch.contiguous_format)  # one pass, not two
        return AttentionState(out.contiguous(), self.lse.contiguous())

    def merge_(self, other: AttentionState) -> AttentionState:
        """Take in the keys of `other` in place; empty with empty stays empty. On CUDA it is one kernel."""
        if self.out.is_cuda and triton_calls.merge_(self.out, self.lse, other.out, other.lse):
            return self
        weight = torch.sigmoid(other.lse - self.lse).masked_fill_(other.lse == -torch.inf, 0.0)  # not NaN: both empty
        self.out.lerp_(other.out.to(self.out.dtype), weight.unsqueeze(-1))
        torch.logaddexp(self.lse, other.lse, out=self.lse)
        return self

    def with_sinks(self, sinks: torch.Tensor) -> torch.Tensor:
        """out after one more key per head with score `sinks` and value 0 (gpt-oss); once, after the last merge.

        sinks: broadcastable to lse. Returns [..., D]: out * sigmoid(lse - sink).
        """
        return self.out * torch.sigmoid(self.lse - sinks.to(self.lse.dtype)).unsqueeze(-1)


def merge(first: AttentionState, second: AttentionState) -> AttentionState:
    """The state over the keys of both; the arguments are left as they are."""
    return AttentionState(first.out.clone(), first.lse.clone()).merge_(second)


def join(parts: AttentionState) -> AttentionState:
    """The state over the keys of parts [P, ...] that lie in one tensor, each of which saw some key."""
    weights = torch.softmax(parts.lse, dim=0)
    return AttentionState((weights.unsqueeze(-1) * parts.out).sum(dim=0), torch.logsumexp(parts.lse, dim=0))
