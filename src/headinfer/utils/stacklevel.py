"""Makes warnings point at the line of the user's code that caused them."""

from __future__ import annotations

import sys

__all__ = ["stacklevel_of_user"]


def stacklevel_of_user() -> int:
    """Return the stacklevel, for warnings.warn() in the calling function, of the first frame outside of headinfer."""
    frame = sys._getframe(1)
    level = 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "headinfer":
        frame = frame.f_back
        level += 1
    return level
