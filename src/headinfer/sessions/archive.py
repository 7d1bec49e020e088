"""A session as one file, to move it to another machine."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

from headinfer.errors import CapacityError, SessionError
from headinfer.files import check_output, partial_path, remove
from headinfer.sessions.folder import at_rest
from headinfer.sessions.manifest import MANIFEST, Manifest

__all__ = ["export_session"]


def export_session(folder: Path, archive: Path) -> None:
    """Write a session's current checkpoint into an uncompressed tar file, the manifest last; whole or not at all.

    It needs no lock: if a writer replaces the checkpoint meanwhile, the export begins again.

    Args:
        folder: the session.
        archive: the file to write. An existing file is never replaced.

    Raises:
        UsageError: the archive exists, or its folder is not writable.
        SessionError: there is no session in the folder, or it is damaged.
        CapacityError: the system refuses to write.
    """
    check_output(archive, is_ours=lambda _: False)
    partial = partial_path(archive)
    try:
        at_rest(folder, lambda manifest: _write(folder, manifest, partial))
        check_output(archive, is_ours=lambda _: False)
        os.replace(partial, archive)
    except SessionError:
        raise
    except OSError as error:
        raise CapacityError(f"cannot write {archive} ({error.strerror or error}): choose another place") from error
    finally:
        remove(partial)


def _write(folder: Path, manifest: Manifest, partial: Path) -> None:
    text = manifest.text().encode("utf-8")
    remove(partial)
    with open(partial, "xb") as file:
        with tarfile.open(fileobj=file, mode="w") as tar:
            for entry in manifest.files():
                path = folder / entry.name
                try:
                    data = open(path, "rb")  # noqa: SIM115  closed below
                except FileNotFoundError as error:
                    raise SessionError(f"cannot open {path} ({error.strerror}): the session is damaged") from error
                with data:
                    tar.addfile(tar.gettarinfo(arcname=f"{folder.name}/{entry.name}", fileobj=data), data)
            about = tarfile.TarInfo(f"{folder.name}/{MANIFEST}")
            about.size = len(text)
            about.mtime = int((folder / MANIFEST).stat().st_mtime)
            tar.addfile(about, io.BytesIO(text))
        file.flush()
        os.fsync(file.fileno())
