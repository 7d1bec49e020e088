"""Checks sessions of models whose rotary frequencies depend on the length of the context (hf/rotary.py)."""

from __future__ import annotations

from pathlib import Path

from headinfer.errors import SessionError, UnsupportedError
from headinfer.hf.rotary import MIXED, RotaryLengths
from headinfer.sessions.manifest import Manifest

__all__ = ["check_document", "check_resumed", "held_rotary_tokens"]


def held_rotary_tokens(lengths: RotaryLengths, manifest: Manifest, folder: Path) -> int:
    """Return the normalized context length whose rotary frequencies the keys of a session have, or MIXED.

    Args:
        lengths: the lengths at which the model's frequencies change.
        manifest: the session's checkpoint.
        folder: its folder, for the message.

    Raises:
        SessionError: an earlier version read the session in chunks, each with the frequencies of its own length.
    """
    noted = next((fields["rotary_tokens"] for fields in manifest.layers if "rotary_tokens" in fields), 0)
    held = lengths.held(noted, manifest.tokens)
    if held == MIXED and not noted:
        raise SessionError(
            f"the session {folder} was read by an earlier version of headinfer, with the rotary frequencies of "
            f"different context lengths: remove it with `headinfer session rm {folder.name}`, and read the document "
            "again"
        )
    return held


def check_document(lengths: RotaryLengths, tokens: int) -> None:
    """Check that a document can be read into a session.

    Raises:
        UnsupportedError: a question would change the frequencies of the whole document.
    """
    if lengths.grows_beyond is not None and tokens > lengths.grows_beyond:
        raise UnsupportedError(
            f"the model's rotary frequencies (dynamic NTK) change with each token beyond {lengths.grows_beyond:,}, so "
            f"each question would read the document's {tokens:,} tokens again: use `headinfer generate` with --file"
        )


def check_resumed(lengths: RotaryLengths, manifest: Manifest, tokens: int, folder: Path) -> None:
    """Check that a session can go on with a document of `tokens` tokens.

    Raises:
        SessionError: the session was read with the frequencies of another length.
    """
    if held_rotary_tokens(lengths, manifest, folder) != lengths.normalized(tokens):
        raise SessionError(
            f"the session {folder} was read with the rotary frequencies of a shorter context than the document's "
            f"{tokens:,} tokens: choose another name, or remove it with `headinfer session rm {folder.name}`"
        )
