"""The manifest of a session: what the folder holds, who made it, and how the arithmetic was fixed.

docs/session-format.md describes it for other programs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import xxhash

from headinfer.errors import SessionError
from headinfer.utils.files import FileEntry, write_text

__all__ = ["FILE_NAME", "FORMAT", "MANIFEST", "VERSION", "Manifest", "SegmentFile", "first_chain", "versions"]

MANIFEST = "manifest.json"
FORMAT, VERSION = "headinfer session", 1
_NAMES_ON_DISK = {"segment_files": "blocks"}  # as version 1 of the format calls it
FILE_NAME = re.compile(r"(block|end)-\d{6,}\.safetensors")


@dataclass(frozen=True)
class SegmentFile:
    """K and V of consecutive tokens in all offloaded layers, in a file that is never written again.

    chain: SHA-256 of the model and of all token ids to the block's end (see first_chain), empty where they are unknown.
    Blocks with equal chains hold the KV of the same tokens after the same tokens.
    """

    file: FileEntry
    tokens: int
    chain: str = ""


@dataclass
class Manifest:
    """One checkpoint of a session.

    rows: for each row of the batch its spans [block, first token, token after the last]. end: the file of what is newer
    than the blocks: the tails, and the states of the layers that transformers keeps, whose plain values are in layers.
    model: see hf/fingerprint.py. arithmetic: Options and chunk_tokens; the same give the same bits. about: the maker's
    own facts.
    """

    generation: int
    tokens: int
    model: dict[str, Any]
    arithmetic: dict[str, Any]
    segment_files: list[SegmentFile]
    rows: list[list[tuple[int, int, int]]]
    end: FileEntry
    layers: list[Any]
    about: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all data files."""
        return self.end.nbytes + sum(segment_file.file.nbytes for segment_file in self.segment_files)

    def files(self) -> list[FileEntry]:
        """All data files."""
        return [*(segment_file.file for segment_file in self.segment_files), self.end]

    def text(self) -> str:
        """The content of the manifest's file."""
        fields = dataclasses.asdict(self)
        body = {"format": FORMAT, "version": VERSION}
        body |= {_NAMES_ON_DISK.get(name, name): value for name, value in fields.items()}
        return json.dumps({**body, "checksum": _checksum(body)}, indent=1) + "\n"

    def write(self, folder: Path) -> None:
        """Replace the folder's manifest: at any instant the old one or this one is there, whole."""
        write_text(folder / MANIFEST, self.text())

    @staticmethod
    def read(folder: Path) -> Manifest:
        """The folder's manifest. Raises SessionError where there is none, or one that is damaged, foreign or newer."""
        path = folder / MANIFEST
        try:
            if path.exists() and not path.is_file():
                raise SessionError(f"{path} is not a regular file: choose another folder")
            body = json.loads(path.read_bytes())
        except SessionError:
            raise
        except FileNotFoundError:
            raise SessionError(f"{folder} is no session: it has no {MANIFEST}") from None
        except OSError as error:
            raise SessionError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise SessionError(f"{path} is damaged ({error}): read the document again to make it anew") from error
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise SessionError(f"{path} is not a manifest of headinfer: choose another folder")
        if body.get("version") != VERSION:
            raise SessionError(
                f"{path} has version {body.get('version')} of the format, and this headinfer reads version {VERSION}: "
                "use the headinfer that wrote it, or read the document again"
            )
        if body.pop("checksum", None) != _checksum(body):
            raise SessionError(
                f"{path} is damaged (its checksum is not right): read the document again to make it anew"
            )
        del body["format"], body["version"]
        try:
            body["segment_files"] = [
                SegmentFile(FileEntry(**entry.pop("file")), **entry) for entry in body.pop("blocks")
            ]
            body["end"] = FileEntry(**body["end"])
            body["rows"] = [[(index, start, stop) for index, start, stop in row] for row in body["rows"]]
            found = Manifest(**body)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise SessionError(f"{path} has other fields than version {VERSION} of the format: {error}") from error
        if outside := [entry.name for entry in found.files() if not FILE_NAME.fullmatch(entry.name)]:
            raise SessionError(f"{path} names {outside[0]!r}, which is no file of a session: do not use it")
        return found


def first_chain(model: dict[str, Any]) -> hashlib._Hash:
    """A chain before any token: update it with token ids as int64, least byte first."""
    return hashlib.sha256(json.dumps(model, sort_keys=True, separators=(",", ":")).encode("utf-8"))


def versions() -> dict[str, str]:
    """The versions of headinfer, torch and transformers that are installed, for a manifest."""
    found = {}
    for name in ("headinfer", "torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "a checkout"  # on PYTHONPATH, not installed
    return found


def _checksum(body: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True, separators=(",", ":")).encode("utf-8"))
