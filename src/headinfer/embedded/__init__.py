"""The model and the text that ship with headinfer: see MODEL_CARD.md and TEXT.md in this folder."""

from __future__ import annotations

import hashlib
import json
import lzma
from pathlib import Path

from headinfer.errors import UsageError

__all__ = ["EMBEDDED", "embedded_model", "embedded_text"]

EMBEDDED = "embedded"
_FOLDER = Path(__file__).parent
_TEXT = "text.txt.xz"


def embedded_model() -> Path:
    """The folder of the model, after a check of every file. Raises UsageError where one is missing or changed."""
    _check()
    return _FOLDER


def embedded_text() -> str:
    """The second half of Moby-Dick, which the model was not trained on. Raises UsageError as embedded_model() does."""
    _check()
    return lzma.decompress((_FOLDER / _TEXT).read_bytes()).decode("utf-8")


def _check() -> None:
    advice = "install headinfer again"
    try:
        sums: dict[str, str] = json.loads((_FOLDER / "SHA256.json").read_text(encoding="utf-8"))
        for name, expected in sums.items():
            if hashlib.sha256((_FOLDER / name).read_bytes()).hexdigest() != expected:
                raise UsageError(f"{_FOLDER / name} is not the file that headinfer came with: {advice}")
    except (OSError, ValueError) as error:
        raise UsageError(f"headinfer's own model is not complete ({error}): {advice}") from error
