"""The KV of the streaming heads of one layer: the first and the newest tokens of each row, on the device.

A HeadWindow never changes: what adds or removes tokens returns another one. So a checkpoint, a fork or a session may
keep one while the layer goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from headinfer.kv.segments import TokenRanges

__all__ = ["SLACK_TOKENS", "HeadWindow", "positions_of", "window_tokens"]

SLACK_TOKENS = 256
"""Tokens that a window holds beside those that are seen, at most, so that rejected guesses can be removed."""


def window_tokens(sink_tokens: int, recent_tokens: int) -> int:
    """Return the tokens that a window holds between two forward passes, at most."""
    return sink_tokens + recent_tokens + SLACK_TOKENS


@dataclass(frozen=True)
class HeadWindow:
    """Some tokens of each row, in order.

    Attributes:
        k: [B, H, T, Dk] on the device.
        v: [B, H, T, Dv] on the device.
        positions: the position of each token among the visible tokens of its row, [B, T], int64, on the CPU; -1 for a
            hidden token, and for an entry without a token.
        indices: the number of each token in its row, hidden tokens included, [B, T], int64, on the CPU.
    """

    k: torch.Tensor
    v: torch.Tensor
    positions: torch.Tensor
    indices: torch.Tensor

    @classmethod
    def empty(cls, k: torch.Tensor, v: torch.Tensor) -> HeadWindow:
        """Return a window of no tokens, shaped as k [B, H, T, Dk] and v [B, H, T, Dv]."""
        nothing = torch.zeros(k.shape[0], 0, dtype=torch.int64)
        return cls(k[:, :, :0].clone(), v[:, :, :0].clone(), nothing, nothing)

    def extended(self, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, first: int) -> HeadWindow:
        """Return a window with a chunk behind its tokens.

        Args:
            k: [B, H, T, Dk].
            v: [B, H, T, Dv].
            positions: [B, T], int64, on the CPU.
            first: the number of the chunk's first token in each row.
        """
        indices = torch.arange(first, first + k.shape[2]).expand(k.shape[0], -1)
        return HeadWindow(
            torch.cat([self.k, k], dim=2),
            torch.cat([self.v, v], dim=2),
            torch.cat([self.positions, positions], dim=1),
            torch.cat([self.indices, indices], dim=1),
        )

    def trimmed(self, sink_tokens: int, recent_tokens: int, added: int) -> HeadWindow:
        """Return a window of at most window_tokens() tokens, which holds all that later queries see.

        Args:
            sink_tokens: the first tokens, which are kept.
            recent_tokens: the newest tokens that a query sees.
            added: tokens of the chunk that was added last. Half of the slack stays free after a short one, so that not
                every token is copied for each new one.
        """
        if self.positions.shape[1] <= window_tokens(sink_tokens, recent_tokens):
            return self
        slack = SLACK_TOKENS if added > SLACK_TOKENS // 2 else SLACK_TOKENS // 2
        newest = self.positions.amax(dim=1, keepdim=True)
        is_recent = self.positions > newest - recent_tokens - slack
        return self._kept((self.positions >= 0) & ((self.positions < sink_tokens) | is_recent))

    def can_crop(self, tokens: int, sink_tokens: int, recent_tokens: int) -> bool:
        """Return whether the window holds all that is seen after the first `tokens` tokens of each row."""
        visible = (self.positions >= 0).sum(dim=1)
        if not visible.numel() or not self.positions.shape[1]:
            return True
        has_all = self.positions.amax(dim=1) + 1 == visible
        is_kept_recent = (self.positions >= sink_tokens) & (self.indices < tokens)
        return bool((has_all | (is_kept_recent.sum(dim=1) >= max(recent_tokens - 1, 1))).all())

    def cropped(self, tokens: int) -> HeadWindow:
        """Return a window without the tokens behind the first `tokens` tokens of each row."""
        return self._kept((self.indices < tokens) & (self.positions >= 0))

    def select_rows(self, rows: Sequence[int]) -> HeadWindow:
        """Return a window whose row i is row rows[i]."""
        chosen = torch.as_tensor(list(rows), dtype=torch.int64)
        on_device = chosen.to(self.k.device)
        return HeadWindow(self.k[on_device], self.v[on_device], self.positions[chosen], self.indices[chosen])

    def _kept(self, keep: torch.Tensor) -> HeadWindow:
        """Return a window of the tokens that a mask [B, T] selects. Rows with fewer tokens get empty entries."""
        counts = keep.sum(dim=1, keepdim=True)
        most = int(counts.max()) if counts.numel() else 0
        order = (~keep).to(torch.int8).argsort(dim=1, stable=True)[:, :most]
        is_token = torch.arange(most) < counts
        positions = self.positions.gather(1, order).masked_fill(~is_token, -1)
        indices = self.indices.gather(1, order)
        if order.shape[0] and torch.equal(order, order[:1].expand_as(order)):
            chosen = order[0].to(self.k.device)
            return HeadWindow(self.k.index_select(2, chosen), self.v.index_select(2, chosen), positions, indices)
        of_heads = order.to(self.k.device)[:, None, :, None].expand(-1, self.k.shape[1], -1, -1)
        k = self.k.gather(2, of_heads.expand(-1, -1, -1, self.k.shape[3]))
        v = self.v.gather(2, of_heads.expand(-1, -1, -1, self.v.shape[3]))
        return HeadWindow(k, v, positions, indices)


def positions_of(token_ranges: Sequence[TokenRanges] | None, rows: int, first: int, tokens: int) -> torch.Tensor:
    """Return the positions of a chunk's tokens among the visible tokens of their rows.

    Args:
        token_ranges: for each row, the ranges of tokens that are seen; None if all are.
        rows: rows of the batch.
        first: the number of the chunk's first token in each row.
        tokens: tokens of the chunk.

    Returns:
        [rows, tokens], int64; -1 for a hidden token.
    """
    if token_ranges is None:
        return torch.arange(first, first + tokens).expand(rows, -1)
    positions = torch.full((rows, tokens), -1, dtype=torch.int64)
    for row, ranges in enumerate(token_ranges):
        before = 0
        for start, stop in ranges:
            begin = max(start, first)
            end = min(stop, first + tokens)
            if begin < end:
                position = before + begin - start
                positions[row, begin - first : end - first] = torch.arange(position, position + end - begin)
            before += stop - start
    return positions
