"""The service: one model, one thread that does all of its work, and the documents and requests of several clients."""

from __future__ import annotations

import dataclasses
import functools
import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch

from headinfer.errors import HeadinferError, SessionError, StateError, UsageError
from headinfer.jobs.generate import already_warned
from headinfer.serve.answering import Answerer
from headinfer.serve.caches import Caches
from headinfer.serve.errors import NotFoundError, QueueFullError, public
from headinfer.serve.events import Event, Failed, Prefill, Queued
from headinfer.serve.library import Library
from headinfer.serve.meter import Meter, Pace
from headinfer.serve.model import ServedModel
from headinfer.serve.reads import ReadTask, Shelf
from headinfer.serve.requests import Ask, DocumentState, ServerState
from headinfer.serve.settings import ServeSettings
from headinfer.serve.turns import Step, Task, Turns
from headinfer.serve.uploads import Upload, Uploads, clean_filename, digest, session_name
from headinfer.serve.work import AnswerTask
from headinfer.sessions.folder import remove_session
from headinfer.sessions.ownership import own_files
from headinfer.utils.files import check_folder
from headinfer.utils.units import format_bytes

__all__ = ["Service", "Work"]

_logger = logging.getLogger(__name__)


class Work(Protocol):
    """A request that was submitted."""

    def cancel(self) -> None:
        """End the request within one chunk or token. What was read is kept. It may be called at any time."""


class Service:
    """Answers requests, and reads documents into sessions. All methods may be called from any thread.

    Args:
        settings: the settings. The model is loaded, which takes a while, and documents that an earlier service has not
            read to their ends go on.

    Attributes:
        settings: the settings.
        model: the name of the model, for clients: the last part of a folder's path, otherwise the name in the settings.

    Raises:
        UsageError: a setting is invalid.
        UnsupportedError: the model is not served.
        CapacityError: the model does not fit this machine.
    """

    def __init__(self, settings: ServeSettings) -> None:
        check_folder(settings.root, "keep sessions")
        self.settings = settings
        self.model = Path(settings.model).name if Path(settings.model).is_dir() else settings.model
        self._meter = Meter()
        self._uploads = Uploads(settings.root)  # before anything expensive
        try:
            self._served = ServedModel(settings, self._meter.after_forward)
        except BaseException:
            self._uploads.close()
            raise
        self._library = Library(settings.root, self._served)
        self._caches = Caches(max(settings.caches_kept, 1))
        pace = Pace()
        self._shelf = Shelf(settings, self._served, self._caches, self._uploads, self._meter, pace)
        self._answerer = Answerer(settings, self._served, self._caches, self._library, self._meter, pace)
        self._changed = threading.Condition()  # protects what follows
        self._turns = Turns({"answer": max(settings.caches_kept, 1), "read": max(settings.caches_kept // 2, 1)})
        self._reads: dict[str, ReadTask] = {}  # those that have failed included
        self._for_documents: dict[str, list[AnswerTask]] = {}  # requests that wait for a document, by its name
        self._forgotten: list[str] = []  # sessions that were removed
        self._removing: set[str] = set()  # the documents that remove_document() is removing
        self._is_closing = False
        self._mean_s = 1.0  # of the last requests
        self._adding = threading.Lock()
        for upload in self._uploads.all():
            self._add_read(upload)
        self._thread = threading.Thread(target=self._work, name="headinfer-serve", daemon=True)
        self._thread.start()

    @property
    def is_ready(self) -> bool:
        """Whether the worker thread runs."""
        return self._thread.is_alive() and not self._is_closing

    def submit(self, request: Ask, on_event: Callable[[Event], None]) -> Work:
        """Queue a request.

        Args:
            request: the request.
            on_event: called with each event, in order, one call at a time, from the worker thread (`Queued` may come
                from the calling thread, before submit() returns). It must return quickly. The last event is `Done` or
                `Failed`. An error that it raises is logged, and cancels the request.

        Returns:
            The request, to cancel it.

        Raises:
            UsageError: the request is invalid.
            UnsupportedError: the model or its chat template cannot serve it.
            NotFoundError: there is no such session.
            SessionError: the session cannot be used: it is damaged, not read to its end by `headinfer read`, or of
                another model.
            CapacityError: the prompt is longer than the memory or the model allows.
            QueueFullError: too many requests wait.
            StateError: the service is closed.
        """
        max_new_tokens = self._checked(request)
        about, held = self._beginning(request.session)
        rest_ids = self._served.prompt_ids(request, about)
        if not rest_ids:
            raise UsageError("the prompt is empty: send a question")
        self._answerer.check_length(held + len(rest_ids), max_new_tokens)
        task = AnswerTask(request, rest_ids, max_new_tokens, on_event)
        with self._changed:
            self._check_queue()
            reading = self._read_of(request.session)
            task.tell(Queued(self._waiting()))
            if reading is not None:
                self._for_documents.setdefault(reading.name, []).append(task)
            else:
                self._turns.add(task)
            self._changed.notify_all()
        return task

    def documents(self) -> list[DocumentState]:
        """Return all documents and sessions, in the order of their names."""
        with self._changed:
            names = list(self._reads)
        states = {state.name: state for state in self._library.states()}
        for name in names:
            try:
                states[name] = self.document(name)
            except NotFoundError:  # it was removed meanwhile
                continue
        return [states[name] for name in sorted(states)]

    def document(self, name: str) -> DocumentState:
        """Return one document or session.

        Raises:
            NotFoundError: there is none of this name.
        """
        with self._changed:
            task = self._reads.get(name)
        if task is None:
            return self._library.state(name)
        state = task.state
        try:
            return dataclasses.replace(state, disk_bytes=self._library.manifest(name).disk_bytes)
        except SessionError:  # there is no checkpoint yet
            return state

    def add_document(self, filename: str, data: Path | bytes, client: str) -> DocumentState:
        """Store a document, and queue it to be read into a session.

        Args:
            filename: its name, of which the suffix tells its format.
            data: its bytes, or a file that holds them, which is copied.
            client: who adds it. The service is fair between clients.

        Returns:
            Its state. Its name is that of the session: one that a document of the same content has, or a new one.

        Raises:
            UsageError: the document is empty or too large, or its format is not known.
            QueueFullError: too many documents are stored or wait.
            CapacityError: the disk is full.
            StateError: the service is closed.
        """
        filename = clean_filename(filename)
        sha256, nbytes = digest(data)
        most = self.settings.limits.document_bytes
        if nbytes > most:
            sizes = f"{format_bytes(nbytes)}, and this server takes {format_bytes(most)}"
            raise UsageError(f"the document has {sizes}: send a shorter one")
        if not nbytes:
            raise UsageError("the document is empty: there is nothing to read")
        with self._adding:
            known = self._known(filename, sha256)
            if known is not None:
                return self.document(known)
            with self._changed:
                self._check_queue()
            if len(self.documents()) >= self.settings.limits.documents:
                raise QueueFullError(
                    f"the server stores {self.settings.limits.documents:,} documents, and takes no more: remove one", 60
                )
            upload = Upload(self._new_name(filename), filename, client, nbytes, sha256, time.time())
            self._uploads.store(upload, data)
            with self._changed:
                self._add_read(upload)
                self._changed.notify_all()
        return self.document(upload.name)

    def remove_document(self, name: str) -> None:
        """Remove a document or session: stop reading it, and remove its files. Requests on it that wait fail.

        Raises:
            NotFoundError: there is none of this name.
            SessionError: another process writes it, or its folder holds foreign files.
        """
        folder = self._library.folder(name)
        with self._adding, self._changed:  # so that no new document gets this name before all of the old one is removed
            task = self._reads.pop(name, None)
            if name in self._removing or (task is None and not own_files(folder)):
                raise NotFoundError(f"there is no document {name!r}")
            self._removing.add(name)
            if task is not None:
                self._turns.remove(task)
        try:
            if task is not None:
                task.close()
            self._uploads.remove(name)
            if own_files(folder):
                remove_session(folder)
        except SessionError as error:
            raise public(error, self.settings.root) from error
        finally:
            with self._changed:
                self._removing.discard(name)
                self._forgotten.append(name)
                self._release_waiting(name)  # they fail, since there is no such session now
                self._changed.notify_all()

    def document_text(self, name: str, start: int = 0, stop: int | None = None) -> str:
        """Return characters of a document's text, as they were read.

        Args:
            name: the document or session.
            start: the first character.
            stop: the character after the last one; None for the end of the document.

        Raises:
            NotFoundError: there is none of this name.
            UsageError: the range is invalid.
            SessionError: the text is not known.
        """
        with self._changed:
            is_read = name not in self._reads
        if not is_read:
            raise SessionError(f"the document {name} is not read to its end yet: ask for its text later")
        text = self._library.document(name).text
        end = len(text) if stop is None else stop
        if not 0 <= start <= end:
            raise UsageError(f"the characters {start} to {end} are no range: start must be 0 or more, and at most stop")
        return text[start:end]

    def state(self) -> ServerState:
        """Return figures about the service at this moment."""
        with self._changed:
            waiting = self._waiting()
            running = sum(not (isinstance(task, AnswerTask) and task.has_ended) for task in self._turns.begun())
        figures = self._meter.figures()
        figures["disk_kv_bytes"] += self._library.disk_bytes()
        figures["approximation"] = self.settings.approximation
        limit = self._served.shape.max_context_tokens or 0
        return ServerState(model=self.model, context_limit=limit, waiting=waiting, running=running, **figures)

    def close(self) -> None:
        """Cancel all work, and free the model. A document that is being read goes on when a service begins again."""
        with self._changed:
            self._is_closing = True
            for task in self._answer_tasks():
                task.cancel()
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> Service:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- requests and documents ------------------------------------------------------------------------------

    def _checked(self, request: Ask) -> int:
        """Check a request without its tokens.

        Returns:
            The tokens of its answer, at most.
        """
        if self._is_closing:
            raise StateError("the server is being shut down: try again later")
        limits = self.settings.limits
        max_new_tokens = request.max_new_tokens if request.max_new_tokens is not None else self.settings.max_new_tokens
        if bool(request.messages) == (request.prompt is not None):
            raise UsageError("a request has either messages or a prompt: send one of both")
        if len(request.messages) > limits.messages:
            given = len(request.messages)
            raise UsageError(f"the chat has {given:,} messages, and this server takes {limits.messages:,}: send fewer")
        if not 1 <= max_new_tokens <= limits.new_tokens:
            raise UsageError(f"{max_new_tokens:,} new tokens are asked for: ask for 1 to {limits.new_tokens:,}")
        if request.sampling.draft is not None:
            raise UsageError("a request cannot name a draft model: leave it out")
        if request.where and request.session is None:
            raise UsageError("`where` says where in a document an answer came from: name a document")
        request.sampling.check()
        return max_new_tokens

    def _beginning(self, session: str | None) -> tuple[Mapping[str, Any] | None, int]:
        """Return the facts and the tokens of the session that a request begins with; None and 0 without one.

        Raises:
            NotFoundError: there is no such session.
            SessionError: it cannot be used.
        """
        if session is None:
            return None, 0
        with self._changed:
            reading = self._read_of(session)
        if reading is not None:
            return {}, reading.state.of  # the sessions of add_document() have no system prompt, and are not raw
        manifest = self._library.usable(session)
        return manifest.about, manifest.tokens

    def _read_of(self, session: str | None) -> ReadTask | None:
        """Return the task that reads a session; None if there is none. The condition is held.

        Raises:
            SessionError: it has failed.
        """
        task = self._reads.get(session) if session is not None else None
        if task is not None and task.state.status == "failed":
            raise SessionError(task.state.error)
        return task

    def _check_queue(self) -> None:
        if self._is_closing:
            raise StateError("the server is being shut down: try again later")
        waiting = self._waiting()
        if waiting >= self.settings.queue_limit:
            raise QueueFullError(
                f"{waiting} requests wait already, and the server takes no more: try again later",
                max(1, round(min(self._mean_s, 600))),
            )

    def _waiting(self) -> int:
        """Return how many tasks wait that were not cancelled."""
        tasks: list[Task] = [*self._turns.waiting(), *(task for one in self._for_documents.values() for task in one)]
        return sum(not task.is_cancelled for task in tasks)

    def _answer_tasks(self) -> list[AnswerTask]:
        tasks = [task for task in self._turns.tasks() if isinstance(task, AnswerTask)]
        return tasks + [task for one in self._for_documents.values() for task in one]

    def _known(self, filename: str, sha256: str) -> str | None:
        """Return the name of the document that has this content already; None if there is none, or it has failed."""
        with self._changed:
            for name, task in self._reads.items():
                same = (task.upload.filename, task.upload.sha256) == (filename, sha256)
                if same and task.state.status != "failed":
                    return name
        return self._library.find_document(filename, sha256)

    def _new_name(self, filename: str) -> str:
        base = session_name(filename)
        name = base
        number = 1
        while name in self._reads or name in self._removing or self._library.folder(name).exists():
            number += 1
            name = f"{base}-{number}"
        return name

    def _add_read(self, upload: Upload) -> None:
        task = ReadTask(self._shelf, upload)
        self._reads[upload.name] = task
        self._turns.add(task)

    def _release_waiting(self, name: str) -> None:
        """Let the requests that wait for a document go on."""
        for task in self._for_documents.pop(name, []):
            self._turns.add(task)

    # -- the worker thread -----------------------------------------------------------------------------------

    def _work(self) -> None:
        """Do the steps of all tasks until close()."""
        with torch.inference_mode():
            while True:
                with self._changed:
                    while not (self._is_closing or self._forgotten or self._turns.tasks() or self._cancelled_waiting()):
                        self._changed.wait()
                    if self._is_closing:
                        break
                    for name in self._forgotten:
                        self._caches.drop_session(name)
                        self._library.forget(name)
                    self._forgotten = []
                    for waiting in self._cancelled_waiting():
                        self._turns.add(waiting)
                        self._for_documents[str(waiting.request.session)].remove(waiting)
                    task = self._turns.next()
                    others = [one for one in self._turns.waiting() if isinstance(one, AnswerTask)]
                    can_wait = len(self._turns.begun()) > 1
                if task is not None:
                    self._meter.begin()
                    self._do(task, others, can_wait=can_wait)
            self._end_all()

    def _cancelled_waiting(self) -> list[AnswerTask]:
        """Return the requests that were cancelled while they wait for a document."""
        return [task for tasks in self._for_documents.values() for task in tasks if task.is_cancelled]

    def _do(self, task: Task, others: list[AnswerTask], *, can_wait: bool) -> None:
        """Do a step of a task. Whatever it raises ends this task only."""
        start = time.monotonic()
        step: Step = "done"
        try:
            with already_warned():
                if isinstance(task, AnswerTask):
                    step = self._answerer.step(
                        task, others, can_wait=can_wait, others_wait=functools.partial(self._others_wait, task)
                    )
                elif isinstance(task, ReadTask):
                    step = task.step()
        except Exception as error:
            if not isinstance(error, HeadinferError):
                _logger.exception("a task has failed, and the server goes on")
            self._fail(task, error)
        with self._changed:
            if step == "later":
                self._turns.put_back(task)
            if step == "done":
                for one in (task, *(other for other in others if other.has_ended)):
                    self._turns.remove(one)
            waiting = self._after_read(task) if isinstance(task, ReadTask) else []
            if step == "done":
                self._mean_s += 0.2 * (time.monotonic() - start - self._mean_s)
        for one, event in waiting:
            one.tell(event)

    def _others_wait(self, task: AnswerTask) -> bool:
        """Return whether other clients than that of a task have work to do."""
        with self._changed:
            return any(one.client != task.client for one in self._turns.tasks())

    def _fail(self, task: Task, error: Exception) -> None:
        try:
            if isinstance(task, AnswerTask):
                self._answerer.fail(task, error)
            elif isinstance(task, ReadTask):
                task.fail(error)
        except Exception:
            _logger.exception("a task that has failed could not be ended")

    def _after_read(self, task: ReadTask) -> list[tuple[AnswerTask, Event]]:
        """Let the requests that wait for a document go on if it is read. The condition is held.

        Returns:
            What those that wait must be told.
        """
        state = task.state
        if self._reads.get(task.name) is not task:
            return []
        if state.status == "ready":
            del self._reads[task.name]
            self._release_waiting(task.name)
        elif state.status == "failed":
            return [(one, Failed(SessionError(state.error))) for one in self._for_documents.pop(task.name, [])]
        elif state.of:
            waiting = self._for_documents.get(task.name, [])
            return [(one, Prefill(state.tokens, state.of + len(one.rest_ids), state.eta_s)) for one in waiting]
        return []

    def _end_all(self) -> None:
        """End all tasks, and free the model."""
        with self._changed:
            answers = self._answer_tasks()
            reads = list(self._reads.values())
        for task in answers:
            task.end("cancelled")
        for read in reads:
            try:
                read.close()
            except HeadinferError as error:
                _logger.warning("the session %s: %s", read.name, error)
        self._caches.clear()
        self._served.close()
        self._uploads.close()
