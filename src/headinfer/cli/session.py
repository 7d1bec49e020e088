"""`headinfer read`, `ask` and `session`: documents that are read once and stay read."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from headinfer.errors import SessionError
from headinfer.sessions.folder import default_root, remove_session, session_folder, session_names
from headinfer.sessions.manifest import Manifest
from headinfer.utils.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from headinfer.jobs.generate import Summary

__all__ = ["app", "ask", "read"]

app = typer.Typer(no_args_is_help=True, help="List, inspect, verify, remove and move sessions.")
_stderr = Console(stderr=True)

Root = Annotated[
    Path | None, typer.Option("--sessions", help="Where sessions lie; else $HEADINFER_SESSIONS, or your data folder.")
]
Session = Annotated[str, typer.Option(help="The session's name.")]
Name = Annotated[str, typer.Argument(help="The session's name.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Budget = Annotated[str | None, typer.Option(help="KV bytes on the device, e.g. 256MiB.")]
HostBudget = Annotated[str | None, typer.Option(help="KV bytes in host RAM, e.g. 32GB; the rest goes to --disk-tier.")]
DiskTier = Annotated[Path | None, typer.Option(help="A folder on a fast disk for KV beyond the budget.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def read(
    model: Annotated[str, typer.Argument(help="As for generate.", show_default=False)],
    file: Annotated[Path, typer.Option(help="A UTF-8 text file.")],
    session: Session,
    sessions: Root = None,
    chunk_tokens: Annotated[
        int | None, typer.Option(help="Tokens of a chunk, after each of which a checkpoint is kept; else planned.")
    ] = None,
    device_kv_budget: Budget = None,
    host_kv_budget: HostBudget = None,
    disk_tier: DiskTier = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="For random weights.")] = 0,
    raw: Annotated[bool, typer.Option("--raw", help="Do not use the model's chat template.")] = False,
    as_json: Json = False,
) -> None:
    """Read a document and keep its KV on disk, to ask it again and again; goes on where it was interrupted."""
    from headinfer.cli import report
    from headinfer.engine.options import Options
    from headinfer.jobs import generate as generation
    from headinfer.jobs import read as reading

    options = Options(**_placed(device_kv_budget, host_kv_budget, disk_tier))
    job = reading.ReadJob(
        model=model,
        document=generation.read_text(file),
        name=session,
        root=sessions or default_root(),
        chunk_tokens=chunk_tokens,
        dtype=dtype,
        device=device,
        seed=seed,
        raw=raw,
        options=options,
    )
    prepared = reading.prepare_read(job)
    tokens = prepared.input_ids.shape[1]
    progress = report.GenerationProgress(
        _stderr, prepared.shape, tokens, 0, show_decode=False, read_before=prepared.done
    )
    with progress:
        result = reading.read(prepared, on_forward=progress.on_forward, on_resumed=_resumed)
    if as_json:
        print(json.dumps(dataclasses.asdict(result)))
    elif not result.interrupted:
        print(
            f"{result.tokens:,} tokens are read and kept in {result.folder} ({format_bytes(result.disk_bytes)}): "
            f'ask with `headinfer ask --session {session} "..."`'
        )
    if result.interrupted:
        _say(f"interrupted: {result.tokens:,} of {tokens:,} tokens are kept; the same command goes on from there")
        raise typer.Exit(130)


def _resumed(tokens: int, origin: str) -> None:
    _say(f"{tokens:,} tokens are there already ({origin}): going on from there")


def ask(
    questions: Annotated[list[str], typer.Argument(help="One question or several.", show_default=False)],
    session: Session,
    sessions: Root = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep questions and answers in the session, each the next one's past.")
    ] = False,
    model: Annotated[str | None, typer.Option(help="Where the model is now, if not where it was.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Write at most this many tokens.")] = 256,
    device_kv_budget: Budget = None,
    host_kv_budget: HostBudget = None,
    disk_tier: DiskTier = None,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="For sampling.")] = 0,
    temperature: Annotated[float, typer.Option(help="0 is greedy; above 0 samples.", min=0.0)] = 0.0,
    as_json: Json = False,
) -> None:
    """Ask a document that was read before. Questions know nothing of each other, and leave no trace without --keep."""
    from headinfer.cli.report import columns_table
    from headinfer.engine.options import Options
    from headinfer.jobs import ask as asking

    placed = _placed(device_kv_budget, host_kv_budget, disk_tier)
    Options(**placed)  # refuses what cannot be, before all else
    changed = {name: value for name, value in placed.items() if value is not None or name != "device_kv_budget_bytes"}
    job = asking.AskJob(
        name=session,
        root=sessions or default_root(),
        questions=questions,
        model=model,
        max_new_tokens=max_new_tokens,
        device=device,
        seed=seed,
        keep=keep,
        sampling={"do_sample": True, "temperature": temperature} if temperature > 0 else {},
        options=changed,
    )
    started = time.perf_counter()
    prepared = asking.prepare_ask(job)
    checked = time.perf_counter()
    _say(f"{prepared.manifest.tokens:,} tokens are read, {format_bytes(prepared.manifest.nbytes)} on disk")
    for line in prepared.slow:
        _say(line)
    loaded_s: list[float] = []
    summaries = asking.ask(
        prepared,
        on_text=(lambda _: None) if as_json else _write,
        on_loaded=lambda _: loaded_s.append(time.perf_counter() - checked),
    )
    if as_json:
        print(
            json.dumps(
                {
                    "slow": prepared.slow,
                    "checks_s": checked - started,
                    "model_load_s": loaded_s[0],
                    "answers": [one.as_dict() for one in summaries],
                }
            )
        )
    else:
        print(flush=True)
        rows = [_row(number, summary) for number, summary in enumerate(summaries, 1)]
        _stderr.print(columns_table("", ("question", "first token", "tokens/s", "KV on the device, peak"), rows))
    if summaries[-1].interrupted:
        raise typer.Exit(130)


def _placed(device_kv_budget: str | None, host_kv_budget: str | None, disk_tier: Path | None) -> dict[str, Any]:
    """Options that say where KV lies."""
    return {
        "device_kv_budget_bytes": parse_bytes(device_kv_budget) if device_kv_budget is not None else None,
        "host_kv_budget_bytes": parse_bytes(host_kv_budget) if host_kv_budget is not None else None,
        "disk_tier": str(disk_tier) if disk_tier is not None else None,
    }


def _row(number: int, summary: Summary) -> tuple[str, str, str, str]:
    first, rate, stats = summary.first_token_s, summary.decode_tokens_per_s, summary.stats
    return (
        str(number),
        "-" if first is None else f"{first:.2f} s",
        "-" if rate is None else f"{rate:.2f}",
        "-" if stats is None else format_bytes(stats.device_kv_peak_bytes),
    )


@app.command(name="list")
def list_sessions(sessions: Root = None, as_json: Json = False) -> None:
    """All sessions: tokens, bytes, model."""
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
        return
    if not found:
        _say(f"there are no sessions in {root}")
        return
    rows = [
        (one["name"], "", "", "damaged")
        if "error" in one
        else (one["name"], f"{one['tokens']:,}", format_bytes(one["disk_bytes"]), one["state"])
        for one in found
    ]
    Console().print(columns_table("", ("session", "tokens", "on disk", ""), rows))


@app.command()
def info(name: Name, sessions: Root = None, as_json: Json = False) -> None:
    """What a session holds, and what made it."""
    from headinfer.cli.report import columns_table

    manifest = Manifest.read(session_folder(sessions or default_root(), name))
    facts = _facts(manifest)
    if as_json:
        print(json.dumps({**facts, "arithmetic": manifest.arithmetic, "model_config": manifest.model["config"]}))
        return
    facts["disk_bytes"] = format_bytes(facts["disk_bytes"])
    rows = [(key.replace("_", " "), value) for key, value in facts.items()]
    Console().print(columns_table(name, ("", ""), rows, "left"))


@app.command()
def verify(name: Name, sessions: Root = None, as_json: Json = False) -> None:
    """Read all files of a session and compare every checksum; exit code 1 where one is wrong."""
    folder = session_folder(sessions or default_root(), name)
    manifest, wrong = _verified(folder)
    if as_json:
        print(json.dumps({"files": len(manifest.files()), "disk_bytes": manifest.nbytes, "wrong": wrong}))
    else:
        for line in wrong:
            print(line)
        print(f"{len(manifest.files())} files, {format_bytes(manifest.nbytes)}: {len(wrong) or 'nothing'} wrong")
    if wrong:
        raise typer.Exit(1)


def _verified(folder: Path) -> tuple[Manifest, list[str]]:
    """What is wrong with a checkpoint; with the next one, where a writer replaced it meanwhile."""
    from headinfer.kv.tensor_file import TensorFile

    while True:
        manifest, wrong = Manifest.read(folder), []
        for entry in manifest.files():
            try:
                file = TensorFile(folder, entry)
            except SessionError as error:
                wrong.append(str(error))
                continue
            for tensor in file.names():
                try:
                    file.verify(tensor)
                except SessionError as error:
                    wrong.append(str(error))
        if not wrong or Manifest.read(folder).generation == manifest.generation:
            return manifest, wrong


@app.command()
def rm(name: Name, sessions: Root = None) -> None:
    """Remove a session from the disk."""
    folder = session_folder(sessions or default_root(), name)
    is_gone = remove_session(folder)
    _say(f"removed {folder}" if is_gone else f"removed the session; {folder} holds other files and stays")


@app.command()
def export(
    name: Name,
    file: Annotated[Path, typer.Argument(help="The archive to write, e.g. mybook.tar; it must not exist yet.")],
    sessions: Root = None,
) -> None:
    """Write a session into one tar file, for another machine: unpack it into the folder for sessions there."""
    from headinfer.sessions.archive import export_session

    folder = session_folder(sessions or default_root(), name)
    export_session(folder, file)
    print(f"written to {file} ({format_bytes(file.stat().st_size)})")


def _facts(manifest: Manifest) -> dict[str, Any]:
    wanted = manifest.about.get("document_tokens", manifest.tokens)
    answers = manifest.about.get("answers", 0)
    state = (
        f"{wanted:,} tokens to read" if manifest.tokens < wanted else f"{answers} answers kept" if answers else "read"
    )
    return {
        "tokens": manifest.tokens,
        "document_tokens": wanted,
        "state": state,
        "model": manifest.about.get("model", manifest.model["config"].get("model_type")),
        "dtype": manifest.model["dtype"],
        "disk_bytes": manifest.nbytes,
        "segments": len(manifest.segment_files),
        "versions": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
    }


def _say(line: str) -> None:
    _stderr.print(line, highlight=False, markup=False, soft_wrap=True)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
