"""The command `headinfer read`."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from headinfer.cli.console import say, warning
from headinfer.cli.documents import AGAIN_HELP, DOCUMENT_HELP, Globs, given_document
from headinfer.cli.options import (
    ChunkTokens,
    Device,
    DeviceKVBudget,
    DiskTier,
    Dtype,
    HostKVBudget,
    Json,
    KVDtypeOption,
    Model,
    Raw,
    SessionOption,
    SessionsFolder,
    SparseHeads,
    SparseShare,
    kv_options,
    seed,
)
from headinfer.cli.sampling import System
from headinfer.sessions.folder import default_root
from headinfer.utils.units import format_bytes

__all__ = ["read"]

NOTHING_NEW = "nothing is new"


def read(
    model: Model,
    file: Annotated[list[Path], typer.Option(help=f"{DOCUMENT_HELP} {AGAIN_HELP}", metavar="PATH")],
    session: SessionOption,
    glob: Globs = None,
    sessions: SessionsFolder = None,
    chunk_tokens: ChunkTokens = None,
    device_kv_budget: DeviceKVBudget = None,
    host_kv_budget: HostKVBudget = None,
    disk_tier: DiskTier = None,
    kv_dtype: KVDtypeOption = None,
    sparse_heads: SparseHeads = None,
    sparse_share: SparseShare = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    seed: Annotated[int, seed("Seed of random weights.")] = 0,
    system: System = "",
    raw: Raw = False,
    as_json: Json = False,
) -> None:
    """Read a document once and keep its KV on disk, in a session. An interrupted reading resumes.

    A checkpoint is saved after each chunk. If files have grown or were added since, the same command reads what is new.
    """
    from headinfer.cli import report
    from headinfer.engine.options import Options
    from headinfer.jobs import read as reading

    given = kv_options(
        device_kv_budget,
        host_kv_budget,
        disk_tier,
        kv_dtype=kv_dtype,
        sparse_heads=sparse_heads,
        sparse_share=sparse_share,
    )
    job = reading.ReadJob(
        model=model,
        document=given_document(file, glob),
        name=session,
        root=sessions or default_root(),
        chunk_tokens=chunk_tokens,
        dtype=dtype,
        device=device,
        seed=seed,
        raw=raw,
        system=system,
        options=Options(**given),
        is_exact=kv_dtype == "auto",
    )
    prepared = reading.prepare_read(job)
    for line in prepared.warnings:
        warning(line)
    tokens = prepared.input_ids.shape[1]
    progress = report.GenerationProgress(prepared.shape, tokens, 0, show_decode=False, read_before=prepared.done)

    def on_resumed(tokens_held: int, origin: str) -> None:
        progress.on_resumed(tokens_held)
        new = tokens - tokens_held
        rest = f"resuming after them, {new:,} are new, from {prepared.names_after(tokens_held)}" if new else NOTHING_NEW
        say(f"{tokens_held:,} tokens are stored already ({origin}): {rest}")

    if prepared.done == tokens:
        say(f"{tokens:,} tokens are stored already (of this session): {NOTHING_NEW}")

    with progress:
        result = reading.read(prepared, on_forward=progress.on_forward, on_resumed=on_resumed)
    if as_json:
        print(json.dumps(dataclasses.asdict(result) | ({"approximate": True} if result.approximate else {})))
    elif not result.interrupted:
        folder = "" if sessions is None else f" --sessions {shlex.quote(str(sessions))}"
        print(
            f"{result.tokens:,} tokens are read and kept in {result.folder} ({format_bytes(result.disk_bytes)}). "
            f'Ask with `headinfer ask --session {session}{folder} "..."`'
        )
    if result.interrupted:
        say(f"interrupted: {result.tokens:,} of {tokens:,} tokens are kept; run the same command again to resume")
        raise typer.Exit(130)
