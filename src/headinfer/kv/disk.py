"""KV on disk: a file of reserved space without a name. And pieces of segments that a device can not copy from."""

from __future__ import annotations

import ctypes
import functools
import os
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from headinfer.errors import CapacityError
from headinfer.utils.tensors import Piece

__all__ = ["DiskFile", "DiskLocation", "DiskSlice", "PageableSlice", "Read", "split_reads"]

_ALIGN_BYTES = 4096
_MOST_VIEWS = 512  # of one system call; systems allow 1,024
_BATCH_BYTES = 4 * 1024 * 1024
_WRITE_BYTES = 32 * 1024 * 1024
_GROWTH_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True)
class Read:
    """Bytes of a file from `at` on, and where they go (or come from). is_aligned: both begin and end at pages."""

    at: int
    view: memoryview
    is_aligned: bool


def split_reads(reads: Sequence[Read]) -> Iterator[list[Read]]:
    """Neighbours in the file, a few MiB at a time: one system call each, and a share of the work for one thread."""
    batch: list[Read] = []
    nbytes = 0
    for read in reads:
        follows = batch and read.at == batch[0].at + nbytes and read.is_aligned == batch[0].is_aligned
        if batch and (not follows or nbytes >= _BATCH_BYTES or len(batch) == _MOST_VIEWS):
            yield batch
            batch, nbytes = [], 0
        batch.append(read)
        nbytes += len(read.view)
    if batch:
        yield batch


class DiskFile:
    """Space on a disk, gone with the process however that ends: the file has no name.

    Where the file system can, reading and writing pass by the page cache, which would hold everything twice.
    """

    def __init__(self, folder: Path, nbytes: int) -> None:
        """Reserve nbytes in a folder. Raises CapacityError where the disk has no room for them."""
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._buffered, self._direct = _open_unnamed(folder)
        except OSError as error:
            raise CapacityError(
                f"cannot keep KV in {folder} ({error.strerror}): name another folder for the disk tier"
            ) from error
        descriptors = [one for one in (self._buffered, self._direct) if one is not None]
        weakref.finalize(self, _close_all, descriptors).atexit = False
        self._reserved = self._used = 0
        self._free: dict[int, list[int]] = {}
        if nbytes:
            self._reserve(nbytes)

    @property
    def is_direct(self) -> bool:
        """Whether it passes by the page cache."""
        return self._direct is not None

    def allocate(self, nbytes: int) -> int:
        """The first byte of nbytes that nothing else uses. Raises CapacityError where the disk is full."""
        size = -(-nbytes // _ALIGN_BYTES) * _ALIGN_BYTES
        if self._free.get(size):
            return self._free[size].pop()
        if self._used + size > self._reserved:
            self._reserve(max(size, _GROWTH_BYTES))
        start, self._used = self._used, self._used + size
        return start

    def free(self, start: int, nbytes: int) -> None:
        """Give back what allocate() gave."""
        self._free.setdefault(-(-nbytes // _ALIGN_BYTES) * _ALIGN_BYTES, []).append(start)

    def write(self, start: int, parts: Sequence[memoryview]) -> None:
        """Write parts, of writable memory, one after the other. Raises CapacityError where the system refuses."""
        try:
            for part in parts:
                address = ctypes.addressof(ctypes.c_char.from_buffer(part))
                aligned = not (start % _ALIGN_BYTES or len(part) % _ALIGN_BYTES or address % _ALIGN_BYTES)
                while part:
                    count = os.pwrite(self._descriptor(aligned), part[:_WRITE_BYTES], start)
                    start, part = start + count, part[count:]
                    aligned = aligned and not count % _ALIGN_BYTES
        except OSError as error:
            raise CapacityError(f"cannot write KV to {self.folder} ({error.strerror}): free some space") from error

    def read(self, reads: Sequence[Read]) -> None:
        """Fill each view from its place in the file."""
        for batch in split_reads(reads):
            at, left, aligned = batch[0].at, [read.view for read in batch], batch[0].is_aligned
            while left:
                count = os.preadv(self._descriptor(aligned), left, at)
                if count <= 0:
                    raise OSError(f"the file for KV in {self.folder} ends early")
                at, left, aligned = at + count, _after(left, count), aligned and not count % _ALIGN_BYTES

    def _descriptor(self, is_aligned: bool) -> int:
        return self._direct if is_aligned and self._direct is not None else self._buffered

    def _reserve(self, nbytes: int) -> None:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._buffered, self._reserved, nbytes)
        except OSError as error:
            raise CapacityError(
                f"the disk of {self.folder} has no room for {nbytes / 2**30:.1f} GiB of KV ({error.strerror}): free "
                "some, or name another folder for the disk tier"
            ) from error
        self._reserved += nbytes


@dataclass(frozen=True)
class DiskLocation:
    """Where a segment of [heads, tokens] lies in a file: a head's K, then its V, then the next head's."""

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
    """Heads [first, last) by tokens [start, stop) of a segment on disk."""

    location: DiskLocation
    first: int
    last: int
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes of K and V."""
        return (
            (self.last - self.first) * (self.stop - self.start) * (self.location.key_bytes + self.location.value_bytes)
        )

    def into(self, memory: torch.Tensor) -> tuple[list[Read], Piece]:
        """What to read into the first nbytes of a uint8 tensor, and the piece k [h, T, Dk], v [h, T, Dv] that it makes.

        A head's K and V are neighbours in memory as they are in the file.
        """
        location, heads, tokens = self.location, self.last - self.first, self.stop - self.start
        key, value = tokens * location.key_bytes, tokens * location.value_bytes
        used = memory[: self.nbytes]
        data: memoryview = used.numpy().data
        address = used.data_ptr()
        reads: list[Read] = []
        for head in range(heads):
            at = location.start + (self.first + head) * location.head_bytes
            to = head * (key + value)
            for nbytes, size in ((key, location.key_bytes), (value, location.value_bytes)):
                begin = at + self.start * size
                aligned = not (begin % _ALIGN_BYTES or nbytes % _ALIGN_BYTES or (address + to) % _ALIGN_BYTES)
                reads.append(Read(begin, data[to : to + nbytes], aligned))
                at, to = at + location.tokens * size, to + nbytes
        whole = used.view(heads, key + value)
        itemsize = location.dtype.itemsize
        k = whole[:, :key].view(location.dtype).unflatten(1, (tokens, location.key_bytes // itemsize))
        v = whole[:, key:].view(location.dtype).unflatten(1, (tokens, location.value_bytes // itemsize))
        return reads, (k, v)

    def bring(self, memory: torch.Tensor) -> tuple[list[Callable[[], None]], Piece]:
        """What brings it into the first nbytes of a uint8 tensor, for any thread, and the piece that it makes."""
        reads, piece = self.into(memory)
        return [functools.partial(self.location.file.read, part) for part in split_reads(reads)], piece


@dataclass(frozen=True)
class PageableSlice:
    """K [h, T, Dk] and V [h, T, Dv] in host memory that could not be pinned: they go through a pinned buffer."""

    k: torch.Tensor
    v: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of K and V."""
        return self.k.numel() * self.k.element_size() + self.v.numel() * self.v.element_size()

    def bring(self, memory: torch.Tensor) -> tuple[list[Callable[[], None]], Piece]:
        """As DiskSlice.bring: a copy for each of K and V."""
        flat = memory[: self.nbytes].view(self.k.dtype)
        k, v = (
            part.view(side.shape)
            for part, side in zip(flat.split([self.k.numel(), self.v.numel()]), (self.k, self.v), strict=True)
        )
        return [functools.partial(k.copy_, self.k), functools.partial(v.copy_, self.v)], (k, v)


def _open_unnamed(folder: Path) -> tuple[int, int | None]:
    """A new file without a name, opened twice: through the page cache, and past it where that can be done."""
    descriptor, name = tempfile.mkstemp(prefix="headinfer-kv-", dir=folder)
    direct = None
    try:
        if hasattr(os, "O_DIRECT"):
            direct = os.open(name, os.O_RDWR | os.O_DIRECT)
    except OSError:  # this file system has no direct I/O
        direct = None
    finally:
        os.unlink(name)
    return descriptor, direct


def _close_all(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _after(views: Sequence[memoryview], count: int) -> list[memoryview]:
    """What is left of the views after the first `count` bytes."""
    left = []
    for view in views:
        if count < len(view):
            left.append(view[count:])
        count = max(count - len(view), 0)
    return left
