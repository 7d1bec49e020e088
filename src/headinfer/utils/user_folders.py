"""The folders of this user for data and for caches, as the XDG Base Directory Specification names them."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_folder", "data_folder"]

_APPLICATION = "headinfer"


def cache_folder() -> Path:
    """Return the folder for files that can be made again: $XDG_CACHE_HOME/headinfer, or ~/.cache/headinfer."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / _APPLICATION


def data_folder() -> Path:
    """Return the folder for files to keep: $XDG_DATA_HOME/headinfer, or ~/.local/share/headinfer."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / _APPLICATION
