"""The job of `headinfer ask`: answer questions about a document that was read into a session."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from headinfer.attention import native
from headinfer.engine.machine import chosen_device, this_machine
from headinfer.engine.options import current_names, merged
from headinfer.engine.run_plan import check_saved_kv
from headinfer.errors import SessionError, UnsupportedError, UsageError
from headinfer.hf.cache import HeadCache
from headinfer.hf.compat import PreTrainedModel
from headinfer.hf.enable import Enabled, context_warning, enable
from headinfer.hf.models import ModelSource, resolve
from headinfer.hf.rotary import RotaryLengths, crossing_warning
from headinfer.jobs.answering import answer, read_missing, remove_after, shown_ids
from headinfer.jobs.draft import check_draft, loaded_draft
from headinfer.jobs.generate import Summary, already_warned
from headinfer.jobs.prompts import ChatTexts, chat_texts, later_question_ids, question_ids
from headinfer.jobs.rotary import held_rotary_tokens
from headinfer.jobs.sampling import Sampling
from headinfer.jobs.together import Together, answer_together
from headinfer.jobs.where import DocumentText, passages
from headinfer.plan.cpu_share import unused_share_warnings
from headinfer.plan.model_shape import ModelShape
from headinfer.sessions.fingerprint import check_config, check_tokenizer
from headinfer.sessions.folder import Lock, check_unchanged, read_consistently, session_folder
from headinfer.sessions.loader import kept_options, saved_ids
from headinfer.sessions.manifest import Manifest
from headinfer.sessions.ownership import check_no_foreign_files
from headinfer.sessions.writer import SessionWriter
from headinfer.utils.units import format_bytes

__all__ = [
    "AskJob",
    "LoadedSession",
    "OpenedSession",
    "PreparedAsk",
    "ask",
    "loaded",
    "open_session",
    "prepare_ask",
]


@dataclass(frozen=True)
class AskJob:
    """Questions to a session.

    Attributes:
        name: the name of the session.
        root: the folder of all sessions.
        questions: the questions.
        document: a text that precedes each question; with `keep` only the first, since the others follow it.
        model: where the model is; None takes the model of the session.
        max_new_tokens: tokens of an answer, at most.
        device: auto, cpu, cuda or cuda:N.
        keep: whether questions and answers are added to the session, as context of later questions.
        system: the system prompt, if the session must have been read with it; empty takes the session's.
        sampling: how tokens are chosen.
        options: fields of Options that replace the session's.
        where: whether the passages that each answer came from are named.
    """

    name: str
    root: Path
    questions: Sequence[str]
    document: str = ""
    model: str | None = None
    max_new_tokens: int = 256
    device: str = "auto"
    keep: bool = False
    system: str = ""
    sampling: Sampling = field(default_factory=Sampling)
    options: dict[str, Any] = field(default_factory=dict)
    where: bool = False

    @property
    def is_together(self) -> bool:
        """Whether the questions are answered together. With `keep`, later questions see earlier answers."""
        return len(self.questions) > 1 and not self.keep


@dataclass(frozen=True)
class OpenedSession:
    """A session that was checked against its model and this machine. No weights are loaded.

    Attributes:
        job: the job.
        folder: the folder of the session.
        manifest: its checkpoint.
        source: the model.
        tokenizer: the model's tokenizer.
        device: the device that computes.
        slow: what will take long, and why.
        draft: the draft model; None if none was asked for.
    """

    job: AskJob
    folder: Path
    manifest: Manifest
    source: ModelSource
    tokenizer: Any
    device: str
    slow: list[str]
    draft: ModelSource | None


@dataclass(frozen=True)
class PreparedAsk(OpenedSession):
    """An AskJob that has passed all checks. No weights are loaded.

    Attributes:
        question_ids: the token ids of each question, in the order of the job.
        warnings: what else the user should know before the run.
    """

    question_ids: list[list[int]]
    warnings: list[str]


def prepare_ask(job: AskJob) -> PreparedAsk:
    """Check questions, session and memory. No weights are loaded.

    Raises:
        UsageError: an argument is invalid.
        SessionError: there is no such session, it is not read to its end, it is damaged, or of another model.
        CapacityError: the session's KV does not fit this machine.
    """
    if not job.questions or not all(question.strip() for question in job.questions):
        raise UsageError("the question is empty: write it after the session's name")
    job.sampling.check(is_together=job.is_together)
    if job.max_new_tokens < 1:
        raise UsageError(f"max-new-tokens is {job.max_new_tokens}: it must be a positive number")
    opened = open_session(job)
    manifest = opened.manifest
    ids = _question_ids(job, opened.tokenizer, manifest.about)
    opened.source.check_ids(chain.from_iterable(ids))
    turns = [len(question) + job.max_new_tokens for question in ids]
    tokens = manifest.tokens + (sum(turns) if job.keep else max(turns))
    lengths = RotaryLengths.from_config(opened.source.config)
    crossing = crossing_warning(
        lengths,
        held=held_rotary_tokens(lengths, manifest, opened.folder),
        past_tokens=manifest.tokens,
        prompt_tokens=manifest.tokens + max(map(len, ids)),
        longest_tokens=tokens,
    )
    told = [context_warning(tokens, ModelShape.from_config(opened.source.config)), crossing]
    warnings = [line for line in (*told, manifest.approximation) if line]
    warnings += unused_share_warnings(job.options.get("cpu_share"), is_in_place=opened.device == "cpu")
    return PreparedAsk(**vars(opened), question_ids=ids, warnings=warnings)


def open_session(job: AskJob) -> OpenedSession:
    """Check a session against its model and this machine. No weights are loaded.

    Args:
        job: the job. Its questions do not matter.

    Raises:
        UsageError: an argument is invalid.
        SessionError: there is no such session, it is not read to its end, it is damaged, or of another model.
        CapacityError: the session's KV does not fit this machine.
    """
    folder = session_folder(job.root, job.name)
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
    draft = check_draft(job.sampling.draft, source, tokenizer)
    slow = _slow(job, manifest, source, draft, device)
    return OpenedSession(job, folder, manifest, source, tokenizer, device, slow, draft)


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
    for number, question in enumerate(job.questions):
        if job.document and not (job.keep and number):
            question = f"{job.document}\n\n{question}"
        if answers:
            ids.append(later_question_ids(tokenizer, question, is_raw=is_raw))
        else:
            chat = ChatTexts(**kept) if kept else chat_texts(tokenizer, is_raw=is_raw)
            ids.append(question_ids(tokenizer, question, chat))
        answers += job.keep
    return ids


def _slow(job: AskJob, manifest: Manifest, source: ModelSource, draft: ModelSource | None, device: str) -> list[str]:
    """Return warnings about what will take long.

    Raises:
        CapacityError: host memory or the disk tier does not hold the session's KV.
    """
    dtype = getattr(torch, manifest.model["dtype"])
    models = [source, *([draft] if draft is not None else [])]
    weight_bytes = sum(one.weight_bytes(dtype) for one in models) if device == "cpu" else 0
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


@dataclass(frozen=True)
class LoadedSession:
    """A session in memory.

    Attributes:
        enabled: the model, enabled.
        cache: holds the session.
        arithmetic: the options that fix the results, and chunk_tokens.
        lock: the lock of the folder, if the job keeps answers.
        load: loads the session again.
        kernel_failure: why the CPU's attention kernel cannot be used; empty if it can, or if a GPU computes.
        draft: the draft model, enabled; None if none was asked for.
    """

    enabled: Enabled
    cache: HeadCache
    arithmetic: dict[str, Any]
    lock: Lock | None
    load: Callable[[], HeadCache]
    kernel_failure: str
    draft: PreTrainedModel | None = None

    @property
    def model(self) -> PreTrainedModel:
        """The model."""
        return self.enabled.model


@contextmanager
def loaded(opened: OpenedSession, on_forward: Callable[[HeadCache], None] | None) -> Iterator[LoadedSession]:
    """Load the model and the session, for generating.

    Args:
        opened: the session.
        on_forward: called with the cache after each forward pass.

    Raises:
        SessionError: another process writes the session, or has written it, and the job keeps answers.
    """
    job = opened.job
    manifest = opened.manifest
    arithmetic = current_names(manifest.arithmetic)
    with ExitStack() as stack:
        lock = stack.enter_context(Lock(opened.folder)) if job.keep else None
        if lock is not None:
            check_unchanged(opened.folder, manifest.generation)
        dtype = getattr(torch, manifest.model["dtype"])
        model = opened.source.load(dtype=dtype, device=opened.device, seed=manifest.about.get("seed", 0))
        # Compiles the kernel, if it was never done here.
        kernel_failure = native.unavailable_reason(model.dtype) if opened.device == "cpu" else ""
        enabled = enable(
            model,
            chunk_tokens=arithmetic.get("chunk_tokens"),
            on_forward=on_forward,
            guesses=job.sampling.guesses,
        )
        stack.enter_context(enabled)
        draft = stack.enter_context(loaded_draft(opened.draft, dtype, opened.device))
        stack.enter_context(torch.inference_mode())

        def load() -> HeadCache:
            return HeadCache.load(opened.folder, model, **{**manifest.approximate_options, **job.options})

        yield LoadedSession(enabled, load(), arithmetic, lock, load, kernel_failure, draft)


def ask(
    prepared: PreparedAsk,
    *,
    on_text: Callable[[str], None],
    on_loaded: Callable[[HeadCache], None] = lambda cache: None,
    on_forward: Callable[[HeadCache], None] | None = None,
    on_done: Callable[[int], None] = lambda answers: None,
    on_note: Callable[[str], None] = lambda line: None,
) -> list[Summary]:
    """Load the model and the session, and answer each question.

    Each question is asked on a fork of the document, and the session is not written. Several questions are answered
    together. With `keep`, questions and answers are appended to the document, one after the other, and written to the
    session. Ctrl-C ends the job after the current chunk or
    token, and the question that it interrupts is not kept.

    Args:
        prepared: the job.
        on_text: called with each part of an answer as it is written. Answers that are given together are whole, in the
            order of the questions, with a newline each.
        on_loaded: called with the cache when the session is loaded.
        on_forward: called with the cache after each chunk and each token.
        on_done: called with the number of complete answers, if several questions are answered together.
        on_note: called with a line if not all of them fit one batch.

    Returns:
        A summary for each question that was asked.
    """
    job = prepared.job
    about = prepared.manifest.about
    tokenizer = prepared.tokenizer
    summaries: list[Summary] = []
    with already_warned(), loaded(prepared, on_forward) as session:
        model = session.model
        cache = session.cache
        on_loaded(cache)
        ids = cache.token_ids
        assert ids is not None
        document = DocumentText(tokenizer, ids[0].tolist(), about) if job.where else None
        if job.is_together:
            for new_ids in prepared.question_ids:
                summary = Summary(str(prepared.source.name), tokens_in=len(new_ids), tokens_read=ids.shape[1])
                summary.kernel_failure = session.kernel_failure
                summaries.append(summary)
            together = Together(session.enabled, tokenizer, job.sampling, job.max_new_tokens, on_text, on_done, on_note)
            answer_together(together, cache, ids, prepared.question_ids, summaries)
            for new_ids, summary in zip(prepared.question_ids, summaries, strict=True):
                _name_passages(session.enabled, cache, [*ids[0].tolist(), *new_ids], document, summary)
            return summaries
        answers = about.get("answers", 0)
        for new_ids in prepared.question_ids:
            if summaries:
                on_text("\n")
            tail = torch.tensor([new_ids], dtype=torch.long)
            summary = Summary(str(prepared.source.name), tokens_in=tail.shape[1], tokens_read=ids.shape[1])
            summary.kernel_failure = session.kernel_failure
            summaries.append(summary)
            used = cache if job.keep else cache.fork()
            before_answer = cache.fork() if job.keep and job.where else cache
            prompt_ids = torch.cat([ids, tail], dim=1)
            before = used.checkpoint()
            found = answer(
                model,
                tokenizer,
                used,
                prompt_ids,
                job.sampling,
                max_new_tokens=job.max_new_tokens,
                summary=summary,
                on_text=on_text,
                draft=session.draft,
            )
            _name_passages(session.enabled, before_answer, prompt_ids[0].tolist(), document, summary)
            if summary.interrupted:
                break
            if session.lock is not None:
                answers += 1
                shown, generated = shown_ids(model, tokenizer, found)
                ids = torch.cat([prompt_ids, torch.tensor([shown], dtype=torch.long)], dim=1)
                remove_after(used, prompt_ids.shape[1] + generated, before)
                read_missing(model, used, ids)
                facts = about | {"answers": answers}
                with SessionWriter(prepared.folder, model, session.arithmetic, facts, session.lock) as writer:
                    writer.checkpoint(used, ids, can_return=True)
    return summaries


def _name_passages(
    enabled: Enabled, cache: HeadCache, prompt_ids: list[int], document: DocumentText | None, summary: Summary
) -> None:
    """Note the passages that an answer came from. Ctrl-C leaves them out.

    Args:
        enabled: the enabled model.
        cache: holds the beginning of the prompt.
        prompt_ids: the tokens of the prompt.
        document: the document; None if passages were not asked for.
        summary: has the tokens of the answer, and gets the passages.
    """
    if document is None or summary.interrupted:
        return
    start = time.perf_counter()
    try:
        summary.where = passages(enabled, cache, prompt_ids, summary.token_ids, document)
    except UnsupportedError as error:  # the answer counts without them
        summary.where_off_reason = str(error)
    except KeyboardInterrupt:
        summary.interrupted = True
    summary.where_s = time.perf_counter() - start
