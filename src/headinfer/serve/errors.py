"""The errors that only a server raises."""

from __future__ import annotations

import os
from pathlib import Path

from headinfer.errors import CapacityError, HeadinferError, SessionError, is_out_of_memory

__all__ = ["NotFoundError", "QueueFullError", "public"]


class QueueFullError(HeadinferError, RuntimeError):
    """Too many requests wait already.

    Args:
        message: one sentence.
        retry_after_s: seconds after which a client may try again.
    """

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NotFoundError(SessionError):
    """There is no document or session of this name. Every other SessionError is a conflict with one that exists."""


def public(error: BaseException, root: Path) -> HeadinferError:
    """Return an error as clients may see it: one sentence without paths of the server.

    Args:
        error: the error. If headinfer has not raised it on purpose, its message is left out.
        root: the folder of all sessions.
    """
    if not isinstance(error, HeadinferError):
        if is_out_of_memory(error):
            return CapacityError("the server has not enough memory for this request: send a shorter one, or try later")
        return HeadinferError("the server failed to do this, and its log says why: try again")
    text = str(error)
    for folder in {str(root), str(root.absolute()), str(root.resolve())}:
        text = text.replace(f"{folder}{os.sep}", "").replace(folder, "the folder of sessions")
    return error if text == str(error) else type(error)(text)
