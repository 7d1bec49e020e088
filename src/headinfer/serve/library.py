"""The sessions of a folder: what clients see of them, and the text of their documents."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from headinfer.errors import SessionError, UsageError
from headinfer.jobs.where import DocumentText
from headinfer.serve.errors import NotFoundError, public
from headinfer.serve.model import ServedModel
from headinfer.serve.requests import DocumentState
from headinfer.sessions.folder import read_consistently, session_folder, session_names
from headinfer.sessions.loader import saved_ids
from headinfer.sessions.manifest import MANIFEST, Manifest
from headinfer.sessions.ownership import LOCK

__all__ = ["Library", "document_characters", "document_tokens"]

_TEXTS_KEPT = 4
_IDS_KEPT = 8  # sessions whose token ids stay in memory; a million take 8 MB


class Library:
    """The sessions of a folder. Any thread may use it.

    Args:
        root: the folder of all sessions.
        model: the model that reads them.
    """

    def __init__(self, root: Path, model: ServedModel) -> None:
        self._root = root
        self._model = model
        self._lock = threading.Lock()
        self._manifests: dict[str, tuple[tuple[int, int], Manifest]] = {}
        # Of the sessions that were asked last, with the manifest that manifest() has read. A new document may have the
        # name and the generation of one that was removed.
        self._ids: list[tuple[Manifest, torch.Tensor]] = []
        self._texts: list[tuple[Manifest, DocumentText]] = []

    def folder(self, name: str) -> Path:
        """Return the folder of a session, which need not exist.

        Raises:
            NotFoundError: no session can have this name.
        """
        try:
            return session_folder(self._root, name)
        except UsageError as error:
            raise NotFoundError(str(public(error, self._root))) from error

    def manifest(self, name: str) -> Manifest:
        """Return the checkpoint of a session.

        Raises:
            NotFoundError: there is no such session.
            SessionError: it is damaged.
        """
        folder = self.folder(name)
        try:
            found = os.stat(folder / MANIFEST)
        except OSError:
            raise NotFoundError(f"there is no document {name!r}: add its file first") from None
        stamp = (found.st_mtime_ns, found.st_size)
        with self._lock:
            known = self._manifests.get(name)
        if known is not None and known[0] == stamp:
            return known[1]
        manifest = Manifest.read(folder)
        with self._lock:
            self._manifests[name] = (stamp, manifest)
        return manifest

    def exists(self, name: str) -> bool:
        """Return whether there is a session of this name."""
        return (self.folder(name) / MANIFEST).exists()

    def forget(self, name: str) -> None:
        """Forget a session that was removed."""
        with self._lock:
            removed = self._manifests.pop(name, None)
            if removed is not None:
                self._ids = [known for known in self._ids if known[0] is not removed[1]]
                self._texts = [known for known in self._texts if known[0] is not removed[1]]

    def usable(self, name: str) -> Manifest:
        """Return the checkpoint of a session that questions can be asked to.

        Raises:
            NotFoundError: there is no such session.
            SessionError: it is damaged, not read to its end, or of another model.
        """
        manifest = self.manifest(name)
        state = self._state(name, manifest)
        if state.status == "partial":
            raise SessionError(
                f"the session {name} holds {state.tokens:,} of the document's {state.of:,} tokens: run the same "
                "`headinfer read` again, which goes on from there"
            )
        if state.status == "failed":
            raise SessionError(state.error)
        return manifest

    def states(self) -> list[DocumentState]:
        """Return the states of all sessions."""
        states = []
        for name in session_names(self._root):
            try:
                states.append(self._state(name, self.manifest(name)))
            except NotFoundError:  # it was removed meanwhile
                continue
            except SessionError as error:
                states.append(self._failed(name, error))
        return states

    def state(self, name: str) -> DocumentState:
        """Return the state of a session.

        Raises:
            NotFoundError: there is no such session.
        """
        try:
            return self._state(name, self.manifest(name))
        except NotFoundError:
            raise
        except SessionError as error:
            return self._failed(name, error)

    def disk_bytes(self) -> int:
        """Return the bytes of the data files of all sessions."""
        return sum(state.disk_bytes for state in self.states())

    def find_document(self, filename: str, sha256: str) -> str | None:
        """Return the name of a session that has been read from the same file alone; None if there is none."""
        for state in self.states():
            files = self.manifest(state.name).about.get("files", []) if state.status == "ready" else []
            if len(files) == 1 and (files[0]["name"], files[0]["sha256"]) == (filename, sha256):
                return state.name
        return None

    def ids(self, name: str) -> torch.Tensor:
        """Return the token ids [T] of a session, int64.

        Raises:
            NotFoundError: there is no such session.
            SessionError: it cannot be used, or does not hold its token ids.
        """
        manifest = self.usable(name)
        with self._lock:
            for known, known_ids in self._ids:
                if known is manifest:
                    return known_ids
        folder = self.folder(name)
        ids = read_consistently(folder, lambda found: saved_ids(folder, found))
        if ids is None or ids.shape[0] != 1:
            raise SessionError(f"the session {name} does not hold its token ids: ask it in Python")
        with self._lock:
            self._ids = [(manifest, ids[0]), *self._ids][:_IDS_KEPT]
        return ids[0]

    def document(self, name: str) -> DocumentText:
        """Return the text of a session's document, from its tokens.

        Raises:
            NotFoundError: there is no such session.
            SessionError: it cannot be used, or does not hold its token ids.
        """
        manifest = self.usable(name)
        with self._lock:
            for known, known_text in self._texts:
                if known is manifest:
                    return known_text
        text = DocumentText(self._model.tokenizer, self.ids(name).tolist(), manifest.about)
        with self._lock:
            self._texts = [(manifest, text), *self._texts][:_TEXTS_KEPT]
        return text

    def _state(self, name: str, manifest: Manifest) -> DocumentState:
        about = manifest.about
        files = about.get("files", [])
        tokens = document_tokens(manifest)
        error = ""
        refusal = self._model.refusal(manifest)
        if refusal:
            error = f"the session {name} {refusal}: ask it with `headinfer ask`"
        elif len(manifest.rows) != 1:
            error = f"the session {name} holds {len(manifest.rows)} rows, and a question is asked to one"
        return DocumentState(
            name=name,
            filename=files[0]["name"] if len(files) == 1 and files[0]["name"] != "text" else name,
            nbytes=sum(file["bytes"] for file in files),
            created_s=self._created_s(name),
            status="failed" if error else "ready" if manifest.tokens >= tokens else "partial",
            tokens=min(manifest.tokens, tokens),
            of=tokens,
            characters=document_characters(about),
            disk_bytes=manifest.disk_bytes,
            error=error,
            approximation=manifest.approximation,
        )

    def _failed(self, name: str, error: SessionError) -> DocumentState:
        return DocumentState(name, name, 0, self._created_s(name), "failed", 0, 0, error=str(public(error, self._root)))

    def _created_s(self, name: str) -> float:
        """Return when a session was begun. Its lock is written once."""
        for file in (LOCK, MANIFEST):
            try:
                return os.stat(self._root / name / file).st_mtime
            except OSError:
                continue
        return 0.0


def document_tokens(manifest: Manifest) -> int:
    """Return the tokens of a session's document, those that are not read yet included."""
    return int(manifest.about.get("document_tokens", manifest.tokens))


def document_characters(about: Mapping[str, Any]) -> int:
    """Return the characters of a document with its headings; 0 if a session does not know them."""
    return sum(len(piece["before"]) + piece["stop"] - piece["start"] for piece in about.get("pieces", []))
