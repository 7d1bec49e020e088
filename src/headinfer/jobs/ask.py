"""Ask a document that was read into a session: each question on a fork of it, or kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from headinfer.attention import native
from headinfer.engine.machine import this_machine
from headinfer.engine.options import current_names
from headinfer.errors import CapacityError, SessionError, UsageError
from headinfer.hf.cache import HeadCache
from headinfer.hf.enable import enable
from headinfer.hf.models import ModelSource, resolve
from headinfer.jobs.generate import Streamer, Summary, checked_device
from headinfer.jobs.prompts import frame, pad_id
from headinfer.plan.memory import available_host_bytes, check_host_memory, free_disk_bytes
from headinfer.sessions.fingerprint import check_config, check_tokenizer
from headinfer.sessions.folder import Lock, at_rest, check_unchanged, session_folder
from headinfer.sessions.loader import kept_options, saved_ids
from headinfer.sessions.manifest import Manifest
from headinfer.sessions.ownership import check_no_foreign_files
from headinfer.sessions.writer import SessionWriter
from headinfer.utils.files import check_folder
from headinfer.utils.units import format_bytes

__all__ = ["AskJob", "Asked", "ask", "prepare_ask"]


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
    """An AskJob that has passed all checks; no weights are loaded yet. slow: what will take long, and why."""

    job: AskJob
    folder: Path
    manifest: Manifest
    source: ModelSource
    tokenizer: Any
    device: str
    slow: list[str]


def prepare_ask(job: AskJob) -> Asked:
    """Check questions, session and memory without loading weights.

    Raises UsageError, SessionError or CapacityError with what is wrong and what would work.
    """
    folder = session_folder(job.root, job.name)
    if not job.questions or not all(question.strip() for question in job.questions):
        raise UsageError("the question is empty: write it after the session's name")
    if job.max_new_tokens < 1:
        raise UsageError(f"max-new-tokens is {job.max_new_tokens}: it must be a positive number")
    manifest = Manifest.read(folder)
    if job.keep:
        check_no_foreign_files(folder)
    name = job.model or manifest.about.get("model")
    if name is None:
        raise UsageError(f"the session {folder} does not say which model made it: name it with --model")
    wanted = manifest.about.get("document_tokens", manifest.tokens)
    if manifest.tokens < wanted:
        raise SessionError(
            f"the session {folder} holds {manifest.tokens:,} of the document's {wanted:,} tokens: run the same "
            "`headinfer read` again, which goes on from there"
        )
    if at_rest(folder, lambda found: saved_ids(folder, found)) is None:
        raise SessionError(f"the session {folder} does not hold its token ids: save it with token_ids to ask it here")
    source = resolve(name)
    check_config(manifest.model, source.config, folder)
    tokenizer, device = source.tokenizer(), checked_device(job.device)
    check_tokenizer(manifest.about.get("tokenizer"), tokenizer, folder)
    HeadCache(source.config, **(kept_options(manifest) | job.options))  # refuses options that cannot be
    return Asked(job, folder, manifest, source, tokenizer, device, _slow(job, manifest, source, device))


def _slow(job: AskJob, manifest: Manifest, source: ModelSource, device: str) -> list[str]:
    """What will take long. Raises CapacityError where host memory cannot hold what it must."""
    dtype = getattr(torch, manifest.model["dtype"])
    weights = source.weight_bytes(dtype) if device == "cpu" else 0
    budget, room = job.options.get("host_kv_budget_bytes"), available_host_bytes()
    token_bytes = -(-manifest.nbytes // manifest.tokens)
    if device != "cpu" or budget is not None:  # else the system reads what does not stay in memory again
        check_host_memory(manifest.tokens, token_bytes, weights, available=room, kv_budget=budget)
    if budget is not None:
        _check_tier(Path(job.options["disk_tier"]), manifest.nbytes - budget)
    disk_bytes_per_s = this_machine(torch.device(device)).disk_read_bytes_per_s
    first_s = manifest.nbytes / disk_bytes_per_s
    lines = []
    if first_s >= 1:
        lines.append(
            f"the first token waits for {format_bytes(manifest.nbytes)} from the disk, where the system does not hold "
            f"them in memory still: about {first_s:,.0f} s at {disk_bytes_per_s / 1e9:.1f} GB/s"
        )
    kept = min(room - weights, manifest.nbytes if budget is None else budget)
    if kept < manifest.nbytes:
        again_s = (manifest.nbytes - max(kept, 0)) / disk_bytes_per_s
        lines.append(
            f"each token reads {format_bytes(manifest.nbytes - max(kept, 0))} from the disk again, since "
            f"{format_bytes(max(kept, 0))} of memory hold the rest: about {again_s:,.1f} s a token"
        )
    return lines


def _check_tier(folder: Path, nbytes: int) -> None:
    check_folder(folder, "keep KV")
    free = free_disk_bytes(folder)
    if nbytes > free:
        raise CapacityError(
            f"{format_bytes(nbytes)} of KV exceed the host budget and {folder} has {format_bytes(free)} free: raise "
            "--host-kv-budget, or name another folder with --disk-tier"
        )


def ask(
    prepared: Asked, *, on_text: Callable[[str], None], on_loaded: Callable[[HeadCache], None] = lambda cache: None
) -> list[Summary]:
    """Load the model and the session, and answer each question; text comes as in generate.

    Each question is asked on a fork of the document, and the session is not written; with keep it is.
    """
    job, about = prepared.job, prepared.manifest.about
    tokenizer = prepared.tokenizer
    summaries: list[Summary] = []
    with ExitStack() as held:
        lock = held.enter_context(Lock(prepared.folder)) if job.keep else None
        if lock is not None:
            check_unchanged(prepared.folder, prepared.manifest.generation)
        dtype = getattr(torch, prepared.manifest.model["dtype"])
        model = prepared.source.load(dtype=dtype, device=prepared.device, seed=about.get("seed", 0))
        native.unavailable_reason()
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
                    ids = _read_to_the_end(model, used, written)
                    facts = about | {"answers": answers}
                    with SessionWriter(
                        prepared.folder, model, current_names(prepared.manifest.arithmetic), facts, lock
                    ) as writer:
                        writer.checkpoint(used, ids)
                if summary.interrupted:
                    break
    return summaries


def _read_to_the_end(model: Any, cache: HeadCache, written: torch.Tensor) -> torch.Tensor:
    """generate() never reads its last token. An end-of-sequence token stays out; one cut off by the limit is read."""
    ends = model.generation_config.eos_token_id
    last = written[:, cache.get_seq_length() :]
    if last.shape[1] and int(last[0, -1]) not in (ends if isinstance(ends, list) else [ends]):
        model(input_ids=last.to(model.device), past_key_values=cache, use_cache=True)
    return written[:, : cache.get_seq_length()]


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
    try:
        model.generate(
            whole.to(model.device),
            attention_mask=torch.ones_like(whole, device=model.device),
            past_key_values=cache,
            max_new_tokens=job.max_new_tokens,
            streamer=streamer,
            pad_token_id=pad_id(tokenizer),
            **({"do_sample": False} | job.sampling),
        )
    except KeyboardInterrupt:
        summary.interrupted = True
        streamer.end()
    summary.total_s = time.perf_counter() - start
    summary.stats = cache.stats()
    new = torch.tensor([summary.token_ids], dtype=torch.long).view(1, -1)
    return torch.cat([whole, new], dim=1)
