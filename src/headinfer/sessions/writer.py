"""Saves a cache to a session's folder, one checkpoint after another.

manifest.json                    replaced last, in one step: the checkpoint
block-000000.safetensors ...     segment files: K and V of consecutive tokens, each written once
end-000007.safetensors           what is newer than the segments; each checkpoint writes a new one
lock                             held by the one writer

docs/session-format.md describes the files.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from headinfer.errors import SessionError, StateError, UsageError
from headinfer.kv.segments import Segment, SegmentSlice
from headinfer.kv.tensor_file import TensorFile, write_tensors
from headinfer.sessions.cache import Saved, SessionCache
from headinfer.sessions.fingerprint import fingerprint, of_stored_kv
from headinfer.sessions.folder import Lock
from headinfer.sessions.layer_state import to_plain
from headinfer.sessions.manifest import MANIFEST, EarlierCheckpoint, Manifest, SegmentFile, first_chain, versions
from headinfer.sessions.ownership import check_replaceable, remove_unused, write_manifest
from headinfer.utils.files import FileEntry, sync_folder

__all__ = ["TOKEN_IDS", "SessionWriter", "save_cache", "undo"]

TOKEN_IDS = "token_ids"
"""The tensor of token ids in segment files and in the end file."""


def save_cache(
    cache: SessionCache,
    folder: Path,
    model: torch.nn.Module,
    token_ids: torch.Tensor | None = None,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Save a cache to a folder. Saving again writes only what is new.

    Args:
        cache: the cache; its model must have read something.
        folder: a folder that does not exist, is empty, or holds the session that the cache goes on from.
        model: the model that filled the cache. Its fingerprint is kept.
        token_ids: the ids [rows, tokens] of all tokens in the cache, or more; int64. load_cache() gives them back.
        about: facts of the caller, for JSON.

    Raises:
        SessionError: the folder holds another session or files that no session wrote, or another process writes it.
        CapacityError: the disk is full. The checkpoint before is still there.
        StateError: the cache is empty.
        UsageError: token_ids has another shape than the cache.
    """
    with SessionWriter(folder, model, cache.engine.options.arithmetic(), dict(about or {})) as writer:
        writer.checkpoint(cache, token_ids)


def undo(folder: Path, lock: Lock | None = None) -> Manifest:
    """Return a session to the checkpoint before its last kept answer. Nothing but the manifest is written.

    Args:
        folder: the session's folder.
        lock: the folder's lock, if the caller holds it.

    Returns:
        The manifest that the session has now.

    Raises:
        SessionError: there is no session, it holds no answer that can be removed, it is damaged, or another process
            writes it.
    """
    Manifest.read(folder)  # raises if there is no session, before the lock would create the folder
    with nullcontext() if lock is not None else Lock(folder):
        manifest = Manifest.read(folder)
        if not manifest.earlier:
            reason = "holds no kept answer"
            if manifest.about.get("answers"):
                reason = (
                    "does not hold the state before its last answer, because an earlier version of headinfer wrote it "
                    "or the answer needed other KV for the whole text"
                )
            raise SessionError(f"the session {folder} {reason}: there is nothing that `session undo` can remove")
        returned = manifest.returned()
        TensorFile(folder, returned.end)  # raises if the file is damaged
        write_manifest(folder, returned)
        named = {entry.name for entry in returned.files()}
        remove_unused(folder, named=named, named_before={entry.name for entry in manifest.files()})
    return returned


@dataclass
class _Snapshot:
    """A cache at one moment: references to what will not change any more, copies of the rest.

    Attributes:
        tokens: tokens of each row.
        tables: for each row, the slices of the first offloaded layer.
        segments: the tensors of each segment that is not on disk yet, by name.
        chains: the chain of each of these segments, if token ids are known (see manifest.first_chain()).
        end: the tensors of the end file, by name.
        layers: the plain values of each layer's state.
    """

    tokens: int
    tables: list[list[SegmentSlice]]
    segments: dict[Segment, dict[str, torch.Tensor]]
    chains: dict[Segment, str]
    end: dict[str, torch.Tensor]
    layers: list[Any]


class SessionWriter:
    """Writes checkpoints of a cache in a thread, while the model computes what follows.

    Args:
        folder: the session's folder.
        model: the model that fills the cache.
        arithmetic: the options that fix the results, for the manifest.
        about: facts of the caller, for the manifest.
        lock: the folder's lock, if the caller holds it. Otherwise the writer takes it, and releases it in close().

    Raises:
        SessionError: another writer holds the lock, or the folder holds a file that no session wrote.
    """

    def __init__(
        self,
        folder: Path,
        model: torch.nn.Module,
        arithmetic: dict[str, Any],
        about: dict[str, Any],
        lock: Lock | None = None,
    ) -> None:
        self.folder = folder
        self.arithmetic = arithmetic
        self.about = about
        self._own_lock = Lock(folder) if lock is None else None
        self._model = of_stored_kv(fingerprint(model), arithmetic)
        self._thread = ThreadPoolExecutor(1, "headinfer-session")
        self._job: Future[None] | None = None

    def checkpoint(
        self, cache: SessionCache, token_ids: torch.Tensor | None = None, *, can_return: bool = False
    ) -> None:
        """Begin to write what is new in the cache.

        The call waits for the checkpoint before, and raises the error of its thread if it failed.

        Args:
            cache: the cache.
            token_ids: the ids [rows, tokens] of all tokens in the cache, or more.
            can_return: whether previous checkpoints are kept, so that undo() returns the session to them: those that
                have fewer `answers` than the facts of the caller.

        Raises:
            SessionError: the folder holds a session that the cache does not go on from.
            StateError: the cache is empty.
        """
        self.finish()
        saved = cache.saved
        if saved is None or saved.folder != self.folder:
            saved = Saved(self.folder)
        on_disk = Manifest.read(self.folder) if (self.folder / MANIFEST).exists() else None
        if (on_disk.generation if on_disk is not None else 0) != saved.generation:
            raise SessionError(
                f"{self.folder} holds another session, or was written since this cache was loaded: choose another "
                "folder, or load it again"
            )
        if len(cache.layer_kvs()) < cache.engine.layers:
            raise StateError("the cache is empty: there is nothing to save before the model has read something")
        cache.engine.settle()
        cache.saved = saved
        named_before = {entry.name for entry in on_disk.files()} if on_disk is not None else set()
        snapshot = _snapshot(cache, saved, self._model, token_ids)
        earlier: list[EarlierCheckpoint] = []
        if on_disk is not None and can_return:
            answers = self.about.get("answers", 0)
            earlier = [*on_disk.earlier, on_disk.as_earlier()]
            earlier = [checkpoint for checkpoint in earlier if checkpoint.about.get("answers", 0) < answers]
        files_before = on_disk.segment_files if on_disk is not None else []
        self._job = self._thread.submit(self._write, snapshot, saved, named_before, earlier, files_before)
        if cache.engine.options.host_kv_budget_bytes is not None:
            self.finish()  # the snapshot keeps segments in host memory, which has a budget

    def _write(
        self,
        snapshot: _Snapshot,
        saved: Saved,
        named_before: set[str],
        earlier: list[EarlierCheckpoint],
        files_before: list[SegmentFile],
    ) -> None:
        """Write new segment files, then the end file, then the manifest. Only then remove unused files.

        Args:
            snapshot: the state to write.
            saved: the session that the cache belongs to.
            named_before: the files that the manifest of the previous checkpoint names.
            earlier: the checkpoints to which the session must be able to return. None is kept if the new checkpoint
                lacks a segment of one of them.
            files_before: the segment files of the previous checkpoint.
        """

        def write(name: str, tensors: dict[str, torch.Tensor]) -> FileEntry:
            check_replaceable(self.folder / name, named_before)
            return write_tensors(self.folder / name, tensors)

        files: dict[Segment, SegmentFile] = {}
        number = saved.next_number
        for segment in dict.fromkeys(part.segment for table in snapshot.tables for part in table):
            if segment in snapshot.segments:
                tensors = snapshot.segments[segment]
                entry = write(f"block-{number:06}.safetensors", tensors)
                tokens = tensors[min(tensors)].shape[1]
                files[segment] = SegmentFile(entry, tokens, snapshot.chains.get(segment, ""))
                number += 1
            else:
                files[segment] = saved.written[segment]
        generation = saved.generation + 1
        end = write(f"end-{generation:06}.safetensors", snapshot.end)
        sync_folder(self.folder)
        order = {segment: index for index, segment in enumerate(files)}
        manifest = Manifest(
            generation,
            snapshot.tokens,
            model=self._model,
            arithmetic=self.arithmetic,
            segment_files=list(files.values()),
            rows=[[(order[part.segment], part.start, part.stop) for part in table] for table in snapshot.tables],
            end=end,
            layers=snapshot.layers,
            about=self.about,
            versions=versions(),
        )
        needed = max((checkpoint.segments for checkpoint in earlier), default=0)
        if manifest.segment_files[:needed] == files_before[:needed]:
            manifest.earlier = earlier
        write_manifest(self.folder, manifest)
        saved.generation = generation
        saved.next_number = number
        saved.written.update(files)
        named = {entry.name for entry in manifest.files()}
        remove_unused(self.folder, named=named, named_before=named_before)

    def finish(self) -> None:
        """Wait for the checkpoint that is being written.

        Raises:
            SessionError, CapacityError: Writing failed. The checkpoint before is still there.
        """
        if self._job is not None:
            job = self._job
            self._job = None
            job.result()

    def close(self) -> None:
        """Finish, and release the lock that the writer took."""
        try:
            self.finish()
        finally:
            self._thread.shutdown()
            if self._own_lock is not None:
                self._own_lock.release()

    def __enter__(self) -> SessionWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _snapshot(cache: SessionCache, saved: Saved, model: dict[str, Any], token_ids: torch.Tensor | None) -> _Snapshot:
    """Copy what changes, and refer to what does not."""
    layer_kvs = cache.layer_kvs()
    tables = {index: layer_kv.saved_tables() for index, layer_kv in layer_kvs.items()}
    first = next(iter(layer_kvs.values()))
    first_tables = next(iter(tables.values()))
    ids = token_ids.cpu()[:, : first.tokens] if token_ids is not None else None
    if ids is not None and tuple(ids.shape) != (first.rows, first.tokens):
        raise UsageError(f"the cache holds {first.rows} x {first.tokens} tokens, and {tuple(ids.shape)} ids were given")
    segments: dict[Segment, dict[str, torch.Tensor]] = {}
    chains: dict[Segment, str] = {}
    for row, table in enumerate(first_tables):
        chain = first_chain(model)
        at = 0
        for number, part in enumerate(table):
            if ids is not None:
                seen = ids[row, at : at + part.tokens].contiguous()
                chain.update(seen.numpy().data)
            if part.segment not in saved.written and part.segment not in segments:
                tensors = {}
                for index, its_tables in tables.items():
                    k, v = _tensors_of(its_tables[row][number])
                    tensors[f"layers.{index}.k"] = k
                    tensors[f"layers.{index}.v"] = v
                if ids is not None:
                    tensors[TOKEN_IDS] = seen
                    chains[part.segment] = chain.hexdigest()
                segments[part.segment] = tensors
            at += part.tokens
    end: dict[str, torch.Tensor] = {}
    fields = cache.layer_fields()
    layers = [to_plain(layer, f"layers.{index}", end) for index, layer in enumerate(fields)]
    for index, layer_kv in layer_kvs.items():
        tail_k, tail_v = layer_kv.tails()
        end[f"layers.{index}.tail_k"] = tail_k.clone()
        end[f"layers.{index}.tail_v"] = tail_v.clone()
    if ids is not None:
        end[TOKEN_IDS] = ids[:, first.host_tokens :].clone()
    return _Snapshot(first.tokens, first_tables, segments, chains, end, layers)


def _tensors_of(part: SegmentSlice) -> tuple[torch.Tensor, torch.Tensor]:
    """Return K and V of a segment, up to the end of its slice."""
    k, v = part.segment.dense()
    return k[:, : part.stop], v[:, : part.stop]
