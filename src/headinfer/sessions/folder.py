"""The folders of sessions: their names, consistent reading without a lock, removal, and the lock of the writer."""

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

__all__ = [
    "Lock",
    "check_unchanged",
    "default_root",
    "read_consistently",
    "remove_session",
    "session_folder",
    "session_names",
]

T = TypeVar("T")

_LOCK_ATTEMPTS = 100  # other processes may remove the folder at the same time
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def default_root() -> Path:
    """Return the folder of all sessions: $HEADINFER_SESSIONS, or `sessions` in this user's data folder of headinfer."""
    chosen = os.environ.get("HEADINFER_SESSIONS")
    return Path(chosen) if chosen else data_folder() / "sessions"


def session_folder(root: Path, name: str) -> Path:
    """Return the folder of a session, which need not exist.

    Args:
        root: the folder of all sessions.
        name: the name of the session.

    Raises:
        UsageError: the name is not valid, for example because it leads out of the root. Or the folder is a symbolic
            link, or the system refuses to look into it.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} is not a valid session name: use letters, digits, dots, dashes and underscores, and begin with "
            "a letter or digit"
        )
    folder = root / name
    try:
        if _exists(folder) and folder.is_symlink():
            raise UsageError(f"{folder} is a link, and a session must be a folder of its own: choose another name")
        _exists(folder / MANIFEST)
    except OSError as error:
        raise _unreadable(root, error) from error
    return folder


def session_names(root: Path) -> list[str]:
    """Return the sorted names of all sessions in a root, with those that cannot be read.

    Raises:
        UsageError: the root cannot be read.
    """
    names = []
    try:
        for path in root.iterdir():
            if _NAME.fullmatch(path.name) and path.is_dir() and _may_exist(path / MANIFEST):
                names.append(path.name)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _unreadable(root, error) from error
    return sorted(names)


def _exists(path: Path) -> bool:
    """Return whether a path exists; raise OSError if the system refuses to say it."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _may_exist(path: Path) -> bool:
    """Return whether a path exists, or cannot be read."""
    try:
        return _exists(path)
    except OSError:
        return True


def _unreadable(root: Path, error: OSError) -> UsageError:
    return UsageError(
        f"cannot read the folder of sessions {root} ({error.strerror}: {error.filename}): name another one with "
        "--sessions, or change its permissions"
    )


def read_consistently(folder: Path, read: Callable[[Manifest], T]) -> T:
    """Read the current checkpoint of a session without a lock.

    A writer may replace the checkpoint meanwhile and remove files of the old one. If reading fails for this reason, it
    begins again with the new checkpoint.

    Args:
        folder: the session's folder.
        read: reads the files that a manifest names.

    Returns:
        What `read` returned.

    Raises:
        SessionError: there is no session, or `read` raised this error although the checkpoint did not change.
    """
    while True:
        manifest = Manifest.read(folder)
        try:
            return read(manifest)
        except SessionError:
            if Manifest.read(folder).generation == manifest.generation:
                raise


def check_unchanged(folder: Path, generation: int) -> None:
    """Check that a session has not changed since a decision was made without the lock. The lock must be held now.

    Args:
        folder: the session's folder.
        generation: the generation of the checkpoint at that time; 0 if there was none.

    Raises:
        SessionError: another process has written the session meanwhile.
    """
    now = Manifest.read(folder).generation if (folder / MANIFEST).exists() else 0
    if now != generation:
        raise SessionError(f"another process has written the session {folder} meanwhile: run the same command again")


def remove_session(folder: Path) -> bool:
    """Remove a session: the manifest first, then the other files that the session wrote, then the folder.

    Args:
        folder: the session's folder.

    Returns:
        Whether the folder was removed too. It remains if another program has put a file there meanwhile.

    Raises:
        SessionError: the folder holds no session or files that no session wrote, or another process is writing the
            session. Nothing was removed.
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
    """An exclusive lock on a session, for its one writer. The end of the process releases it too.

    Args:
        folder: the session's folder. It is created if it does not exist.

    Raises:
        SessionError: another process or writer holds the lock, the folder is not writable, or it holds files that no
            session wrote. Nothing was written.
    """

    def __init__(self, folder: Path) -> None:
        self._descriptor = -1
        check_no_foreign_files(folder)
        try:
            for _ in range(_LOCK_ATTEMPTS):
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
        raise SessionError(f"cannot lock {folder}: other processes keep removing its lock; choose another folder")

    def release(self) -> None:
        """Release the lock. Calling it again has no effect."""
        if self._descriptor >= 0:
            os.close(self._descriptor)  # releases the lock
            self._descriptor = -1

    def __enter__(self) -> Lock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _open_locked(folder: Path) -> int:
    """Open the lock file of a folder and lock it.

    Returns:
        The file descriptor; -1 if the last holder has removed the lock file or the folder meanwhile.

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
    """Create a lock file together with its text, so that a killed process never leaves an empty one."""
    partial = partial_path(path)
    try:
        partial.write_bytes(LOCK_TEXT)
        os.link(partial, path)
    except FileExistsError:  # another process has created it meanwhile
        return
    except FileNotFoundError:
        raise
    except OSError:  # a file system without hard links
        with open(path, "ab") as file:
            file.write(LOCK_TEXT if not file.tell() else b"")
    finally:
        remove(partial)


def _is_same(descriptor: int, path: Path) -> bool:
    """Return whether a path still refers to an open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _lock(descriptor: int) -> bool:
    """Lock an open file exclusively; return False if another descriptor holds the lock."""
    try:
        import fcntl
    except ImportError:  # this system has no such locks, so the user must prevent a second writer
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
