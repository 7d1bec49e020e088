"""Atomic, durable file writes, and outputs that never replace a file of another program.

Errors of the operating system while writing become CapacityError.
"""

from __future__ import annotations

import ctypes
import errno
import io
import json
import os
import secrets
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headinfer.errors import CapacityError, UsageError

__all__ = [
    "CHECKSUM_PREFIX",
    "PARTIAL_SUFFIX",
    "REMEDY",
    "SESSION_FORMAT",
    "SESSION_MANIFEST",
    "FileEntry",
    "Output",
    "check_folder",
    "is_session_folder",
    "link_or_copy",
    "partial_path",
    "read_bytes",
    "read_json_object",
    "read_text",
    "remove",
    "sync_folder",
    "write_bytes",
    "write_file",
    "write_text",
]

REMEDY = "remove the session with `headinfer session rm`, then read the document again"
"""What works if a file of a session is damaged."""

CHECKSUM_PREFIX = "xxh3:"
"""Prefix of the checksums in the header of a data file (kv/tensor_file.py). Only headinfer writes such headers."""

PARTIAL_SUFFIX = ".headinfer-partial"
"""Suffix of a file that is being written. Only headinfer uses it, so remains of a killed write can be recognised."""

SESSION_MANIFEST = "manifest.json"
SESSION_FORMAT = "headinfer session"
"""The field `format` of a session's manifest (sessions/manifest.py)."""

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_MAX_JSON_BYTES = 2**28
_PROBE_BYTES = 4096
_PART_BYTES = 8 * 1024 * 1024
_SYNC_FILE_RANGE_WRITE = 2  # <fcntl.h>


@dataclass(frozen=True)
class FileEntry:
    """The facts about a data file that a manifest stores, so that the file can be checked before it is used.

    Attributes:
        name: the file's name, without a folder.
        nbytes: the file's size in bytes.
        header: the checksum of the file's header, which contains the checksums of the tensors (kv/tensor_file.py).
    """

    name: str
    nbytes: int
    header: str


def check_folder(folder: Path, purpose: str) -> None:
    """Check that a folder, which need not exist yet, can be written to, by writing and removing a small file.

    Args:
        folder: the folder.
        purpose: what it is for, such as "keep KV"; the message begins with it.

    Raises:
        UsageError: the folder, or its nearest parent that exists, cannot be written to, or it is the folder of a
            session.
    """
    nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    problem = f"cannot {purpose} in {folder}: {nearest}"
    if not nearest.is_dir():
        raise UsageError(f"{problem} is not a writable folder; name another one")
    if is_session_folder(nearest):
        where = "it" if nearest == folder else nearest
        raise UsageError(f"cannot {purpose} in {folder}: {where} is a session's folder; name another one")
    try:
        _probe(nearest)
    except OSError as error:
        advice = "free some space, or name another one" if error.errno in _DISK_FULL else "name another one"
        # Folders of the kernel, such as /proc, say that a file that is to be made does not exist.
        is_puzzling = error.errno == errno.ENOENT
        reason = "no file can be made in it" if is_puzzling else error.strerror or error
        raise UsageError(f"{problem} is not a writable folder ({reason}); {advice}") from error


def is_session_folder(folder: Path) -> bool:
    """Return whether a folder holds the manifest of a session."""
    return read_json_object(folder / SESSION_MANIFEST).get("format") == SESSION_FORMAT


def _probe(folder: Path) -> None:
    """Write a small file into a folder and remove it.

    Raises:
        OSError: the system refuses it.
    """
    path = folder / f"{secrets.token_hex(8)}{PARTIAL_SUFFIX}"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(descriptor, bytes(_PROBE_BYTES))
    finally:
        os.close(descriptor)
        remove(path)


class Output:
    """The file that a command writes its result to.

    Writing may create the file, fill an empty one, or replace an earlier result of the same kind. It never replaces
    anything else. The constructor checks this, so that a command fails before it begins to compute; write() checks
    again, because the command may have taken hours.

    Args:
        path: the file that the user named. If it is a symbolic link, its target is written.
        is_ours: returns whether a file is an earlier result of the same kind. It is called with the path of a regular
            file that is not empty. If it is None, no file is ever replaced.

    Raises:
        UsageError: the path is a folder, a device or a pipe, its folder is not writable, or the file is not an earlier
            result.
    """

    def __init__(self, path: Path, is_ours: Callable[[Path], bool] | None) -> None:
        self.path = path
        self._is_ours = is_ours
        self.check()

    def check(self) -> None:
        """Check that the result can be written and replaces nothing but an earlier result.

        Raises:
            UsageError: as for the constructor.
        """
        try:
            self._check(self.path.resolve())
        except OSError as error:
            raise UsageError(
                f"cannot write a result to {self.path} ({error.strerror or error}): name another file"
            ) from error

    def _check(self, target: Path) -> None:
        if self.path.is_symlink() and not target.exists():
            raise UsageError(f"cannot write a result to {self.path}: it is a link to nothing; name a file")
        if target.is_dir():
            raise UsageError(f"cannot write a result to {self.path}: it is a folder; name a file")
        if target.exists() and not target.is_file():
            raise UsageError(f"cannot write a result to {self.path}: it is not a regular file; name a file")
        check_folder(target.parent, "write a result")
        if not target.exists() or not target.stat().st_size:
            return
        if self._is_ours is None:
            raise UsageError(f"{self.path} exists and is not replaced: choose another name, or move it away")
        if not self._is_ours(target):
            raise UsageError(
                f"{self.path} is not an earlier result of this command and is not replaced: choose another name, or "
                "move it away"
            )

    def write(self, data: str | bytes) -> None:
        """Check again, then write the result as write_bytes() does.

        If this fails, the result is written to a temporary file, which the error names.

        Args:
            data: the whole content of the file; text is encoded in UTF-8.

        Raises:
            UsageError: as for the constructor.
            CapacityError: the system refuses to write, for example because the disk is full.
        """
        content = data.encode("utf-8") if isinstance(data, str) else data
        try:
            self.check()
            write_bytes(self.path, content)
        except (UsageError, CapacityError) as error:
            kept = _keep(content, self.path.suffix)
            where = f"; the result is in {kept}" if kept is not None else "; a temporary file failed too"
            raise type(error)(f"{error}{where}") from error


def _keep(content: bytes, suffix: str) -> Path | None:
    """Write a result to a new temporary file; return its path, or None if that fails too."""
    try:
        descriptor, name = tempfile.mkstemp(prefix="headinfer-result-", suffix=suffix)
        with open(descriptor, "wb") as file:
            file.write(content)
    except OSError:
        return None
    return Path(name)


def read_bytes(path: Path) -> bytes:
    """Read a file that a user names.

    Args:
        path: the file; `-` reads standard input.

    Raises:
        UsageError: the file cannot be read, or is a device.
    """
    is_stdin = str(path) == "-"
    name = "standard input" if is_stdin else str(path)
    problem = None
    if is_stdin and sys.stdin is None:
        problem = "it is closed"
    elif not is_stdin and path.is_char_device():  # such as /dev/zero, which never ends
        problem = "it is a device; name a file, or - for standard input"
    if problem is not None:
        raise UsageError(f"cannot read {name}: {problem}")
    try:
        return sys.stdin.buffer.read() if is_stdin else path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {name}: {error.strerror or error}") from error


def read_text(path: Path) -> str:
    """Read a UTF-8 text file.

    Args:
        path: the file; `-` reads standard input.

    Raises:
        UsageError: the file cannot be read, is a device, or is not UTF-8.
    """
    data = read_bytes(path)
    try:
        return io.TextIOWrapper(io.BytesIO(data), encoding="utf-8").read()  # with the line ends of a text file
    except UnicodeDecodeError as error:
        name = "standard input" if str(path) == "-" else path
        raise UsageError(f"cannot read {name}: it is not UTF-8 text") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that contains an object.

    Returns:
        The object; an empty dictionary if the file is missing, unreadable, no regular file or contains anything else.
    """
    try:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > _MAX_JSON_BYTES:
            return {}
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def partial_path(path: Path) -> Path:
    """Return a new name in the folder of `path`, for a file that is renamed to `path` when it is complete."""
    return path.with_name(secrets.token_hex(8) + PARTIAL_SUFFIX)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, as write_bytes() does."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file as write_file() does, and sync its folder; create the folder if it does not exist.

    Raises:
        CapacityError: the system refuses to write, for example because the disk is full.
    """
    with _os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, [data])
    with _os_errors(path):
        sync_folder(path.resolve().parent)


def write_file(path: Path, parts: Iterable[memoryview | bytes]) -> None:
    """Write a file atomically: under a partial name, which is synced to the disk and then renamed.

    At any time the path has the old content or the new one. An existing file is replaced, so callers must check that it
    may be. If the path is a symbolic link, the link's target is replaced. Other hard links to an existing file keep the
    old content.

    Args:
        path: the file; its folder must exist.
        parts: the content, in order. Each part is written before the next one is computed.

    Raises:
        CapacityError: the system refuses to write, for example because the disk is full. The partial file is removed.
    """
    path = path.resolve()
    partial = partial_path(path)
    try:
        with _os_errors(path):
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            try:
                offset = 0
                for part in parts:
                    view = memoryview(part)
                    while view:
                        count = os.write(descriptor, view[:_PART_BYTES])
                        _begin_to_sync(descriptor, offset, count)
                        offset += count
                        view = view[count:]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(partial, path)
    except BaseException:
        remove(partial)
        raise


def link_or_copy(source: Path, target: Path) -> None:
    """Create a hard link to a file that is never written again; copy it if the file system has no hard links.

    An existing target is replaced, so callers must check that it may be.
    """
    remove(target)
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        with open(source, "rb") as file:
            write_file(target, iter(lambda: file.read(_PART_BYTES), b""))


def remove(path: Path) -> None:
    """Remove a file if it exists."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return


def sync_folder(folder: Path) -> None:
    """Sync a folder, so that the names of its files are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _begin_to_sync(descriptor: int, offset: int, nbytes: int) -> None:
    """Start to write a part of a file to the disk, while the next part is computed; fsync() waits for all parts."""
    if sys.platform == "linux":
        sync = getattr(ctypes.CDLL(None), "sync_file_range", None)
        if sync is not None:
            sync(descriptor, ctypes.c_int64(offset), ctypes.c_int64(nbytes), _SYNC_FILE_RANGE_WRITE)


@contextmanager
def _os_errors(path: Path) -> Iterator[None]:
    """Turn an OSError into a CapacityError."""
    try:
        yield
    except OSError as error:
        is_full = error.errno in _DISK_FULL
        advice = "free some space on this disk, or use another folder" if is_full else "use another folder"
        raise CapacityError(f"cannot write {path} ({error.strerror or error}): {advice}") from error
