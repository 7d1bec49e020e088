"""Read a document into a session on disk, a checkpoint after each chunk."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from headinfer.attention import native
from headinfer.engine.options import Options, current_names
from headinfer.engine.run_plan import RunRequest, plan_run
from headinfer.errors import CapacityError, SessionError, UsageError
from headinfer.hf.cache import HeadCache
from headinfer.hf.compat import PreTrainedModel, last_logits_only
from headinfer.hf.enable import enable
from headinfer.hf.layers import HeadLayer
from headinfer.hf.models import ModelSource, resolve
from headinfer.jobs.generate import checked_device, chosen_dtype
from headinfer.jobs.prompts import document_ids
from headinfer.plan.memory import free_disk_bytes
from headinfer.plan.model_shape import ModelShape
from headinfer.sessions.fingerprint import check_config, check_tokenizer, fingerprint, tokenizer_fingerprint
from headinfer.sessions.folder import Lock, at_rest, check_unchanged, session_folder
from headinfer.sessions.loader import saved_ids
from headinfer.sessions.manifest import MANIFEST, Manifest
from headinfer.sessions.ownership import check_no_foreign_files
from headinfer.sessions.prefix import find_prefix, take_over
from headinfer.sessions.writer import SessionWriter
from headinfer.utils.files import check_folder
from headinfer.utils.units import format_bytes

__all__ = ["ReadJob", "ReadResult", "ToRead", "prepare_read", "read"]

OnForward = Callable[[HeadCache], None]


@dataclass(frozen=True)
class ReadJob:
    """A document to read into a session. What is None is planned."""

    model: str
    document: str
    name: str
    root: Path
    chunk_tokens: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0
    raw: bool = False
    options: Options = field(default_factory=Options)


@dataclass(frozen=True)
class ToRead:
    """A document that has passed all checks; no weights are loaded yet.

    Attributes:
        done: tokens that the session holds already.
        generation: the checkpoint that holds them; 0 if there is none.
    """

    job: ReadJob
    source: ModelSource
    folder: Path
    input_ids: torch.Tensor
    dtype: torch.dtype
    device: str
    arithmetic: dict[str, Any]
    about: dict[str, Any]
    shape: ModelShape
    done: int
    generation: int


@dataclass
class ReadResult:
    """What reading came to. tokens: that the session holds; resumed_at: of them, those that it held before."""

    session: str
    folder: str
    tokens: int
    document_tokens: int
    resumed_at: int
    seconds: float
    disk_bytes: int
    interrupted: bool = False


def prepare_read(job: ReadJob) -> ToRead:
    """Check the document against the model, this machine and what the session holds, without loading weights.

    Raises UsageError, UnsupportedError, CapacityError or SessionError with what is wrong and what would work.
    """
    folder = session_folder(job.root, job.name)
    check_folder(job.root, "keep sessions")
    has_manifest = (folder / MANIFEST).exists()
    if not has_manifest:
        check_no_foreign_files(folder)
    if not job.document.strip():
        raise UsageError("the document is empty: there is nothing to read")
    device = checked_device(job.device)
    source = resolve(job.model)
    dtype = chosen_dtype(job.dtype, source, device)
    tokenizer = source.tokenizer()
    input_ids = torch.tensor([list(document_ids(tokenizer, job.document, is_raw=job.raw))])
    shape, tokens = ModelShape.from_config(source.config), input_ids.shape[1]
    found, done = (Manifest.read(folder) if has_manifest else None), 0
    if found is not None:
        check_config(found.model, source.config, folder)
        check_tokenizer(found.about.get("tokenizer"), tokenizer, folder)
        done = _held_tokens(folder, found, input_ids)
        _check_same(job, folder, found)
        dtype = getattr(torch, found.model["dtype"])
        if done < tokens:  # else nothing is written
            check_no_foreign_files(folder)
    # Another day has other memory to spare, and the session is to go on with the same bits then: nothing is resident.
    request = RunRequest(
        shape=shape,
        device=torch.device(device),
        dtype=dtype,
        context_tokens=tokens,
        options=job.options,
        chunk_tokens=job.chunk_tokens,
        keeps_resident=False,
    )
    run_plan = plan_run(request)
    _check_disk(job.root, (tokens - done) * shape.kv_bytes_per_token(dtype.itemsize))
    if found is not None:
        arithmetic = current_names(found.arithmetic)
    else:
        HeadCache(source.config, **vars(run_plan.options))  # raises if a layer of the model is not served
        arithmetic = run_plan.options.arithmetic() | {"chunk_tokens": run_plan.chunk_tokens}
    about = {"model": job.model, "seed": job.seed, "raw": job.raw, "document_tokens": tokens, "answers": 0}
    about["tokenizer"] = tokenizer_fingerprint(tokenizer)
    about["asked_for"] = _asked_for(job) if found is None else current_names(found.about.get("asked_for", {}))
    generation = found.generation if found is not None else 0
    return ToRead(job, source, folder, input_ids, dtype, device, arithmetic, about, shape, done, generation)


def _where(options: Options) -> dict[str, Any]:
    """Where KV lies, which a session does not keep."""
    return {"host_kv_budget_bytes": options.host_kv_budget_bytes, "disk_tier": options.disk_tier}


def _check_same(job: ReadJob, folder: Path, found: Manifest) -> None:
    """Raise UsageError for options that would go on with another arithmetic than the session was begun with."""
    kept = current_names(found.arithmetic) | {"dtype": found.model["dtype"]}
    before = current_names(found.about.get("asked_for", {}))
    for name, value in _asked_for(job).items():
        if value is not None and value not in (kept[name], before.get(name)):
            raise UsageError(
                f"the session {folder} was begun with {name} {kept[name]}, and goes on with the same: leave out "
                f"--{name.removesuffix('_bytes').replace('_', '-')}, or choose another name"
            )


def _asked_for(job: ReadJob) -> dict[str, Any]:
    """Options that fix the arithmetic, as the user gave them; a plan may have made other values of them."""
    dtype = job.dtype if job.dtype != "auto" else None
    return {
        "chunk_tokens": job.chunk_tokens,
        "device_kv_budget_bytes": job.options.device_kv_budget_bytes,
        "dtype": dtype,
    }


def _held_tokens(folder: Path, found: Manifest, input_ids: torch.Tensor) -> int:
    """Tokens of the session, which must be the beginning of the document."""
    held = at_rest(folder, lambda now: saved_ids(folder, now))
    if held is None or held.shape[0] != 1 or found.about.get("answers"):
        raise SessionError(f"the session {folder} holds more than a document's beginning: choose another name")
    common = min(held.shape[1], input_ids.shape[1])
    equal = (held[0, :common] == input_ids[0, :common]).long().cumprod(0).sum().item()
    if equal < held.shape[1]:
        raise SessionError(
            f"the session {folder} holds another text (it differs after {equal:,} tokens): choose another name, and "
            "what both begin with is taken from there"
        )
    return held.shape[1]


def _check_disk(root: Path, nbytes: int) -> None:
    free = free_disk_bytes(root)
    if nbytes > free:
        raise CapacityError(
            f"the session needs {format_bytes(nbytes)} on disk and {root} has {format_bytes(free)} free: choose "
            "another folder with --sessions, or a shorter document"
        )


def read(
    prepared: ToRead,
    *,
    on_forward: OnForward = lambda cache: None,
    on_resumed: Callable[[int, str], None] = lambda tokens, origin: None,
) -> ReadResult:
    """Load the model and read what the session does not hold yet. Ctrl-C keeps all chunks that were read.

    What another session holds of the same beginning is taken over. on_resumed: called with the number of tokens that
    need not be read, and whose they are.
    """
    job, folder, start = prepared.job, prepared.folder, time.perf_counter()
    tokens = prepared.input_ids.shape[1]
    result = ReadResult(job.name, str(folder), prepared.done, tokens, prepared.done, 0.0, 0)
    if prepared.done < tokens:
        try:
            with Lock(folder) as lock:  # before anything expensive
                check_unchanged(folder, prepared.generation)
                model = prepared.source.load(dtype=prepared.dtype, device=prepared.device, seed=job.seed)
                native.unavailable_reason()  # compiles the decode kernel where that was never done here
                done = _resume(prepared, model, on_resumed)
                result.tokens = result.resumed_at = done
                start = time.perf_counter()
                if done < tokens:
                    _read_rest(prepared, model, done, lock, on_forward)
        except KeyboardInterrupt:
            result.interrupted = True
    result.seconds = time.perf_counter() - start
    if (folder / MANIFEST).exists():
        manifest = Manifest.read(folder)
        result.tokens, result.disk_bytes = manifest.tokens, manifest.nbytes
    return result


def _resume(prepared: ToRead, model: PreTrainedModel, on_resumed: Callable[[int, str], None]) -> int:
    """Tokens that need not be read: of this session, or of another with the same beginning, which this one then is."""
    done, origin = prepared.done, "of this session"
    if not done:
        root, folder, ids = prepared.job.root, prepared.folder, prepared.input_ids[0]
        whole_only = not all(type(layer) is HeadLayer for layer in HeadCache(model.config).layers)
        found = find_prefix(root, fingerprint(model), ids, besides=prepared.job.name, whole_only=whole_only)
        if found is not None:
            take_over(root, found, folder, prepared.arithmetic, prepared.about)
            done, origin = found.tokens, f"of the session {found.name}"
    if done:
        on_resumed(done, origin)
    return done


def _read_rest(prepared: ToRead, model: PreTrainedModel, done: int, lock: Lock, on_forward: OnForward) -> None:
    options = {name: value for name, value in prepared.arithmetic.items() if name != "chunk_tokens"}
    chunk = prepared.arithmetic["chunk_tokens"]
    with SessionWriter(prepared.folder, model, prepared.arithmetic, prepared.about, lock) as writer:

        def after_chunk(cache: HeadCache) -> None:
            writer.checkpoint(cache, prepared.input_ids)
            on_forward(cache)

        with enable(model, chunk_tokens=chunk, on_forward=after_chunk), torch.inference_mode():
            options |= _where(prepared.job.options)
            cache = HeadCache.load(prepared.folder, model, **options) if done else HeadCache(model.config, **options)
            rest = prepared.input_ids[:, done:].to(prepared.device)
            model(input_ids=rest, past_key_values=cache, use_cache=True, **last_logits_only(model))
