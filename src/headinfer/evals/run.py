"""Run an evaluation: read each document, ask, score; results on disk after each document, and taken up from there."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headinfer.errors import UsageError
from headinfer.evals.reader import HEAD_WISE, STANDARD, Method, Reader, Reading
from headinfer.evals.tasks import Document, Question
from headinfer.info import machine
from headinfer.plan.memory import available_host_bytes
from headinfer.utils.files import Output, read_json_object
from headinfer.utils.units import format_bytes

__all__ = ["Results", "evaluate"]

_FORMAT = 1


@dataclass
class Results:
    """The answers so far. about: what must be equal for an evaluation to be continued (model, task, seed, ...).

    records: one per question and method, in the order of asking. skipped: documents that the standard cache could not
    hold, with the reason.
    """

    path: Path
    about: dict[str, Any]
    records: list[dict[str, Any]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    command: str = ""

    @classmethod
    def open(cls, folder: Path, about: dict[str, Any]) -> Results:
        """The results in a folder, or new ones. Raises UsageError where those there are of another evaluation."""
        results = cls(folder / "results.json", about)
        if results.path.is_file() and results.path.stat().st_size:
            found = read_json_object(results.path)
            before = found.get("about")
            records = found.get("answers")
            skipped = found.get("skipped")
            if not (isinstance(before, dict) and isinstance(records, list) and isinstance(skipped, dict)):
                raise UsageError(f"{results.path} holds no results of headinfer eval: choose another --out")
            results.records = records
            results.skipped = skipped
            for name in {**before, **about}:
                if before.get(name) != about.get(name):
                    raise UsageError(
                        f"{results.path} holds another evaluation: its {name} is {before.get(name)!r}, not "
                        f"{about.get(name)!r}; choose another --out"
                    )
        results.check()
        return results

    def check(self) -> Output:
        """The file, which may be written: it is free, or holds this evaluation. Raises UsageError if it may not."""
        return Output(self.path, is_ours=lambda path: read_json_object(path).get("about") == self.about)

    def has(self, document: Document, method: Method) -> bool:
        """Whether every question of a document was answered with a method."""
        done = {(record["key"], record["method"]) for record in self.records}
        return all((_key(document, question), method) in done for question in document.questions)

    def add(self, document: Document, reading: Reading) -> None:
        """Score a reading's answers and keep them, in place of those of an earlier reading that was cut short."""
        keys = {_key(document, question) for question in document.questions}
        kept = [one for one in self.records if one["key"] not in keys or one["method"] != reading.method]
        for question, answer in zip(document.questions, reading.answers, strict=True):
            kept.append(
                {
                    "key": _key(document, question),
                    "method": reading.method,
                    **document.facts,
                    **question.facts,
                    "answer": answer.text,
                    "token_ids": answer.token_ids,
                    "references": list(question.references),
                    "score": question.score(answer.text, question.references),
                    "tokens_read": reading.tokens,
                    "read_s": round(reading.read_s, 3),
                    "answer_s": round(answer.seconds, 3),
                    "device_kv_bytes": reading.device_kv_bytes,
                    "host_kv_bytes": reading.host_kv_bytes,
                }
            )
        self.records = kept

    def save(self) -> None:
        """Write the file, whole; an answer a line."""
        about = {"format": _FORMAT, "command": self.command, "machine": machine(), "about": self.about}
        about |= {"summary": self.summary(), "skipped": self.skipped}
        lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in self.records)
        head = json.dumps(about, indent=1, ensure_ascii=False).removesuffix("\n}")
        self.check().write(f'{head},\n "answers": [\n{lines}\n]}}\n')

    def scores(self, *names: str, method: Method = HEAD_WISE) -> dict[tuple[Any, ...], float]:
        """The mean score by the facts named, e.g. ("length", "depth")."""
        groups = defaultdict(list)
        for record in self.records:
            if record["method"] == method:
                groups[tuple(record.get(name) for name in names)].append(record["score"])
        return {key: statistics.fmean(scores) for key, scores in sorted(groups.items(), key=str)}

    def differing(self) -> list[str]:
        """Questions whose tokens differ between the methods; empty where all that both answered are identical."""
        tokens: dict[str, dict[str, list[int]]] = defaultdict(dict)
        for record in self.records:
            tokens[record["key"]][record["method"]] = record["token_ids"]
        return [key for key, by in tokens.items() if len(by) == 2 and by[HEAD_WISE] != by[STANDARD]]

    def summary(self) -> dict[str, Any]:
        """Scores of both methods, and whether their answers are the same."""
        both = {one["key"] for one in self.records if one["method"] == STANDARD}
        both &= {one["key"] for one in self.records if one["method"] == HEAD_WISE}
        found: dict[str, Any] = {"questions": sum(one["method"] == HEAD_WISE for one in self.records)}
        found["score"] = _mean(one["score"] for one in self.records if one["method"] == HEAD_WISE)
        if both:
            of_both = [one for one in self.records if one["key"] in both]
            ours, theirs = (
                _mean(one["score"] for one in of_both if one["method"] == method) for method in (HEAD_WISE, STANDARD)
            )
            assert ours is not None
            assert theirs is not None
            found["compared"] = {
                "questions": len(both),
                "identical": len(both) - len(self.differing()),
                "score_head_wise": ours,
                "score_standard": theirs,
                "score_difference": ours - theirs,
            }
        return found


def evaluate(
    reader: Reader,
    documents: Iterable[Document],
    results: Results,
    *,
    compare: bool,
    kv_bytes_per_token: int,
    on_document: Callable[[Document, Sequence[Reading]], None] = lambda document, readings: None,
) -> None:
    """Answer what is not answered yet, saving after each document.

    compare: with the standard cache too, where the host or device can hold its KV twice (each question is asked on a
    copy). kv_bytes_per_token: of the whole model.
    """
    for document in documents:
        readings = []
        for method in (HEAD_WISE, STANDARD) if compare else (HEAD_WISE,):
            if results.has(document, method):
                continue
            if method == STANDARD:
                needed = 2 * reader.count(document.text) * kv_bytes_per_token
                if needed > (room := _room(reader)):
                    reason = f"needs {format_bytes(needed)} for its KV and a copy; there are {format_bytes(room)}"
                    results.skipped[document.key] = reason
                    continue
                results.skipped.pop(document.key, None)
            reading = reader.read(document, method)
            results.add(document, reading)
            results.save()
            readings.append(reading)
        on_document(document, readings)
    results.save()


def _room(reader: Reader) -> int:
    """Bytes that are free where the standard cache lies."""
    device = reader.model.device
    if device.type == "cuda":
        from headinfer.engine.machine import free_device_bytes

        return free_device_bytes(device)
    return available_host_bytes()


def _key(document: Document, question: Question) -> str:
    return f"{document.key}/{question.key}"


def _mean(scores: Iterable[float]) -> float | None:
    found = list(scores)
    return statistics.fmean(found) if found else None
