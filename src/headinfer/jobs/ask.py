"""The job of `headinfer ask`: answer questions about a document that was read into a session."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from headinfer.attention import native
from headinfer.engine.machine import chosen_device, this_machine
from headinfer.engine.options import current_names, merged
from headinfer.engine.run_plan import check_saved_kv
from headinfer.errors import SessionError, UsageError
from headinfer.hf.cache import HeadCache
from headinfer.hf.enable import context_warning, enable
from headinfer.hf.models import ModelSource, resolve
from headinfer.hf.rotary import RotaryLengths, crossing_warning
from headinfer.jobs.answer_text import AnswerText
from headinfer.jobs.generate import Streamer, Summary, already_warned
from headinfer.jobs.held import hold
from headinfer.jobs.prompts import ChatTexts, chat_texts, later_question_ids, pad_id, question_ids, text_ids
from headinfer.jobs.rotary import held_rotary_tokens
from headinfer.jobs.sampling import Sampling
from headinfer.plan.model_shape import ModelShape
from headinfer.sessions.fingerprint import check_config, check_tokenizer
from headinfer.sessions.folder import Lock, check_unchanged, read_consistently, session_folder
from headinfer.sessions.loader import kept_options, saved_ids
from headinfer.sessions.manifest import Manifest
from headinfer.sessions.ownership import check_no_foreign_files
from headinfer.sessions.writer import SessionWriter
from headinfer.utils.units import format_bytes

__all__ = ["AskJob", "PreparedAsk", "ask", "prepare_ask"]


@dataclass(frozen=True)
class AskJob:
    """Questions to a session.

    Attributes:
        name: the name of the session.
        root: the folder of all sessions.
        questions: the questions.
        model: where the model is; None takes the model of the session.
        max_new_tokens: tokens of an answer, at most.
        device: auto, cpu, cuda or cuda:N.
        keep: whether questions and answers are added to the session, as context of later questions.
        system: the system prompt, if the session must have been read with it; empty takes the session's.
        sampling: how tokens are chosen.
        options: fields of Options that replace the session's.
    """

    name: str
    root: Path
    questions: Sequence[str]
    model: str | None = None
    max_new_tokens: int = 256
    device: str = "auto"
    keep: bool = False
    system: str = ""
    sampling: Sampling = field(default_factory=Sampling)
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PreparedAsk:
    """An AskJob that has passed all checks. No weights are loaded.

    Attributes:
        job: the job.
        folder: the folder of the session.
        manifest: its checkpoint.
        source: the model.
        tokenizer: the model's tokenizer.
        device: the device that computes.
        question_ids: the token ids of each question, in the order of the job.
        slow: what will take long, and why.
        warnings: what else the user should know before the run.
    """

    job: AskJob
    folder: Path
    manifest: Manifest
    source: ModelSource
    tokenizer: Any
    device: str
    question_ids: list[list[int]]
    slow: list[str]
    warnings: list[str]


def prepare_ask(job: AskJob) -> PreparedAsk:
    """Check questions, session and memory. No weights are loaded.

    Raises:
        UsageError: an argument is invalid.
        SessionError: there is no such session, it is not read to its end, it is damaged, or of another model.
        CapacityError: the session's KV does not fit this machine.
    """
    folder = session_folder(job.root, job.name)
    if not job.questions or not all(question.strip() for question in job.questions):
        raise UsageError("the question is empty: write it after the session's name")
    job.sampling.check()
    if job.max_new_tokens < 1:
        raise UsageError(f"max-new-tokens is {job.max_new_tokens}: it must be a positive number")
    manifest = Manifest.read(folder)
    if job.system and job.system != manifest.about.get("system", ""):
        raise UsageError(
            f"the session {folder} was read without this system prompt, and it precedes the document: give --system to "
            "`headinfer read`, or put it into the question"
        )
    if job.keep:
        check_no_foreign_files(folder)
    wanted = manifest.about.get("document_tokens", manifest.tokens)
    if manifest.tokens < wanted:
        raise SessionError(
            f"the session {folder} holds {manifest.tokens:,} of the document's {wanted:,} tokens: run the same "
            "`headinfer read` again, which goes on from there"
        )
    held = read_consistently(folder, lambda found: saved_ids(folder, found))
    if held is None:
        raise SessionError(f"the session {folder} does not hold its token ids: save it with token_ids to ask it here")
    if held.shape[0] != 1:
        raise SessionError(
            f"the session {folder} holds {held.shape[0]} rows, and a question is asked to one: load it in Python with "
            "HeadCache.load()"
        )
    source = _source(job, folder, manifest)
    check_config(manifest.model, source.config, folder)
    tokenizer = source.tokenizer()
    device = str(chosen_device(job.device))
    check_tokenizer(manifest.about.get("tokenizer"), tokenizer, folder)
    HeadCache(source.config, **merged(kept_options(manifest), job.options))  # raises if an option is out of range
    ids = _question_ids(job, tokenizer, manifest.about)
    source.check_ids(chain.from_iterable(ids))
    slow = _slow(job, manifest, source, device)
    turns = [len(question) + job.max_new_tokens for question in ids]
    tokens = manifest.tokens + (sum(turns) if job.keep else max(turns))
    lengths = RotaryLengths.from_config(source.config)
    crossing = crossing_warning(
        lengths,
        held=held_rotary_tokens(lengths, manifest, folder),
        past_tokens=manifest.tokens,
        prompt_tokens=manifest.tokens + max(map(len, ids)),
        longest_tokens=tokens,
    )
    told = [context_warning(tokens, ModelShape.from_config(source.config)), crossing]
    warnings = [line for line in told if line is not None]
    return PreparedAsk(job, folder, manifest, source, tokenizer, device, ids, slow, warnings)


def _source(job: AskJob, folder: Path, manifest: Manifest) -> ModelSource:
    """Return the model that the user names, or else the one that the session names.

    Raises:
        UsageError: there is no such model, or the session names none.
    """
    if job.model is not None:
        return resolve(job.model)
    name = manifest.about.get("model")
    if name is None:
        raise UsageError(f"the session {folder} does not say which model made it: name it with --model")
    try:
        return resolve(name)
    except UsageError as error:
        if Path(name).exists():
            raise
        raise UsageError(
            f"the session {folder} was read with the model {name}, and there is no model of this name here: name its "
            "folder or hub name with --model"
        ) from error


def _question_ids(job: AskJob, tokenizer: Any, about: dict[str, Any]) -> list[list[int]]:
    """Return the token ids of each question.

    Args:
        job: the job.
        tokenizer: the model's tokenizer.
        about: what the session's manifest says about the document.
    """
    is_raw = about.get("raw", False)
    kept = about.get("chat")
    answers = about.get("answers", 0)
    ids = []
    for question in job.questions:
        if answers:
            ids.append(later_question_ids(tokenizer, question, is_raw=is_raw))
        else:
            chat = ChatTexts(**kept) if kept else chat_texts(tokenizer, is_raw=is_raw)
            ids.append(question_ids(tokenizer, question, chat))
        answers += job.keep
    return ids


def _slow(job: AskJob, manifest: Manifest, source: ModelSource, device: str) -> list[str]:
    """Return warnings about what will take long.

    Raises:
        CapacityError: host memory or the disk tier does not hold the session's KV.
    """
    dtype = getattr(torch, manifest.model["dtype"])
    weight_bytes = source.weight_bytes(dtype) if device == "cpu" else 0
    kept_bytes = check_saved_kv(manifest.tokens, manifest.nbytes, weight_bytes, job.options, is_mapped=device == "cpu")
    disk_bytes_per_s = this_machine(torch.device(device)).disk_read_bytes_per_s
    first_s = manifest.nbytes / disk_bytes_per_s
    lines = []
    if first_s >= 1:
        lines.append(
            f"the first token waits for {format_bytes(manifest.nbytes)} from the disk, unless the system still holds "
            f"them in memory: about {first_s:,.0f} s at {disk_bytes_per_s / 1e9:.1f} GB/s"
        )
    if kept_bytes < manifest.nbytes:
        again_bytes = manifest.nbytes - kept_bytes
        lines.append(
            f"each token reads {format_bytes(again_bytes)} from the disk again, since {format_bytes(kept_bytes)} of "
            f"memory hold the rest: about {again_bytes / disk_bytes_per_s:,.1f} s a token"
        )
    return lines


def ask(
    prepared: PreparedAsk,
    *,
    on_text: Callable[[str], None],
    on_loaded: Callable[[HeadCache], None] = lambda cache: None,
    on_forward: Callable[[HeadCache], None] | None = None,
) -> list[Summary]:
    """Load the model and the session, and answer each question.

    Each question is asked on a fork of the document, and the session is not written. With `keep`, questions and
    answers are appended to the document and written to the session. Ctrl-C ends the job after the current chunk or
    token, and the question that it interrupts is not kept.

    Args:
        prepared: the job.
        on_text: called with each part of an answer as it is written.
        on_loaded: called with the cache when the session is loaded.
        on_forward: called with the cache after each chunk and each token.

    Returns:
        A summary for each question that was asked.
    """
    job = prepared.job
    manifest = prepared.manifest
    about = manifest.about
    arithmetic = current_names(manifest.arithmetic)
    tokenizer = prepared.tokenizer
    summaries: list[Summary] = []
    with ExitStack() as stack:
        lock = stack.enter_context(Lock(prepared.folder)) if job.keep else None
        if lock is not None:
            check_unchanged(prepared.folder, manifest.generation)
        dtype = getattr(torch, manifest.model["dtype"])
        model = prepared.source.load(dtype=dtype, device=prepared.device, seed=about.get("seed", 0))
        # Compiles the kernel, if it was never done here.
        kernel_failure = native.unavailable_reason(model.dtype) if prepared.device == "cpu" else ""
        stack.enter_context(already_warned())
        stack.enter_context(enable(model, chunk_tokens=arithmetic.get("chunk_tokens"), on_forward=on_forward))
        stack.enter_context(torch.inference_mode())
        cache = HeadCache.load(prepared.folder, model, **job.options)
        on_loaded(cache)
        ids = cache.token_ids
        assert ids is not None
        answers = about.get("answers", 0)
        for new_ids in prepared.question_ids:
            if summaries:
                on_text("\n")
            torch.manual_seed(job.sampling.seed)
            tail = torch.tensor([new_ids], dtype=torch.long)
            summary = Summary(str(prepared.source.name), tokens_in=tail.shape[1], tokens_read=ids.shape[1])
            summary.kernel_failure = kernel_failure
            summaries.append(summary)
            used = cache if job.keep else cache.fork()
            prompt_ids = torch.cat([ids, tail], dim=1)
            before = used.checkpoint()
            answer = _answer(model, tokenizer, used, prompt_ids, job, summary, on_text)
            if summary.interrupted:
                break
            if lock is not None:
                answers += 1
                ids = _hold_the_answer(model, tokenizer, used, prompt_ids, answer, before)
                facts = about | {"answers": answers}
                with SessionWriter(prepared.folder, model, arithmetic, facts, lock) as writer:
                    writer.checkpoint(used, ids, can_return=True)
    return summaries


def _hold_the_answer(
    model: Any, tokenizer: Any, cache: HeadCache, prompt_ids: torch.Tensor, answer: AnswerText, before: Any
) -> torch.Tensor:
    """Make a cache hold a question and the text of its answer as it was shown.

    The cache lacks the last token of the answer, which generate() does not read. It is read here, unless it ends the
    sequence. Tokens of a stop string are removed.

    Args:
        model: the enabled model.
        tokenizer: its tokenizer.
        cache: holds the prompt and all tokens of the answer but the last one.
        prompt_ids: the tokens [1, T] up to the question; int64.
        answer: the answer.
        before: a checkpoint of the cache before the question.

    Returns:
        The token ids [1, T + n] that the cache holds.
    """
    ends = model.generation_config.eos_token_id
    kept, rest = answer.kept()
    if kept and kept[-1] in (ends if isinstance(ends, list) else [ends]):
        kept = kept[:-1]
    wanted = torch.tensor([[*kept, *text_ids(tokenizer, rest)]], dtype=torch.long)
    return hold(model, cache, torch.cat([prompt_ids, wanted], dim=1), prompt_ids.shape[1] + len(kept), before)


def _answer(
    model: Any,
    tokenizer: Any,
    cache: HeadCache,
    prompt_ids: torch.Tensor,
    job: AskJob,
    summary: Summary,
    on_text: Callable[[str], None],
) -> AnswerText:
    """Generate an answer.

    Args:
        model: the enabled model.
        tokenizer: its tokenizer.
        cache: holds the KV of the first tokens of the prompt.
        prompt_ids: [1, T] int64.
        job: the job.
        summary: gets tokens, times and bytes.
        on_text: called with each part of the answer.
    """
    start = time.perf_counter()
    streamer = Streamer(tokenizer, on_text, summary, start, job.sampling.stop)
    sampling = job.sampling.arguments(tokenizer, prompt_tokens=prompt_ids.shape[1], max_new_tokens=job.max_new_tokens)
    try:
        model.generate(
            prompt_ids.to(model.device),
            attention_mask=torch.ones_like(prompt_ids, device=model.device),
            past_key_values=cache,
            streamer=streamer,
            tokenizer=tokenizer,  # for stop_strings in the model's generation config
            pad_token_id=pad_id(tokenizer),
            **sampling,
        )
    except KeyboardInterrupt:
        summary.interrupted = True
        streamer.end()
    summary.total_s = time.perf_counter() - start
    summary.stats = cache.stats()
    return streamer.answer
