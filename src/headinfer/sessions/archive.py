"""A session as one file, for moving it."""

from __future__ import annotations

import tarfile
from pathlib import Path

from headinfer.errors import CapacityError
from headinfer.files import remove
from headinfer.sessions.manifest import MANIFEST, Manifest

__all__ = ["export_session"]


def export_session(folder: Path, archive: Path) -> None:
    """Write the folder's current checkpoint into an uncompressed tar file, the manifest last; whole or not at all.

    Raises CapacityError where it cannot be written.
    """
    names = [entry.name for entry in Manifest.read(folder).files()]
    partial = archive.with_name(archive.name + ".partial")
    try:
        with tarfile.open(partial, "w") as tar:
            for name in [*names, MANIFEST]:
                tar.add(folder / name, arcname=f"{folder.name}/{name}")
        partial.replace(archive)
    except OSError as error:
        remove(partial)
        raise CapacityError(f"cannot write {archive} ({error.strerror or error}): choose another place") from error
