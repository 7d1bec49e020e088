"""The attention of one layer in one forward pass: what it is asked for, and which kernels compute it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from headinfer.attention.backends import Backend, Problem, capability_of, choose
from headinfer.attention.state import AttentionState
from headinfer.engine.packed import attend_packed, is_packed
from headinfer.kv.layer_kv import LayerKV, TokenRanges
from headinfer.plan.tiles import FEW_QUERY_TOKENS
from headinfer.utils.tensors import Piece

__all__ = ["BLOCK_TOKENS", "AttentionSpec", "LayerPass"]

BLOCK_TOKENS = (32_768, 16_384, 8192)
"""Lengths of the pieces that kernels with one plan per shape are given. Merging a piece of 32K tokens costs about a
hundredth of its attention."""


class AttentionSpec(NamedTuple):
    """What a model asks of an attention, beside Q, K and V.

    Attributes:
        scale: factor of the scores.
        softcap: soft cap c of the scores: tanh(score / c) * c. None applies no cap.
        sinks: one more score per query head, [Hq], of a key with value 0 (gpt-oss).
        token_ranges: for each row of the batch, the half-open ranges of tokens that are seen, over the past and the
            chunk. None sees all tokens.
    """

    scale: float
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    token_ranges: Sequence[TokenRanges] | None = None


@dataclass
class LayerPass:
    """The attention of one layer in one forward pass.

    Attributes:
        q: queries [B, Hq, T, Dk], contiguous.
        k: keys of the chunk [B, Hkv, T, Dk].
        v: values of the chunk [B, Hkv, T, Dv].
        layer_kv: the KV of the tokens before.
        spec: what the model asks for.
        past_tokens: how many of these tokens are attended to.
        backend: attention backends to try first.
        used: collects the names of the backends that ran.
        staged_tokens: tokens of the chunk that were written behind the tail: 1 or 0.
        choices: the backends that were chosen so far, by problem.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    layer_kv: LayerKV
    spec: AttentionSpec
    past_tokens: int
    backend: str | None = None
    used: set[str] = field(default_factory=set)
    staged_tokens: int = 0
    choices: dict[Hashable, Backend] = field(default_factory=dict)

    @property
    def is_decode(self) -> bool:
        """Whether there are so few query tokens that a kernel call costs more than what it computes."""
        return self.q.shape[2] <= FEW_QUERY_TOKENS

    @property
    def group_queries(self) -> int:
        """Query heads per KV head."""
        return self.q.shape[1] // self.k.shape[1]

    def packed(self, rows: Sequence[int], heads: slice) -> torch.Tensor:
        """Return all queries that see the same keys, [h, N, Dk]: those of some rows and of the groups of some KV heads.

        N counts the rows, the query heads of a group and the tokens of the chunk, in this order.
        """
        kv_heads = heads.stop - heads.start
        queries = slice(heads.start * self.group_queries, heads.stop * self.group_queries)
        packed = [self.q[row, queries].reshape(kv_heads, -1, self.q.shape[3]) for row in rows]
        return packed[0] if len(packed) == 1 else torch.cat(packed, dim=1)

    def merge(self, heads: slice, state: AttentionState, rows: Sequence[int], part: AttentionState) -> None:
        """Merge the result for some rows into the state of a head group.

        Args:
            heads: the KV heads of the group.
            state: [B, h * G, T, Dv].
            rows: the rows.
            part: out [h, N, Dv] and lse [h, N], in the order of packed().
        """
        kv_heads = heads.stop - heads.start
        share = self.group_queries * self.q.shape[2]
        for index, row in enumerate(rows):
            of_row = part if len(rows) == 1 else part[:, index * share : (index + 1) * share]
            target = AttentionState(state.out[row].view(kv_heads, share, -1), state.lse[row].view(kv_heads, share))
            target.merge_(of_row)

    def attend_full(self, q: torch.Tensor, pieces: Sequence[Piece], key_tokens: int = 0) -> AttentionState:
        """Compute attention of q [h, N, Dk] to all keys of some pieces, of which some may be quantised.

        Args:
            q: query rows; see packed().
            pieces: pairs of k and v.
            key_tokens: tokens of the keys, if they are one piece.

        Returns:
            out [h, N, Dv] and lse [h, N].
        """
        scale = self.spec.scale
        softcap = self.spec.softcap
        codec = self.layer_kv.codec
        packed = [piece for piece in pieces if is_packed(piece)] if codec is not None else []
        if codec is None or not packed:
            return self.kernel(q.shape[1], key_tokens).attend_full(q, pieces, scale, softcap)
        rows = q.shape[1]
        state = attend_packed(
            q, packed, codec, self.v.shape[3], lambda tokens: self.kernel(rows, tokens), scale, softcap
        )
        exact = [piece for piece in pieces if not is_packed(piece)]
        if exact:
            state = state.running()
            state.merge_(self.kernel(rows).attend_full(q, exact, scale, softcap))
        return state

    def kernel(self, query_rows: int, key_tokens: int = 0) -> Backend:
        """Return the backend for a problem. Its name is added to `used`."""
        backend = self.choice(query_rows, key_tokens)
        self.used.add(backend.name)
        return backend

    def choice(self, query_rows: int, key_tokens: int) -> Backend:
        """Return the backend for a problem. It is chosen once in a pass, since most layers have the same problems.

        Args:
            query_rows: query rows per KV head; 0 for the chunk on itself.
            key_tokens: tokens of one piece of keys; 0 for several pieces, or any number.
        """
        q = self.q
        softcap = self.spec.softcap is not None
        key = (query_rows, key_tokens, q.device, q.dtype, q.shape[3], self.v.shape[3], softcap)
        backend = self.choices.get(key)
        if backend is None:
            problem = Problem(
                q.device.type,
                q.dtype,
                query_rows,
                q.shape[3],
                self.v.shape[3],
                softcap,
                capability_of(q.device),
                key_tokens,
                key_tokens in BLOCK_TOKENS,  # kernels with one plan per shape serve these lengths only
            )
            backend = choose(problem, self.backend)
            self.choices[key] = backend
        return backend
