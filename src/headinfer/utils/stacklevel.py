"""Makes warnings point at the line of the user's code that caused them."""

from __future__ import annotations

import sys

__all__ = ["stacklevel_of_user"]


_LIBRARIES = {"headinfer", "torch", "transformers", "accelerate", "peft"}


def stacklevel_of_user() -> int:
    """Return the stacklevel, for warnings.warn() in the calling function, of the first frame of the user's code."""
    frame = sys._getframe(1)
    level = 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _LIBRARIES:
        frame = frame.f_back
        level += 1
    return level
