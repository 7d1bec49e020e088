"""The manifest of a session: its data files, the model that made it, and the options that fix its results.

docs/session-format.md describes the manifest for other programs.
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
from headinfer.utils.approximation import approximation
from headinfer.utils.files import REMEDY, SESSION_FORMAT, SESSION_MANIFEST, FileEntry, write_text
from headinfer.utils.head_pattern import HeadPattern
from headinfer.utils.kv_format import KVDtype

__all__ = [
    "APPROXIMATE_VERSION",
    "DATA_FILE_NAME",
    "FORMAT",
    "MANIFEST",
    "VERSION",
    "EarlierCheckpoint",
    "Manifest",
    "SegmentFile",
    "first_chain",
    "versions",
]

MANIFEST = SESSION_MANIFEST
FORMAT = SESSION_FORMAT
VERSION = 1
APPROXIMATE_VERSION = 2
"""The version of sessions whose KV is approximate. Earlier versions of headinfer refuse it."""

# Version 1 of the format fixes two names that contain "block": the field `blocks` and the file names `block-NNNNNN`.
# The code calls the same things segment files.
_NAMES_ON_DISK = {"segment_files": "blocks"}
_ONLY_IF_FILLED = "earlier"  # headinfer 0.1.0 reads manifests without it
DATA_FILE_NAME = re.compile(r"(block|end)-\d{6,}\.safetensors")


@dataclass(frozen=True)
class SegmentFile:
    """A file with K and V of consecutive tokens in all offloaded layers. It is written once.

    Attributes:
        file: name, size and header checksum of the file.
        tokens: the number of tokens.
        chain: the SHA-256 of the model and of all token ids up to the end of the file (see first_chain()); empty if
            they are unknown. Files with equal chains hold the KV of the same tokens after the same tokens.
    """

    file: FileEntry
    tokens: int
    chain: str = ""


@dataclass(frozen=True)
class EarlierCheckpoint:
    """A checkpoint before the current one, to which the session can return.

    It has the model and the arithmetic of the current one.

    Attributes:
        tokens: the tokens of each row.
        segments: how many of the current segment files it has, from the first one.
        rows: as in Manifest.
        end: as in Manifest. The file is kept for this checkpoint alone.
        layers: as in Manifest.
        about: as in Manifest.
        versions: as in Manifest.
    """

    tokens: int
    segments: int
    rows: list[list[tuple[int, int, int]]]
    end: FileEntry
    layers: list[Any]
    about: dict[str, Any]
    versions: dict[str, str]


@dataclass
class Manifest:
    """One checkpoint of a session.

    Attributes:
        generation: the number of the checkpoint, from 1.
        tokens: the tokens of each row, those of its tail included.
        model: the fingerprint of the model (fingerprint.py).
        arithmetic: the fields of Options that fix the results, and chunk_tokens. Equal ones give the same bits.
        segment_files: the segment files. The JSON calls this field `blocks`.
        rows: for each row of the batch, its slices (index in segment_files, first token, token after the last one), in
            the order of the text.
        end: the file with what is newer than the segments: the tails, and the states of the layers that transformers
            keeps.
        layers: for each layer, the plain values of its state (layer_state.py). They refer to tensors in `end`.
        about: facts of the caller.
        versions: the versions of headinfer, torch and transformers that wrote the checkpoint.
        earlier: the checkpoints to which the session can return, the oldest first.
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
    earlier: list[EarlierCheckpoint] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """The size of the data files of the checkpoint, in bytes."""
        return self.end.nbytes + sum(segment_file.file.nbytes for segment_file in self.segment_files)

    @property
    def kv_dtype(self) -> KVDtype:
        """How K and V are stored: auto, in the model's dtype; or int8 or int4, approximately."""
        found: KVDtype = self.arithmetic.get("kv_dtype", "auto")
        return found

    @property
    def sparse_heads(self) -> HeadPattern | None:
        """The heads that do not see the whole context; None if all heads do, which is exact."""
        found = self.arithmetic.get("sparse_heads")
        return HeadPattern.from_dict(found) if found is not None else None

    @property
    def is_approximate(self) -> bool:
        """Whether the KV is approximate."""
        return _is_approximate(self.arithmetic)

    @property
    def approximation(self) -> str:
        """What is approximate about the KV, in one sentence for people; empty if it is exact."""
        return approximation(self.kv_dtype, self.sparse_heads)

    @property
    def approximate_options(self) -> dict[str, Any]:
        """The fields of Options that make the KV approximate; none if it is exact."""
        options: dict[str, Any] = {} if self.kv_dtype == "auto" else {"kv_dtype": self.kv_dtype}
        return options if self.sparse_heads is None else {**options, "sparse_heads": self.sparse_heads}

    @property
    def disk_bytes(self) -> int:
        """The size of all data files, in bytes: those of the checkpoint and those of earlier ones."""
        return sum(entry.nbytes for entry in self.files())

    def files(self) -> list[FileEntry]:
        """Return the entries of all data files."""
        ends = [self.end, *(checkpoint.end for checkpoint in self.earlier)]
        return [*(segment_file.file for segment_file in self.segment_files), *ends]

    def as_earlier(self) -> EarlierCheckpoint:
        """Return this checkpoint as one to which a later manifest of the session can return."""
        return EarlierCheckpoint(
            self.tokens, len(self.segment_files), self.rows, self.end, self.layers, self.about, self.versions
        )

    def returned(self) -> Manifest:
        """Return the manifest with which the session is again at the newest of its earlier checkpoints."""
        *earlier, newest = self.earlier
        return dataclasses.replace(
            self,
            generation=self.generation + 1,
            tokens=newest.tokens,
            segment_files=self.segment_files[: newest.segments],
            rows=newest.rows,
            end=newest.end,
            layers=newest.layers,
            about=newest.about,
            versions=newest.versions,
            earlier=earlier,
        )

    def text(self) -> str:
        """Return the manifest as JSON, with its checksum."""
        fields = dataclasses.asdict(self)
        if not self.earlier:
            del fields[_ONLY_IF_FILLED]
        body = {"format": FORMAT, "version": APPROXIMATE_VERSION if self.is_approximate else VERSION}
        body |= {_NAMES_ON_DISK.get(name, name): value for name, value in fields.items()}
        return json.dumps({**body, "checksum": _checksum(body)}, indent=1) + "\n"

    def write(self, folder: Path) -> None:
        """Replace the manifest of a folder. At any time the folder has the old manifest or this one, whole.

        Raises:
            CapacityError: the system refuses to write, for example because the disk is full.
        """
        write_text(folder / MANIFEST, self.text())

    @staticmethod
    def read(folder: Path) -> Manifest:
        """Read and verify the manifest of a folder.

        Raises:
            SessionError: there is no manifest, or it is damaged, of another program, or of another version.
        """
        path = folder / MANIFEST
        body = _read_json(path)
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise SessionError(f"{path} is not a manifest of headinfer: choose another folder")
        arithmetic = body.get("arithmetic")
        is_approximate = isinstance(arithmetic, dict) and _is_approximate(arithmetic)
        if body.get("version") != (APPROXIMATE_VERSION if is_approximate else VERSION):
            raise SessionError(
                f"{path} has version {body.get('version')} of the format, and this headinfer reads version {VERSION}, "
                f"or {APPROXIMATE_VERSION} with approximate KV: use the headinfer that wrote it, or {REMEDY}"
            )
        if body.pop("checksum", None) != _checksum(body):
            raise SessionError(f"{path} is damaged (its checksum is not right): {REMEDY}")
        del body["format"]
        del body["version"]
        try:
            segment_files = body.pop(_NAMES_ON_DISK["segment_files"])
            body["segment_files"] = [SegmentFile(FileEntry(**entry.pop("file")), **entry) for entry in segment_files]
            body["end"] = FileEntry(**body["end"])
            body["rows"] = _rows(body["rows"])
            earlier = body.get(_ONLY_IF_FILLED, [])
            body[_ONLY_IF_FILLED] = [
                EarlierCheckpoint(**{**entry, "rows": _rows(entry["rows"]), "end": FileEntry(**entry["end"])})
                for entry in earlier
            ]
            manifest = Manifest(**body)
            _ = manifest.sparse_heads  # raises if it is not a pattern
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise SessionError(f"{path} has other fields than version {VERSION} of the format: {error}") from error
        for entry in manifest.files():
            if not DATA_FILE_NAME.fullmatch(entry.name):
                raise SessionError(
                    f"{path} names {entry.name!r}, which is not the name of a session's file: do not load this folder"
                )
        return manifest


def _is_approximate(arithmetic: dict[str, Any]) -> bool:
    return arithmetic.get("kv_dtype", "auto") != "auto" or "sparse_heads" in arithmetic


def _rows(rows: list[list[list[int]]]) -> list[list[tuple[int, int, int]]]:
    return [[(index, start, stop) for index, start, stop in row] for row in rows]


def first_chain(model: dict[str, Any]) -> hashlib._Hash:
    """Begin the chain of a row (see SegmentFile), before any token.

    Args:
        model: the fingerprint of the model.

    Returns:
        A hash to update with the token ids of the row, as little-endian int64.
    """
    return hashlib.sha256(json.dumps(model, sort_keys=True, separators=(",", ":")).encode("utf-8"))


def versions() -> dict[str, str]:
    """Return the installed versions of headinfer, torch and transformers, for a manifest."""
    found = {}
    for name in ("headinfer", "torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "a checkout"  # on PYTHONPATH, not installed
    return found


def _read_json(path: Path) -> Any:
    """Read the JSON of a manifest file.

    Raises:
        SessionError: the file is missing, unreadable, not a regular file, or not JSON.
    """
    try:
        if path.exists() and not path.is_file():
            raise SessionError(f"{path} is not a regular file: choose another folder")
        return json.loads(path.read_bytes())
    except SessionError:
        raise
    except FileNotFoundError:
        raise SessionError(f"{path.parent} is not a session: it has no {MANIFEST}") from None
    except OSError as error:
        raise SessionError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise SessionError(f"{path} is damaged ({error}): {REMEDY}") from error


def _checksum(body: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True, separators=(",", ":")).encode("utf-8"))
