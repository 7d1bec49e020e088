"""Where sessions lie, what they may be called, and the lock of the one that writes."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from headinfer.errors import SessionError, UsageError
from headinfer.sessions.manifest import MANIFEST, Manifest

__all__ = ["Lock", "at_rest", "default_root", "remove_session", "session_folder", "session_names"]

T = TypeVar("T")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_LOCK = "lock"


def default_root() -> Path:
    """$HEADINFER_SESSIONS, or headinfer/sessions in the user's data folder."""
    if chosen := os.environ.get("HEADINFER_SESSIONS"):
        return Path(chosen)
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "headinfer" / "sessions"


def session_folder(root: Path, name: str) -> Path:
    """The folder of a session, which need not be there. Raises UsageError for a name that could lead elsewhere."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} is no name for a session: use letters, digits, dots, dashes and underscores, and begin with a "
            "letter or digit"
        )
    folder = root / name
    if folder.is_symlink():
        raise UsageError(f"{folder} is a link to another place: sessions are folders of their own")
    return folder


def session_names(root: Path) -> list[str]:
    """All sessions of a root."""
    if not root.is_dir():
        return []
    return sorted(path.parent.name for path in root.glob(f"*/{MANIFEST}") if _NAME.fullmatch(path.parent.name))


def at_rest(folder: Path, look: Callable[[Manifest], T]) -> T:
    """look() at the folder's checkpoint, which needs no lock: once more where a writer has replaced it meanwhile, and
    removed a file of it. Raises SessionError as Manifest.read() and look() do.
    """
    while True:
        manifest = Manifest.read(folder)
        try:
            return look(manifest)
        except SessionError:
            if Manifest.read(folder).generation == manifest.generation:
                raise


def remove_session(folder: Path) -> None:
    """Remove a session, its manifest first. Raises SessionError where one is writing it, or where there is none."""
    if not (folder / MANIFEST).exists() and not (folder / _LOCK).exists():
        raise SessionError(f"there is no session {folder.name} in {folder.parent}")
    lock = Lock(folder)
    try:
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder)
    finally:
        lock.release()


class Lock:
    """One writer at a time: held until release(), or until the process ends.

    The folder is made where there is none. Raises SessionError where another process or writer holds it.
    """

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise SessionError(f"cannot write into {folder} ({error.strerror}): choose another folder") from error
        if not _lock(self._descriptor):
            os.close(self._descriptor)
            raise SessionError(f"another process is writing {folder}: wait for it to end, or use another name")

    def release(self) -> None:
        """Let others write."""
        if self._descriptor >= 0:
            os.close(self._descriptor)  # lets go of the lock
            self._descriptor = -1

    def __enter__(self) -> Lock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _lock(descriptor: int) -> bool:
    try:
        import fcntl
    except ImportError:  # no such locks on this system: then it is up to the user
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
