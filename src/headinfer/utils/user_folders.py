"""The folders of this user that the operating system intends for data and for caches."""

from __future__ import annotations

from pathlib import Path

from platformdirs import user_cache_path, user_data_path

__all__ = ["cache_folder", "data_folder"]

_APPLICATION = "headinfer"


def cache_folder() -> Path:
    """The folder for files that can be made again: $XDG_CACHE_HOME/headinfer, or ~/.cache/headinfer, on Linux."""
    return user_cache_path(_APPLICATION, appauthor=False)


def data_folder() -> Path:
    """The folder for files to keep: $XDG_DATA_HOME/headinfer, or ~/.local/share/headinfer, on Linux."""
    return user_data_path(_APPLICATION, appauthor=False)
