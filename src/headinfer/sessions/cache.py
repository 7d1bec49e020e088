"""What sessions need of a cache. `headinfer.HeadCache` has it; this package does not import transformers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch

from headinfer.engine.engine import Engine
from headinfer.kv.layer_kv import LayerKV
from headinfer.kv.segments import Segment
from headinfer.sessions.manifest import SegmentFile

__all__ = ["Saved", "SessionCache"]


@dataclass
class Saved:
    """The session that a cache was saved to or loaded from.

    Attributes:
        folder: the session's folder.
        generation: the checkpoint that the cache goes on from; 0 if none was written.
        next_number: the number of the next segment file.
        written: the file of each segment of the first offloaded layer. The segments of the other layers are in the
            same file.
    """

    folder: Path
    generation: int = 0
    next_number: int = 0
    written: WeakKeyDictionary[Segment, SegmentFile] = field(default_factory=WeakKeyDictionary)

    def copy(self) -> Saved:
        """Return a copy for a fork of the cache, which may be saved to another folder."""
        return dataclasses.replace(self, written=WeakKeyDictionary(self.written))


class SessionCache(Protocol):
    """A cache that can be saved and loaded.

    Attributes:
        engine: the engine that its offloaded layers share.
        saved: the session that it belongs to, if any.
        token_ids: the token ids [rows, tokens] that were loaded with it; int64.
    """

    engine: Engine
    saved: Saved | None
    token_ids: torch.Tensor | None

    def layer_kvs(self) -> dict[int, LayerKV]:
        """Return the KV of each offloaded layer that has any, by the layer's index."""

    def layer_fields(self) -> list[dict[str, Any]]:
        """Return the state of every layer but its offloaded KV, as attributes by name."""

    def restore_fields(self, index: int, fields: dict[str, Any]) -> None:
        """Set the attributes of a layer that layer_fields() gave."""

    def new_layer_kv(self, index: int, k: torch.Tensor, v: torch.Tensor) -> LayerKV:
        """Create the empty KV of an offloaded layer, shaped as k [B, Hkv, T, Dk] and v [B, Hkv, T, Dv]."""
