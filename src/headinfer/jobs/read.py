"""The job of `headinfer read`: read a document into a session on disk, with a checkpoint after each chunk."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch

from headinfer.attention import native
from headinfer.engine.machine import chosen_device
from headinfer.engine.options import current_names
from headinfer.engine.run_plan import RunRequest, plan_run
from headinfer.errors import SessionError, UsageError
from headinfer.hf.cache import HeadCache
from headinfer.hf.enable import context_warning, enable
from headinfer.hf.models import ModelSource, resolve
from headinfer.hf.rotary import RotaryLengths
from headinfer.jobs.documents import Document, as_document
from headinfer.jobs.generate import already_warned, chosen_dtype
from headinfer.jobs.prompts import ChatTexts, chat_texts, document_parts
from headinfer.jobs.reading import PreparedRead, Reading, ReadJob
from headinfer.jobs.rotary import check_document, check_resumed
from headinfer.plan.model_shape import ModelShape
from headinfer.sessions.fingerprint import check_config, check_tokenizer, tokenizer_fingerprint
from headinfer.sessions.folder import Lock, check_unchanged, read_consistently, session_folder
from headinfer.sessions.loader import saved_ids
from headinfer.sessions.manifest import MANIFEST, Manifest
from headinfer.sessions.ownership import check_no_foreign_files
from headinfer.utils.files import check_folder
from headinfer.utils.values import shown

__all__ = ["PreparedRead", "ReadJob", "ReadResult", "prepare_read", "read"]

OnForward = Callable[[HeadCache], None]


@dataclass
class ReadResult:
    """What a ReadJob did.

    Attributes:
        session: the name of the session.
        folder: its folder.
        tokens: tokens that the session holds.
        document_tokens: tokens of the document.
        resumed_at: tokens that were not read again.
        seconds: seconds of reading.
        disk_bytes: bytes of the session's data files.
        kv_dtype: how the session keeps K and V: auto, in the model's dtype; or int8 or int4, which is approximate.
        approximation: what is approximate about the session's KV, in one sentence; empty if it is exact.
        interrupted: whether Ctrl-C ended the job.
    """

    session: str
    folder: str
    tokens: int
    document_tokens: int
    resumed_at: int
    seconds: float
    disk_bytes: int
    kv_dtype: str = "auto"
    approximation: str = ""
    interrupted: bool = False

    @property
    def approximate(self) -> bool:
        """Whether the session's KV is approximate."""
        return bool(self.approximation)


def prepare_read(job: ReadJob, source: ModelSource | None = None, tokenizer: Any = None) -> PreparedRead:
    """Check a document against the model, this machine and what the session holds. No weights are loaded.

    Args:
        job: the job.
        source: the model, if its weights are in memory already; None resolves the model of the job.
        tokenizer: its tokenizer; None loads it.

    Raises:
        UsageError: an argument is invalid, or differs from what the session was begun with.
        UnsupportedError: the model is not served.
        CapacityError: the document does not fit this machine, or the disk.
        SessionError: the session holds another text, is of another model, or is damaged.
    """
    folder = session_folder(job.root, job.name)
    check_folder(job.root, "keep sessions")
    has_manifest = (folder / MANIFEST).exists()
    if not has_manifest:
        check_no_foreign_files(folder)
    if not any(text.strip() for text in as_document(job.document).texts):
        raise UsageError("the document is empty: there is nothing to read")
    device = str(chosen_device(job.device))
    is_loaded = source is not None
    source = source or resolve(job.model)
    dtype = chosen_dtype(job.dtype, source, device)
    tokenizer = tokenizer or source.tokenizer()
    found = Manifest.read(folder) if has_manifest else None
    if found is not None:
        check_config(found.model, source.config, folder)
        check_tokenizer(found.about.get("tokenizer"), tokenizer, folder)
    document, encoded, done = _lay_out(job, tokenizer, folder, found)
    input_ids = encoded.input_ids
    source.check_ids(input_ids[0].tolist())
    tokens = input_ids.shape[1]
    shape = ModelShape.from_config(source.config)
    lengths = RotaryLengths.from_config(source.config)
    check_document(lengths, tokens)
    if found is not None:
        check_resumed(lengths, found, tokens, folder)
        _check_same(job, folder, found)
        dtype = getattr(torch, found.model["dtype"])
        if done < tokens:  # otherwise nothing is written
            check_no_foreign_files(folder)
    options = job.options if found is None else replace(job.options, **found.approximate_options)
    request = RunRequest(
        shape=shape,
        device=torch.device(device),
        dtype=dtype,
        context_tokens=tokens,
        options=options,
        chunk_tokens=job.chunk_tokens,
        session_root=job.root,
        saved_tokens=done,
        is_loaded=is_loaded,
        keeps_resident=False,  # the free memory may differ when reading resumes, and the bits must not
    )
    run_plan = plan_run(request)
    asked_for = _asked_for(job)
    if found is not None:
        arithmetic = current_names(found.arithmetic)
        asked_for = current_names(found.about.get("asked_for", {}))
    else:
        HeadCache(source.config, **vars(run_plan.options))  # raises if a layer of the model is not served
        arithmetic = run_plan.options.arithmetic() | {"chunk_tokens": run_plan.chunk_tokens}
    about = {
        "model": os.path.abspath(job.model) if Path(job.model).is_dir() else job.model,
        "seed": job.seed,
        "raw": job.raw,
        "document_tokens": tokens,
        "answers": 0,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "asked_for": asked_for,
        **encoded.about,
        **document.facts(),
    }
    if job.system:
        about["system"] = job.system
    generation = found.generation if found is not None else 0
    warning = context_warning(tokens, shape)
    return PreparedRead(
        job,
        source,
        folder,
        document,
        input_ids,
        encoded.piece_tokens,
        dtype,
        device,
        options,
        arithmetic,
        about,
        shape,
        done,
        generation,
        [line for line in (warning, options.approximation) if line],
    )


class _Encoded(NamedTuple):
    """A document as tokens.

    Attributes:
        input_ids: the ids [1, T], int64.
        about: what the session keeps about the chat template.
        piece_tokens: the tokens of each piece.
    """

    input_ids: torch.Tensor
    about: dict[str, Any]
    piece_tokens: list[int]


def _lay_out(job: ReadJob, tokenizer: Any, folder: Path, found: Manifest | None) -> tuple[Document, _Encoded, int]:
    """Lay out the document so that it goes on from what the session holds.

    If its own layout does so, it is used. Otherwise the pieces of the session come first.

    Args:
        job: the job.
        tokenizer: the model's tokenizer.
        folder: the folder of the session.
        found: the checkpoint of the session, if there is one.

    Returns:
        The document, its tokens, and how many of them the session holds.

    Raises:
        SessionError: the session holds another text.
    """
    document = as_document(job.document)
    encoded = _encode(job, tokenizer, found, document)
    if found is None:
        return document, encoded, 0
    held = _held_ids(folder, found)
    equal = _equal_tokens(held, encoded)
    difference = ""
    if equal < len(held):
        document, difference = document.continuing(found.about)
        if not difference:
            encoded = _encode(job, tokenizer, found, document)
            equal = _equal_tokens(held, encoded)
    if equal < len(held):
        why = f"{difference}; it" if difference else "it"
        raise SessionError(
            f"the session {folder} holds another text ({why} differs after {equal:,} tokens): choose another name, and "
            "what both begin with is taken from there"
        )
    return document, encoded, equal


def _encode(job: ReadJob, tokenizer: Any, found: Manifest | None, document: Document | None = None) -> _Encoded:
    """Tokenize the document.

    Args:
        job: the job.
        tokenizer: the model's tokenizer.
        found: the checkpoint of the session, if there is one. The texts of its chat template are used again, because a
            template may write the date.
        document: the document, if it is not laid out as that of the job.
    """
    texts = (document or as_document(job.document)).texts
    kept = found.about.get("chat") if found is not None and not job.raw else None
    chat = ChatTexts(**kept) if kept else chat_texts(tokenizer, is_raw=job.raw, system=job.system)
    about: dict[str, Any] = {"chat": dataclasses.asdict(chat) if chat is not None else None}
    if found is not None and "chat" not in found.about:  # headinfer 0.1.0 stripped the document, and kept no texts
        texts[0] = texts[0].lstrip() if chat is not None else texts[0]
        about = {}
    parts = document_parts(tokenizer, texts, chat)
    ids = list(chain.from_iterable(parts))
    if not ids:
        raise UsageError("the document has no tokens: the model's tokenizer drops all of its characters")
    return _Encoded(torch.tensor([ids]), about, list(map(len, parts)))


def _check_same(job: ReadJob, folder: Path, found: Manifest) -> None:
    """Raise UsageError for an option that differs from what the session was begun with."""
    system = found.about.get("system", "")
    if job.system != system:
        begun = f"with the system prompt {shown(system)}" if system else "without a system prompt"
        raise UsageError(
            f"the session {folder} was begun {begun}, and goes on with the same: give the same --system, or choose "
            "another name"
        )
    kept = {"kv_dtype": "auto"} | current_names(found.arithmetic) | {"dtype": found.model["dtype"]}
    before = current_names(found.about.get("asked_for", {}))
    for name, value in _asked_for(job).items():
        if value is not None and value not in (kept[name], before.get(name)):
            flag = name.removesuffix("_bytes").replace("_", "-")
            raise UsageError(
                f"the session {folder} was begun with {name} {kept[name]}, and goes on with the same: leave out "
                f"--{flag}, or choose another name"
            )
    given = job.options.sparse_heads
    held = found.sparse_heads
    if given is not None and (held is None or held.digest != given.digest):
        form = f"the head pattern {held.digest}" if held is not None else "all heads full"
        raise UsageError(
            f"the session {folder} was begun with {form}, and goes on with the same, not with the head pattern "
            f"{given.digest}: leave out --sparse-heads, or choose another name"
        )
    if job.is_exact and found.kv_dtype != "auto":
        raise UsageError(
            f"the session {folder} was read approximately ({found.kv_dtype}), and does not go on exactly: leave "
            "out --kv-dtype to go on as it was begun, or choose another name to read exactly"
        )


def _asked_for(job: ReadJob) -> dict[str, Any]:
    """Return the options that fix the results, as the user gave them. The plan may have chosen other values."""
    return {
        "chunk_tokens": job.chunk_tokens,
        "device_kv_budget_bytes": job.options.device_kv_budget_bytes,
        "dtype": job.dtype if job.dtype != "auto" else None,
        "kv_dtype": job.options.kv_dtype if job.options.is_approximate else None,
    }


def _held_ids(folder: Path, found: Manifest) -> torch.Tensor:
    """Return the ids [T] of the tokens that the session holds, int64. They are the beginning of a document."""
    held = read_consistently(folder, lambda manifest: saved_ids(folder, manifest))
    if found.about.get("answers"):
        raise SessionError(
            f"the session {folder} holds answers after its document: remove them with `headinfer session undo`, or "
            "choose another name"
        )
    if held is None or held.shape[0] != 1:
        raise SessionError(f"the session {folder} holds more than a document's beginning: choose another name")
    return held[0]


def _equal_tokens(held: torch.Tensor, encoded: _Encoded) -> int:
    """Return the number of tokens that a session and a document have in common at their beginnings."""
    ids = encoded.input_ids[0]
    common = min(len(held), len(ids))
    return int((held[:common] == ids[:common]).long().cumprod(0).sum())


def read(
    prepared: PreparedRead,
    *,
    on_forward: OnForward = lambda cache: None,
    on_resumed: Callable[[int, str], None] = lambda tokens, origin: None,
) -> ReadResult:
    """Load the model and read what the session does not hold yet.

    If another session holds the same beginning, its files are used. Ctrl-C keeps all chunks that were read.

    Args:
        prepared: the job.
        on_forward: called with the cache after each chunk.
        on_resumed: called with the number of tokens that need not be read, and where they come from.
    """
    job = prepared.job
    folder = prepared.folder
    tokens = prepared.input_ids.shape[1]
    result = ReadResult(job.name, str(folder), prepared.done, tokens, prepared.done, 0.0, 0)
    result.kv_dtype = prepared.options.kv_dtype
    result.approximation = prepared.options.approximation
    start = time.perf_counter()
    if prepared.done < tokens:
        try:
            with Lock(folder) as lock:  # before anything expensive
                check_unchanged(folder, prepared.generation)
                model = prepared.source.load(dtype=prepared.dtype, device=prepared.device, seed=job.seed)
                native.unavailable_reason(model.dtype)  # compiles the decode kernel, if it was never done here
                with Reading(prepared, model, lock, on_resumed) as reading:
                    result.tokens = reading.done
                    result.resumed_at = reading.done
                    start = time.perf_counter()
                    with already_warned(), enable(model), torch.inference_mode():
                        while not reading.is_done:
                            reading.step()
                            on_forward(reading.cache)
        except KeyboardInterrupt:
            result.interrupted = True
    result.seconds = time.perf_counter() - start
    if (folder / MANIFEST).exists():
        manifest = Manifest.read(folder)
        result.tokens = manifest.tokens
        result.disk_bytes = manifest.disk_bytes
    return result
