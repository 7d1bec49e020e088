"""Documents that were sent and are not completely read yet, in ROOT/.uploads/NAME/.

data           the bytes of the document, as they were sent
upload.json    its facts; written last, so a folder without it is the remains of an upload that did not end

ROOT/.uploads/.server has the lock of the one server that uses the folder of sessions.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from headinfer.errors import CapacityError, SessionError, UsageError
from headinfer.sessions.folder import Lock
from headinfer.utils.files import read_bytes, read_json_object, remove, sync_folder, write_file, write_text

__all__ = ["Upload", "Uploads", "clean_filename", "digest", "session_name"]

_FOLDER = ".uploads"  # no session has such a name
_SERVER = ".server"
_DATA = "data"
_FACTS = "upload.json"
_PART_BYTES = 8 * 1024 * 1024
_LONGEST_NAME = 80
_LONGEST_FILENAME = 200


@dataclass(frozen=True)
class Upload:
    """A document that was sent.

    Attributes:
        name: the name of its session.
        filename: the name of its file.
        client: who sent it.
        nbytes: its size.
        sha256: the SHA-256 of its bytes, in hexadecimal.
        created_s: when it was sent, in seconds since 1970.
    """

    name: str
    filename: str
    client: str
    nbytes: int
    sha256: str
    created_s: float


class Uploads:
    """The documents of a folder of sessions that are not completely read yet. One server at a time uses them.

    Args:
        root: the folder of all sessions.

    Raises:
        UsageError: another server uses this folder.
    """

    def __init__(self, root: Path) -> None:
        self._folder = root / _FOLDER
        try:
            self._lock = Lock(self._folder / _SERVER)
        except SessionError as error:
            raise UsageError(
                f"another server uses the sessions in {root}, or they are not writable: end it, or name another folder "
                "with --sessions"
            ) from error

    def close(self) -> None:
        """Let another server use the folder."""
        self._lock.release()

    def all(self) -> list[Upload]:
        """Return all documents, the oldest first. Remains of killed uploads are removed."""
        found = []
        for folder in sorted(self._folder.iterdir()):
            if folder.name == _SERVER:
                continue
            facts = read_json_object(folder / _FACTS)
            if facts.keys() == Upload.__annotations__.keys() and facts["name"] == folder.name:
                found.append(Upload(**facts))
            else:
                self.remove(folder.name)
        return sorted(found, key=lambda upload: upload.created_s)

    def store(self, upload: Upload, data: Path | bytes) -> None:
        """Store a document, whole or not at all.

        Args:
            upload: its facts.
            data: its bytes, or a file that holds them.

        Raises:
            CapacityError: the disk is full.
        """
        folder = self._folder / upload.name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_file(folder / _DATA, _parts(data))
            write_text(folder / _FACTS, json.dumps(asdict(upload), indent=1))
            sync_folder(self._folder)
        except OSError as error:
            self.remove(upload.name)
            reason = error.strerror or error
            raise CapacityError(f"the document cannot be stored ({reason}): free some space") from error
        except BaseException:
            self.remove(upload.name)
            raise

    def data(self, upload: Upload) -> bytes:
        """Return the bytes of a document.

        Raises:
            UsageError: they cannot be read.
        """
        return read_bytes(self._folder / upload.name / _DATA)

    def remove(self, name: str) -> None:
        """Remove a document, if there is one of this name: its facts first."""
        folder = self._folder / name
        if not folder.is_dir():
            return
        remove(folder / _FACTS)
        for path in folder.iterdir():
            remove(path)
        folder.rmdir()


def digest(data: Path | bytes) -> tuple[str, int]:
    """Return the SHA-256 of bytes, or of those of a file, in hexadecimal, and their number."""
    sha256 = hashlib.sha256()
    nbytes = 0
    for part in _parts(data):
        sha256.update(part)
        nbytes += len(part)
    return sha256.hexdigest(), nbytes


def clean_filename(filename: str) -> str:
    """Return the last part of a path as a client names it, without characters that cannot be printed."""
    name = PurePosixPath(filename.replace("\\", "/")).name
    printable = "".join(character for character in name if character.isprintable())
    return printable[-_LONGEST_FILENAME:] or "document"


def session_name(filename: str) -> str:
    """Return a valid name of a session that resembles the name of a file."""
    stem = os.path.splitext(filename)[0]
    plain = unicodedata.normalize("NFKD", stem).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9_]+", "-", plain).strip("-_")[:_LONGEST_NAME] or "document"


def _parts(data: Path | bytes) -> Iterator[bytes]:
    if isinstance(data, bytes):
        yield data
        return
    with open(data, "rb") as file:
        yield from iter(lambda: file.read(_PART_BYTES), b"")
