"""The command `headinfer chat`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from headinfer.cli.console import error, say, stderr, warning, write
from headinfer.cli.documents import Files, Globs, given_document
from headinfer.cli.options import (
    ChunkTokens,
    CpuShare,
    Device,
    DeviceKVBudget,
    DiskTier,
    Dtype,
    HostKVBudget,
    KVDtypeOption,
    MaxNewTokens,
    Raw,
    SessionsFolder,
    SparseHeads,
    SparseShare,
    kv_options,
    session_options,
)
from headinfer.cli.sampling import System, takes_sampling
from headinfer.errors import UsageError
from headinfer.jobs.sampling import Sampling
from headinfer.sessions.folder import default_root
from headinfer.utils.units import format_bytes
from headinfer.utils.values import check_text

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession

    from headinfer.hf.cache import HeadCache

__all__ = ["chat"]

_PROMPT = "> "


@takes_sampling
def chat(
    model: Annotated[
        str | None,
        typer.Argument(
            help="The model, as for `headinfer generate`. With --session: where its model is stored, if it was moved.",
            show_default=False,
        ),
    ] = None,
    file: Files = None,
    glob: Globs = None,
    session: Annotated[str | None, typer.Option(help="Name of the session to talk about.", show_default=False)] = None,
    sessions: SessionsFolder = None,
    keep: Annotated[bool, typer.Option("--keep", help="Add each question and answer to the session.")] = False,
    max_new_tokens: MaxNewTokens = 1024,
    chunk_tokens: ChunkTokens = None,
    device_kv_budget: DeviceKVBudget = None,
    host_kv_budget: HostKVBudget = None,
    disk_tier: DiskTier = None,
    cpu_share: CpuShare = None,
    kv_dtype: KVDtypeOption = None,
    sparse_heads: SparseHeads = None,
    sparse_share: SparseShare = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    system: System = "",
    raw: Raw = False,
    *,
    sampling: Sampling,
) -> None:
    """Talk with a model about a document: one that `headinfer read` has read, or a file.

    Ctrl-C stops an answer. /help lists what can be typed besides questions. If standard input is no terminal, each of
    its lines is a question.
    """
    from headinfer.cli.report import GenerationProgress
    from headinfer.engine.options import Options
    from headinfer.jobs.ask import OpenedSession
    from headinfer.jobs.chat import ChatJob
    from headinfer.jobs.open_chat import open_chat, prepare_chat
    from headinfer.jobs.talk import talk

    options = kv_options(device_kv_budget, host_kv_budget, disk_tier, cpu_share, kv_dtype, sparse_heads, sparse_share)
    Options(**options)  # raises UsageError before anything is loaded
    if session is not None and (file or glob):
        raise UsageError("--file and --session exclude each other: a session has its document from `headinfer read`")
    if Path("-") in (file or []):
        raise UsageError("standard input has the questions, so --file - cannot read it: name a file")
    job = ChatJob(
        root=sessions or default_root(),
        session=session,
        model=model,
        document=given_document(file or [], glob) if file or glob else None,
        keep=keep,
        max_new_tokens=max_new_tokens,
        chunk_tokens=chunk_tokens,
        dtype=dtype,
        device=device,
        raw=raw,
        system=system,
        sampling=sampling,
        options=options if session is None else session_options(options),
    )
    prepared = prepare_chat(job)
    if isinstance(prepared.origin, OpenedSession):
        manifest = prepared.origin.manifest
        say(f"{manifest.tokens:,} tokens are read, {format_bytes(manifest.nbytes)} on disk")
    for message in prepared.warnings:
        warning(message)
    for message in prepared.slow:
        say(message)
    with ExitStack() as reading:
        progress = None
        if prepared.document_ids:
            shown = GenerationProgress(prepared.shape, len(prepared.document_ids), 0, show_decode=False)
            progress = reading.enter_context(shown)

        def on_forward(cache: HeadCache) -> None:
            if progress is not None:
                progress.on_forward(cache)

        with open_chat(prepared, say=say, on_forward=on_forward) as opened:
            progress = None
            reading.close()
            turns = opened.conversation.turns
            if turns:
                which = f"the last of {len(turns)} questions" if len(turns) > 1 else "its only question so far"
                say(f"the conversation goes on; {which}: {turns[-1].question}")
            terminal = _Terminal([turn.question for turn in turns])
            was_interrupted = talk(opened, terminal)
    if was_interrupted:
        raise typer.Exit(130)


class _Terminal:
    """Reads lines from a terminal, with editing and history, or from a pipe. Answers go to standard output.

    Args:
        questions: the questions so far, for the history.
    """

    def __init__(self, questions: Sequence[str]) -> None:
        self.is_interactive = sys.stdin.isatty()
        self._session: PromptSession[str] | None = None
        screen = next(
            (stream for stream in (sys.stderr, sys.__stdout__) if stream is not None and stream.isatty()), None
        )
        if self.is_interactive and screen is not None:
            self._session = _line_editor(questions, screen)
            say("Ask a question. /help lists what else can be typed.")

    def read(self) -> str:
        """Return the next line, or several that were pasted or typed with Alt-Enter between them."""
        if self._session is not None:
            return self._session.prompt(_PROMPT)
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError as failure:
            raise UsageError("standard input is not UTF-8 text: convert it, for example with iconv") from failure
        if not line:
            raise EOFError
        return check_text(line.rstrip("\n"), "a line of standard input")

    def write(self, text: str) -> None:
        """Write a part of an answer at once."""
        write(text)

    def say(self, line: str) -> None:
        """Show a line that is no answer."""
        say(line)

    def fail(self, line: str) -> None:
        """Show an error."""
        error(line)

    def show(self, rows: Sequence[tuple[str, str]]) -> None:
        """Show a table of names and values."""
        from headinfer.cli.report import columns_table

        stderr.print(columns_table("", ("", ""), rows, "left"), markup=False)


def _line_editor(questions: Sequence[str], screen: TextIO | None) -> PromptSession[str]:
    """Return an editor of lines. Enter ends a question, and Alt-Enter begins a new line of it.

    Args:
        questions: earlier questions, which the arrow keys bring back.
        screen: the terminal to write to; None is the one of the application.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output import create_output

    keys = KeyBindings()

    @keys.add("enter")
    def _end(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return PromptSession(
        history=InMemoryHistory(list(questions)),
        key_bindings=keys,
        multiline=True,
        reserve_space_for_menu=0,
        output=create_output(stdout=screen) if screen is not None else None,
    )
