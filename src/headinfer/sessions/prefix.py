"""Shares the segment files of a common prefix between sessions, as hard links."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from headinfer.errors import SessionError
from headinfer.kv.tensor_file import TensorFile, faults, write_tensors
from headinfer.sessions.folder import session_names
from headinfer.sessions.manifest import Manifest, first_chain, versions
from headinfer.sessions.ownership import check_replaceable, remove_unused, write_manifest
from headinfer.sessions.writer import TOKEN_IDS
from headinfer.utils.files import FileEntry, link_or_copy, sync_folder

__all__ = ["Prefix", "find_prefix", "link_prefix"]


@dataclass(frozen=True)
class Prefix:
    """The part of a session that is a prefix of a document.

    Attributes:
        name: the name of the session.
        manifest: its manifest.
        segments: the number of its first segment files that belong to the prefix.
        tokens: the tokens of the prefix.
        is_whole: whether the whole session is a prefix, so that its end file belongs to the prefix too.
    """

    name: str
    manifest: Manifest
    segments: int
    tokens: int
    is_whole: bool


def find_prefix(
    root: Path,
    model: dict[str, Any],
    token_ids: torch.Tensor,
    *,
    exclude: str,
    whole_only: bool,
    is_usable: Callable[[Manifest, Path], bool],
    is_linked: bool = True,
) -> Prefix | None:
    """Find the session with the longest common prefix with a document.

    Args:
        root: the folder of all sessions.
        model: the fingerprint of the model. Sessions of other models do not count.
        token_ids: the document, [T] int64.
        exclude: the name of the session that will be written. It does not count.
        whole_only: only sessions that are a prefix as a whole count. A model needs this if some of its layers have a
            state that cannot be cropped.
        is_usable: returns whether the KV of a session, given its manifest and folder, is that of the document. It may
            raise SessionError if it is not.
        is_linked: whether the files will be used in another session, so that their checksums are compared now. A
            session that is loaded compares them when it reads the files.

    Returns:
        The longest prefix whose files are not damaged; None if no session has any.
    """
    found: list[Prefix] = []
    for name in session_names(root):
        if name == exclude:
            continue
        try:
            manifest = Manifest.read(root / name)
            prefix = _common_prefix(root, name, manifest, model, token_ids)
            if prefix is None or not is_usable(manifest, root / name):
                continue
        except SessionError:
            continue  # the session is damaged; `session list` reports it
        if prefix.is_whole or not whole_only:
            found.append(prefix)
    by_length = sorted(found, key=lambda prefix: -prefix.tokens)
    return next((prefix for prefix in by_length if not is_linked or _is_intact(root, prefix)), None)


def _is_intact(root: Path, prefix: Prefix) -> bool:
    """Return whether all checksums of the files of a prefix are right. The model will read these files anyway."""
    manifest = prefix.manifest
    entries = [segment_file.file for segment_file in manifest.segment_files[: prefix.segments]]
    return not faults(root / prefix.name, [*entries, manifest.end])


def _common_prefix(
    root: Path, name: str, manifest: Manifest, model: dict[str, Any], token_ids: torch.Tensor
) -> Prefix | None:
    """Return the common prefix of a session and a document, in whole segment files; None if there is none.

    Raises:
        SessionError: the end file is missing or damaged.
    """
    if manifest.model != model or len(manifest.rows) != 1:
        return None
    chain = first_chain(model)
    segments = 0
    tokens = 0
    for index, start, stop in manifest.rows[0]:
        segment_file = manifest.segment_files[index]
        if (start, stop) != (0, segment_file.tokens) or index != segments or tokens + stop > token_ids.shape[0]:
            break
        chain.update(token_ids[tokens : tokens + stop].contiguous().numpy().data)
        if chain.hexdigest() != segment_file.chain:
            break
        segments += 1
        tokens += stop
    if segments == len(manifest.rows[0]) and manifest.tokens <= token_ids.shape[0]:
        end = TensorFile(root / name, manifest.end)
        if TOKEN_IDS in end.names() and torch.equal(end.read(TOKEN_IDS)[0], token_ids[tokens : manifest.tokens]):
            return Prefix(name, manifest, segments, manifest.tokens, is_whole=True)
    return Prefix(name, manifest, segments, tokens, is_whole=False) if segments else None


def link_prefix(root: Path, prefix: Prefix, folder: Path, arithmetic: dict[str, Any], about: dict[str, Any]) -> None:
    """Write a session that holds a prefix. Its segment files are hard links to those of the prefix.

    The caller holds the lock of the new session. Files are copied if the file system has no hard links.

    Args:
        root: the folder of all sessions.
        prefix: the prefix.
        folder: the folder of the new session.
        arithmetic: the options that fix the results, for the manifest.
        about: facts of the caller, for the manifest.

    Raises:
        SessionError: the session of the prefix was removed meanwhile or is damaged, or a file in the folder was not
            written by a session.
        CapacityError: the system refuses to write, for example because the disk is full.
    """
    source = root / prefix.name
    manifest = prefix.manifest
    segment_files = manifest.segment_files[: prefix.segments]
    try:
        for segment_file in segment_files:
            check_replaceable(folder / segment_file.file.name, named=())
            link_or_copy(source / segment_file.file.name, folder / segment_file.file.name)
        end = _write_end(source, folder, manifest, is_whole=prefix.is_whole)
    except FileNotFoundError as error:
        raise SessionError(f"the session {source} was removed meanwhile: run the same command again") from error
    sync_folder(folder)
    rows = [[(index, 0, segment_file.tokens) for index, segment_file in enumerate(segment_files)]]
    linked = Manifest(
        1,
        prefix.tokens,
        model=manifest.model,
        arithmetic=arithmetic,
        segment_files=segment_files,
        rows=rows,
        end=end,
        layers=manifest.layers,
        about=about,
        versions=versions(),
    )
    write_manifest(folder, linked)
    remove_unused(folder, named={entry.name for entry in linked.files()}, named_before=())


def _write_end(source: Path, folder: Path, manifest: Manifest, *, is_whole: bool) -> FileEntry:
    """Write the end file of a new session: that of the source, without tokens unless is_whole."""
    file = TensorFile(source, manifest.end)
    tensors = {name: file.read(name) for name in file.names()}
    if not is_whole:
        tensors = {name: tensor[..., :0] if name == TOKEN_IDS else tensor[:, :, :0] for name, tensor in tensors.items()}
    path = folder / "end-000001.safetensors"
    check_replaceable(path, named=())
    return write_tensors(path, tensors)
