"""Standard output that loses nothing: what cannot be written to it is written to a temporary file."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from headinfer.errors import UsageError

__all__ = ["BROKEN_PIPE", "KeptOutput", "open_missing_streams"]

BROKEN_PIPE = 141
"""The exit code if the reader of standard output has ended, as with `| head`: 128 and the number of SIGPIPE."""


def open_missing_streams() -> None:
    """Open /dev/null for standard input and standard error if the parent process has closed them.

    Otherwise the next file that is opened would get their descriptors, and messages would be written into it.

    Raises:
        UsageError: standard output is closed.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor, which is this one
    if sys.stdout is None:
        raise UsageError("standard output is closed: redirect it to a file, or to /dev/null")


class KeptOutput:
    """A text stream in place of sys.stdout. If writing fails, the work goes on and the text is kept in a file.

    Args:
        stream: standard output.

    Attributes:
        failure: what is wrong and where the text is, one sentence; None while all text was written.
        is_broken_pipe: whether the reader of the stream has ended.
    """

    def __init__(self, stream: TextIO) -> None:
        self.failure: str | None = None
        self.is_broken_pipe = False
        self._stream = stream
        self._kept: TextIO | None = None
        self._text: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text. If the reader of the stream has ended, the command ends."""
        self._text.append(text)
        if self.failure is None:
            self._try(lambda: self._stream.write(text))
        elif self._kept is not None:
            self._kept.write(text)
        return len(text)

    def flush(self) -> None:
        """Write what is buffered."""
        if self.failure is None:
            self._try(self._stream.flush)
        elif self._kept is not None:
            self._kept.flush()

    def close(self) -> None:
        """Write what is buffered, and close the file that keeps the text. The stream itself stays open."""
        with contextlib.suppress(SystemExit):
            self.flush()
        if self._kept is not None:
            self._kept.close()

    def _try(self, write: Callable[[], object]) -> None:
        try:
            write()
        except BrokenPipeError:
            self.is_broken_pipe = True
            self._discard()
            raise SystemExit(BROKEN_PIPE) from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            self._discard()
            self._keep(str(reason))

    def _keep(self, reason: str) -> None:
        """Write all text so far to a temporary file."""
        problem = f"cannot write to standard output ({reason})"
        try:
            descriptor, name = tempfile.mkstemp(prefix="headinfer-output-", suffix=".txt")
            self._kept = open(descriptor, "w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115  in close()
            self._kept.write("".join(self._text))
            self._kept.flush()
        except OSError as error:
            self._kept = None
            self.failure = f"{problem} nor to a temporary file ({error.strerror}): the output is lost"
        else:
            self.failure = f"{problem}: the output was written to {Path(name)} instead"

    def _discard(self) -> None:
        """Let the buffered text go to /dev/null, so that Python does not fail at the end of the process."""
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
