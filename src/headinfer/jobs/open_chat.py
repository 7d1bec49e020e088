"""The job of `headinfer chat`: check everything, then load the model and the session, or read the document."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from headinfer.attention import native
from headinfer.engine.options import Options
from headinfer.errors import UsageError
from headinfer.hf.cache import HeadCache
from headinfer.hf.compat import last_logits_only
from headinfer.hf.enable import context_warning, enable
from headinfer.hf.models import ModelSource
from headinfer.hf.rotary import RotaryLengths
from headinfer.jobs.ask import AskJob, OpenedSession, loaded, open_session
from headinfer.jobs.chat import Beginning, Chat, ChatJob
from headinfer.jobs.conversation import Conversation, Turn
from headinfer.jobs.draft import loaded_draft
from headinfer.jobs.generate import Job, Prepared, already_warned, prepare
from headinfer.jobs.prompts import chat_texts, document_ids
from headinfer.jobs.rotary import check_document
from headinfer.plan.cpu_share import unused_share_warnings
from headinfer.plan.model_shape import ModelShape
from headinfer.sessions.fingerprint import tokenizer_fingerprint

__all__ = ["PreparedChat", "open_chat", "prepare_chat"]


@dataclass(frozen=True)
class PreparedChat:
    """A ChatJob that has passed all checks. No weights are loaded.

    Attributes:
        job: the job.
        origin: the session, or the model and the document.
        conversation: an empty conversation, or the one that the session has kept.
        document_ids: the tokens of the document, without a session.
        slow: what will take long, and why.
        warnings: what else the user should know before.
    """

    job: ChatJob
    origin: OpenedSession | Prepared
    conversation: Conversation
    document_ids: list[int]
    slow: list[str]
    warnings: list[str]

    @property
    def source(self) -> ModelSource:
        """The model."""
        return self.origin.source

    @property
    def shape(self) -> ModelShape:
        """The shape of the model."""
        return ModelShape.from_config(self.source.config)


def prepare_chat(job: ChatJob) -> PreparedChat:
    """Check a chat against its session or model and this machine. No weights are loaded.

    Raises:
        UsageError: an argument is invalid.
        UnsupportedError: the model is not served, or its chat template cannot write a conversation.
        SessionError: there is no such session, it is not read to its end, it is damaged, or of another model.
        CapacityError: the document or the session does not fit this machine.
    """
    job.sampling.check()
    if job.max_new_tokens < 1:
        raise UsageError(f"max-new-tokens is {job.max_new_tokens}: it must be a positive number")
    prepared = _prepare_session(job, job.session) if job.session is not None else _prepare_model(job)
    two_turns = dataclasses.replace(prepared.conversation, turns=(Turn("a question", "an answer"),))
    two_turns.prompt(prepared.origin.tokenizer, "another question")  # raises if the template cannot write it
    return prepared


def _prepare_session(job: ChatJob, name: str) -> PreparedChat:
    """Check a chat over a session."""
    for option, is_given in (
        ("--raw", job.raw),
        ("--dtype", job.dtype != "auto"),
        ("--chunk-tokens", job.chunk_tokens),
    ):
        if is_given:
            raise UsageError(f"a session has {option} from `headinfer read`: leave it out")
    asked = AskJob(
        name,
        job.root,
        questions=(),
        model=job.model,
        device=job.device,
        keep=job.keep,
        system=job.system,
        sampling=job.sampling,
        options=job.options,
    )
    opened = open_session(asked)
    manifest = opened.manifest
    about = manifest.about
    conversation = Conversation(
        "answer" if about.get("answers") else "document", about.get("raw", False), about.get("system", "")
    )
    shape = ModelShape.from_config(opened.source.config)
    warning = context_warning(manifest.tokens + job.max_new_tokens, shape)
    warnings = [line for line in (warning, manifest.approximation) if line]
    warnings += unused_share_warnings(job.options.get("cpu_share"), is_in_place=opened.device == "cpu")
    return PreparedChat(job, opened, conversation, [], opened.slow, warnings)


def _prepare_model(job: ChatJob) -> PreparedChat:
    """Check a chat over a model and perhaps a document."""
    if job.model is None:
        raise UsageError("name a model, or a session with --session")
    if job.keep:
        raise UsageError("--keep adds answers to a session: name it with --session, or type /save NAME in the chat")
    texts = job.document.texts if job.document is not None else []
    if job.document is not None and not any(text.strip() for text in texts):
        raise UsageError("the document is empty: there is nothing to talk about")
    run = Job(
        job.model,
        texts,
        "" if texts else "a question",
        max_new_tokens=job.max_new_tokens,
        chunk_tokens=job.chunk_tokens,
        dtype=job.dtype,
        device=job.device,
        seed=job.sampling.seed,
        raw=job.raw,
        system=job.system,
        sampling=job.sampling,
        options=Options(**job.options),
    )
    prepared = prepare(run)
    chat = chat_texts(prepared.tokenizer, is_raw=job.raw, system=job.system)
    ids = document_ids(prepared.tokenizer, texts, chat) if texts else []
    check_document(RotaryLengths.from_config(prepared.source.config), len(ids))
    conversation = Conversation("document" if texts else "", job.raw, job.system)
    return PreparedChat(job, prepared, conversation, ids, [], prepared.warnings)


@contextmanager
def open_chat(
    prepared: PreparedChat,
    *,
    say: Callable[[str], None],
    on_forward: Callable[[HeadCache], None] | None = None,
) -> Iterator[Chat]:
    """Load the model and the session, or read the document, for a conversation.

    Args:
        prepared: the chat.
        say: called with lines that the user should know.
        on_forward: called with the cache after each forward pass.

    Raises:
        SessionError: another process writes the session, or has written it, and the job keeps answers.
    """
    origin = prepared.origin
    job = prepared.job
    if isinstance(origin, OpenedSession):
        with loaded(origin, on_forward) as session:
            ids = session.cache.token_ids
            assert ids is not None
            about = origin.manifest.about
            beginning = Beginning(
                session.model,
                origin.source,
                origin.tokenizer,
                session.cache,
                ids,
                origin.folder,
                session.lock,
                session.load,
                about,
                session.arithmetic,
                session.draft,
            )
            yield Chat(job, beginning, prepared.conversation.resumed(about, ids), say)
        return
    model = origin.source.load(dtype=origin.dtype, device=origin.device, seed=job.sampling.seed)
    if origin.device == "cpu":
        native.unavailable_reason(model.dtype)  # compiles the decode kernel, if it was never done here
    enabled = enable(
        model, chunk_tokens=job.chunk_tokens, on_forward=on_forward, guesses=job.sampling.guesses, **job.options
    )
    with enabled, loaded_draft(origin.draft, origin.dtype, origin.device) as draft, torch.inference_mode():
        cache = enabled.new_cache()
        ids = torch.tensor([prepared.document_ids], dtype=torch.long)
        if ids.shape[1]:
            with already_warned():
                model(input_ids=ids.to(model.device), past_key_values=cache, use_cache=True, **last_logits_only(model))
        arithmetic = cache.engine.options.arithmetic()
        about = _about(prepared, origin)
        beginning = Beginning(
            model, origin.source, origin.tokenizer, cache, ids, None, None, None, about, arithmetic, draft
        )
        yield Chat(job, beginning, prepared.conversation, say)


def _about(prepared: PreparedChat, origin: Prepared) -> dict[str, Any]:
    """Return the facts about a document that no session holds, as `headinfer read` keeps them."""
    job = prepared.job
    assert job.model is not None
    chat = chat_texts(origin.tokenizer, is_raw=job.raw, system=job.system)
    about = {
        "model": os.path.abspath(job.model) if Path(job.model).is_dir() else job.model,
        "seed": job.sampling.seed,
        "raw": job.raw,
        "document_tokens": len(prepared.document_ids),
        "answers": 0,
        "tokenizer": tokenizer_fingerprint(origin.tokenizer),
        "chat": dataclasses.asdict(chat) if chat is not None else None,
    }
    facts = job.document.facts() if job.document is not None else {}
    return about | facts | ({"system": job.system} if job.system else {})
