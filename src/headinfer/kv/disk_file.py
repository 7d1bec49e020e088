"""An unnamed file for KV that is moved out of host memory."""

from __future__ import annotations

import ctypes
import os
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from headinfer.errors import CapacityError

__all__ = ["ALIGN_BYTES", "DiskFile", "Read", "split_reads"]

ALIGN_BYTES = 4096
"""Direct I/O requires offsets, sizes and addresses that are multiples of this."""

_MAX_VIEWS = 512  # in one system call; systems allow 1,024
_BATCH_BYTES = 4 * 1024 * 1024
_WRITE_BYTES = 32 * 1024 * 1024
_GROWTH_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True)
class Read:
    """A contiguous part of a file, and the memory that it is read into.

    Attributes:
        start: the offset in the file, in bytes.
        view: the memory; its length is the number of bytes.
        is_aligned: whether the offset, the length and the address are multiples of ALIGN_BYTES.
    """

    start: int
    view: memoryview
    is_aligned: bool


def split_reads(reads: Sequence[Read]) -> Iterator[list[Read]]:
    """Split reads into batches of a few MiB, each of which one system call can serve, in any thread.

    The reads of a batch are adjacent in the file, and all are aligned or none is.
    """
    batch: list[Read] = []
    nbytes = 0
    for read in reads:
        is_adjacent = batch and read.start == batch[0].start + nbytes and read.is_aligned == batch[0].is_aligned
        if batch and (not is_adjacent or nbytes >= _BATCH_BYTES or len(batch) == _MAX_VIEWS):
            yield batch
            batch = []
            nbytes = 0
        batch.append(read)
        nbytes += len(read.view)
    if batch:
        yield batch


class DiskFile:
    """Disk space that is allocated in parts. The file has no name, so it is gone when the process ends in any way.

    Reads and writes bypass the page cache if the file system supports direct I/O, because the page cache would hold the
    same KV a second time.

    Args:
        folder: the folder whose file system the space is taken from; it is created if it does not exist.
        nbytes: the space to reserve at once.

    Raises:
        CapacityError: the folder is not writable, or the disk has too little space.
    """

    def __init__(self, folder: Path, nbytes: int) -> None:
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
        self._reserved = 0
        self._used = 0
        self._free: dict[int, list[int]] = {}  # offsets of freed parts, by size
        if nbytes:
            self._reserve(nbytes)

    @property
    def is_direct(self) -> bool:
        """Whether reads and writes bypass the page cache."""
        return self._direct is not None

    def allocate(self, nbytes: int) -> int:
        """Allocate space and return its offset in the file.

        Raises:
            CapacityError: the disk is full.
        """
        size = _round_up(nbytes)
        if self._free.get(size):
            return self._free[size].pop()
        if self._used + size > self._reserved:
            self._reserve(max(size, _GROWTH_BYTES))
        start = self._used
        self._used += size
        return start

    def free(self, start: int, nbytes: int) -> None:
        """Free space that allocate() returned for the same number of bytes."""
        self._free.setdefault(_round_up(nbytes), []).append(start)

    def write(self, start: int, parts: Sequence[memoryview]) -> None:
        """Write parts one after the other.

        Args:
            start: the offset in the file.
            parts: writable memory.

        Raises:
            CapacityError: the system refuses to write.
        """
        try:
            for part in parts:
                address = ctypes.addressof(ctypes.c_char.from_buffer(part))
                is_aligned = not (start % ALIGN_BYTES or len(part) % ALIGN_BYTES or address % ALIGN_BYTES)
                left = part
                while left:
                    count = os.pwrite(self._descriptor(is_aligned), left[:_WRITE_BYTES], start)
                    start += count
                    left = left[count:]
                    is_aligned = is_aligned and not count % ALIGN_BYTES
        except OSError as error:
            raise CapacityError(f"cannot write KV to {self.folder} ({error.strerror}): free some space") from error

    def read(self, reads: Sequence[Read]) -> None:
        """Fill the memory of each read from the file. Several threads may call this at the same time.

        Raises:
            OSError: the system cannot read, or the file ends early.
        """
        for batch in split_reads(reads):
            start = batch[0].start
            is_aligned = batch[0].is_aligned
            left = [read.view for read in batch]
            while left:
                count = os.preadv(self._descriptor(is_aligned), left, start)
                if count <= 0:
                    raise OSError(f"the file for KV in {self.folder} ends early")
                start += count
                left = _without_first_bytes(left, count)
                is_aligned = is_aligned and not count % ALIGN_BYTES

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


def _round_up(nbytes: int) -> int:
    return -(-nbytes // ALIGN_BYTES) * ALIGN_BYTES


def _open_unnamed(folder: Path) -> tuple[int, int | None]:
    """Create a file and unlink it; return a descriptor for buffered I/O, and one for direct I/O if it is supported."""
    descriptor, name = tempfile.mkstemp(prefix="headinfer-kv-", dir=folder)
    direct = None
    try:
        if hasattr(os, "O_DIRECT"):
            direct = os.open(name, os.O_RDWR | os.O_DIRECT)
    except OSError:  # this file system does not support direct I/O
        direct = None
    finally:
        os.unlink(name)
    return descriptor, direct


def _close_all(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _without_first_bytes(views: Sequence[memoryview], count: int) -> list[memoryview]:
    """Return the views without their first `count` bytes."""
    left = []
    for view in views:
        if count < len(view):
            left.append(view[count:])
        count = max(count - len(view), 0)
    return left
