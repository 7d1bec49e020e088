"""Output of the commands: results go to stdout, everything else to stderr."""

from __future__ import annotations

import logging
import sys

from rich.console import Console, RenderableType

__all__ = ["discard", "error", "say", "show", "show_log", "stderr", "warning", "write"]

stderr = Console(stderr=True)
"""The console of messages and progress bars. A message that is printed while a bar is shown appears above the bar."""


def say(message: str) -> None:
    """Print a message to stderr."""
    _print_to_stderr(message)


def warning(message: str) -> None:
    """Print a warning to stderr."""
    _print_to_stderr(f"headinfer: warning: {message}", style="yellow")


def error(message: str, origin: str = "") -> None:
    """Print an error to stderr.

    Args:
        message: the error, one sentence.
        origin: the process that raised it, such as " on rank 1 of 2"; empty if there is only one.
    """
    _print_to_stderr(f"headinfer: error{origin}: {message}", style="red")


class _LogLines(logging.Handler):
    """Prints what the library logs to stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


def show_log() -> None:
    """Print what the library logs to stderr, from now on: that a kernel is being built."""
    logger = logging.getLogger("headinfer")
    logger.setLevel(logging.INFO)
    if not logger.handlers:
        logger.addHandler(_LogLines())


def show(renderable: RenderableType) -> None:
    """Print a table or a line of a result to stdout. Square brackets in it are printed as they are."""
    Console().print(renderable, highlight=False, markup=False)


def write(text: str) -> None:
    """Write generated text to stdout at once, without a newline."""
    sys.stdout.write(text)
    sys.stdout.flush()


def discard(text: str) -> None:
    """Drop generated text: in place of write() if the text is part of a JSON object, or if another rank writes it."""


def _print_to_stderr(line: str, style: str | None = None) -> None:
    """Print a line. A terminal gets it wrapped at words; a file or a pipe gets it whole, so that it can be searched."""
    stderr.print(line, style=style, highlight=False, markup=False, soft_wrap=not stderr.is_terminal)
