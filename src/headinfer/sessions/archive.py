"""A session as one file, to move it to another machine."""

from __future__ import annotations

import io
import os
import tarfile
import time
from pathlib import Path

from headinfer.errors import CapacityError, HeadinferError, SessionError, UsageError
from headinfer.sessions.folder import at_rest
from headinfer.sessions.manifest import MANIFEST, Manifest
from headinfer.sessions.ownership import own_files
from headinfer.utils.files import FileEntry, Output, partial_path, remove, sync_folder

__all__ = ["export_session"]


def export_session(folder: Path, archive: Path) -> None:
    """Write a session's current checkpoint into an uncompressed tar file, the manifest last; whole or not at all.

    It needs no lock: if a writer replaces the checkpoint meanwhile, the export begins again.

    Args:
        folder: the session.
        archive: the file to write. A file that exists and is not empty is never replaced.

    Raises:
        UsageError: the archive exists, its folder is not writable, or it would lie in a session's folder.
        SessionError: there is no session in the folder, or it is damaged.
        CapacityError: the system refuses to write.
    """
    output = Output(archive, is_ours=None)
    archive = archive.resolve()
    if MANIFEST in own_files(archive.parent):
        raise UsageError(f"cannot write an archive into {archive.parent}: it is a session's folder; choose another one")
    partial = partial_path(archive)
    try:
        at_rest(folder, lambda manifest: _write(folder, manifest, partial))
        output.check()
        os.replace(partial, archive)
        sync_folder(archive.parent)
    except HeadinferError:
        raise
    except OSError as error:
        raise CapacityError(f"cannot write {archive} ({error.strerror or error}): choose another place") from error
    finally:
        remove(partial)


def _write(folder: Path, manifest: Manifest, partial: Path) -> None:
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
    path = folder / entry.name
    try:
        data = open(path, "rb")  # noqa: SIM115  closed below
    except OSError as error:
        raise SessionError(f"cannot open {path} ({error.strerror}): the session is damaged") from error
    with data:
        about = tar.gettarinfo(arcname=f"{folder.name}/{entry.name}", fileobj=data)
        if about.size != entry.nbytes:
            raise SessionError(f"{path} has {about.size:,} bytes and was written with {entry.nbytes:,}: it is damaged")
        tar.addfile(about, data)
