"""The service: one model, one thread that does all of its work, and the documents and requests of several clients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Protocol

from headinfer.serve.events import Event
from headinfer.serve.requests import Ask, DocumentState, ServerState
from headinfer.serve.settings import ServeSettings

__all__ = ["Service", "Work"]


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
        is_ready: whether the worker thread runs.

    Raises:
        UsageError: a setting is invalid.
        UnsupportedError: the model is not served.
        CapacityError: the model does not fit this machine.
    """

    def __init__(self, settings: ServeSettings) -> None:
        self.settings = settings
        self.model = Path(settings.model).name if Path(settings.model).is_dir() else settings.model
        self.is_ready = True

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
        raise NotImplementedError

    def documents(self) -> list[DocumentState]:
        """Return all documents and sessions, in the order of their names."""
        raise NotImplementedError

    def document(self, name: str) -> DocumentState:
        """Return one document or session.

        Raises:
            NotFoundError: there is none of this name.
        """
        raise NotImplementedError

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
        raise NotImplementedError

    def remove_document(self, name: str) -> None:
        """Remove a document or session: stop reading it, and remove its files. Requests on it that wait fail.

        Raises:
            NotFoundError: there is none of this name.
            SessionError: another process writes it, or its folder holds foreign files.
        """
        raise NotImplementedError

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
        raise NotImplementedError

    def state(self) -> ServerState:
        """Return figures about the service at this moment."""
        raise NotImplementedError

    def close(self) -> None:
        """Cancel all work, and free the model. A document that is being read goes on when a service begins again."""
        self.is_ready = False

    def __enter__(self) -> Service:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
