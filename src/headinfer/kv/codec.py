"""What the KV of a layer needs of quantisation. attention/quantised.py has it; this package does not import it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from headinfer.kv.segments import SegmentSlice, clip
from headinfer.utils.kv_format import rounded_down
from headinfer.utils.tensors import Piece

__all__ = ["KVCodec", "tokens_of_cut_block"]


class KVCodec(Protocol):
    """Converts K and V of one layer to the bytes that are stored, and back."""

    @property
    def bits(self) -> int:
        """Bits of a stored element: 8 or 4."""

    @property
    def unit(self) -> int:
        """Tokens of a block. Only whole blocks are converted."""

    @property
    def stored_dims(self) -> tuple[int, int]:
        """Bytes of the K and of the V of one token and head."""

    def encode(self, k: torch.Tensor, v: torch.Tensor) -> Piece:
        """Return uint8 tensors [H, T, bytes] of k [H, T, Dk] and v [H, T, Dv]. T is a multiple of `unit`."""

    def decode(self, k: torch.Tensor, v: torch.Tensor, dtype: torch.dtype | None = None) -> Piece:
        """Return k [H, T, Dk] and v [H, T, Dv] of stored bytes, in `dtype`, or in the dtype of the layer."""


def tokens_of_cut_block(
    tables: Sequence[list[SegmentSlice]], tokens: int, codec: KVCodec, device: torch.device
) -> Piece:
    """Return K and V [B, Hkv, T, D] of the first `tokens` tokens of each row that are behind their last whole block.

    Args:
        tables: the slices of each row.
        tokens: not a multiple of `codec.unit`.
        codec: decodes the block that is cut.
        device: the device of the result.
    """
    start = rounded_down(tokens, codec.unit)
    rows = []
    for table in tables:
        (part,) = clip(table, [(start, start + codec.unit)])
        k, v = (x[:, part.start : part.stop].to(device) for x in part.segment.dense())
        rows.append([x[:, : tokens - start] for x in codec.decode(k, v)])
    k, v = (torch.stack(sides) for sides in zip(*rows, strict=True))
    return k, v
