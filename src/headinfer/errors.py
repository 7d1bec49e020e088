"""The exception tree.

HeadinferError
├── UsageError        an argument or input that cannot be right
├── UnsupportedError  a model, cache or mask that this version does not serve exactly
├── CapacityError     the job does not fit the memory that there is
├── SessionError      a session on disk that is damaged, in use, or made by another model
└── StateError        the cache was used out of order

Each message is one sentence that says what, why and what would work; the command line prints it and exits
with 2. Catch HeadinferError to catch them all.
"""

__all__ = ["CapacityError", "HeadinferError", "SessionError", "StateError", "UnsupportedError", "UsageError"]


class HeadinferError(Exception):
    """Base of all errors that headinfer raises on purpose."""


class UsageError(HeadinferError, ValueError):
    """An argument or input that cannot be right."""


class UnsupportedError(HeadinferError, TypeError):
    """A model, cache or mask that this version does not serve exactly."""


class CapacityError(HeadinferError, MemoryError):
    """The job does not fit the memory that there is."""


class StateError(HeadinferError, RuntimeError):
    """The cache was used out of order."""


class SessionError(HeadinferError, OSError):
    """A session on disk that is damaged, in use, or made by another model."""
