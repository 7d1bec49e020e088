"""Decides which files of a folder a session wrote. Only these are replaced or removed.

A session is never written into a folder that holds files of other programs.

A file belongs to a session if it is a regular file and one of these holds:

- it is `manifest.json` (or `manifest.json.partial`) and its content says that it is a session's manifest;
- the folder's manifest names it;
- it has the name of a data file, and its header holds the checksums that only headinfer writes;
- it is `lock` and holds LOCK_TEXT;
- its name ends with PARTIAL_SUFFIX, so a write is under way or was killed;
- it is empty, has one of these names, and another file of the folder belongs to a session.
"""

from __future__ import annotations

import fnmatch
import json
import os
import stat
from collections.abc import Collection
from pathlib import Path

from headinfer.errors import SessionError
from headinfer.sessions.manifest import DATA_FILE_NAME, FORMAT, MANIFEST, Manifest
from headinfer.utils.files import CHECKSUM_PREFIX, PARTIAL_SUFFIX, remove

__all__ = [
    "LOCK",
    "LOCK_TEXT",
    "check_no_foreign_files",
    "check_replaceable",
    "own_files",
    "remove_unused",
    "write_manifest",
]

LOCK = "lock"
LOCK_TEXT = b"lock of a headinfer session\n"
_MANIFESTS = (MANIFEST, MANIFEST + ".partial")  # a killed write of headinfer 0.1.0 leaves the second one
_MANIFEST_START = f'{{\n "format": "{FORMAT}"'.encode()
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_SYSTEM_FILES = (".nfs*", ".fuse_hidden*", ".DS_Store", "._*", "Thumbs.db", "lost+found")


def own_files(folder: Path) -> list[str]:
    """Return the names of the files in a folder that a session provably wrote; empty if the folder does not exist."""
    return _own_and_foreign(folder)[0]


def check_no_foreign_files(folder: Path) -> None:
    """Check that a session may be written to a folder: it does not exist, is empty, or holds only a session's files.

    Files that the system keeps in folders (_SYSTEM_FILES) do not count.

    Args:
        folder: the folder.

    Raises:
        SessionError: the folder holds something else, or cannot be listed. Nothing was written or removed.
    """
    foreign = _own_and_foreign(folder)[1]
    if foreign:
        others = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise SessionError(
            f"{folder} holds {foreign[0]}{others}, which no session of headinfer wrote: nothing was written or removed "
            "there; choose a folder of its own for the session, or move the other files away"
        )


def check_replaceable(path: Path, named: Collection[str]) -> None:
    """Check that a session's file may be written to a path.

    Args:
        path: the file to write.
        named: the data files that the folder's manifest names.

    Raises:
        SessionError: a file of this name exists that no session wrote.
    """
    if os.path.lexists(path) and not _is_own(path, named) and not _is_empty(path):
        raise SessionError(
            f"{path} was not written by headinfer and is not replaced: move it away, or use another folder"
        )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest of a session. The caller holds the session's lock.

    Args:
        folder: the session's folder.
        manifest: the new manifest.

    Raises:
        SessionError: the folder has a manifest of another program.
        CapacityError: the system refuses to write, for example because the disk is full.
    """
    check_replaceable(folder / MANIFEST, named=())
    manifest.write(folder)


def remove_unused(folder: Path, *, named: Collection[str], named_before: Collection[str]) -> None:
    """Remove the data files that only the previous checkpoint needed, and the remains of killed writes.

    The caller holds the session's lock.

    Args:
        folder: the session's folder.
        named: the data files that its manifest names now.
        named_before: the data files that its manifest named before.
    """
    for path in folder.iterdir():
        may_be_unused = path.name.endswith(PARTIAL_SUFFIX) or DATA_FILE_NAME.fullmatch(path.name)
        if may_be_unused and path.name not in named and (_is_own(path, named_before) or _is_empty(path)):
            remove(path)


def _own_and_foreign(folder: Path) -> tuple[list[str], list[str]]:
    """Return the names of the entries that a session wrote, and of all others but those of the system.

    Raises:
        SessionError: the folder cannot be listed.
    """
    named = _named_by_manifest(folder)
    own: list[str] = []
    foreign: list[str] = []
    empty: list[str] = []
    try:
        paths = sorted(folder.iterdir())
    except FileNotFoundError:
        return own, foreign
    except OSError as error:
        raise SessionError(f"cannot write into {folder} ({error.strerror}): choose another folder") from error
    for path in paths:
        if any(fnmatch.fnmatchcase(path.name, pattern) for pattern in _SYSTEM_FILES):
            continue
        if _is_own(path, named):
            own.append(path.name)
        elif _is_empty(path):
            empty.append(path.name)
        else:
            foreign.append(path.name)
    # headinfer 0.1.0 wrote an empty lock, and a power cut can leave an empty file.
    if own:
        own.extend(empty)
    else:
        foreign.extend(empty)
    return own, foreign


def _named_by_manifest(folder: Path) -> set[str]:
    """Return the data files that the manifest of a folder names; empty if there is no valid manifest."""
    try:
        return {entry.name for entry in Manifest.read(folder).files()}
    except SessionError:  # each file is then judged by its own content
        return set()


def _is_own(path: Path, named: Collection[str]) -> bool:
    """Return whether a session wrote a file, judged by its name, its content and the files that a manifest names."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return False
        if path.name in named or path.name.endswith(PARTIAL_SUFFIX):
            return True
        if path.name == LOCK:
            return path.stat().st_size == len(LOCK_TEXT) and path.read_bytes() == LOCK_TEXT
        if path.name in _MANIFESTS:
            return _is_manifest(path)
        return DATA_FILE_NAME.fullmatch(path.name) is not None and _has_checksums(path)
    except FileNotFoundError:  # the writer of the session has renamed or removed it meanwhile
        return True
    except OSError:
        return False


def _is_empty(path: Path) -> bool:
    """Return whether a file is empty and has a name that sessions use."""
    has_name = path.name in (LOCK, *_MANIFESTS) or DATA_FILE_NAME.fullmatch(path.name) is not None
    try:
        found = path.lstat()
    except OSError:
        return False
    return has_name and stat.S_ISREG(found.st_mode) and found.st_size == 0


def _is_manifest(path: Path) -> bool:
    """Return whether a file is a session's manifest. The beginning of a damaged one suffices."""
    data = path.read_bytes()
    if data.startswith(_MANIFEST_START):
        return True
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.get("format") == FORMAT


def _has_checksums(path: Path) -> bool:
    """Return whether a file is a safetensors file with a checksum for each tensor (docs/session-format.md)."""
    with open(path, "rb") as file:
        nbytes = int.from_bytes(file.read(8), "little")
        if nbytes > min(_MAX_HEADER_BYTES, path.stat().st_size):
            return False
        try:
            header = json.loads(file.read(nbytes))
        except (ValueError, RecursionError):
            return False
    if not isinstance(header, dict):
        return False
    sums = header.pop("__metadata__", None)
    return bool(header) and isinstance(sums, dict) and all(CHECKSUM_PREFIX + name in sums for name in header)
