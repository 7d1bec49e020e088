"""Exports a session to one tar file, to move it to another machine."""

from __future__ import annotations

import io
import os
import tarfile
import time
from pathlib import Path

from headinfer.errors import CapacityError, HeadinferError, SessionError
from headinfer.sessions.folder import read_consistently
from headinfer.sessions.manifest import MANIFEST, Manifest
from headinfer.utils.files import REMEDY, FileEntry, Output, partial_path, remove, sync_folder

__all__ = ["export_session"]


def export_session(folder: Path, archive: Path) -> None:
    """Write the current checkpoint of a session to an uncompressed tar file. The manifest is its last member.

    The archive appears whole or not at all. The export needs no lock: if a writer replaces the checkpoint meanwhile,
    it begins again.

    Args:
        folder: the session's folder.
        archive: the file to write. A file that exists and is not empty is never replaced.

    Raises:
        UsageError: the archive exists, its folder is not writable, or its folder is that of a session.
        SessionError: the folder holds no session, or the session is damaged.
        CapacityError: the system refuses to write, for example because the disk is full.
    """
    output = Output(archive, is_ours=None)
    archive = archive.resolve()
    partial = partial_path(archive)
    try:
        read_consistently(folder, lambda manifest: _write(folder, manifest, partial))
        output.check()
        os.replace(partial, archive)
        sync_folder(archive.parent)
    except HeadinferError:
        raise
    except OSError as error:
        raise CapacityError(f"cannot write {archive} ({error.strerror or error}): name another file") from error
    finally:
        remove(partial)


def _write(folder: Path, manifest: Manifest, partial: Path) -> None:
    """Write the files that a manifest names, then the manifest, to a tar file, and sync it to the disk."""
    text = manifest.text().encode("utf-8")
    about = tarfile.TarInfo(f"{folder.name}/{MANIFEST}")
    about.size = len(text)
    about.mtime = int(time.time())
    with open(partial, "wb") as file:
        with tarfile.open(fileobj=file, mode="w") as tar:
            for entry in manifest.files():
                _add(tar, folder, entry)
            tar.addfile(about, io.BytesIO(text))
        file.flush()
        os.fsync(file.fileno())


def _add(tar: tarfile.TarFile, folder: Path, entry: FileEntry) -> None:
    """Add a data file to an archive.

    Raises:
        SessionError: the file is missing or has another size than its entry.
    """
    path = folder / entry.name
    try:
        data = open(path, "rb")  # noqa: SIM115  closed below
    except OSError as error:
        raise SessionError(f"cannot open {path} ({error.strerror}): it is damaged; {REMEDY}") from error
    with data:
        about = tar.gettarinfo(arcname=f"{folder.name}/{entry.name}", fileobj=data)
        if about.size != entry.nbytes:
            raise SessionError(
                f"{path} has {about.size:,} bytes and was written with {entry.nbytes:,}: it is damaged; {REMEDY}"
            )
        tar.addfile(about, data)
