"""Where headinfer keeps its files if the user names no folder: the same paths as in earlier versions."""

from pathlib import Path

import pytest

from headinfer.plan.hardware import probe_path
from headinfer.sessions.folder import default_root
from headinfer.utils.user_folders import cache_folder


@pytest.mark.parametrize("value", [None, ""])
def test_the_folders_of_a_user_who_names_none(monkeypatch, tmp_path, value):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("HEADINFER_SESSIONS", "XDG_DATA_HOME", "XDG_CACHE_HOME"):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert default_root() == tmp_path / ".local" / "share" / "headinfer" / "sessions"
    assert cache_folder() == tmp_path / ".cache" / "headinfer"
    assert probe_path() == tmp_path / ".cache" / "headinfer" / "hardware.json"
    assert not list(tmp_path.iterdir()), "no folder is created before something is written"


def test_the_folders_that_a_user_names(monkeypatch):
    monkeypatch.delenv("HEADINFER_SESSIONS", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert default_root() == Path("/data/headinfer/sessions")
    assert probe_path() == Path("/cache/headinfer/hardware.json")
    monkeypatch.setenv("HEADINFER_SESSIONS", "/sessions")
    assert default_root() == Path("/sessions")
