"""A service whose answers are scripted: what the HTTP layer needs of `Service`, without a model."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

from headinfer.errors import UsageError
from headinfer.jobs.sampling import Sampling
from headinfer.serve.errors import NotFoundError
from headinfer.serve.events import Done, Event, Passage, Text, Where
from headinfer.serve.requests import Ask, DocumentState, ServerState
from headinfer.serve.settings import ServeSettings
from headinfer.serve.uploads import clean_filename

ROOT = Path("/srv/secret place/sessions")
PASSAGES = (Passage(4, 9, 0.75, "brave", "book.txt", 4),)


class ScriptedService:
    """Answers each request with the events that `script` returns for it.

    A `float` among the events waits for as many seconds, or until the request is cancelled. An exception in place of
    events is raised by submit(). A cancelled request ends at once with Done("cancelled").
    """

    def __init__(self, script: Callable[[Ask], object] | None = None) -> None:
        self.settings = ServeSettings(model="tiny", root=ROOT, sampling=Sampling(), max_new_tokens=16)
        self.model = "tiny"
        self.is_ready = True
        self.script = script or repeat
        self.asked: list[Ask] = []
        self.works: list[ScriptedWork] = []
        self.stored: dict[str, tuple[DocumentState, str]] = {}

    def submit(self, request: Ask, on_event: Callable[[Event], None]) -> "ScriptedWork":
        self.asked.append(request)
        script = self.script(request)
        if isinstance(script, Exception):
            raise script
        work = ScriptedWork(script, on_event)
        self.works.append(work)
        work.thread.start()
        return work

    def documents(self) -> list[DocumentState]:
        return [self.stored[name][0] for name in sorted(self.stored)]

    def document(self, name: str) -> DocumentState:
        return self._stored(name)[0]

    def add_document(self, filename: str, data: Path | bytes, client: str) -> DocumentState:
        content = data if isinstance(data, bytes) else data.read_bytes()
        if not content:
            raise UsageError(f"{ROOT}/.uploads/x/{filename} is empty: add a file with text")
        filename = clean_filename(filename)
        name = f"doc-{len(self.stored)}"
        state = DocumentState(name, filename, len(content), time.time(), "ready", len(content), len(content))
        self.stored[name] = (state, content.decode())
        return state

    def remove_document(self, name: str) -> None:
        self._stored(name)
        del self.stored[name]

    def document_text(self, name: str, start: int = 0, stop: int | None = None) -> str:
        return self._stored(name)[1][start:stop]

    def state(self) -> ServerState:
        return ServerState(model="tiny", context_limit=4096, host_kv_bytes=7, prompt_tokens_total=len(self.asked))

    def close(self) -> None:
        for work in self.works:
            work.cancel()

    def _stored(self, name: str) -> tuple[DocumentState, str]:
        if name not in self.stored:
            raise NotFoundError(f"there is no session {name} in {ROOT}")
        return self.stored[name]


class ScriptedWork:
    """A request that plays its script in a thread of its own."""

    def __init__(self, script: list[Event | float], on_event: Callable[[Event], None]) -> None:
        self._script = script
        self._on_event = on_event
        self.cancelled = threading.Event()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._play, daemon=True)

    def cancel(self) -> None:
        self.cancelled.set()

    def _play(self) -> None:
        for event in self._script:
            if isinstance(event, float):
                self.cancelled.wait(event)
            elif not self.cancelled.is_set():
                self._on_event(event)
        if self.cancelled.is_set():
            self._on_event(Done("cancelled", 0, 0, 0))
        self.ended.set()


def repeat(request: Ask) -> list[Event]:
    """Answer with the last message or the prompt, word by word."""
    text = request.messages[-1]["content"] if request.messages else str(request.prompt)
    words = text.split() or ["nothing"]
    where = [Where(PASSAGES)] if request.where else []
    return [*(Text(f"{word} ") for word in words), *where, Done("stop", len(words), 1, len(words))]
