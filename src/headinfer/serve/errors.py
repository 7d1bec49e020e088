"""The errors that only a server raises."""

from __future__ import annotations

from headinfer.errors import HeadinferError, SessionError

__all__ = ["NotFoundError", "QueueFullError"]


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
