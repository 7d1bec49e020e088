"""Slices of segments that a device cannot copy from: on disk, or in pageable memory.

read_ahead.py loads them into pinned host buffers before they are fetched.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from headinfer.kv.disk_file import ALIGN_BYTES, DiskFile, Read, split_reads
from headinfer.utils.tensors import Piece

__all__ = ["AnyPiece", "DiskLocation", "DiskSlice", "PageableSlice"]


@dataclass(frozen=True)
class DiskLocation:
    """The location of a segment in a file: for each head, the K of all its tokens, then their V.

    Attributes:
        file: the file.
        start: the offset of the segment in the file, in bytes.
        heads: the number of KV heads of the segment.
        tokens: the number of tokens of the segment.
        key_bytes: the bytes of one head's K of one token.
        value_bytes: the bytes of one head's V of one token.
        dtype: the dtype of K and V.
    """

    file: DiskFile
    start: int
    heads: int
    tokens: int
    key_bytes: int
    value_bytes: int
    dtype: torch.dtype

    @property
    def head_bytes(self) -> int:
        """Bytes of one head."""
        return self.tokens * (self.key_bytes + self.value_bytes)


@dataclass(frozen=True)
class DiskSlice:
    """Heads [first, last) of the tokens [start, stop) of a segment on disk.

    Attributes:
        location: where the segment is.
        first: the first head.
        last: the head after the last one.
        start: the first token of the segment.
        stop: the token after the last one.
    """

    location: DiskLocation
    first: int
    last: int
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes of K and V."""
        token_bytes = self.location.key_bytes + self.location.value_bytes
        return (self.last - self.first) * (self.stop - self.start) * token_bytes

    def plan_reads(self, memory: torch.Tensor) -> tuple[list[Read], Piece]:
        """Plan how to read the slice into memory.

        A head's K and V are adjacent in memory, as they are in the file.

        Args:
            memory: a uint8 tensor of at least `nbytes` elements, whose first ones are filled.

        Returns:
            The reads, and the piece k [h, T, Dk], v [h, T, Dv] on `memory` that they fill.
        """
        location = self.location
        heads = self.last - self.first
        tokens = self.stop - self.start
        k_bytes = tokens * location.key_bytes
        v_bytes = tokens * location.value_bytes
        used = memory[: self.nbytes]
        data: memoryview = used.numpy().data
        address = used.data_ptr()
        reads: list[Read] = []
        for head in range(heads):
            side_start = location.start + (self.first + head) * location.head_bytes  # of the head's K, then of its V
            target = head * (k_bytes + v_bytes)
            for nbytes, token_bytes in ((k_bytes, location.key_bytes), (v_bytes, location.value_bytes)):
                start = side_start + self.start * token_bytes
                is_aligned = not (start % ALIGN_BYTES or nbytes % ALIGN_BYTES or (address + target) % ALIGN_BYTES)
                reads.append(Read(start, data[target : target + nbytes], is_aligned))
                side_start += location.tokens * token_bytes
                target += nbytes
        whole = used.view(heads, k_bytes + v_bytes)
        itemsize = location.dtype.itemsize
        k = whole[:, :k_bytes].view(location.dtype).unflatten(1, (tokens, location.key_bytes // itemsize))
        v = whole[:, k_bytes:].view(location.dtype).unflatten(1, (tokens, location.value_bytes // itemsize))
        return reads, (k, v)

    def load_into(self, memory: torch.Tensor) -> tuple[list[Callable[[], None]], Piece]:
        """Plan how to load the slice into memory, in several threads.

        Args:
            memory: a uint8 tensor of at least `nbytes` elements, whose first ones are filled.

        Returns:
            Functions that any threads may call, and the piece on `memory` that is valid when all have returned.
        """
        reads, piece = self.plan_reads(memory)
        return [functools.partial(self.location.file.read, batch) for batch in split_reads(reads)], piece


@dataclass(frozen=True)
class PageableSlice:
    """K and V in host memory that could not be pinned.

    Attributes:
        k: [h, T, Dk].
        v: [h, T, Dv].
    """

    k: torch.Tensor
    v: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of K and V."""
        return self.k.numel() * self.k.element_size() + self.v.numel() * self.v.element_size()

    def load_into(self, memory: torch.Tensor) -> tuple[list[Callable[[], None]], Piece]:
        """Plan how to copy the slice into memory, as DiskSlice.load_into() does: one function for K and one for V."""
        with torch.inference_mode(False):  # other threads write to the views
            flat = memory[: self.nbytes].view(self.k.dtype)
            flat_k, flat_v = flat.split([self.k.numel(), self.v.numel()])
            k = flat_k.view(self.k.shape)
            v = flat_v.view(self.v.shape)
        return [functools.partial(k.copy_, self.k), functools.partial(v.copy_, self.v)], (k, v)


AnyPiece = Piece | DiskSlice | PageableSlice
"""K and V in memory that a device can copy from, on a disk, or in memory that is not pinned."""
