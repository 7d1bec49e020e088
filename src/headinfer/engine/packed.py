"""Attention on quantised K and V: whole blocks by a kernel for them, or decoded some tokens at a time.

Slices of tokens may begin or end within a block, if tokens are hidden by padding. Blocks are moved as a whole, so the
rest of such a block is decoded and cut after it has arrived.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from headinfer.attention import native
from headinfer.attention.backends import Backend
from headinfer.attention.problem import FEW_ROWS
from headinfer.attention.state import AttentionState
from headinfer.kv.codec import KVCodec
from headinfer.kv.segments import SegmentSlice
from headinfer.utils.kv_format import DECODED_ELEMENTS, UNIT, rounded_down, rounded_up
from headinfer.utils.tensors import Piece

__all__ = ["attend_packed", "is_packed", "visible_pieces", "whole_blocks"]

KernelOf = Callable[[int], Backend]
"""Returns the backend for keys of so many tokens in one piece; 0 for several pieces."""


def is_packed(piece: Piece) -> bool:
    """Return whether a piece is quantised."""
    return piece[0].dtype == torch.uint8


def whole_blocks(part: SegmentSlice, codec: KVCodec | None) -> tuple[int, int]:
    """Return the tokens [start, stop) of a segment that are moved for a slice of it."""
    unit = codec.unit if codec is not None else 1
    return rounded_down(part.start, unit), rounded_up(part.stop, unit)


def visible_pieces(pieces: Sequence[Piece], slices: Sequence[SegmentSlice], codec: KVCodec | None) -> list[Piece]:
    """Return the pieces of a tile without what its slices do not see.

    Args:
        pieces: the whole blocks of the slices: one piece for each slice, or one for all of them.
        slices: what is seen.
        codec: decodes the blocks that a slice cuts; None if nothing is quantised.

    Returns:
        Quantised pieces of whole blocks, and pieces in the dtype of the layer of the blocks that were cut.
    """
    if codec is None or all(not (part.start % codec.unit or part.stop % codec.unit) for part in slices):
        return list(pieces)
    found: list[Piece] = []
    at = 0
    for number, part in enumerate(slices):
        start, stop = whole_blocks(part, codec)
        k, v = pieces[number] if len(pieces) == len(slices) else pieces[0]
        first = 0 if len(pieces) == len(slices) else at
        at += stop - start
        for begin, end in _at_blocks(part.start - start, part.stop - start, codec.unit):
            block = first + rounded_down(begin, codec.unit)
            if not (begin % codec.unit or end % codec.unit):
                found.append((k[:, first + begin : first + end], v[:, first + begin : first + end]))
                continue
            decoded = codec.decode(k[:, block : block + codec.unit], v[:, block : block + codec.unit])
            seen = slice(first + begin - block, first + end - block)
            found.append((decoded[0][:, seen], decoded[1][:, seen]))
    return found


def _at_blocks(start: int, stop: int, unit: int) -> list[tuple[int, int]]:
    """Split the tokens [start, stop) into whole blocks and the parts of the blocks that are cut."""
    first = min(rounded_up(start, unit), stop)
    last = max(rounded_down(stop, unit), first)
    return [(begin, end) for begin, end in ((start, first), (first, last), (last, stop)) if begin < end]


def attend_packed(
    q: torch.Tensor,
    pieces: Sequence[Piece],
    codec: KVCodec,
    value_dim: int,
    kernel_of: KernelOf,
    scale: float,
    softcap: float | None,
) -> AttentionState:
    """Compute attention of q to quantised keys, without a mask.

    If the native kernel serves the problem, it multiplies integers. Otherwise K and V are decoded, some thousand tokens
    at a time, for the backend that serves the problem without quantisation.

    Args:
        q: [H, N, Dk].
        pieces: quantised pairs of k and v, on the device of q.
        codec: the format.
        value_dim: the head dim Dv of V.
        kernel_of: chooses the backend.
        scale: the factor of the scores.
        softcap: caps the scores; None: no cap.

    Returns:
        out [H, N, Dv] and lse [H, N].
    """
    is_decode = q.shape[1] <= FEW_ROWS  # for more rows, decoding takes little beside the products
    if is_decode and kernel_of(0).name == "cpu-native" and not native.quantised_refusal(codec.bits):
        return native.attend_quantised(q, pieces, bits=codec.bits, value_dim=value_dim, scale=scale, soft_cap=softcap)
    state: AttentionState | None = None
    tokens = _tokens_at_once(q, value_dim)
    for k, v in pieces:
        for start in range(0, k.shape[1], tokens):
            block = slice(start, start + tokens)
            decoded = codec.decode(k[:, block], v[:, block], q.dtype)
            kernel = kernel_of(decoded[0].shape[1])
            part = kernel.attend_full(q, [decoded], scale, softcap)
            if state is None:
                state = part.running()
            else:
                state.merge_(part)
    assert state is not None
    return state


def _tokens_at_once(q: torch.Tensor, value_dim: int) -> int:
    """Return how many tokens are decoded at once: a power of two."""
    heads, _, key_dim = q.shape
    most = DECODED_ELEMENTS // (heads * max(key_dim, value_dim))
    return max(1 << max(most, 1).bit_length() - 1, UNIT)
