"""Assembles a document from files, folders and standard input, and lays it out so that it only grows at its end.

A document is a sequence of pieces. Each piece is tokenized on its own, so the tokens of a piece never change if pieces
follow it. A session keeps the pieces that it was read from. If files have grown or were added since, the document
goes on with pieces for what is new, and everything before keeps its tokens and its KV.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import stat
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headinfer.errors import UsageError
from headinfer.jobs.convert import SNIFFED_BYTES, NoTextError, Text, is_binary, to_text
from headinfer.utils.files import read_bytes

__all__ = ["Document", "Piece", "SourceFile", "as_document", "document_of", "read_documents", "sha256_of_text"]

_STANDARD_INPUT = Path("-")
_SKIPPED_FOLDERS = ("__pycache__", "node_modules")  # what programs put there, nobody asks about
_MOST_NAMED = 3


@dataclass(frozen=True)
class SourceFile:
    """A file that a document is made of.

    Attributes:
        name: the name in its heading: the path below the folder that was given, or the name of a file.
        nbytes: the size of the file in bytes.
        sha256: the SHA-256 of its bytes, in hexadecimal.
        read_as: its encoding, or its format and the library that converted it.
        text: its text.
    """

    name: str
    nbytes: int
    sha256: str
    read_as: str
    text: str


@dataclass(frozen=True)
class Piece:
    """A part of a document that is tokenized on its own: characters of one file.

    Attributes:
        file: the index of the file in the document.
        before: what precedes the characters: blank lines and a heading. It is empty for the first file if it is the
            only one, and for what was appended to the last file.
        start: the first character of the file.
        stop: the character after the last one.
    """

    file: int
    before: str
    start: int
    stop: int


@dataclass(frozen=True)
class Document:
    """A text and the files that it is made of.

    Attributes:
        files: the files.
        pieces: the pieces, in the order of the text.
        notes: what the user should know about the files, a sentence each.
    """

    files: tuple[SourceFile, ...]
    pieces: tuple[Piece, ...]
    notes: tuple[str, ...] = ()

    @property
    def texts(self) -> list[str]:
        """The texts of the pieces with their headings. Joined, they are the text of the document."""
        return [piece.before + self._characters(piece) for piece in self.pieces]

    def _characters(self, piece: Piece) -> str:
        return self.files[piece.file].text[piece.start : piece.stop]

    def facts(self) -> dict[str, Any]:
        """Return what a session keeps about the document, for JSON."""
        files = [
            {"name": file.name, "bytes": file.nbytes, "sha256": file.sha256, "read_as": file.read_as}
            for file in self.files
        ]
        pieces = [{**vars(piece), "sha256": sha256_of_text(self._characters(piece))} for piece in self.pieces]
        return {"files": files, "pieces": pieces}

    def names_from(self, piece: int) -> str:
        """Return the names of the files of a piece and of all pieces after it, for people."""
        return _named(dict.fromkeys(self.files[one.file].name for one in self.pieces[piece:]))

    def continuing(self, kept: Mapping[str, Any]) -> tuple[Document, str]:
        """Lay the document out as one that goes on from an earlier one.

        The pieces of the earlier one come first. What was appended to its last file follows without a heading, what
        was appended to other files under their names, and then the files that were added.

        Args:
            kept: the facts() of the earlier document.

        Returns:
            The document, and an empty text; or this document, and why it does not go on from the earlier one.
        """
        if not kept.get("pieces"):
            return self, ""  # an earlier version of headinfer wrote the session
        given = {file.name: file for file in self.files}
        renamed = [file for file in self.files if file.name not in {entry["name"] for entry in kept["files"]}]
        files: list[SourceFile] = []
        last = kept["pieces"][-1]["file"]
        for index, entry in enumerate(kept["files"]):
            pieces = [piece for piece in kept["pieces"] if piece["file"] == index]
            same_name = given.get(entry["name"])
            candidates = [same_name] if same_name is not None else renamed
            found = next((file for file in candidates if _goes_on(file, pieces, is_last=index == last)), None)
            if found is None:
                return self, _difference(entry, same_name)
            if found in renamed:
                renamed.remove(found)
            files.append(found)
        before = [Piece(piece["file"], piece["before"], piece["start"], piece["stop"]) for piece in kept["pieces"]]
        grown = [last, *(index for index in range(len(files)) if index != last)]
        more: list[Piece] = []
        for index in grown:
            stop = max(piece.stop for piece in before if piece.file == index)
            file = files[index]
            if len(file.text) > stop:
                heading = "" if index == last and not more else _heading(f"{file.name} (continued)", is_first=False)
                more.append(Piece(index, heading, stop, len(file.text)))
        for file in self.files:
            if file not in files:
                more.append(Piece(len(files), _heading(file.name, is_first=False), 0, len(file.text)))
                files.append(file)
        return Document(tuple(files), (*before, *more), self.notes), ""


def as_document(document: str | Document) -> Document:
    """Return a text as a document of one piece, and a document as it is."""
    if isinstance(document, Document):
        return document
    data = document.encode("utf-8", "surrogatepass")
    file = SourceFile("text", len(data), hashlib.sha256(data).hexdigest(), "text", document)
    return Document((file,), (Piece(0, "", 0, len(document)),))


def _goes_on(file: SourceFile, pieces: Sequence[Mapping[str, Any]], *, is_last: bool) -> bool:
    """Return whether a file begins with the text that a session has of it.

    If the document does not end with this file, its new part gets a heading, and so must begin with a line.
    """
    for piece in pieces:
        if sha256_of_text(file.text[piece["start"] : piece["stop"]]) != piece["sha256"]:
            return False
    stop = max(piece["stop"] for piece in pieces)
    return is_last or len(file.text) == stop or "\n" in file.text[stop - 1 : stop + 1]


def _difference(entry: Mapping[str, Any], given: SourceFile | None) -> str:
    """Return how a file differs from what a session has of it."""
    if given is None:
        return f"{entry['name']} is no longer given"
    if given.sha256 != entry["sha256"]:
        return f"{given.name} has changed"
    return f"{given.name} was read as {entry['read_as']}, and is now read as {given.read_as}"


def sha256_of_text(text: str) -> str:
    """Return the SHA-256 that a session keeps of the characters of a piece, in hexadecimal."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _heading(name: str, *, is_first: bool) -> str:
    return f"# {name}\n\n" if is_first else f"\n\n# {name}\n\n"


# -- files and folders -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    """A file that was found.

    Attributes:
        path: where it is.
        name: the path below the folder that was given, or the name of the file.
        given: the path as the user named it, with the path below the folder.
        is_in_folder: whether the user gave a folder, so that the file is left out if it has no text.
    """

    path: Path
    name: str
    given: str
    is_in_folder: bool


class _LeftOut:
    """Counts what is left out, and names some of it."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = {}

    def add(self, reason: str, name: str) -> None:
        self._names.setdefault(reason, []).append(name)

    def note(self) -> list[str]:
        """Return a sentence about what is left out; none if there is nothing."""
        parts = [f"{len(names)} {reason} ({_named(names)})" for reason, names in self._names.items()]
        return [f"left out: {', '.join(parts)}"] if parts else []


def read_documents(paths: Sequence[Path | str], globs: Sequence[str] = ()) -> Document:
    """Read files into a document.

    A single file is the document. Several files, and the files of a folder, have their names as headings. The files of
    a folder are in the order of their paths. Hidden files, files without text and empty files of a folder are left
    out, and a note says so.

    Args:
        paths: files and folders; `-` is standard input.
        globs: patterns; they need a folder. The files of folders that match none of them are left out. A pattern
            without a slash is compared with the name of a file, others with the path below the folder.

    Raises:
        UsageError: a file or folder cannot be read, a file that was named has no text that can be read, a library is
            not installed, a folder has no file with text, or a pattern is given without a folder.
    """
    left_out = _LeftOut()
    found = _all_files([Path(path) for path in paths], globs, left_out)
    names = _names(found)
    files = []
    read_as: dict[str, list[str]] = {}
    about_pages: list[str] = []
    for one, name in zip(found, names, strict=True):
        shown = "standard input" if one.path == _STANDARD_INPUT else str(one.path)
        try:
            data = read_bytes(one.path)
            text = to_text(data, shown)
        except NoTextError:
            if not one.is_in_folder:
                raise
            left_out.add("without text", name)
            continue
        if not text.content.strip() and (len(found) > 1 or one.is_in_folder):
            left_out.add("empty", name)
            continue
        if text.read_as != "UTF-8" and " by " not in text.read_as:
            read_as.setdefault(text.read_as + (" (guessed)" if text.is_guessed else ""), []).append(name)
        about_pages += [f"{name}: {note}" for note in text.notes]
        files.append(_source_file(name, data, text))
    notes = about_pages[:_MOST_NAMED]
    if len(about_pages) > _MOST_NAMED:
        notes.append(f"{len(about_pages) - _MOST_NAMED} more files have pages without text")
    notes += [f"read as {kind}: {_named(its_names)}" for kind, its_names in read_as.items()]
    notes += left_out.note()
    if paths and not files:
        folders = ", ".join(map(str, paths))
        raise UsageError(f"cannot read {folders}: no file has text ({'; '.join(notes)})")
    is_one = len(found) == 1 and not found[0].is_in_folder
    pieces = [
        Piece(index, "" if is_one else _heading(file.name, is_first=index == 0), 0, len(file.text))
        for index, file in enumerate(files)
    ]
    return Document(tuple(files), tuple(pieces), tuple(notes))


def document_of(data: bytes, name: str) -> Document:
    """Make a document of the bytes of one file, as read_documents() does.

    Args:
        data: all bytes of the file.
        name: its name, whose suffix may tell its format.

    Raises:
        UsageError: the file has no text that can be read, or a library that it needs is not installed.
    """
    text = to_text(data, name)
    return Document((_source_file(name, data, text),), (Piece(0, "", 0, len(text.content)),), tuple(text.notes))


def _source_file(name: str, data: bytes, text: Text) -> SourceFile:
    return SourceFile(name, len(data), hashlib.sha256(data).hexdigest(), text.read_as, text.content)


def _all_files(paths: Sequence[Path], globs: Sequence[str], left_out: _LeftOut) -> list[_Found]:
    """Return all files that paths name, each once."""
    found: list[_Found] = []
    has_folder = False
    for path in paths:
        if path == _STANDARD_INPUT:
            found.append(_Found(path, "standard input", "standard input", is_in_folder=False))
        elif path.is_dir():
            has_folder = True
            found += _files_of(path, globs, left_out)
        else:
            found.append(_Found(path, _readable(path.name), _readable(os.path.normpath(path)), is_in_folder=False))
    if globs and not has_folder:
        raise UsageError("--glob chooses among the files of a folder: give a folder with --file")
    if sum(one.path == _STANDARD_INPUT for one in found) > 1:
        raise UsageError("standard input is given twice: give --file - once")
    once: dict[Path | str, _Found] = {}
    for one in found:
        once.setdefault(one.path if one.path == _STANDARD_INPUT else os.path.realpath(one.path), one)
    return list(once.values())


def _files_of(root: Path, globs: Sequence[str], left_out: _LeftOut) -> list[_Found]:
    """Return the files of a folder that may have text, in the order of their paths.

    Raises:
        UsageError: the folder cannot be read, or no file matches.
    """
    found = []
    matches = 0
    for folder, subfolders, files in os.walk(root, onerror=_refuse_folder):
        below = Path(folder).relative_to(root)
        entered = []
        for name in subfolders:
            path = Path(folder, name)
            if name.startswith("."):
                left_out.add("hidden", _readable(below / name))
            elif name in _SKIPPED_FOLDERS or path.is_symlink():
                left_out.add("behind a link" if path.is_symlink() else "made by programs", _readable(below / name))
            else:
                entered.append(name)
        subfolders[:] = entered
        for name in files:
            path = Path(folder, name)
            shown = _readable(below / name)
            if globs and not _matches(shown, globs):
                continue
            matches += 1
            reason = "hidden" if name.startswith(".") else _without_text(path)
            if reason:
                left_out.add(reason, shown)
            else:
                given = _readable(Path(os.path.normpath(root)) / below / name)
                found.append(_Found(path, shown, given, is_in_folder=True))
    if not matches:
        what = f"no file that matches {' or '.join(map(repr, globs))}" if globs else "no files that are not hidden"
        raise UsageError(f"cannot read {root}: this folder has {what}; name another folder, or other files")
    return sorted(found, key=lambda one: one.name.split("/"))


def _refuse_folder(error: OSError) -> None:
    raise UsageError(f"cannot read the folder {error.filename}: {error.strerror or error}") from error


def _without_text(path: Path) -> str:
    """Return why a file of a folder is left out without reading all of it; empty if it may have text."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return "not regular"
        with open(path, "rb") as file:
            return "binary" if is_binary(file.read(SNIFFED_BYTES)) else ""
    except FileNotFoundError:
        return "not found"
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error


def _matches(path: str, globs: Sequence[str]) -> bool:
    """Return whether a path below a folder matches a pattern. `*` in a pattern with a slash matches slashes too."""
    for pattern in globs:
        subject = path if "/" in pattern else path.rsplit("/", 1)[-1]
        if fnmatch.fnmatchcase(subject, pattern.removeprefix("./").replace("**/", "*")):
            return True
    return False


def _names(found: Sequence[_Found]) -> list[str]:
    """Return a name for each file: a short one, or the path as it was given if two files have the same short one."""
    counts = Counter(one.name for one in found)
    return [one.name if counts[one.name] == 1 else one.given for one in found]


def _readable(path: Path | str) -> str:
    """Return a path with slashes. Bytes that are not UTF-8 are replaced."""
    return os.fsencode(Path(path).as_posix()).decode("utf-8", "replace")


def _named(names: Iterable[str]) -> str:
    """Return the first names, and how many more there are."""
    every = list(names)
    more = len(every) - _MOST_NAMED
    return ", ".join(every[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
