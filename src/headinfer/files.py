"""Files that are whole or not there, and what a system call refused, said in a sentence."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from headinfer.errors import CapacityError, UsageError

__all__ = [
    "FileEntry",
    "check_folder",
    "link_or_copy",
    "remove",
    "replace_text",
    "sync_folder",
    "write_new",
    "write_text",
]

_PART_BYTES = 8 * 1024 * 1024
_SYNC_FILE_RANGE_WRITE = 2  # <fcntl.h>


@dataclass(frozen=True)
class FileEntry:
    """What is known of a file of tensors without opening it: its name, its bytes, and the checksum of its header, which
    holds those of the tensors (kv/tensor_file.py).
    """

    name: str
    nbytes: int
    header: str


def check_folder(folder: Path, purpose: str) -> None:
    """Raise UsageError where a folder, which need not be there yet, cannot be written to.

    purpose: such as "keep KV".
    """
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise UsageError(f"cannot {purpose} in {folder}: {place} is no folder that you may write into")


def write_text(path: Path, text: str) -> None:
    """Write a file beside its place, then move it there; its folder is made where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def replace_text(path: Path, text: str) -> None:
    """As write_text, for files that must outlive a power cut: after it the new text is on the disk, and at any instant
    before it the old one. Raises CapacityError where the disk is full.
    """
    partial = path.with_name(path.name + ".partial")
    write_new(partial, [text.encode("utf-8")])
    os.replace(partial, path)
    sync_folder(path.parent)


def write_new(path: Path, parts: Iterable[memoryview | bytes]) -> None:
    """Write a new file and bring it to the disk. What was there before under this name is let go of, not written to:
    it may have other names. Raises CapacityError where the disk is full; then nothing is left of the file.
    """
    remove(path)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        with _told(path):
            at = 0
            for part in parts:
                view = memoryview(part)
                while view:
                    count = os.write(descriptor, view[:_PART_BYTES])
                    _begin_to_sync(descriptor, at, count)
                    at, view = at + count, view[count:]
            os.fsync(descriptor)
    except CapacityError:
        remove(path)
        raise
    finally:
        os.close(descriptor)


def link_or_copy(source: Path, target: Path) -> None:
    """A second name for a file that is never written again; a copy where the file system has no links."""
    remove(target)
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        with open(source, "rb") as file:
            write_new(target, iter(lambda: file.read(_PART_BYTES), b""))


def remove(path: Path) -> None:
    """Remove a file where there is one."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return


def sync_folder(folder: Path) -> None:
    """Bring a folder's names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _begin_to_sync(descriptor: int, at: int, nbytes: int) -> None:
    """Let the disk begin with a part of a file while the next one is written; fsync() waits for all of them."""
    if sys.platform == "linux":
        sync = getattr(ctypes.CDLL(None), "sync_file_range", None)
        if sync is not None:
            sync(descriptor, ctypes.c_int64(at), ctypes.c_int64(nbytes), _SYNC_FILE_RANGE_WRITE)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CapacityError(
            f"cannot write {path} ({error.strerror or error}): free some space on this disk, or use another folder"
        ) from error
