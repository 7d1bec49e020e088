"""The model and the text that ship with headinfer. MODEL_CARD.md and TEXT.md in this folder describe them."""

from __future__ import annotations

import hashlib
import json
import lzma
from pathlib import Path

from headinfer.errors import UsageError

__all__ = ["EMBEDDED", "embedded_model", "embedded_text"]

EMBEDDED = "embedded"
"""The name of the model on the command line."""

_FOLDER = Path(__file__).parent
_TEXT = "text.txt.xz"


def embedded_model() -> Path:
    """Return the folder of the embedded model, after a check of all files.

    Raises:
        UsageError: a file is missing or was changed.
    """
    _check_files()
    return _FOLDER


def embedded_text() -> str:
    """Return the second half of Moby-Dick, on which the model was not trained.

    Raises:
        UsageError: a file is missing or was changed.
    """
    _check_files()
    return lzma.decompress((_FOLDER / _TEXT).read_bytes()).decode("utf-8")


def _check_files() -> None:
    advice = "install headinfer again"
    try:
        sums: dict[str, str] = json.loads((_FOLDER / "SHA256.json").read_text(encoding="utf-8"))
        for name, expected in sums.items():
            if hashlib.sha256((_FOLDER / name).read_bytes()).hexdigest() != expected:
                raise UsageError(f"{_FOLDER / name} differs from the file that ships with headinfer: {advice}")
    except (OSError, ValueError) as error:
        raise UsageError(f"the embedded model is not complete ({error}): {advice}") from error
