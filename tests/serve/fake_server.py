"""A small server with the server's HTTP contract and canned answers, to test the page without a model.

A document is read in two steps, one for each GET /v1/files. The answer, its passages and the figures are given, so a
test can say "this answer" and need not find a question that leads to it.
"""

import json
import mimetypes
import threading
from dataclasses import dataclass, field
from email.parser import BytesParser
from email.policy import HTTP
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import headinfer

PAGE = Path(headinfer.__file__).parent / "serve" / "page"
STEPS = 2
POLICY = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


@dataclass
class Script:
    """What the server says.

    Attributes:
        key: the key that it wants; empty for none.
        answer: the pieces of each answer.
        passages: function of a document's text that returns the passages of each answer.
        prefill: chunks of progress before each answer.
        hold: if it is set, the answer stops after its first piece until the event is set.
        error: if it is set, each question is refused with this sentence.
        state: figures that replace those of /v1/state.
        steps: how many GETs of the list a document takes to be read.
    """

    key: str = ""
    answer: tuple[str, ...] = ("The magic number ", "is 60732.")
    passages: object = lambda text: ()
    prefill: tuple[dict, ...] = ()
    hold: threading.Event | None = None
    error: str = ""
    state: dict = field(default_factory=dict)
    steps: int = STEPS


@dataclass
class FakeDocument:
    name: str
    filename: str
    text: str
    created: int
    step: int = 0
    error: str = ""


class FakeServer:
    """The server, on a free port of 127.0.0.1, until it is left."""

    def __init__(self, script=None):
        self.script = script or Script()
        self.documents = {}
        self.requests = []  # (method, path) of each
        self.asked = []  # the body of each question
        self.created = 1_700_000_000
        handler = type("Handler", (_Handler,), {"fake": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/"

    def __enter__(self):
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()

    def add(self, filename, text, *, step=0, error=""):
        self.created += 1
        document = FakeDocument(f"doc-{len(self.requests)}-{self.created}", filename, text, self.created, step, error)
        self.documents[document.name] = document
        return document

    def file(self, document):
        tokens = len(document.text) // 4
        is_read = document.step >= self.script.steps
        state = "failed" if document.error else "ready" if is_read else "reading" if document.step else "waiting"
        read = tokens * min(document.step, self.script.steps) // self.script.steps
        return {
            "id": document.name,
            "object": "file",
            "bytes": len(document.text.encode()),
            "created_at": document.created,
            "filename": document.filename,
            "purpose": "user_data",
            "status": {"failed": "error", "ready": "processed"}.get(state, "uploaded"),
            "status_details": document.error or None,
            "headinfer": {
                "state": state,
                "tokens": read,
                "of": tokens,
                "characters": len(document.text),
                "eta_s": None if state != "reading" else 12.0 * (self.script.steps - document.step),
                "disk_bytes": 1024 * read,
            },
        }

    def state(self):
        read = sum(self.file(document)["headinfer"]["tokens"] for document in self.documents.values())
        return {
            "model": "embedded",
            "context_limit": 1_048_576,
            "device_kv_bytes": 4 << 20,
            "device_kv_budget_bytes": 8 << 20,
            "host_kv_bytes": 1024 * read,
            "disk_kv_bytes": 1024 * read,
            "tokens_per_s": 1234.5,
            "link_bytes_per_s": 24.1e9,
            "cpu_bytes_per_s": 8.3e9,
            "waiting": 0,
            "running": 0,
        } | self.script.state


class _Handler(BaseHTTPRequestHandler):
    fake: FakeServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def handle_one(self):
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        self.fake.requests.append((self.command, path))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if not path.startswith("/v1/"):
            return self.page(path)
        if self.fake.script.key and self.headers.get("Authorization") != f"Bearer {self.fake.script.key}":
            return self.fail(401, "This server needs a key: send it as 'Authorization: Bearer KEY'.")
        match self.command, path.split("/")[2:]:
            case "GET", ["state"]:
                return self.send(self.fake.state())
            case "GET", ["models"]:
                return self.send({"object": "list", "data": [{"id": "embedded", "object": "model"}]})
            case "GET", ["files"]:
                for document in self.fake.documents.values():
                    document.step += 1
                return self.send({"object": "list", "data": [*map(self.fake.file, self.fake.documents.values())]})
            case "POST", ["files"]:
                head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
                for part in BytesParser(policy=HTTP).parsebytes(head + body).iter_parts():
                    if part.get_filename():
                        text = part.get_payload(decode=True).decode()
                        return self.send(self.fake.file(self.fake.add(part.get_filename(), text)))
            case method, ["files", name, *rest] if name in self.fake.documents:
                document = self.fake.documents[name]
                if rest == ["content"]:
                    query = parse_qs(parts.query)
                    text = document.text[int(query.get("start", ["0"])[0]) : int(query.get("stop", [str(1 << 40)])[0])]
                    return self.reply(200, text.encode(), "text/plain; charset=utf-8")
                if method == "DELETE":
                    del self.fake.documents[name]
                    return self.send({"id": name, "object": "file", "deleted": True})
                return self.send(self.fake.file(document))
            case "POST", ["chat", "completions"]:
                return self.chat(json.loads(body))
        return self.fail(404, "There is no such address here.")

    do_GET = do_POST = do_DELETE = handle_one

    def page(self, path):
        file = PAGE / "index.html" if path == "/" else PAGE / path.removeprefix("/page/")
        if path != "/" and not (path.startswith("/page/") and file.parent == PAGE and file.is_file()):
            return self.fail(404, "There is no such address here.")
        return self.reply(200, file.read_bytes(), mimetypes.guess_type(file.name)[0])

    def reply(self, status, data, media_type):
        self.send_response(status)
        self.send_header("Content-Type", media_type)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Security-Policy", POLICY)
        self.end_headers()
        self.wfile.write(data)

    def send(self, value):
        self.reply(200, json.dumps(value).encode(), "application/json")

    def fail(self, status, message):
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
        self.reply(status, json.dumps({"error": error}).encode(), "application/json")

    def chat(self, body):
        script = self.fake.script
        self.fake.asked.append(body)
        if script.error:
            return self.fail(400, script.error)
        document = self.fake.documents.get(body.get("metadata", {}).get("session"))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True

        def chunk(**fields):
            line = json.dumps({"id": "chat", "object": "chat.completion.chunk", "choices": [], **fields})
            self.wfile.write(f"data: {line}\n\n".encode())
            self.wfile.flush()

        def piece(delta, finish_reason=None):
            chunk(choices=[{"index": 0, "delta": delta, "finish_reason": finish_reason}])

        try:
            for progress in script.prefill:
                chunk(prefill=progress)
                self.wfile.write(b": still here\n\n")
            if script.prefill and script.hold:
                self.wfile.flush()
                script.hold.wait(60)
            for index, text in enumerate(script.answer):
                piece({"content": text})
                if index == 0 and script.hold:
                    script.hold.wait(60)
            piece({}, "stop")
            last = {
                "usage": {
                    "prompt_tokens": 8234,
                    "completion_tokens": 12,
                    "total_tokens": 8246,
                    "prompt_tokens_details": {"cached_tokens": 8201},
                }
            }
            if document and body.get("where"):
                last["where"] = list(script.passages(document.text))
            chunk(**last)
            self.wfile.write(b"data: [DONE]\n\n")
        except (BrokenPipeError, ConnectionResetError):
            pass  # the page has stopped the answer
