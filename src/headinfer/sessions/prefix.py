"""A new session takes over what an earlier one holds of the same beginning: its files get a second name, not a copy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from headinfer.errors import SessionError
from headinfer.kv.tensor_file import TensorFile, write_tensors
from headinfer.sessions.folder import session_names
from headinfer.sessions.manifest import Manifest, first_chain, versions
from headinfer.sessions.ownership import check_replaceable, remove_unused, write_manifest
from headinfer.sessions.writer import TOKEN_IDS
from headinfer.utils.files import FileEntry, link_or_copy, sync_folder

__all__ = ["Prefix", "find_prefix", "take_over"]


@dataclass(frozen=True)
class Prefix:
    """The first blocks of a session, and its end too where is_whole."""

    name: str
    manifest: Manifest
    segment_files: int
    tokens: int
    is_whole: bool


def find_prefix(
    root: Path, model: dict[str, Any], token_ids: torch.Tensor, *, besides: str, whole_only: bool
) -> Prefix | None:
    """Find the session with the longest common prefix with a document.

    Args:
        root: the folder of all sessions.
        model: the fingerprint of the model; sessions of other models do not count.
        token_ids: [T] int64, the document.
        besides: the name of the session that is to be written, which does not count.
        whole_only: only a session that is a prefix as a whole counts, since layers of the model have a state that
            cannot go back.

    Returns:
        What the session holds of the prefix; None if no session has any.
    """
    best: Prefix | None = None
    for name in session_names(root):
        if name == besides:
            continue
        try:
            found = _match(root, name, Manifest.read(root / name), model, token_ids)
        except SessionError:
            continue  # damaged: of no use here, and `session list` says so
        if found is None or (whole_only and not found.is_whole):
            continue
        if best is None or found.tokens > best.tokens:
            best = found
    return best


def _match(root: Path, name: str, manifest: Manifest, model: dict[str, Any], token_ids: torch.Tensor) -> Prefix | None:
    if manifest.model != model or len(manifest.rows) != 1:
        return None
    chain, segment_files, tokens = first_chain(model), 0, 0
    for index, start, stop in manifest.rows[0]:
        segment_file = manifest.segment_files[index]
        if (start, stop) != (0, segment_file.tokens) or index != segment_files or tokens + stop > token_ids.shape[0]:
            break
        chain.update(token_ids[tokens : tokens + stop].contiguous().numpy().data)
        if chain.hexdigest() != segment_file.chain:
            break
        segment_files, tokens = segment_files + 1, tokens + stop
    if segment_files == len(manifest.rows[0]) and manifest.tokens <= token_ids.shape[0]:
        end = TensorFile(root / name, manifest.end)
        if TOKEN_IDS in end.names() and torch.equal(end.read(TOKEN_IDS)[0], token_ids[tokens : manifest.tokens]):
            return Prefix(name, manifest, segment_files, manifest.tokens, is_whole=True)
    return Prefix(name, manifest, segment_files, tokens, is_whole=False) if segment_files else None


def take_over(root: Path, prefix: Prefix, folder: Path, arithmetic: dict[str, Any], about: dict[str, Any]) -> None:
    """Make `folder`, whose lock is held, a session that holds the prefix. Raises SessionError where it is gone."""
    source, manifest = root / prefix.name, prefix.manifest
    segment_files = manifest.segment_files[: prefix.segment_files]
    try:
        for segment_file in segment_files:
            check_replaceable(folder / segment_file.file.name, named=())
            link_or_copy(source / segment_file.file.name, folder / segment_file.file.name)
        end = _end(source, folder, manifest, is_whole=prefix.is_whole)
    except FileNotFoundError as error:
        raise SessionError(f"the session {source} was removed in this moment: run the same command again") from error
    sync_folder(folder)
    rows = [[(index, 0, segment_file.tokens) for index, segment_file in enumerate(segment_files)]]
    taken = Manifest(
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
    write_manifest(folder, taken)
    remove_unused(folder, named={entry.name for entry in taken.files()}, named_before=())


def _end(source: Path, folder: Path, manifest: Manifest, *, is_whole: bool) -> FileEntry:
    """The end of the source, or one without tokens."""
    file = TensorFile(source, manifest.end)
    tensors = {name: file.read(name) for name in file.names()}
    if not is_whole:
        tensors = {name: tensor[..., :0] if name == TOKEN_IDS else tensor[:, :, :0] for name, tensor in tensors.items()}
    path = folder / "end-000001.safetensors"
    check_replaceable(path, named=())
    return write_tensors(path, tensors)
