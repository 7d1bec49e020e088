"""The exceptions of headinfer.

HeadinferError
├── UsageError        an argument or an input is invalid
├── UnsupportedError  a model, cache or mask is not supported exactly
├── CapacityError     memory or disk space does not suffice
├── SessionError      a session on disk is damaged, in use, or of another model
└── StateError        methods were called in the wrong order

Each message is one sentence that says what failed, why, and what would work. The command line prints it and exits with
status 2. Each class also derives from a built-in exception.
"""

import errno
import re

__all__ = [
    "ApproximationWarning",
    "CapacityError",
    "ContextLengthWarning",
    "HeadinferError",
    "RereadWarning",
    "SessionError",
    "StateError",
    "UnsupportedError",
    "UsageError",
    "is_out_of_memory",
]

# What torch, the dynamic linker and Python say if the system or a device refuses memory.
_NO_MEMORY = re.compile(
    r"can't allocate memory|cannot allocate memory|not enough memory|out of memory|failed to map segment"
    r"|can't start new thread|std::bad_alloc|_STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)


class HeadinferError(Exception):
    """Base class of all exceptions that headinfer raises on purpose."""


class UsageError(HeadinferError, ValueError):
    """An argument or an input is invalid."""


class UnsupportedError(HeadinferError, TypeError):
    """This version does not support a model, cache or mask with exact results."""


class CapacityError(HeadinferError, MemoryError):
    """The job needs more memory or disk space than there is, or the system refuses to allocate or write it."""


class StateError(HeadinferError, RuntimeError):
    """Methods of a cache or of one of its parts were called in the wrong order."""


class SessionError(HeadinferError, OSError):
    """A session on disk is damaged, in use by another process, or was written with another model."""


class ContextLengthWarning(UserWarning):
    """A context is longer than what the model was made for."""


class ApproximationWarning(UserWarning):
    """A session holds KV that is approximate, so that what goes on from it is too."""


class RereadWarning(UserWarning):
    """A cache is filled anew, since the model's rotary frequencies depend on the length of the context."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that the system or a device has no memory left."""
    is_refused = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
    return is_refused or _NO_MEMORY.search(str(error)) is not None
