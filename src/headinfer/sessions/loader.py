"""Loads a cache from a session's folder. K and V are read when they are first needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from headinfer.engine.options import known_fields
from headinfer.kv.segments import SegmentSlice
from headinfer.kv.stored import StoredSegment
from headinfer.kv.tensor_file import TensorFile
from headinfer.sessions.cache import Saved, SessionCache
from headinfer.sessions.fingerprint import check_fingerprint
from headinfer.sessions.folder import read_consistently
from headinfer.sessions.layer_state import from_plain
from headinfer.sessions.manifest import Manifest
from headinfer.sessions.writer import TOKEN_IDS

__all__ = ["kept_options", "load_cache", "saved_ids"]

Cache = TypeVar("Cache", bound=SessionCache)


def load_cache(
    folder: Path,
    model: torch.nn.Module,
    new_cache: Callable[[dict[str, Any]], Cache],
    device_of: Callable[[int], torch.device],
) -> Cache:
    """Load the current checkpoint of a session. It needs no lock.

    If a writer replaces the checkpoint meanwhile, loading begins again.

    Args:
        folder: the session's folder.
        model: the model that made the session.
        new_cache: makes an empty cache; it gets the fields of Options that the session keeps.
        device_of: the device of a layer, by its index.

    Returns:
        The cache. Its `token_ids` are those that save_cache() was given.

    Raises:
        SessionError: there is no session, it is damaged, or another model made it.
    """

    def load(manifest: Manifest) -> Cache:
        cache = new_cache(kept_options(manifest))
        check_fingerprint(manifest.model, model, folder)
        _fill(cache, folder, manifest, device_of)
        return cache

    return read_consistently(folder, load)


def kept_options(manifest: Manifest) -> dict[str, Any]:
    """Return the fields of Options that fix a session's results, without those that this version does not have."""
    return known_fields(manifest.arithmetic)


def saved_ids(folder: Path, manifest: Manifest) -> torch.Tensor | None:
    """Return the token ids [rows, tokens] that a session keeps, int64; None if it keeps none.

    Raises:
        SessionError: a file is missing or damaged.
    """
    files = [TensorFile(folder, segment_file.file) for segment_file in manifest.segment_files]
    return _token_ids(manifest, files, TensorFile(folder, manifest.end))


def _fill(cache: SessionCache, folder: Path, manifest: Manifest, device_of: Callable[[int], torch.device]) -> None:
    """Fill an empty cache from the files that a manifest names."""
    files = [TensorFile(folder, segment_file.file) for segment_file in manifest.segment_files]
    end = TensorFile(folder, manifest.end)
    tensors = {name: end.read(name) for name in end.names()}
    saved = Saved(folder, manifest.generation, _next_number(manifest))
    engine = cache.engine
    before: list[StoredSegment] = []
    for index, plain in enumerate(manifest.layers):
        device = device_of(index)
        cache.restore_fields(index, from_plain(plain, tensors, device))
        if f"layers.{index}.tail_k" not in tensors:  # transformers keeps this layer
            continue
        tail_k = tensors[f"layers.{index}.tail_k"].to(device)
        tail_v = tensors[f"layers.{index}.tail_v"].to(device)
        layer_kv = cache.new_layer_kv(index, tail_k[:, :, :0], tail_v[:, :, :0])
        tier = engine.segment_tier(layer_kv)
        names = (f"layers.{index}.k", f"layers.{index}.v")
        segments = [StoredSegment(file, *names, tier, engine.on_full) for file in files]
        tables = [[SegmentSlice(segments[at], start, stop) for at, start, stop in row] for row in manifest.rows]
        layer_kv.restore(tables, tail_k, tail_v)
        if not saved.written:
            saved.written.update(zip(segments, manifest.segment_files, strict=True))
        for earlier, later in zip(before, segments, strict=False):
            earlier.following = later  # it is read ahead while the layer before is computed
        before = segments
    cache.saved = saved
    cache.token_ids = _token_ids(manifest, files, end)


def _token_ids(manifest: Manifest, files: list[TensorFile], end: TensorFile) -> torch.Tensor | None:
    if TOKEN_IDS not in end.names():
        return None
    newest = end.read(TOKEN_IDS)
    rows = []
    for row, table in enumerate(manifest.rows):
        parts = [files[index].read(TOKEN_IDS)[start:stop] for index, start, stop in table]
        rows.append(torch.cat([*parts, newest[row]]))
    return torch.stack(rows)


def _next_number(manifest: Manifest) -> int:
    """Return the number after the highest one in the names of the segment files."""
    numbers = [int(segment_file.file.name[6:12]) for segment_file in manifest.segment_files]
    return max(numbers, default=-1) + 1
