"""The command line: all commands, and how errors end them."""

from __future__ import annotations

import io
import logging
import os
import sys
from contextlib import ExitStack, redirect_stderr, redirect_stdout

import typer

from headinfer.cli import eval as evaluations
from headinfer.cli import session as sessions
from headinfer.cli.ask import ask
from headinfer.cli.bench import bench
from headinfer.cli.console import error, say
from headinfer.cli.demo import demo
from headinfer.cli.generate import generate
from headinfer.cli.info import info
from headinfer.cli.plan import plan
from headinfer.cli.probe import probe
from headinfer.cli.read import read
from headinfer.errors import HeadinferError

__all__ = ["app", "main"]

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

# Libraries whose warnings repeat or contradict headinfer's own.
_QUIET_LIBRARIES = ("transformers", "huggingface_hub", "torchao", "torch.utils._pytree")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Exact LLM inference over very long contexts on one small GPU: the KV cache is kept in host RAM, per "
    "attention head.",
)
app.command()(generate)
app.command()(read)
app.command()(ask)
app.add_typer(sessions.app, name="session")
app.command()(plan)
app.command()(probe)
app.command()(info)
app.command()(demo)
app.add_typer(evaluations.app, name="eval")
app.command()(bench)


def main() -> None:
    """Run the command line: the entry point of `headinfer` and `python -m headinfer`.

    An error of headinfer becomes one sentence on stderr and exit code 2. Ctrl-C ends with exit code 130. If torchrun
    started several ranks, only rank 0 prints; the other ranks print nothing but their errors.
    """
    for library in _QUIET_LIBRARIES:
        logging.getLogger(library).setLevel(logging.ERROR)
    rank = os.environ.get("RANK", "0")
    world = os.environ.get("WORLD_SIZE", "1")
    is_first = world == "1" or rank == "0"
    try:
        with ExitStack() as redirected:
            if not is_first:
                redirected.enter_context(redirect_stdout(io.StringIO()))
                redirected.enter_context(redirect_stderr(io.StringIO()))
            app()
    except HeadinferError as raised:
        error(str(raised), origin="" if is_first else f" on rank {rank} of {world}")
        sys.exit(2)
    except KeyboardInterrupt:
        if is_first:
            say("headinfer: interrupted")
        sys.exit(130)
