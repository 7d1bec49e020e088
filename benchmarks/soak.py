"""Soaks a real `headinfer serve`: clients of all kinds for minutes, some of which leave, and kill -9 in between.

    python benchmarks/soak.py [--minutes 10] [--clients 6] [--out benchmarks/results/soak.json]

The documents hold needles, so the right answers are known; each answer is also compared with the first one to the same
question. In the first 40 % of the time the server is killed, in turns while it reads a document and while it answers,
and started again. Nothing that it has acknowledged may be lost. The rest of the time is without kills: the memory of
the process at the begin and the end of it is what a long run costs. The exit code is 1 if anything was lost or wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import psutil

from headinfer.embedded import embedded_text
from headinfer.evals.needles import Needle, build_haystack, random_needles
from headinfer.info import gather_info, machine
from headinfer.utils.files import write_text

MODEL = "embedded"
_DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
_KILLS_SHARE = 0.4  # of the time
_START_S = 300.0
_READ_S = 600.0


@dataclass
class Book:
    """A document with needles that the server has acknowledged."""

    file_id: str
    text: str
    needles: list[Needle]
    is_deleted: bool = False


@dataclass
class Findings:
    """What was seen. All methods may be called from any thread."""

    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    first_answers: dict[tuple[str, ...], str] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, what: str) -> None:
        """Count an event."""
        with self.lock:
            self.counts[what] += 1

    def problem(self, what: str) -> None:
        """Note something that must not happen."""
        with self.lock:
            self.problems.append(what)
        print(f"PROBLEM: {what}", file=sys.stderr, flush=True)

    def compare(self, key: tuple[str, ...], needle: Needle, answer: str) -> None:
        """Compare an answer with the first one to the same question, and look for the needle's number."""
        with self.lock:
            first = self.first_answers.setdefault(key, answer)
        if answer != first:
            self.problem(f"{key}: {answer!r} is not {first!r}")
        self.count("answers with the right number" if needle.number in answer else "answers with another number")


class Server:
    """A server process over a folder of sessions, which can be killed and started again."""

    def __init__(self, root: Path, log: Path, chunk_tokens: int) -> None:
        self._root = root
        self._log = log
        self._chunk_tokens = chunk_tokens
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self.is_up = threading.Event()
        self.starts = 0
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "headinfer", "serve", MODEL, "--device", "cpu", "--sessions", str(self._root)]
        command += ["--port", str(self.port), "--chunk-tokens", str(self._chunk_tokens)]
        with open(self._log, "ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log)

    def wait(self) -> float:
        """Wait until the server answers; return the seconds."""
        started = time.monotonic()
        while time.monotonic() - started < _START_S:
            if self.process.poll() is not None:
                raise SystemExit(f"the server has ended: see {self._log}")
            with suppress(httpx2.TransportError):
                if httpx2.get(f"{self.address}/health", timeout=5).status_code == 200:
                    self.starts += 1
                    self.is_up.set()
                    return time.monotonic() - started
            time.sleep(0.2)
        raise SystemExit(f"the server does not answer: see {self._log}")

    def kill(self) -> float:
        """Kill the server as the system would, and start it again; return the seconds until it answers."""
        self.is_up.clear()
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.process = self._start()
        return self.wait()

    def stop(self) -> int:
        """End the server as Ctrl-C does; return its exit code."""
        self.is_up.clear()
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(60)

    def memory(self) -> dict[str, int]:
        """Return what the process holds now."""
        process = psutil.Process(self.process.pid)
        return {"rss_bytes": process.memory_info().rss, "threads": process.num_threads(), "files": process.num_fds()}


class Clients:
    """What clients do. Each call is one request, or a few, of a random kind."""

    def __init__(self, server: Server, books: list[Book], findings: Findings) -> None:
        self._server = server
        self._books = books
        self._findings = findings
        self._kinds: dict[Callable[[httpx2.Client, random.Random], None], int] = {
            self.complete: 6,
            self.chat: 4,
            self.respond: 2,
            self.leave_a_stream: 3,
            self.leave_while_waiting: 2,
            self.add_and_delete: 2,
            self.look: 3,
            self.send_nonsense: 2,
        }

    def run(self, seed: int, until: float) -> None:
        """Send requests until a time."""
        rng = random.Random(seed)
        kinds = list(self._kinds)
        with httpx2.Client(verify=False, timeout=300, base_url=self._server.address) as http:
            while time.monotonic() < until:
                self._server.is_up.wait()
                starts = self._server.starts
                kind = rng.choices(kinds, list(self._kinds.values()))[0]
                try:
                    kind(http, rng)
                    self._findings.count(kind.__name__)
                except (httpx2.TransportError, httpx2.StreamError) as error:
                    time.sleep(0.5)  # until a kill is known
                    if starts == self._server.starts and self._server.is_up.is_set():
                        self._findings.problem(f"{kind.__name__}: {type(error).__name__} {error}")
                    self._findings.count("requests cut by a kill")

    def complete(self, http: httpx2.Client, rng: random.Random) -> None:
        """Ask about a needle, and wait for the whole answer."""
        book, needle = self._question(rng)
        body = {
            "prompt": needle.question + needle.lead,
            "max_tokens": 16,
            "stop": ["."],
            "metadata": {"session": book.file_id},
            "where": rng.random() < 0.3,
        }
        answer = self._post(http, "/v1/completions", body, book)
        if answer is not None:
            self._findings.compare(("complete", book.file_id, needle.word), needle, answer["choices"][0]["text"])

    def chat(self, http: httpx2.Client, rng: random.Random) -> None:
        """Ask about a needle in a chat, with a stream."""
        book, needle = self._question(rng)
        body = self._chat_body(book, needle)
        with http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as answer:
            if not self._is_fine(answer, book):
                return
            lines = [line[6:] for line in answer.iter_lines() if line.startswith("data: ")]
        if not lines or lines[-1] != "[DONE]":
            self._findings.problem(f"chat: the stream ends with {lines[-1:]}")
            return
        chunks = [json.loads(line) for line in lines[:-1]]
        parts = [choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"]]
        self._findings.compare(("chat", book.file_id, needle.word), needle, "".join(parts))

    def respond(self, http: httpx2.Client, rng: random.Random) -> None:
        """Ask about a needle with the newer form of a chat."""
        book, needle = self._question(rng)
        body = {"input": needle.question.strip(), "max_output_tokens": 24, "metadata": {"session": book.file_id}}
        answer = self._post(http, "/v1/responses", body, book)
        if answer is not None:
            texts = [part["text"] for item in answer["output"] for part in item["content"]]
            self._findings.compare(("respond", book.file_id, needle.word), needle, "".join(texts))

    def leave_a_stream(self, http: httpx2.Client, rng: random.Random) -> None:
        """Leave after some lines of a long answer, or of a long prompt that is being read."""
        book, needle = self._question(rng)
        body: dict[str, Any] = {**self._chat_body(book, needle), "max_tokens": 200, "ignore_eos": True, "stream": True}
        if rng.random() < 0.3:
            del body["metadata"]
            body["messages"] = [{"role": "user", "content": f"{rng.random()} {book.text[:20_000]} {needle.question}"}]
        left = rng.randrange(1, 30)
        with http.stream("POST", "/v1/chat/completions", json=body) as answer:
            lines = answer.iter_lines()
            for _ in range(left):
                if next(lines, None) is None:
                    break

    def leave_while_waiting(self, http: httpx2.Client, rng: random.Random) -> None:
        """Give up before an answer that is not streamed has come."""
        book, needle = self._question(rng)
        body = {**self._chat_body(book, needle), "max_tokens": 200, "ignore_eos": True}
        with suppress(httpx2.ReadTimeout):
            http.post("/v1/chat/completions", json=body, timeout=rng.uniform(0.02, 0.5))

    def add_and_delete(self, http: httpx2.Client, rng: random.Random) -> None:
        """Add a document, look at its text, and delete it at any stage of its reading."""
        text = f"{rng.random()} " + " ".join(rng.choices(self._books[0].text.split(), k=rng.randrange(50, 3000)))
        answer = http.post("/v1/files", files={"file": ("small.txt", text.encode())}, data={"purpose": "user_data"})
        if answer.status_code == 429:
            self._findings.count("429")
            return
        if answer.status_code != 200:
            self._findings.problem(f"add_and_delete: {answer.status_code} {answer.text}")
            return
        file_id = answer.json()["id"]
        time.sleep(rng.uniform(0, 2))
        content = http.get(f"/v1/files/{file_id}/content")
        if content.status_code == 200 and content.text != text:
            self._findings.problem(f"add_and_delete: the text of {file_id} is another one")
        deleted = http.delete(f"/v1/files/{file_id}")
        if deleted.status_code != 200:
            self._findings.problem(f"add_and_delete: {deleted.status_code} {deleted.text}")

    def look(self, http: httpx2.Client, rng: random.Random) -> None:
        """Look at documents, a part of a text, and the state."""
        book = self._books[rng.randrange(len(self._books))]
        names = {one["id"] for one in http.get("/v1/files").json()["data"]}
        if not book.is_deleted and book.file_id not in names:
            self._findings.problem(f"look: {book.file_id} is not listed")
        start = rng.randrange(len(book.text))
        part = http.get(f"/v1/files/{book.file_id}/content", params={"start": start, "stop": start + 1000})
        if part.status_code == 200 and part.text != book.text[start : start + 1000]:
            self._findings.problem(f"look: the text of {book.file_id} is another one")
        for path in ("/v1/state", "/metrics", "/v1/models", "/"):
            if http.get(path).status_code != 200:
                self._findings.problem(f"look: {path}")

    def send_nonsense(self, http: httpx2.Client, rng: random.Random) -> None:
        """Send a request that is wrong."""
        bodies: list[Any] = [{"messages": rng.random()}, [], {"prompt": None}, {"input": {}}, {"messages": [{}]}]
        path = rng.choice(["/v1/chat/completions", "/v1/completions", "/v1/responses"])
        answer = http.post(path, json=rng.choice(bodies))
        if answer.status_code != 400 or not answer.json()["error"]["message"]:
            self._findings.problem(f"send_nonsense: {answer.status_code} {answer.text}")

    def _question(self, rng: random.Random) -> tuple[Book, Needle]:
        book = rng.choice(self._books)
        return book, rng.choice(book.needles)

    def _chat_body(self, book: Book, needle: Needle) -> dict[str, Any]:
        messages = [{"role": "user", "content": needle.question.strip()}]
        return {"messages": messages, "max_tokens": 24, "metadata": {"session": book.file_id}}

    def _post(self, http: httpx2.Client, path: str, body: dict[str, Any], book: Book) -> Any:
        answer = http.post(path, json=body)
        return answer.json() if self._is_fine(answer, book) else None

    def _is_fine(self, answer: httpx2.Response, book: Book) -> bool:
        if answer.status_code == 200:
            return True
        if answer.status_code == 429:
            self._findings.count("429")
        else:
            answer.read()
            self._findings.problem(f"{book.file_id}: {answer.status_code} {answer.text}")
        return False


def make_text(characters: int, rng: random.Random) -> tuple[str, list[Needle]]:
    """Return a text with needles."""
    whole = embedded_text()
    start = rng.randrange(len(whole) - characters)
    text = whole[start : start + characters]
    needles = random_needles(len(_DEPTHS), rng, held_out=True, accepts=lambda word: word not in text)
    return build_haystack(text, needles, _DEPTHS), needles


def add_book(server: Server, characters: int, rng: random.Random) -> Book:
    """Send a document to the server."""
    text, needles = make_text(characters, rng)
    files = {"file": (f"book-{rng.randrange(10**9)}.txt", text.encode())}
    answer = httpx2.post(f"{server.address}/v1/files", files=files, data={"purpose": "user_data"}, timeout=60)
    answer.raise_for_status()
    return Book(answer.json()["id"], text, needles)


def state_of(server: Server, book: Book) -> dict[str, Any]:
    """Return how far a document is read."""
    answer = httpx2.get(f"{server.address}/v1/files/{book.file_id}", timeout=60)
    state: dict[str, Any] = answer.json()["headinfer"] if answer.status_code == 200 else {"state": "lost"}
    return state


def wait_for(server: Server, book: Book, is_reached: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Wait until a document is in a state."""
    started = time.monotonic()
    while time.monotonic() - started < _READ_S:
        state = state_of(server, book)
        if is_reached(state) or state["state"] in ("ready", "failed", "lost"):
            return state
        time.sleep(0.05)
    return {"state": "not read in time"}


def kill_while_reading(server: Server, books: list[Book], findings: Findings, rng: random.Random) -> None:
    """Kill the server within a document; the document must be there, and be read from its last checkpoint on."""
    book = add_book(server, 30_000, rng)
    books.append(book)
    before = wait_for(server, book, lambda state: 0 < state["tokens"] < state["of"])
    seconds = server.kill()
    after = state_of(server, book)
    findings.count("kills while reading" if before["state"] == "reading" else "kills after reading")
    print(f"killed at {before['tokens']} of {before['of']} tokens; again up after {seconds:.1f} s: {after}", flush=True)
    if after["state"] in ("lost", "failed"):
        findings.problem(f"{book.file_id} after a kill while reading: {after}")


def kill_while_answering(server: Server, books: list[Book], findings: Findings) -> None:
    """Kill the server within an answer, of which a part has come."""
    body = {
        "prompt": books[0].needles[0].question,
        "max_tokens": 400,
        "ignore_eos": True,
        "stream": True,
        "metadata": {"session": books[0].file_id},
    }
    with (
        suppress(httpx2.TransportError),
        httpx2.stream("POST", f"{server.address}/v1/completions", json=body, timeout=300) as answer,
    ):
        for line in answer.iter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"]:
                seconds = server.kill()
                findings.count("kills while answering")
                print(f"killed within an answer; again up after {seconds:.1f} s", flush=True)
                break


def check_documents(server: Server, books: list[Book], findings: Findings) -> None:
    """Check that every document is there, is read to its end, and has its text."""
    for book in books:
        state = wait_for(server, book, lambda state: state["state"] == "ready")
        text = httpx2.get(f"{server.address}/v1/files/{book.file_id}/content", timeout=60).text
        if state["state"] != "ready" or text != book.text:
            findings.problem(f"{book.file_id} is lost: {state}")


def soak(server: Server, minutes: float, clients: int, seed: int, log: Path) -> dict[str, Any]:
    """Run the soak; return its results."""
    rng = random.Random(seed)
    findings = Findings()
    start_s = server.wait()
    books = [add_book(server, characters, rng) for characters in (4_000, 12_000, 30_000)]
    check_documents(server, books, findings)
    doing = Clients(server, books, findings)
    with httpx2.Client(verify=False, timeout=300, base_url=server.address) as http:
        for ask in (doing.complete, doing.chat, doing.respond):  # the first answers, each alone
            for _ in range(5):
                ask(http, rng)
    begun = time.monotonic()
    until = begun + 60 * minutes
    threads = [threading.Thread(target=doing.run, args=(seed + index, until)) for index in range(clients)]
    for thread in threads:
        thread.start()
    kills_until = begun + 60 * minutes * _KILLS_SHARE
    while time.monotonic() < kills_until:
        kill_while_reading(server, books, findings, rng)
        kill_while_answering(server, books, findings)
    time.sleep(max(0.0, (until - time.monotonic()) * 0.2))  # caches fill
    memory_begin = server.memory()
    samples = []
    while any(thread.is_alive() for thread in threads):
        samples.append(server.memory()["rss_bytes"])
        time.sleep(2)
    for thread in threads:
        thread.join()
    check_documents(server, books, findings)
    time.sleep(3)
    memory_end = server.memory()
    state = httpx2.get(f"{server.address}/v1/state", timeout=60).json()
    exit_code = server.stop()
    if exit_code != 130:
        findings.problem(f"the server ended with {exit_code} after Ctrl-C")
    log_text = log.read_text(encoding="utf-8", errors="replace")
    if "Traceback" in log_text:
        findings.problem(f"the server's log has a traceback: {log_text[log_text.index('Traceback') :][:2000]}")
    return {
        "minutes": minutes,
        "clients": clients,
        "seed": seed,
        "start_s": start_s,
        "counts": dict(sorted(findings.counts.items())),
        "documents": len(books),
        "memory_begin": memory_begin,
        "memory_end": memory_end,
        "rss_bytes_highest": max(samples, default=0),
        "state": state,
        "problems": findings.problems,
    }


def main() -> None:
    """Run the soak, write its results and print them."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs this in the background ignores it
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long")
    parser.add_argument("--clients", type=int, default=6, help="clients at once")
    parser.add_argument("--seed", type=int, default=0, help="seed of what the clients do")
    parser.add_argument("--out", type=Path, default=None, help="a JSON file for the results")
    given = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory(prefix="headinfer-soak-") as folder:
        log = Path(folder) / "server.log"
        server = Server(Path(folder) / "sessions", log, chunk_tokens=1024)
        try:
            results = soak(server, given.minutes, given.clients, given.seed, log)
        finally:
            server.process.kill()  # if it has not ended
            print(log.read_text(encoding="utf-8", errors="replace")[-2000:], file=sys.stderr)
    command = f"python benchmarks/soak.py --minutes {given.minutes:g} --clients {given.clients} --seed {given.seed}"
    facts = {"command": command, "machine": machine(), "versions": gather_info()["versions"], **results}
    print(json.dumps(facts, indent=1))
    if given.out is not None:
        write_text(given.out, json.dumps(facts, indent=1) + "\n")
    sys.exit(1 if results["problems"] else 0)


if __name__ == "__main__":
    main()
