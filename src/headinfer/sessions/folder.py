"""Where sessions lie, what they may be called, and the lock of the one that writes."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from headinfer.errors import SessionError, UsageError
from headinfer.sessions.manifest import MANIFEST, Manifest
from headinfer.sessions.ownership import LOCK, LOCK_TEXT, check_no_foreign_files, own_files
from headinfer.utils.files import partial_path, remove, sync_folder
from headinfer.utils.user_folders import data_folder

__all__ = ["Lock", "at_rest", "check_unchanged", "default_root", "remove_session", "session_folder", "session_names"]

T = TypeVar("T")

_ATTEMPTS = 100  # to lock a folder that other processes remove at the same time
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def default_root() -> Path:
    """The folder of all sessions: $HEADINFER_SESSIONS, or sessions in headinfer's data folder of this user."""
    if chosen := os.environ.get("HEADINFER_SESSIONS"):
        return Path(chosen)
    return data_folder() / "sessions"


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


def check_unchanged(folder: Path, generation: int) -> None:
    """Check, with the lock held, that a session is as it was before the lock was taken.

    Args:
        folder: the session's folder.
        generation: that of the checkpoint that the folder had before; 0 if it had none.

    Raises:
        SessionError: another process has written the session meanwhile.
    """
    now = Manifest.read(folder).generation if (folder / MANIFEST).exists() else 0
    if now != generation:
        raise SessionError(f"another process has written the session {folder} meanwhile: run the same command again")


def remove_session(folder: Path) -> bool:
    """Remove a session: the files that it wrote, its manifest first, then the folder.

    Returns:
        Whether the folder is gone too. It stays if another program has put a file there meanwhile.

    Raises:
        SessionError: the folder is no session, holds files that no session wrote, or is being written. Nothing was
            removed then.
    """
    if not own_files(folder):
        raise SessionError(f"there is no session {folder.name} in {folder.parent}: nothing was removed")
    with Lock(folder):
        for name in sorted(own_files(folder), key=lambda name: (name != MANIFEST, name == LOCK)):
            remove(folder / name)
        try:
            folder.rmdir()
        except OSError:
            return False
    return True


class Lock:
    """The right to write a session: one writer at a time, until release() or the end of the process.

    Args:
        folder: the session's folder; it is created if there is none.

    Raises:
        SessionError: another process or writer holds the lock, the folder is not writable, or it holds files that no
            session wrote. Nothing was written then.
    """

    def __init__(self, folder: Path) -> None:
        self._descriptor = -1
        check_no_foreign_files(folder)
        try:
            for _ in range(_ATTEMPTS):
                if not folder.is_dir():
                    folder.mkdir(parents=True, exist_ok=True)
                    sync_folder(folder.parent)
                self._descriptor = _open_locked(folder)
                if self._descriptor >= 0:
                    return
        except SessionError:
            raise
        except OSError as error:
            raise SessionError(f"cannot write into {folder} ({error.strerror}): choose another folder") from error
        raise SessionError(f"cannot lock {folder}: its lock is removed again and again; choose another folder")

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


def _open_locked(folder: Path) -> int:
    """Open a folder's lock and lock it; -1 if its last holder has removed it, or the folder, meanwhile.

    Raises:
        SessionError: another process or writer holds the lock.
        OSError: the file cannot be created or opened.
    """
    path = folder / LOCK
    try:
        if not os.path.lexists(path):
            _create_lock(path)
        descriptor = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
    except FileNotFoundError:
        return -1
    try:
        if not _lock(descriptor):
            raise SessionError(f"another process is writing {folder}: wait for it to end, or use another name")
        if _is_same(descriptor, path):
            return descriptor
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return -1


def _create_lock(path: Path) -> None:
    """Create a lock's file together with its text, so that a process that is killed never leaves an empty one."""
    partial = partial_path(path)
    try:
        partial.write_bytes(LOCK_TEXT)
        os.link(partial, path)
    except FileExistsError:  # another process was quicker
        return
    except FileNotFoundError:
        raise
    except OSError:  # a file system without hard links
        with open(path, "ab") as file:
            file.write(LOCK_TEXT if not file.tell() else b"")
    finally:
        remove(partial)


def _is_same(descriptor: int, path: Path) -> bool:
    """Whether a path still leads to an open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


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
