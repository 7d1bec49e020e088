"""Partial softmax attention that can be merged exactly.

The state of attention over a set S of keys is its output and its log-sum-exp. With the scores s_j = scale * q . k_j:

    lse(S) = log sum_{j in S} exp(s_j)          out(S) = sum_{j in S} exp(s_j - lse(S)) v_j

The states of two disjoint sets A and B are merged by their log-sum-exps:

    lse(A u B) = logaddexp(lse(A), lse(B))      out(A u B) = (1 - w) out(A) + w out(B)
    w = exp(lse(B) - lse(A u B)) = sigmoid(lse(B) - lse(A))

This is online softmax (Milakov and Gimelshein, arXiv 1805.02867) applied to blocks of keys, as in FlashDecoding. The
keys can be split in any way and the states merged in any order: the result is attention over all keys, up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from headinfer.attention import triton_calls

__all__ = ["AttentionState", "join", "merge"]


@dataclass
class AttentionState:
    """The result of attention over some of the keys, from which attention over more keys can be computed.

    A state that a kernel returns for some keys (a part) may have `out` in a half type, and any strides. A state that
    parts are merged into (a running state, see `running`) is float32 and contiguous, or a view of such a state.

    Attributes:
        out: [..., D], float32 (float64 in reference.py); 0 in rows that have seen no key.
        lse: [...], the natural logarithm of the sum of exp(score), float32 (float64 in reference.py); -inf in rows that
            have seen no key.
    """

    out: torch.Tensor
    lse: torch.Tensor

    @classmethod
    def empty(
        cls, shape: Sequence[int], dim: int, device: torch.device | str, dtype: torch.dtype = torch.float32
    ) -> AttentionState:
        """Return the state over no keys, which is the identity of merge().

        Args:
            shape: the shape of `lse`; that of `out` is [*shape, dim].
            dim: the head dim of the values.
            device: the device of both tensors.
            dtype: the dtype of both tensors.
        """
        return cls(
            torch.zeros(*shape, dim, device=device, dtype=dtype),
            torch.full(tuple(shape), -torch.inf, device=device, dtype=dtype),
        )

    def __getitem__(self, index: object) -> AttentionState:
        """Return a view of some rows: both tensors are indexed alike in their leading dims."""
        return AttentionState(self.out[index], self.lse[index])  # type: ignore[index]

    def running(self) -> AttentionState:
        """Return this state in float32 and contiguous, so that others can be merged into it.

        Tensors that are float32 and contiguous already are not copied.
        """
        out = self.out.to(torch.float32, memory_format=torch.contiguous_format)  # converts and copies in one pass
        return AttentionState(out.contiguous(), self.lse.contiguous())

    def merge_(self, other: AttentionState) -> AttentionState:
        """Merge a state over other keys into this one, in place.

        Rows that have seen no key take over the bits of `other`; if neither has seen a key, the row stays empty. On
        CUDA one Triton kernel does the merge if triton is available and the layout allows it (triton_calls.merge_).

        Args:
            other: a state of the same shape over keys that this state has not seen; `out` may be of a half type.

        Returns:
            This state.
        """
        if self.out.is_cuda and triton_calls.merge_(self.out, self.lse, other.out, other.lse):
            return self
        weight = torch.sigmoid(other.lse - self.lse)
        weight = weight.masked_fill_(other.lse == -torch.inf, 0.0)  # if both are empty, the difference is NaN
        self.out.lerp_(other.out.to(self.out.dtype), weight.unsqueeze(-1))
        torch.logaddexp(self.lse, other.lse, out=self.lse)
        return self

    def with_sinks(self, sinks: torch.Tensor) -> torch.Tensor:
        """Return the output with one more key per head, of a given score and of value 0 (the sinks of gpt-oss).

        The output is scaled by sigmoid(lse - sink). Call this once, after the last merge.

        Args:
            sinks: the scores of the additional keys, broadcastable to `lse`.

        Returns:
            [..., D], of the dtype of `out`.
        """
        return self.out * torch.sigmoid(self.lse - sinks.to(self.lse.dtype)).unsqueeze(-1)


def merge(first: AttentionState, second: AttentionState) -> AttentionState:
    """Return the state over the keys of both states; the arguments stay as they are."""
    return AttentionState(first.out.clone(), first.lse.clone()).merge_(second)


def join(parts: AttentionState) -> AttentionState:
    """Merge parts that are stacked in one tensor, all at once.

    Args:
        parts: out [P, ..., D] and lse [P, ...]. For each row, at least one of the P parts must have seen a key.

    Returns:
        The state over the keys of all parts: out [..., D] and lse [...].
    """
    weights = torch.softmax(parts.lse, dim=0)
    return AttentionState((weights.unsqueeze(-1) * parts.out).sum(dim=0), torch.logsumexp(parts.lse, dim=0))
