"""A conversation with a model on one cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from headinfer.errors import StateError, UsageError
from headinfer.hf.cache import HeadCache
from headinfer.hf.compat import PreTrainedModel
from headinfer.hf.models import ModelSource
from headinfer.jobs.answering import answer, can_remove, read_missing, remove_after, shown_ids
from headinfer.jobs.conversation import Conversation, Prompt, Turn
from headinfer.jobs.documents import Document
from headinfer.jobs.generate import Summary
from headinfer.jobs.sampling import Sampling
from headinfer.sessions.folder import Lock, session_folder
from headinfer.sessions.manifest import Manifest
from headinfer.sessions.writer import SessionWriter, undo
from headinfer.utils.units import format_bytes

__all__ = ["Beginning", "Chat", "ChatJob"]

_CHECKPOINTS = 4  # of the newest turns; each may have the states of windows and of linear attention, on the device
_LAYERS_KEEP_NEWEST = "some layers of this model keep their newest state only"

Say = Callable[[str], None]


@dataclass(frozen=True)
class ChatJob:
    """The options of `headinfer chat`.

    Attributes:
        root: the folder of all sessions.
        session: the name of the session; None without one.
        model: the model, which a chat without a session needs; otherwise where the session's model is, if it was moved.
        document: what to read before the first question, without a session; None if there is nothing.
        keep: whether each answer is added to the session.
        max_new_tokens: tokens of an answer, at most.
        chunk_tokens: tokens of a prefill chunk, without a session; None is planned.
        dtype: auto, float32, bfloat16 or float16, without a session.
        device: auto, cpu, cuda or cuda:N.
        raw: whether the model's chat template is left out, without a session.
        system: the system prompt; empty if there is none, or takes the session's.
        sampling: how tokens are chosen.
        options: fields of Options. With a session, those that replace the session's.
    """

    root: Path
    session: str | None = None
    model: str | None = None
    document: Document | None = None
    keep: bool = False
    max_new_tokens: int = 1024
    chunk_tokens: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    raw: bool = False
    system: str = ""
    sampling: Sampling = field(default_factory=Sampling)
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Beginning:
    """What a chat goes on from, and where it is kept.

    Attributes:
        model: the enabled model.
        source: where it is from.
        tokenizer: its tokenizer.
        cache: holds the tokens.
        ids: the tokens [1, T] that the cache holds.
        folder: the folder of its session; None if it has none.
        lock: the lock of the folder, if each answer is kept.
        load: loads the session again; None without one.
        about: facts for the manifest.
        arithmetic: the options that fix the results, for the manifest.
        draft: the draft model, enabled; None if none was asked for.
    """

    model: PreTrainedModel
    source: ModelSource
    tokenizer: Any
    cache: HeadCache
    ids: torch.Tensor
    folder: Path | None
    lock: Lock | None
    load: Callable[[], HeadCache] | None
    about: dict[str, Any]
    arithmetic: dict[str, Any]
    draft: PreTrainedModel | None = None


class Chat:
    """A conversation with a model, on one cache. open_chat() makes it.

    After an error or Ctrl-C at any point the conversation has the turns that were shown, and goes on.

    Args:
        job: the options.
        beginning: what the chat goes on from.
        conversation: the conversation, whose tokens are the last ones that the cache holds.
        say: called with lines that the user should know.

    Attributes:
        conversation: the turns so far.
        last: what the last answer took; None before the first one.
        is_saved: whether a session on disk has all turns.
    """

    def __init__(self, job: ChatJob, beginning: Beginning, conversation: Conversation, say: Say) -> None:
        self.last: Summary | None = None
        self.is_saved = True
        self._job = job
        self._source = beginning.source
        self._tokenizer = beginning.tokenizer
        self._model = beginning.model
        self._folder = beginning.folder
        self._lock = beginning.lock
        self._load = beginning.load
        self._draft = beginning.draft
        self._arithmetic = beginning.arithmetic
        self._say = say
        self._read_again = 0
        self._before: str | None = None
        self._begin(beginning.cache, beginning.ids, conversation, beginning.about)

    def _begin(self, cache: HeadCache, ids: torch.Tensor, conversation: Conversation, about: dict[str, Any]) -> None:
        """Begin with a cache that holds the tokens ids [1, T], of which the last ones are the conversation."""
        self.conversation = conversation
        self._cache = cache
        self._about = about
        self._held = conversation.ids  # after those of _first: a beginning of them is in the cache
        self._first = ids[:, : ids.shape[1] - len(self._held)]
        self._answers_before = about.get("answers", 0) - len(conversation.turns)
        self._checkpoints = [(cache.get_seq_length(), cache.checkpoint())]

    def ask(self, question: str, on_text: Callable[[str], None]) -> Summary:
        """Answer a question, and keep both if the job does. Ctrl-C ends the answer, and what was shown is kept.

        Args:
            question: the question.
            on_text: called with each part of the answer.

        Raises:
            HeadinferError: the question cannot be answered, for example because memory is full.
        """
        prompt = self._prompt(question)
        ids = prompt.ids
        common = self._cache.get_seq_length() - self._first.shape[1]
        self._checkpoints[1:] = self._checkpoints[1:][1 - _CHECKPOINTS :]
        self._checkpoints.append((self._cache.get_seq_length(), self._cache.checkpoint()))
        self._held = ids
        summary = Summary(
            str(self._source.name), tokens_in=len(ids) - common, tokens_read=self._first.shape[1] + common
        )
        found = answer(
            self._model,
            self._tokenizer,
            self._cache,
            self._with_first(ids),
            self._job.sampling,
            max_new_tokens=self._job.max_new_tokens,
            summary=summary,
            on_text=on_text,
            draft=self._draft,
        )
        self._held = [*ids, *found.token_ids]
        self.last = summary
        if summary.interrupted and not found.text:
            return summary
        shown, _ = shown_ids(self._model, self._tokenizer, found)
        self.conversation = self.conversation.answered(self._tokenizer, prompt, question, found.text, shown)
        self.is_saved = False
        if self._job.keep:
            self.save()
        return summary

    def is_cut(self, summary: Summary) -> bool:
        """Return whether an answer ended because it had as many tokens as are allowed."""
        ends = self._model.generation_config.eos_token_id
        last = summary.token_ids[-1] if summary.token_ids else None
        has_ended = summary.stopped_by is not None or last in (ends if isinstance(ends, list) else [ends])
        return summary.tokens_out >= self._job.max_new_tokens and not has_ended

    def undo(self) -> Turn:
        """Remove the last question and its answer, also from the session if the job keeps answers.

        Returns:
            What was removed.

        Raises:
            UsageError: there is none.
            StateError: the model's layers cannot return to the state before it.
        """
        if not self.conversation.turns:
            raise UsageError("there is no question of this conversation to undo")
        undone = self.conversation.undone(self._tokenizer)
        if self._job.keep and not undone.pieces and not self._first.shape[1]:
            raise UsageError("the session would be empty: leave, and remove it with `headinfer session rm`")
        turn = self.conversation.turns[-1]
        common = _common(self._now_held(), undone.ids)
        if self._job.keep and not self._can_go_back(common):
            self._undo_on_disk()
            return turn
        self._go_back(common)
        self.conversation = undone
        self.is_saved = not undone.turns
        if self._job.keep:
            self.save()
        return turn

    def _undo_on_disk(self) -> None:
        """Return the session to the checkpoint before its last answer, and load it."""
        assert self._folder is not None
        assert self._load is not None
        about = undo(self._folder, self._lock).about
        del self._cache  # frees its memory
        cache = self._load()
        assert cache.token_ids is not None
        empty = dataclasses.replace(self.conversation, turns=(), pieces=())
        self._begin(cache, cache.token_ids, empty.resumed(about, cache.token_ids), about)

    def save(self, name: str | None = None) -> Path:
        """Write the conversation to a session.

        Args:
            name: the name of the session; None is the session of this chat.

        Returns:
            The folder of the session.

        Raises:
            UsageError: the chat has no session and no name is given, or there is nothing to save.
            SessionError: the folder holds another session, or another process writes it.
            CapacityError: the disk is full.
        """
        folder = session_folder(self._job.root, name) if name is not None else self._folder
        if folder is None:
            raise UsageError("this chat belongs to no session: name a new one, /save NAME")
        ids = self._with_first(self.conversation.ids)
        if not ids.shape[1]:
            raise UsageError("there is nothing to save yet: ask a question first")
        self._go_back(_common(self._now_held(), self.conversation.ids))
        self._held = self.conversation.ids
        read_missing(self._model, self._cache, ids)
        saved = self._cache.saved
        used = self._cache if saved is None or saved.folder == folder else self._cache.fork()
        lock = self._lock if folder == self._folder else None
        about = self._about | {"answers": self._answers_before + len(self.conversation.turns)}
        about["conversation"] = self.conversation.as_dict() | {"after_tokens": self._first.shape[1]}
        with SessionWriter(folder, self._model, self._arithmetic, about, lock) as writer:
            writer.checkpoint(used, ids, can_return=True)
        self.is_saved = True
        if self._folder is None:
            self._folder = folder
        return folder

    def stats(self) -> list[tuple[str, str]]:
        """Return what the conversation and its last answer took, as names and values."""
        stats = self._cache.stats()
        held = self._cache.get_seq_length()
        rows = [
            ("turns", f"{len(self.conversation.turns):,}"),
            ("tokens in the cache", f"{held:,}"),
            ("of them before the conversation", f"{self._first.shape[1]:,}"),
            ("read again, as the template writes them", f"{self._read_again:,}"),
            ("KV on the device, peak", format_bytes(stats.device_kv_peak_bytes)),
            ("KV on the host", format_bytes(stats.host_kv_bytes)),
        ]
        if stats.disk_kv_bytes:
            rows.append(("KV on the disk", format_bytes(stats.disk_kv_bytes)))
        if self._folder is not None:
            rows.append(("KV in the files of the session", format_bytes(Manifest.read(self._folder).nbytes)))
        last = self.last
        if last is not None:
            rows += [
                ("last question, tokens read", f"{last.tokens_in:,}"),
                ("last answer, tokens", f"{last.tokens_out:,}"),
            ]
            if last.first_token_s is not None:
                rows.append(("time to its first token", f"{last.first_token_s:.2f} s"))
            if last.decode_tokens_per_s is not None:
                rows.append(("its tokens/s after the first", f"{last.decode_tokens_per_s:.2f}"))
            if last.guesses_text:
                rows.append(("its guesses", last.guesses_text))
        return rows

    def _prompt(self, question: str) -> Prompt:
        """Return the tokens up to the answer, after the cache was cut to what it has in common with them."""
        prompt = self.conversation.prompt(self._tokenizer, question)
        self._source.check_ids(prompt.ids)
        if self._before not in (None, prompt.before):
            self._say(
                "the model's chat template now writes something else before the document, which is not read again: the "
                "answers may differ from those to the whole conversation"
            )
        self._before = prompt.before
        held = self._now_held()
        common = min(_common(held, prompt.ids), len(prompt.ids) - 1)  # generate() reads at least one token
        if not self._can_go_back(common):
            self._say(
                f"the model's chat template writes the earlier turns differently now, and {_LAYERS_KEEP_NEWEST}: the "
                "conversation goes on from what was read"
            )
            self._first = self._with_first(held)
            self._held = []
            self._answers_before += len(self.conversation.turns)
            self.conversation = dataclasses.replace(self.conversation, follows="answer", turns=(), pieces=())
            return self._prompt(question)
        old = len(self.conversation.ids)
        self._read_again += max(min(len(held), old) - common, 0)
        self._go_back(common)
        return prompt

    def _now_held(self) -> list[int]:
        """Return the tokens of the conversation that the cache holds."""
        return self._held[: max(self._cache.get_seq_length() - self._first.shape[1], 0)]

    def _with_first(self, ids: Sequence[int]) -> torch.Tensor:
        """Return all token ids [1, T], int64: those before the conversation, and these."""
        return torch.cat([self._first, torch.tensor([list(ids)], dtype=torch.long)], dim=1)

    def _can_go_back(self, tokens: int) -> bool:
        """Return whether the cache can be cut to the first tokens of the conversation, or fewer of them."""
        wanted = self._first.shape[1] + tokens
        surplus = self._cache.get_seq_length() - wanted
        is_held = surplus <= 0 or can_remove(self._cache, surplus)
        return is_held or any(at <= wanted for at, _ in self._checkpoints)

    def _go_back(self, tokens: int) -> None:
        """Cut the cache to the first tokens of the conversation. Some layers can only be cut to fewer of them.

        Raises:
            StateError: a layer cannot be cut at all, since the session was loaded with more tokens.
        """
        if not self._can_go_back(tokens):
            raise StateError(
                f"{_LAYERS_KEEP_NEWEST}: leave the chat and use `headinfer session undo`, or begin with --keep"
            )
        wanted = self._first.shape[1] + tokens
        possible = [state for at, state in self._checkpoints if at <= wanted]
        remove_after(self._cache, wanted, possible[-1] if possible else [])
        held = self._cache.get_seq_length()
        self._checkpoints = [one for one in self._checkpoints if one[0] <= held]


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens two sequences have in common at their beginning."""
    pairs = zip(first, second, strict=False)
    return next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second)))
