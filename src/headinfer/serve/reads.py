"""Reads a document into its session, step by step."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import replace

from headinfer.errors import CapacityError, HeadinferError, SessionError
from headinfer.jobs.documents import document_of
from headinfer.jobs.read import prepare_read
from headinfer.jobs.reading import PreparedRead, Reading, ReadJob
from headinfer.serve.caches import Caches, Kept
from headinfer.serve.errors import public
from headinfer.serve.library import document_characters
from headinfer.serve.meter import Meter, Pace
from headinfer.serve.model import ServedModel
from headinfer.serve.requests import DocumentState
from headinfer.serve.settings import ServeSettings
from headinfer.serve.turns import Kind, Step
from headinfer.serve.uploads import Upload, Uploads
from headinfer.sessions.folder import Lock, check_unchanged, session_folder
from headinfer.sessions.manifest import MANIFEST, Manifest

__all__ = ["ReadTask", "Shelf"]

_logger = logging.getLogger(__name__)


class Shelf:
    """What reading needs of the service: its settings, its model, its caches and where documents are stored."""

    def __init__(
        self, settings: ServeSettings, model: ServedModel, caches: Caches, uploads: Uploads, meter: Meter, pace: Pace
    ) -> None:
        self.settings = settings
        self.model = model
        self.caches = caches
        self.uploads = uploads
        self.meter = meter
        self.pace = pace


class ReadTask:
    """A document that was sent, on its way into a session.

    The first step makes text of its bytes, the second one checks it and takes the session's lock, and each further one
    reads a chunk. Whatever happens, the session holds all chunks before.

    Args:
        shelf: what it needs of the service.
        upload: the document.

    Attributes:
        client: who sent it.
        kind: "read".
        name: the name of its session.
        upload: the document.
        is_cancelled: whether it must end. close() ends it.
    """

    kind: Kind = "read"

    def __init__(self, shelf: Shelf, upload: Upload) -> None:
        self.client = upload.client
        self.name = upload.name
        self.is_cancelled = False
        self._shelf = shelf
        self.upload = upload
        self._working = threading.Lock()  # held in a step, and to end the task
        self._prepared: PreparedRead | None = None
        self._lock: Lock | None = None
        self._reading: Reading | None = None
        self._job: ReadJob | None = None
        self._state = DocumentState(
            upload.name,
            upload.filename,
            upload.nbytes,
            upload.created_s,
            "waiting",
            tokens=0,
            of=0,
            approximation=shelf.settings.approximation,
        )

    @property
    def state(self) -> DocumentState:
        """The state of the document."""
        return self._state

    def step(self) -> Step:
        """Do the next step. The worker thread calls it, in torch.inference_mode().

        Raises:
            Exception: the document cannot be read. fail() notes the reason.
        """
        with self._working:
            if self.is_cancelled:
                return "done"
            if self._job is None:
                self._convert()
            elif self._reading is None:
                self._begin()
            else:
                self._read_chunk()
            if self._reading is None or not self._reading.is_done:
                return "goes on"
            self._finish()
            return "done"

    def fail(self, error: BaseException) -> None:
        """Note why the document cannot be read, and end."""
        reason = str(public(error, self._shelf.settings.root))
        self._state = replace(self._state, status="failed", error=reason, eta_s=None)
        try:
            self.close()
        except HeadinferError as other:  # such as the same full disk
            _logger.warning("the session %s: %s", self.name, other)

    def close(self) -> None:
        """End the task, within one chunk. What was read is kept, and a later task for the same session goes on."""
        self.is_cancelled = True
        with self._working:
            self._release()

    def _convert(self) -> None:
        upload = self.upload
        settings = self._shelf.settings
        self._state = replace(self._state, status="reading")
        document = document_of(self._shelf.uploads.data(upload), upload.filename)
        self._job = ReadJob(
            settings.model,
            document,
            upload.name,
            settings.root,
            chunk_tokens=settings.chunk_tokens,
            dtype=settings.dtype,
            device=settings.device,
            seed=settings.seed,
            options=settings.options,
        )

    def _begin(self) -> None:
        shelf = self._shelf
        assert self._job is not None
        folder = session_folder(shelf.settings.root, self.name)
        refusal = shelf.model.refusal(Manifest.read(folder)) if (folder / MANIFEST).exists() else ""
        if refusal:
            raise SessionError(f"the session {self.name} {refusal}: remove it, or add the file under another name")
        prepared = self._prepare(self._job)
        self._lock = Lock(prepared.folder)
        check_unchanged(prepared.folder, prepared.generation)
        self._reading = Reading(prepared, shelf.model.model, self._lock)
        characters = document_characters(prepared.about)
        self._state = replace(self._state, of=self._reading.tokens, characters=characters)
        self._prepared = prepared
        self._note()

    def _prepare(self, job: ReadJob) -> PreparedRead:
        """Check the document. Old caches are freed if its KV does not fit beside them."""
        model = self._shelf.model
        while True:
            try:
                return prepare_read(job, model.source, model.tokenizer)
            except CapacityError:
                if not self._shelf.caches.drop_one():
                    raise

    def _read_chunk(self) -> None:
        reading = self._reading
        assert reading is not None
        before = reading.done
        start = time.perf_counter()
        reading.step()
        seconds = time.perf_counter() - start
        self._shelf.meter.note_read(reading.done - before, seconds)
        self._shelf.pace.note(before, reading.done, seconds)
        self._note()

    def _note(self) -> None:
        reading = self._reading
        assert reading is not None
        eta_s = self._shelf.pace.eta_s(reading.done, reading.tokens)
        self._state = replace(self._state, tokens=reading.done, eta_s=eta_s)

    def _finish(self) -> None:
        """Keep the cache, and remove what was sent: the session is complete."""
        reading = self._reading
        prepared = self._prepared
        assert reading is not None
        assert prepared is not None
        self._release()
        generation = Manifest.read(prepared.folder).generation
        self._shelf.caches.keep(Kept(reading.cache, prepared.input_ids[0], self.name, generation))
        self._shelf.uploads.remove(self.name)
        self._state = replace(self._state, status="ready", eta_s=None)

    def _release(self) -> None:
        """Finish the last checkpoint, and release the lock of the session."""
        reading = self._reading
        lock = self._lock
        self._reading = None
        self._lock = None
        try:
            if reading is not None:
                reading.close()
        finally:
            if lock is not None:
                lock.release()
