"""Keep a HeadCache in a folder, and bring it back: what cache.save(), HeadCache.load() and the command line use.

manifest.json                    replaced last, at once: the checkpoint
block-000000.safetensors ...     K and V of consecutive tokens, written once
end-000007.safetensors           what is newer than the blocks; another one for each checkpoint
lock                             held by the one writer
"""

from __future__ import annotations

import dataclasses
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from headinfer.engine.options import known_fields
from headinfer.errors import SessionError, StateError, UsageError
from headinfer.hf.compat import PreTrainedModel, layer_device, versions
from headinfer.hf.layers import HeadLayer, restore, state_of
from headinfer.kv.layer_kv import LayerKV
from headinfer.kv.segments import Segment, SegmentSlice
from headinfer.kv.stored import StoredSegment
from headinfer.kv.tensor_file import TensorFile, write_tensors
from headinfer.sessions.fingerprint import check_fingerprint, fingerprint
from headinfer.sessions.folder import Lock
from headinfer.sessions.layer_state import from_plain, to_plain
from headinfer.sessions.manifest import MANIFEST, Manifest, SegmentFile, first_chain
from headinfer.sessions.ownership import check_replaceable, remove_unused, write_manifest
from headinfer.utils.files import FileEntry, sync_folder

if TYPE_CHECKING:
    from headinfer.hf.cache import HeadCache

__all__ = ["Saved", "SessionWriter", "kept_options", "load", "saved_ids"]

_IDS = "token_ids"


@dataclass
class Saved:
    """What a cache knows of the session that it was saved to or loaded from.

    written: the block that a segment of the first offloaded layer is in; the other layers' are in the same one.
    """

    folder: Path
    generation: int = 0
    next_number: int = 0
    written: WeakKeyDictionary[Segment, SegmentFile] = field(default_factory=WeakKeyDictionary)

    def copy(self) -> Saved:
        """For a fork, which goes its own way."""
        return dataclasses.replace(self, written=WeakKeyDictionary(self.written))


@dataclass
class _Snapshot:
    """A cache as it was: what will not change any more by reference, copies of the rest."""

    tokens: int
    tables: list[list[SegmentSlice]]
    segments: dict[Segment, dict[str, torch.Tensor]]
    chains: dict[Segment, str]
    end: dict[str, torch.Tensor]
    layers: list[Any]


class SessionWriter:
    """Writes checkpoints of a cache to a folder, each behind the computation of what follows it.

    Holds the folder's lock. Raises SessionError if another writer holds it, if the folder holds a file that no session
    wrote, and if it keeps a session that this cache does not go on from.
    """

    def __init__(
        self,
        folder: Path,
        model: PreTrainedModel,
        arithmetic: dict[str, Any],
        about: dict[str, Any],
        lock: Lock | None = None,
    ) -> None:
        """lock: where the caller holds the folder's already, and goes on holding it."""
        self.folder, self.arithmetic, self.about = folder, arithmetic, about
        self._own_lock = Lock(folder) if lock is None else None
        self._model = fingerprint(model)
        self._thread = ThreadPoolExecutor(1, "headinfer-session")
        self._job: Future[None] | None = None

    def checkpoint(self, cache: HeadCache, token_ids: torch.Tensor | None = None) -> None:
        """Begin to write what is new; waits for the checkpoint before, and raises what went wrong with it.

        token_ids [rows, tokens] or longer: of all tokens so far, where they are known.
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
        layers = cache.head_layers
        if any(layer.layer_kv is None for layer in layers):
            raise StateError("the cache is empty: there is nothing to save before the model has read something")
        cache.engine.settle()
        cache.saved = saved
        named_before = {entry.name for entry in on_disk.files()} if on_disk is not None else set()
        taken = _snapshot(cache, saved, self._model, token_ids)
        self._job = self._thread.submit(self._write, taken, saved, named_before)
        if cache.engine.options.host_kv_budget_bytes is not None:
            self.finish()  # what is being written stays in memory: no more of it than has to

    def _write(self, taken: _Snapshot, saved: Saved, named_before: set[str]) -> None:
        """Write new blocks, then the end, then the manifest; only then remove what the checkpoint before needed.

        named_before: the files that the manifest of the checkpoint before names.
        """

        def write(name: str, tensors: dict[str, torch.Tensor]) -> FileEntry:
            check_replaceable(self.folder / name, named_before)
            return write_tensors(self.folder / name, tensors)

        segment_files: dict[Segment, SegmentFile] = {}
        number = saved.next_number
        for segment in dict.fromkeys(part.segment for table in taken.tables for part in table):
            if segment in taken.segments:
                tensors = taken.segments[segment]
                entry = write(f"block-{number:06}.safetensors", tensors)
                tokens = tensors[min(tensors)].shape[1]
                segment_files[segment] = SegmentFile(entry, tokens, taken.chains.get(segment, ""))
                number += 1
            else:
                segment_files[segment] = saved.written[segment]
        generation = saved.generation + 1
        end = write(f"end-{generation:06}.safetensors", taken.end)
        sync_folder(self.folder)
        order = {segment: index for index, segment in enumerate(segment_files)}
        manifest = Manifest(
            generation,
            taken.tokens,
            model=self._model,
            arithmetic=self.arithmetic,
            segment_files=list(segment_files.values()),
            rows=[[(order[part.segment], part.start, part.stop) for part in table] for table in taken.tables],
            end=end,
            layers=taken.layers,
            about=self.about,
            versions=versions(),
        )
        write_manifest(self.folder, manifest)
        saved.generation, saved.next_number = generation, number
        saved.written.update(segment_files)
        named = {entry.name for entry in manifest.files()}
        remove_unused(self.folder, named=named, named_before=named_before)

    def finish(self) -> None:
        """Wait for what was begun. Raises what went wrong with it; the checkpoint before is still there then."""
        if self._job is not None:
            job, self._job = self._job, None
            job.result()

    def close(self) -> None:
        """Finish and let go of the lock."""
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


def _snapshot(cache: HeadCache, saved: Saved, model: dict[str, Any], token_ids: torch.Tensor | None) -> _Snapshot:
    layer_kvs = {index: layer.layer_kv for index, layer in enumerate(cache.layers) if isinstance(layer, HeadLayer)}
    tables = {index: layer_kv.saved_tables() for index, layer_kv in layer_kvs.items() if layer_kv is not None}
    leading = next(iter(tables.values()))
    first = next(layer_kv for layer_kv in layer_kvs.values() if layer_kv is not None)
    ids = token_ids.cpu()[:, : first.tokens] if token_ids is not None else None
    if ids is not None and tuple(ids.shape) != (first.rows, first.tokens):
        raise UsageError(f"the cache holds {first.rows} x {first.tokens} tokens, and {tuple(ids.shape)} ids were given")
    segments: dict[Segment, dict[str, torch.Tensor]] = {}
    chains: dict[Segment, str] = {}
    for row, table in enumerate(leading):
        chain, at = first_chain(model), 0
        for number, part in enumerate(table):
            if ids is not None:
                seen = ids[row, at : at + part.tokens].contiguous()
                chain.update(seen.numpy().data)
            if part.segment not in saved.written and part.segment not in segments:
                tensors = {}
                for index, its_tables in tables.items():
                    its_slice = its_tables[row][number]
                    k, v = its_slice.segment.dense()
                    tensors[f"layers.{index}.k"], tensors[f"layers.{index}.v"] = (
                        side[:, : its_slice.stop] for side in (k, v)
                    )
                if ids is not None:
                    tensors[_IDS] = seen
                    chains[part.segment] = chain.hexdigest()
                segments[part.segment] = tensors
            at += part.tokens
    end: dict[str, torch.Tensor] = {}
    layers = [to_plain(state_of(layer)["fields"], f"layers.{index}", end) for index, layer in enumerate(cache.layers)]
    for index, layer_kv in layer_kvs.items():
        assert layer_kv is not None
        end[f"layers.{index}.tail_k"], end[f"layers.{index}.tail_v"] = (tail.clone() for tail in layer_kv.tails())
    if ids is not None:
        end[_IDS] = ids[:, first.host_tokens :].clone()
    return _Snapshot(first.tokens, leading, segments, chains, end, layers)


def load(folder: Path, model: PreTrainedModel, cache: HeadCache, manifest: Manifest) -> None:
    """Fill an empty cache, made with the manifest's options, from a session. Blocks come in when they are first read.

    Raises SessionError where the session is damaged or of another model.
    """
    check_fingerprint(manifest.model, model, folder)
    files = [TensorFile(folder, segment_file.file) for segment_file in manifest.segment_files]
    end = TensorFile(folder, manifest.end)
    tensors = {name: end.read(name) for name in end.names()}
    saved = Saved(folder, manifest.generation, _next_number(manifest))
    before: list[StoredSegment] = []
    for index, layer in enumerate(cache.layers):
        state = from_plain(manifest.layers[index], tensors, layer_device(model, index))
        restore(layer, {"fields": layer.__dict__ | state, "tokens": 0})
        if not isinstance(layer, HeadLayer):
            continue
        device = layer_device(model, index)
        tail_k, tail_v = (tensors[f"layers.{index}.tail_{side}"].to(device) for side in "kv")
        layer.lazy_initialization(tail_k[:, :, :0], tail_v[:, :, :0])
        layer_kv = layer.layer_kv
        assert isinstance(layer_kv, LayerKV)
        names = f"layers.{index}.k", f"layers.{index}.v"
        engine = cache.engine
        segments = [StoredSegment(file, *names, engine.segment_tier(layer_kv), engine.on_full) for file in files]
        tables = [[SegmentSlice(segments[index], start, stop) for index, start, stop in row] for row in manifest.rows]
        layer_kv.restore(tables, tail_k, tail_v)
        if not saved.written:
            saved.written.update(zip(segments, manifest.segment_files, strict=True))
        for earlier, later in zip(before, segments, strict=False):
            earlier.following = later  # read ahead while the layer before is computed
        before = segments
    cache.saved = saved
    cache.token_ids = _token_ids(manifest, files, end)


def kept_options(manifest: Manifest) -> dict[str, Any]:
    """The fields of Options that fix a session's arithmetic; what only another version knows is left out."""
    return known_fields(manifest.arithmetic)


def saved_ids(folder: Path, manifest: Manifest) -> torch.Tensor | None:
    """The token ids [rows, tokens] that a session was given; None where it was given none. Raises SessionError."""
    files = [TensorFile(folder, segment_file.file) for segment_file in manifest.segment_files]
    return _token_ids(manifest, files, TensorFile(folder, manifest.end))


def _token_ids(manifest: Manifest, files: list[TensorFile], end: TensorFile) -> torch.Tensor | None:
    if _IDS not in end.names():
        return None
    newest, rows = end.read(_IDS), []
    for row, table in enumerate(manifest.rows):
        parts = [files[index].read(_IDS)[start:stop] for index, start, stop in table]
        rows.append(torch.cat([*parts, newest[row]]))
    return torch.stack(rows)


def _next_number(manifest: Manifest) -> int:
    return max((int(segment_file.file.name[6:12]) for segment_file in manifest.segment_files), default=-1) + 1
