"""Files of tensors with checksums, written once: safetensors whose data begin at a multiple of 4096 bytes.

The header of a file contains the checksum of each tensor, and the FileEntry of the file that of the header. So each
tensor can be verified on its own, when it is first needed. Checksums are XXH3 with 128 bits, in hexadecimal.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
import xxhash

from headinfer.errors import SessionError
from headinfer.utils.files import CHECKSUM_PREFIX, REMEDY, FileEntry, write_file

__all__ = ["TensorFile", "write_tensors"]

_PAGE_BYTES = 4096
_LENGTH_BYTES = 8
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ADVICE = f"it is damaged; {REMEDY}"


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> FileEntry:
    """Write a file of tensors, those with larger elements first, so that all are aligned.

    Args:
        path: the file; its folder must exist.
        tensors: tensors by name, of any strides and on any device.

    Returns:
        The facts that TensorFile needs to verify the file.

    Raises:
        CapacityError: the system refuses to write, for example because the disk is full.
    """
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    parts = {name: [_bytes(part) for part in _contiguous_parts(tensor)] for name, tensor in tensors.items()}
    header: dict[str, object] = {}
    checksums: dict[str, str] = {}
    start = 0
    for name, tensor in tensors.items():
        stop = start + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
        checksums[CHECKSUM_PREFIX + name] = _checksum(parts[name])
        start = stop
    text = json.dumps({"__metadata__": checksums, **header}, separators=(",", ":")).encode("utf-8")
    text += b" " * (-(_LENGTH_BYTES + len(text)) % _PAGE_BYTES)
    head = len(text).to_bytes(_LENGTH_BYTES, "little") + text
    write_file(path, [head, *(part for name in tensors for part in parts[name])])
    return FileEntry(path.name, len(head) + start, xxhash.xxh3_128_hexdigest(head))


class TensorFile:
    """A file of tensors. Opening it verifies its header and maps the file; tensors are read when they are accessed.

    Args:
        folder: the folder of the file.
        entry: the facts that write_tensors() returned.

    Raises:
        SessionError: the file is missing, or its size or header is not that of the entry.
    """

    def __init__(self, folder: Path, entry: FileEntry) -> None:
        self.path = folder / entry.name
        try:
            with open(self.path, "rb") as file:
                nbytes = os.fstat(file.fileno()).st_size
                if nbytes != entry.nbytes:
                    raise SessionError(
                        f"{self.path} has {nbytes:,} bytes and was written with {entry.nbytes:,}: {_ADVICE}"
                    )
                self._map = mmap.mmap(file.fileno(), nbytes, access=mmap.ACCESS_COPY)
        except SessionError:
            raise
        except OSError as error:
            raise SessionError(f"cannot open {self.path} ({error.strerror}): {_ADVICE}") from error
        length = int.from_bytes(self._map[:_LENGTH_BYTES], "little")
        head = self._map[: _LENGTH_BYTES + length] if length < nbytes else b""
        if xxhash.xxh3_128_hexdigest(head) != entry.header:
            raise SessionError(f"the header of {self.path} is not as it was written: {_ADVICE}")
        self._entries = json.loads(head[_LENGTH_BYTES:])
        self._checksums: dict[str, str] = self._entries.pop("__metadata__")
        self._data_start = len(head)

    def names(self) -> list[str]:
        """Return the names of the tensors, in the order of the file."""
        return list(self._entries)

    def byte_range(self, name: str) -> tuple[int, int]:
        """Return the offset of a tensor in the file, and its size in bytes."""
        begin, end = self._entries[name]["data_offsets"]
        return self._data_start + begin, end - begin

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor on the mapped file, without verifying it. Writing to it does not change the file."""
        begin, nbytes = self.byte_range(name)
        dtype = _DTYPES[self._entries[name]["dtype"]]
        shape = self._entries[name]["shape"]
        if nbytes == 0:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._map, dtype=dtype, count=math.prod(shape), offset=begin).view(shape)

    def verify(self, name: str) -> None:
        """Read a tensor and compare its checksum.

        Raises:
            SessionError: the checksum differs.
        """
        begin, nbytes = self.byte_range(name)
        found = xxhash.xxh3_128_hexdigest(memoryview(self._map)[begin : begin + nbytes])
        if found != self._checksums[CHECKSUM_PREFIX + name]:
            raise SessionError(f"{name} in {self.path} is not as it was written: {_ADVICE}")

    def read(self, name: str) -> torch.Tensor:
        """Return a verified copy of a tensor.

        Raises:
            SessionError: the checksum differs.
        """
        self.verify(name)
        return self.tensor(name).clone()

    def prefetch(self, name: str) -> None:
        """Ask the system to read a tensor soon."""
        begin, nbytes = self.byte_range(name)
        if nbytes and hasattr(mmap, "MADV_WILLNEED"):
            first = begin // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, first, begin + nbytes - first)


def faults(folder: Path, entries: Iterable[FileEntry]) -> list[str]:
    """Read files and compare all of their checksums.

    Args:
        folder: the folder of the files.
        entries: the facts that write_tensors() returned.

    Returns:
        What is wrong, a sentence each.
    """
    found = []
    for entry in entries:
        try:
            file = TensorFile(folder, entry)
        except SessionError as error:
            found.append(str(error))
            continue
        for name in file.names():
            try:
                file.verify(name)
            except SessionError as error:
                found.append(str(error))
    return found


def _checksum(parts: list[memoryview]) -> str:
    whole = xxhash.xxh3_128()
    for part in parts:
        whole.update(part)
    return whole.hexdigest()


def _contiguous_parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Split a tensor along its leading dims into contiguous parts, so that writing it needs no copy of all of it."""
    if tensor.is_contiguous() or tensor.ndim == 0:
        yield tensor
    else:
        for part in tensor.unbind(0):
            yield from _contiguous_parts(part)


def _bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor."""
    if tensor.numel() == 0:
        return memoryview(b"")
    flat = tensor.detach().cpu().reshape(-1)
    flat = flat.as_strided(flat.shape, (1,))  # a tensor of one element may have any stride
    data: memoryview = flat.view(torch.uint8).numpy().data
    return data
