"""Reads a document into its session with a loaded model, one chunk at a time, with a checkpoint after each."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from headinfer.engine.options import Options
from headinfer.hf.cache import HeadCache
from headinfer.hf.compat import PreTrainedModel, last_logits_only
from headinfer.hf.layers import HeadLayer
from headinfer.hf.models import ModelSource
from headinfer.hf.rotary import RotaryLengths
from headinfer.jobs.documents import Document
from headinfer.jobs.rotary import held_rotary_tokens
from headinfer.plan.model_shape import ModelShape
from headinfer.sessions.fingerprint import fingerprint, of_stored_kv
from headinfer.sessions.folder import Lock
from headinfer.sessions.prefix import find_prefix, link_prefix
from headinfer.sessions.writer import SessionWriter

__all__ = ["PreparedRead", "ReadJob", "Reading"]


@dataclass(frozen=True)
class ReadJob:
    """A document to read into a session.

    Attributes:
        model: a local folder, a hub name, `embedded`, or random:NAME (hf/models.py).
        document: the text, or what read_documents() has made of files.
        name: the name of the session.
        root: the folder of all sessions.
        chunk_tokens: tokens of a prefill chunk; None is planned.
        dtype: auto, float32, bfloat16 or float16.
        device: auto, cpu, cuda or cuda:N.
        seed: the seed of random weights.
        raw: whether the model's chat template is left out.
        system: the system prompt; empty if there is none.
        options: Options of the cache; what they leave open is planned. A session goes on in its own kv_dtype,
            with its own sparse_heads.
        is_exact: whether the user has named the kv_dtype auto, so that a session with another one is refused.
    """

    model: str
    document: str | Document
    name: str
    root: Path
    chunk_tokens: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0
    raw: bool = False
    system: str = ""
    options: Options = field(default_factory=Options)
    is_exact: bool = False


@dataclass(frozen=True)
class PreparedRead:
    """A ReadJob that has passed all checks. No weights are loaded.

    Attributes:
        job: the job.
        source: the model.
        folder: the folder of the session.
        document: the document, as it is laid out in this session.
        input_ids: its tokens [1, T], int64.
        piece_tokens: the tokens of each piece of the document.
        dtype: the dtype of weights and KV.
        device: the device that computes.
        options: the options of the job, with those of the session that make its KV approximate.
        arithmetic: Options of the cache and chunk_tokens, which fix the results; for the manifest.
        about: facts about the document, for the manifest.
        shape: the shape of the model.
        done: tokens that the session holds already.
        generation: the checkpoint that holds them; 0 if there is none.
        warnings: what the user should know before the run.
    """

    job: ReadJob
    source: ModelSource
    folder: Path
    document: Document
    input_ids: torch.Tensor
    piece_tokens: list[int]
    dtype: torch.dtype
    device: str
    options: Options
    arithmetic: dict[str, Any]
    about: dict[str, Any]
    shape: ModelShape
    done: int
    generation: int
    warnings: list[str]

    def names_after(self, tokens: int) -> str:
        """Return the names of the files whose text follows the first `tokens` tokens, for people."""
        ends = list(accumulate(self.piece_tokens))
        return self.document.names_from(bisect_right(ends, tokens))


class Reading:
    """A document that is being read into its session. close() finishes the last checkpoint.

    If another session holds the same beginning, its files are used.

    Args:
        prepared: the job.
        model: the model, on which headinfer is enabled before the first step().
        lock: the lock of the session's folder, which the caller holds.
        on_resumed: called with the number of tokens that need not be read, and where they come from.

    Attributes:
        cache: holds the tokens that have been read.
        done: tokens that have been read, those that need not be read included.
        tokens: tokens of the document.
    """

    def __init__(
        self,
        prepared: PreparedRead,
        model: PreTrainedModel,
        lock: Lock,
        on_resumed: Callable[[int, str], None] = lambda tokens, origin: None,
    ) -> None:
        self.tokens = prepared.input_ids.shape[1]
        self.done = _resume(prepared, model, on_resumed)
        self._model = model
        self._input_ids = prepared.input_ids
        self._chunk_tokens = prepared.arithmetic["chunk_tokens"]
        options = {name: value for name, value in prepared.arithmetic.items() if name != "chunk_tokens"}
        options["host_kv_budget_bytes"] = prepared.job.options.host_kv_budget_bytes
        options["disk_tier"] = prepared.job.options.disk_tier
        self.cache = (
            HeadCache.load(prepared.folder, model, **options) if self.done else HeadCache(model.config, **options)
        )
        self.cache.chunk_tokens = self._chunk_tokens
        if RotaryLengths.from_config(model.config):  # each chunk gets the frequencies of the whole document
            self.cache.rotary_min_tokens = max(self.cache.rotary_min_tokens, self.tokens)
            first = self.cache.head_layers[0]
            first.rotary_min_tokens = max(first.rotary_min_tokens, self.tokens)
        self._writer = SessionWriter(prepared.folder, model, prepared.arithmetic, prepared.about, lock)

    @property
    def is_done(self) -> bool:
        """Whether the whole document has been read."""
        return self.done >= self.tokens

    def step(self) -> None:
        """Read the next chunk, and begin to write its checkpoint. The caller is in torch.inference_mode().

        Raises:
            CapacityError: memory or the disk is full. The checkpoint before is still there.
        """
        stop = min(self.done + self._chunk_tokens, self.tokens)
        ids = self._input_ids[:, self.done : stop].to(self._model.device)
        self._model(input_ids=ids, past_key_values=self.cache, use_cache=True, **last_logits_only(self._model))
        self._writer.checkpoint(self.cache, self._input_ids)
        self.done = stop

    def close(self) -> None:
        """Wait for the last checkpoint. The lock is not released.

        Raises:
            CapacityError: the disk is full. The checkpoint before is still there.
        """
        self._writer.close()

    def __enter__(self) -> Reading:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _resume(prepared: PreparedRead, model: PreTrainedModel, on_resumed: Callable[[int, str], None]) -> int:
    """Return the number of tokens that need not be read: of this session, or of another one with the same beginning."""
    done = prepared.done
    origin = "of this session"
    if not done:
        root = prepared.job.root
        layers = HeadCache(model.config, sparse_heads=prepared.options.sparse_heads).layers
        whole_only = not all(type(layer) is HeadLayer for layer in layers)
        lengths = RotaryLengths.from_config(model.config)
        needed = lengths.normalized(prepared.input_ids.shape[1])
        found = find_prefix(
            root,
            of_stored_kv(fingerprint(model), prepared.arithmetic),
            prepared.input_ids[0],
            exclude=prepared.job.name,
            whole_only=whole_only,
            is_usable=lambda manifest, folder: held_rotary_tokens(lengths, manifest, folder) == needed,
        )
        if found is not None:
            link_prefix(root, found, prepared.folder, prepared.arithmetic, prepared.about)
            done = found.tokens
            origin = f"of the session {found.name}"
    if done:
        on_resumed(done, origin)
    return done
