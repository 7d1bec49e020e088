"""The command line: all commands, and how errors end them."""

from __future__ import annotations

import io
import logging
import os
import sys
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from typing import Annotated

import typer

import headinfer
from headinfer.cli import eval as evaluations
from headinfer.cli import session as sessions
from headinfer.cli.ask import ask
from headinfer.cli.bench import bench
from headinfer.cli.chat import chat
from headinfer.cli.console import error, say, show_log
from headinfer.cli.demo import demo
from headinfer.cli.generate import generate
from headinfer.cli.heads import heads
from headinfer.cli.info import info
from headinfer.cli.options import Command, LightCommand
from headinfer.cli.plan import plan
from headinfer.cli.probe import probe
from headinfer.cli.read import read
from headinfer.cli.serve import serve
from headinfer.cli.streams import BROKEN_PIPE, KeptOutput, open_missing_streams
from headinfer.errors import HeadinferError, UsageError, is_out_of_memory

__all__ = ["app", "main"]

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# Libraries whose warnings repeat or contradict headinfer's own. The first two set their levels when they are imported.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_VERBOSITY", "error")
_QUIET_LIBRARIES = ("torchao", "torch.utils._pytree")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Exact LLM inference over very long contexts on one small GPU: the KV cache is kept in host RAM, per "
    "attention head.",
    epilog="Exit codes: 0 success; 1 a check of the command failed (demo, eval --compare, session verify, bench "
    "--check-plan); 2 a mistake or a missing resource, with one sentence on stderr; 130 Ctrl-C; 141 the reader of the "
    "output has ended.",
)
for command in (generate, read, ask, chat, serve, plan, heads, probe, info, demo, bench):
    app.command(cls=LightCommand if command is plan else Command)(command)
app.add_typer(sessions.app, name="session")
app.add_typer(evaluations.app, name="eval")


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        print(f"headinfer {headinfer.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line: the entry point of `headinfer` and `python -m headinfer`.

    An error of headinfer becomes one sentence on stderr and exit code 2. Ctrl-C ends with exit code 130. If standard
    output fails, the output is kept in a file, and the exit code is 2. If torchrun started several ranks, only rank 0
    prints; the other ranks print nothing but their errors.
    """
    for library in _QUIET_LIBRARIES:
        logging.getLogger(library).setLevel(logging.ERROR)
    show_log()
    try:
        open_missing_streams()
    except UsageError as raised:
        error(str(raised))
        sys.exit(2)
    stdout = sys.stdout
    if isinstance(stdout, io.TextIOWrapper):
        stdout.reconfigure(errors="backslashreplace")  # a terminal may not have all characters of a text
    output = KeptOutput(stdout)
    try:
        with redirect_stdout(output):
            code = _run()
    finally:
        output.close()
    if output.failure is not None:
        error(output.failure)
        code = 2
    sys.exit(BROKEN_PIPE if output.is_broken_pipe else code)


def _run() -> int | str | None:
    """Run the command that the command line names.

    Returns:
        The exit code.
    """
    rank = os.environ.get("RANK", "0")
    world = os.environ.get("WORLD_SIZE", "1")
    is_first = world == "1" or rank == "0"
    origin = "" if is_first else f" on rank {rank} of {world}"
    try:
        with ExitStack() as redirected:
            if not is_first:
                redirected.enter_context(redirect_stdout(io.StringIO()))
                redirected.enter_context(redirect_stderr(io.StringIO()))
            app()
    except SystemExit as ended:
        stopped = ended.__context__  # typer turns Ctrl-C into an Exit, and that into SystemExit
        if is_first and stopped is not None and isinstance(stopped.__cause__, KeyboardInterrupt):
            say("headinfer: interrupted")
        return ended.code
    except HeadinferError as raised:
        error(str(raised), origin)
    except (MemoryError, ImportError, OSError, RuntimeError) as raised:
        if not is_out_of_memory(raised):
            raise
        reason = (str(raised).strip() or type(raised).__name__).splitlines()[0]
        error(f"the system refuses memory ({reason}): free some memory, or raise the limit (ulimit -v)", origin)
    return 2
