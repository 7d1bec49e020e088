"""The options --file and --glob, and the document that they name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headinfer.cli.console import say

if TYPE_CHECKING:
    from headinfer.jobs.documents import Document

__all__ = ["AGAIN_HELP", "DOCUMENT_HELP", "Files", "Globs", "given_document"]

DOCUMENT_HELP = "A text in any encoding, PDF, HTML, EPUB or DOCX; a folder of them; or - for standard input."
AGAIN_HELP = "Give the option again for more."

Files = Annotated[
    list[Path] | None,
    typer.Option("--file", help=f"{DOCUMENT_HELP} {AGAIN_HELP}", metavar="PATH", show_default=False),
]
Globs = Annotated[
    list[str] | None,
    typer.Option(
        "--glob",
        help="Of folders, read only the files that match this pattern, e.g. '*.py'. Give the option again for more.",
        metavar="PATTERN",
        show_default="all that have text",
    ),
]


def given_document(files: Sequence[Path], globs: Sequence[str] | None) -> Document:
    """Read the files of a command line, and print what the user should know about them.

    Raises:
        UsageError: a file cannot be read, or holds no text.
    """
    from headinfer.jobs.documents import read_documents

    document = read_documents(files, globs or [])
    for note in document.notes:
        say(note)
    return document
