"""A scripted service for the page: documents that are read in steps, and figures that a test sets."""

import threading
from dataclasses import replace
from pathlib import Path

from scripted_service import ScriptedService, ScriptedWork

from headinfer.errors import UsageError
from headinfer.serve.events import Done, Event, Passage, Prefill, Text, Where
from headinfer.serve.requests import Ask, DocumentState, ServerState

STEPS = 2


class PageService(ScriptedService):
    """Answers each question with the same words and passages. reset() returns to the words of the beginning.

    Attributes:
        answer: the pieces of each answer.
        passages: a function of a document's text that returns the passages of each answer.
        prefill: events before each answer. If there is one, the answer waits for `may_answer`.
        may_answer: set if answers need not wait.
        error: if it is set, each question is refused with it.
        figures: fields of the state that replace those of the service.
    """

    def __init__(self) -> None:
        super().__init__(self._play)
        self.model = "embedded"
        self.may_answer = threading.Event()
        self.reset()

    def reset(self) -> None:
        self.close()
        self.answer = ("The magic number ", "is 60732.")
        self.passages = lambda text: ()
        self.prefill: tuple[Event, ...] = ()
        self.may_answer.set()
        self.error: Exception | None = None
        self.figures: dict[str, object] = {}
        self.asked.clear()
        self.works.clear()
        self.stored.clear()
        self.created_s = 1_700_000_000.0

    def add(self, filename: str, text: str, *, status: str = "ready", error: str = "") -> str:
        """Add a document; one that waits is read in `STEPS` steps, one for each time that the list is asked for."""
        self.created_s += 1
        name = f"doc-{self.created_s:.0f}"
        tokens = len(text) // 4
        read = tokens if status == "ready" else 0
        state = DocumentState(name, filename, len(text.encode()), self.created_s, status, read, tokens, len(text))
        self.stored[name] = (replace(state, error=error, disk_bytes=1024 * read), text)
        return name

    def add_document(self, filename: str, data: Path | bytes, client: str) -> DocumentState:
        content = data if isinstance(data, bytes) else data.read_bytes()
        if not content:
            raise UsageError(f"{filename} is empty: add a file with text")
        return self.document(self.add(filename, content.decode(), status="waiting"))

    def documents(self) -> list[DocumentState]:
        for name, (state, text) in list(self.stored.items()):
            if state.status in ("waiting", "reading"):
                step = STEPS if not state.of else round(STEPS * state.tokens / state.of) + (state.status == "reading")
                read = state.of * min(max(step, 1), STEPS) // STEPS
                status = "ready" if step >= STEPS else "reading"
                eta_s = None if status == "ready" else 12.0
                self.stored[name] = (
                    replace(state, status=status, tokens=read, eta_s=eta_s, disk_bytes=1024 * read),
                    text,
                )
        return super().documents()

    def state(self) -> ServerState:
        read = sum(state.tokens for state, _ in self.stored.values())
        state = ServerState(
            "embedded", 1_048_576, 255 << 20, 256 << 20, 1024 * read, 1024 * read, 1234.5, 24.1e9, 8.3e9
        )
        return replace(state, **self.figures)

    def submit(self, request, on_event) -> ScriptedWork:
        self.asked.append(request)
        if self.error:
            raise self.error
        work = _WaitingWork(self, self._play(request), on_event)
        self.works.append(work)
        work.thread.start()
        return work

    def _play(self, request: Ask) -> list[Event]:
        found = self.passages(self.document_text(request.session)) if request.where else ()
        where = [Where(tuple(found))] if request.where else []
        return [*self.prefill, *(Text(text) for text in self.answer), *where, Done("stop", 8234, 8201, 12)]


class _WaitingWork(ScriptedWork):
    """A request that waits after its progress until the service may answer, or until it is cancelled."""

    def __init__(self, service: PageService, script: list[Event], on_event) -> None:
        def follow(event: Event) -> None:
            on_event(event)
            if isinstance(event, Prefill):
                while not service.may_answer.wait(0.01) and not self.cancelled.is_set():
                    pass

        super().__init__(script, follow)


def passage(text: str, start: int, stop: int, share: float, file: str = "") -> Passage:
    """A passage of a document's text."""
    return Passage(start, stop, share, text[start:stop], file, start)
