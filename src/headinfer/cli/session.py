"""The commands `headinfer session list`, `info`, `verify`, `undo`, `rm` and `export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from headinfer.cli.console import say, show
from headinfer.cli.options import Json, LightCommand, SessionArgument, SessionsFolder
from headinfer.errors import SessionError
from headinfer.sessions.folder import default_root, read_consistently, remove_session, session_folder, session_names
from headinfer.sessions.manifest import Manifest
from headinfer.utils.approximation import short_form
from headinfer.utils.head_pattern import HeadPattern
from headinfer.utils.units import format_bytes

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="List, inspect, verify, undo, remove and export sessions.")


@app.command(name="list", cls=LightCommand)
def list_sessions(sessions: SessionsFolder = None, as_json: Json = False) -> None:
    """List all sessions, with their tokens, their size on disk and their state."""
    from headinfer.cli.report import columns_table

    root = sessions or default_root()
    found: list[dict[str, Any]] = []
    for name in session_names(root):
        try:
            found.append({"name": name, **_facts(Manifest.read(root / name))})
        except SessionError as error:
            found.append({"name": name, "error": str(error)})
    if as_json:
        print(json.dumps(found))
    elif found:
        show(columns_table("", ("session", "tokens", "on disk", "state"), [_list_row(facts) for facts in found]))
    else:
        say(f"there are no sessions in {root}")


def _list_row(facts: dict[str, Any]) -> tuple[str, str, str, str]:
    if "error" in facts:
        return facts["name"], "", "", "damaged"
    return facts["name"], f"{facts['tokens']:,}", format_bytes(facts["disk_bytes"]), facts["state"]


@app.command(cls=LightCommand)
def info(name: SessionArgument, sessions: SessionsFolder = None, as_json: Json = False) -> None:
    """Show what a session holds, and which model and versions made it."""
    from headinfer.cli.report import columns_table

    manifest = Manifest.read(session_folder(sessions or default_root(), name))
    facts = _facts(manifest)
    files = manifest.about.get("files")  # sessions of earlier versions have none
    if as_json:
        more = {"files": files, "arithmetic": manifest.arithmetic, "model_config": manifest.model["config"]}
        print(json.dumps(facts | more))
        return
    shown = facts | {
        "tokens": f"{facts['tokens']:,}",
        "document_tokens": f"{facts['document_tokens']:,}",
        "disk_bytes": format_bytes(facts["disk_bytes"]),
    }
    if manifest.sparse_heads is not None:
        shown["sparse_heads"] = short_form("auto", manifest.sparse_heads)
    rows = [(key.replace("_", " "), value) for key, value in shown.items()]
    show(columns_table(name, ("", ""), rows, "left"))
    if files:
        cells = [(one["name"], format_bytes(one["bytes"]), one["read_as"], one["sha256"][:16]) for one in files]
        show(columns_table("", ("file", "size", "read as", "SHA-256 begins with"), cells, "left"))


@app.command(cls=LightCommand)
def verify(name: SessionArgument, sessions: SessionsFolder = None, as_json: Json = False) -> None:
    """Read all files of a session and compare every checksum. The exit code is 1 if one is wrong."""
    folder = session_folder(sessions or default_root(), name)
    manifest, faults = _verify(folder)
    if as_json:
        print(json.dumps({"files": len(manifest.files()), "disk_bytes": manifest.disk_bytes, "wrong": faults}))
    else:
        for fault in faults:
            print(fault)
        print(f"{len(manifest.files())} files, {format_bytes(manifest.disk_bytes)}: {len(faults) or 'nothing'} wrong")
    if faults:
        raise typer.Exit(1)


class _FaultsError(SessionError):
    """The files of a checkpoint have faults."""

    def __init__(self, manifest: Manifest, faults: list[str]) -> None:
        super().__init__(faults[0])
        self.manifest = manifest
        self.faults = faults


def _verify(folder: Path) -> tuple[Manifest, list[str]]:
    """Verify the current checkpoint of a session.

    Returns:
        The manifest of the checkpoint, and its faults, a sentence each.
    """
    from headinfer.kv.tensor_file import faults

    def verify_files(manifest: Manifest) -> Manifest:
        found = faults(folder, manifest.files())
        if found:
            raise _FaultsError(manifest, found)
        return manifest

    try:
        return read_consistently(folder, verify_files), []
    except _FaultsError as found:
        return found.manifest, found.faults


@app.command(cls=LightCommand)
def undo(name: SessionArgument, sessions: SessionsFolder = None, as_json: Json = False) -> None:
    """Remove the last question and answer that `ask --keep` added. Run it again to remove the one before."""
    from headinfer.sessions.writer import undo as undo_answer

    manifest = undo_answer(session_folder(sessions or default_root(), name))
    if as_json:
        print(json.dumps(_facts(manifest)))
    else:
        say(f"removed the last question and answer: {manifest.tokens:,} tokens, {_state(manifest)}")


@app.command(cls=LightCommand)
def rm(name: SessionArgument, sessions: SessionsFolder = None) -> None:
    """Remove a session from the disk."""
    folder = session_folder(sessions or default_root(), name)
    is_gone = remove_session(folder)
    say(f"removed {folder}" if is_gone else f"removed the session; {folder} holds other files and stays")


@app.command(cls=LightCommand)
def export(
    name: SessionArgument,
    file: Annotated[Path, typer.Argument(help="Archive to write, e.g. mybook.tar. It must not exist yet.")],
    sessions: SessionsFolder = None,
) -> None:
    """Write a session to a tar file. On another machine, unpack it in the folder of all sessions."""
    from headinfer.sessions.archive import export_session

    folder = session_folder(sessions or default_root(), name)
    export_session(folder, file)
    print(f"written to {file} ({format_bytes(file.stat().st_size)})")


def _facts(manifest: Manifest) -> dict[str, Any]:
    """Return the facts about a session that `session list` and `session info` show."""
    pattern = manifest.sparse_heads
    return {
        "tokens": manifest.tokens,
        "document_tokens": _document_tokens(manifest),
        "state": _state(manifest),
        "model": manifest.about.get("model", manifest.model["config"].get("model_type")),
        "dtype": manifest.model["dtype"],
        **({"kv_dtype": manifest.kv_dtype} if manifest.kv_dtype != "auto" else {}),
        **({"sparse_heads": _sparse_facts(pattern)} if pattern is not None else {}),
        **({"approximate": True} if manifest.is_approximate else {}),
        "disk_bytes": manifest.disk_bytes,
        "segments": len(manifest.segment_files),
        "versions": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
    }


def _document_tokens(manifest: Manifest) -> int:
    tokens: int = manifest.about.get("document_tokens", manifest.tokens)
    return tokens


def _state(manifest: Manifest) -> str:
    document_tokens = _document_tokens(manifest)
    answers = manifest.about.get("answers", 0)
    state = f"{answers} answer{'s' if answers > 1 else ''} kept" if answers else "read"
    if manifest.tokens < document_tokens:
        state = f"{document_tokens:,} tokens to read"
    form = short_form(manifest.kv_dtype, manifest.sparse_heads)
    return f"{state}, approximate ({form})" if form else state


def _sparse_facts(pattern: HeadPattern) -> dict[str, Any]:
    """Return what people and programs need to know of a head pattern."""
    return {
        "streaming_share": round(pattern.share, 4),
        "sink_tokens": pattern.sink_tokens,
        "recent_tokens": pattern.recent_tokens,
        "digest": pattern.digest,
    }
