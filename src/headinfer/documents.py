"""Documents that stay read: read one into a session on disk, a checkpoint after each chunk, and ask it questions."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from headinfer.attention import native
from headinfer.engine import Options
from headinfer.errors import CapacityError, SessionError, UsageError
from headinfer.generation import Streamer, Summary, checked_device, chosen_dtype
from headinfer.hf.cache import HeadCache
from headinfer.hf.compat import PreTrainedModel
from headinfer.hf.enable import enable
from headinfer.hf.fingerprint import check_config, fingerprint
from headinfer.hf.layers import HeadLayer
from headinfer.hf.models import ModelSource, resolve
from headinfer.hf.prefix import find_prefix, take_over
from headinfer.hf.prompts import document_ids, frame
from headinfer.hf.session import SessionWriter, saved_ids
from headinfer.model_shape import ModelShape
from headinfer.plan.memory import format_bytes, free_disk_bytes
from headinfer.run_plan import fixed_fields, plan_run, planned
from headinfer.sessions.folder import Lock, session_folder
from headinfer.sessions.manifest import MANIFEST, Manifest

__all__ = ["AskJob", "Asked", "ReadJob", "ReadResult", "ToRead", "ask", "prepare_ask", "prepare_read", "read"]

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
    """A document that has passed all checks; no weights are loaded yet. done: tokens that the session holds already."""

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
    if not job.document.strip():
        raise UsageError("the document is empty: there is nothing to read")
    device = checked_device(job.device)
    source = resolve(job.model)
    dtype = chosen_dtype(job.dtype, source, device)
    tokenizer = source.tokenizer()
    input_ids = torch.tensor([list(document_ids(tokenizer, job.document, is_raw=job.raw))])
    shape, tokens = ModelShape.from_config(source.config), input_ids.shape[1]
    arithmetic, done = None, 0
    if (folder / MANIFEST).exists():
        found = Manifest.read(folder)
        check_config(found.model, source.config, folder)
        done = _held_tokens(folder, found, input_ids)
        arithmetic = found.arithmetic
        dtype = getattr(torch, found.model["dtype"])
    fixed = fixed_fields(job.options, job.chunk_tokens)
    plan = plan_run(shape, torch.device(device), dtype, tokens, fixed=fixed)
    _check_disk(job.root, (tokens - done) * shape.kv_bytes_per_token(dtype.itemsize))
    if arithmetic is None:
        options = planned(job.options, plan)
        HeadCache(source.config, **vars(options)).engine.check_budget(shape, dtype.itemsize, plan.chunk_tokens, tokens)
        arithmetic = options.arithmetic() | {"chunk_tokens": plan.chunk_tokens}
    about = {"model": job.model, "seed": job.seed, "raw": job.raw, "document_tokens": tokens, "answers": 0}
    return ToRead(job, source, folder, input_ids, dtype, device, arithmetic, about, shape, done)


def _where(options: Options) -> dict[str, Any]:
    """Where KV lies, which a session does not keep."""
    return {"host_kv_budget": options.host_kv_budget, "disk_tier": options.disk_tier}


def _held_tokens(folder: Path, found: Manifest, input_ids: torch.Tensor) -> int:
    """Tokens of the session, which must be the beginning of the document."""
    held = saved_ids(folder, found)
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
                model = prepared.source.load(dtype=prepared.dtype, device=prepared.device, seed=job.seed)
                native.why_not()  # compiles the decode kernel where that was never done here
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
        found = find_prefix(root, fingerprint(model), ids, whole_only=whole_only)
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
            keep = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
            rest = prepared.input_ids[:, done:].to(prepared.device)
            model(input_ids=rest, past_key_values=cache, use_cache=True, **keep)


@dataclass(frozen=True)
class AskJob:
    """Questions to a session. keep: questions and answers become part of it, each the next one's past."""

    name: str
    root: Path
    questions: Sequence[str]
    model: str | None = None
    max_new_tokens: int = 256
    device: str = "auto"
    seed: int = 0
    keep: bool = False
    sampling: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Asked:
    """An AskJob that has passed all checks; no weights are loaded yet."""

    job: AskJob
    folder: Path
    manifest: Manifest
    source: ModelSource
    device: str


def prepare_ask(job: AskJob) -> Asked:
    """Check questions and session without loading weights. Raises UsageError or SessionError."""
    folder = session_folder(job.root, job.name)
    if not job.questions or not all(question.strip() for question in job.questions):
        raise UsageError("the question is empty: write it after the session's name")
    if job.max_new_tokens < 1:
        raise UsageError(f"max-new-tokens is {job.max_new_tokens}: it must be a positive number")
    manifest = Manifest.read(folder)
    name = job.model or manifest.about.get("model")
    if name is None:
        raise UsageError(f"the session {folder} does not say which model made it: name it with --model")
    wanted = manifest.about.get("document_tokens", manifest.tokens)
    if manifest.tokens < wanted:
        raise SessionError(
            f"the session {folder} holds {manifest.tokens:,} of the document's {wanted:,} tokens: run the same "
            "`headinfer read` again, which goes on from there"
        )
    if saved_ids(folder, manifest) is None:
        raise SessionError(f"the session {folder} does not hold its token ids: save it with token_ids to ask it here")
    source = resolve(name)
    check_config(manifest.model, source.config, folder)
    return Asked(job, folder, manifest, source, checked_device(job.device))


def ask(
    prepared: Asked, *, on_text: Callable[[str], None], on_loaded: Callable[[HeadCache], None] = lambda cache: None
) -> list[Summary]:
    """Load the model and the session, and answer each question; text comes as in generate.

    Each question is asked on a fork of the document, and the session is not written; with keep it is.
    """
    job, about = prepared.job, prepared.manifest.about
    tokenizer = prepared.source.tokenizer()
    summaries: list[Summary] = []
    with ExitStack() as held:
        lock = held.enter_context(Lock(prepared.folder)) if job.keep else None
        dtype = getattr(torch, prepared.manifest.model["dtype"])
        model = prepared.source.load(dtype=dtype, device=prepared.device, seed=about.get("seed", 0))
        native.why_not()
        with enable(model, chunk_tokens=prepared.manifest.arithmetic.get("chunk_tokens")), torch.inference_mode():
            cache = HeadCache.load(prepared.folder, model, **job.options)
            on_loaded(cache)
            ids, answers = cache.token_ids, about.get("answers", 0)
            assert ids is not None
            for question in job.questions:
                if summaries:
                    on_text("\n")
                torch.manual_seed(job.seed)
                text = ("\n\n" if not answers else "\n") + question
                _, after = frame(tokenizer, text, is_raw=about.get("raw", False), is_later=bool(answers))
                tail = torch.tensor([tokenizer(after, add_special_tokens=False).input_ids], dtype=torch.long)
                summary = Summary(str(prepared.source.name), tokens_in=tail.shape[1], tokens_read=ids.shape[1])
                summaries.append(summary)
                used = cache if job.keep else cache.fork()
                whole = torch.cat([ids, tail], dim=1)
                written = _answer(model, tokenizer, used, whole, job, summary, on_text)
                if job.keep and lock is not None:
                    answers += 1
                    ids = written[:, : used.get_seq_length()]
                    facts = about | {"answers": answers}
                    with SessionWriter(prepared.folder, model, prepared.manifest.arithmetic, facts, lock) as writer:
                        writer.checkpoint(used, ids)
                if summary.interrupted:
                    break
    return summaries


def _answer(
    model: Any,
    tokenizer: Any,
    cache: HeadCache,
    whole: torch.Tensor,
    job: AskJob,
    summary: Summary,
    on_text: Callable[[str], None],
) -> torch.Tensor:
    """Generate after `whole` [1, T], of which the cache holds the beginning; returns all token ids [1, T + n]."""
    start = time.perf_counter()
    streamer = Streamer(tokenizer, on_text, summary, start)
    pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    try:
        model.generate(
            whole.to(model.device),
            attention_mask=torch.ones_like(whole, device=model.device),
            past_key_values=cache,
            max_new_tokens=job.max_new_tokens,
            streamer=streamer,
            pad_token_id=next(one for one in pads if one is not None),
            **({"do_sample": False} | job.sampling),
        )
    except KeyboardInterrupt:
        summary.interrupted = True
        streamer.end()
    summary.total_s = time.perf_counter() - start
    summary.stats = cache.stats()
    new = torch.tensor([summary.token_ids], dtype=torch.long).view(1, -1)
    return torch.cat([whole, new], dim=1)
