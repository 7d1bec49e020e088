"""Runs an evaluation. The results are saved after each document, and an interrupted evaluation continues from them."""

from __future__ import annotations

import json
import os
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headinfer.errors import UsageError
from headinfer.evals.reader import HEAD_WISE, STANDARD, Method, Reader, Reading
from headinfer.evals.tasks import Document, Question
from headinfer.hf.batch import MOST_ROWS
from headinfer.info import machine
from headinfer.plan.memory import available_host_bytes
from headinfer.utils.files import Output, read_json_object
from headinfer.utils.units import format_bytes

__all__ = ["Results", "evaluate"]

_FORMAT = 1
_MOST_TOKENS_TOGETHER = 65_536  # of all documents of a group: computing takes the time of longer ones


@dataclass
class Results:
    """The results of an evaluation, which may be incomplete.

    Attributes:
        path: the file, results.json.
        about: model, task, seed and everything else that must be equal for an evaluation to be continued.
        records: one entry for each question and method, in the order in which they were asked.
        skipped: the keys of documents that are too large for the standard cache, each with the reason.
        command: the command line, which is saved with the results.
    """

    path: Path
    about: dict[str, Any]
    records: list[dict[str, Any]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    command: str = ""

    @classmethod
    def open(cls, folder: Path, about: dict[str, Any]) -> Results:
        """Read the results of a folder, or begin new ones.

        Args:
            folder: the folder of results.json.
            about: the evaluation that is about to run.

        Returns:
            The results.

        Raises:
            UsageError: the folder contains the results of another evaluation, or results.json cannot be written.
        """
        results = cls(folder / "results.json", about)
        if os.path.isfile(results.path) and results.path.stat().st_size:
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
        """Check that the results can be written.

        Returns:
            The output file, which does not exist or contains results of this evaluation.

        Raises:
            UsageError: the file contains something else, or its folder is not writable.
        """
        return Output(self.path, is_ours=lambda path: read_json_object(path).get("about") == self.about)

    def has(self, document: Document, method: Method) -> bool:
        """Return whether every question of a document has been answered with a method."""
        done = {(record["key"], record["method"]) for record in self.records}
        return all((_key(document, question), method) in done for question in document.questions)

    def add(self, document: Document, reading: Reading) -> None:
        """Score the answers of a reading and add them. They replace those of an earlier, interrupted reading."""
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
        """Write all results to the file, with one line for each answer."""
        about = {"format": _FORMAT, "command": self.command, "machine": machine(), "about": self.about}
        about |= {"summary": self.summary(), "skipped": self.skipped}
        lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in self.records)
        head = json.dumps(about, indent=1, ensure_ascii=False).removesuffix("\n}")
        self.check().write(f'{head},\n "answers": [\n{lines}\n]}}\n')

    def scores(self, *names: str, method: Method = HEAD_WISE) -> dict[tuple[Any, ...], float]:
        """Compute mean scores.

        Args:
            names: the fields to group by, such as "length" and "depth".
            method: the cache whose answers are scored.

        Returns:
            The mean score for each combination of values of these fields.
        """
        groups = defaultdict(list)
        for record in self.records:
            if record["method"] == method:
                groups[tuple(record.get(name) for name in names)].append(record["score"])
        return {key: statistics.fmean(scores) for key, scores in sorted(groups.items(), key=str)}

    def differing(self) -> list[str]:
        """List the keys of the questions to which the two caches gave different tokens."""
        tokens: dict[str, dict[str, list[int]]] = defaultdict(dict)
        for record in self.records:
            tokens[record["key"]][record["method"]] = record["token_ids"]
        return [
            key
            for key, by_method in tokens.items()
            if len(by_method) == 2 and by_method[HEAD_WISE] != by_method[STANDARD]
        ]

    def summary(self) -> dict[str, Any]:
        """Summarize the scores.

        Returns:
            The number of questions that the head-wise cache answered and its mean score (None without answers). If both
            caches answered questions, the entry "compared" says how many answers are identical and how the mean scores
            of these questions differ.
        """
        head_wise = [record for record in self.records if record["method"] == HEAD_WISE]
        standard = [record for record in self.records if record["method"] == STANDARD]
        summary: dict[str, Any] = {
            "questions": len(head_wise),
            "score": statistics.fmean(record["score"] for record in head_wise) if head_wise else None,
        }
        both = {record["key"] for record in head_wise} & {record["key"] for record in standard}
        if both:
            head_wise_score = statistics.fmean(record["score"] for record in head_wise if record["key"] in both)
            standard_score = statistics.fmean(record["score"] for record in standard if record["key"] in both)
            summary["compared"] = {
                "questions": len(both),
                "identical": len(both) - len(self.differing()),
                "score_head_wise": head_wise_score,
                "score_standard": standard_score,
                "score_difference": head_wise_score - standard_score,
            }
        return summary


def evaluate(
    reader: Reader,
    documents: Iterable[Document],
    results: Results,
    *,
    compare: bool,
    kv_bytes_per_token: int,
    on_document: Callable[[Document, Sequence[Reading]], None] = lambda document, readings: None,
) -> None:
    """Answer the questions that are not answered yet, and save the results after each document.

    Without a comparison, the questions about a document are answered in batches, and documents of one length are read
    together. With one, the head-wise cache answers one question after the other too, as the standard cache does.

    Args:
        reader: reads the documents.
        documents: the documents.
        results: the results so far. New answers are added.
        compare: answer with the standard cache as well. Documents whose KV does not fit into memory twice are skipped,
            since each question is asked on a copy of the cache.
        kv_bytes_per_token: the KV of one token in all layers, in bytes.
        on_document: called after each document with its new readings.
    """
    if not compare:
        for group in _groups(reader, documents, results):
            readings = [] if results.has(group[0], HEAD_WISE) else reader.read_together(group)
            for document, reading in zip(group, readings, strict=False):
                results.add(document, reading)
            if readings:
                results.save()
            for number, document in enumerate(group):
                on_document(document, readings[number : number + 1])
        results.save()
        return
    for document in documents:
        readings = []
        for method in (HEAD_WISE, STANDARD):
            if results.has(document, method):
                continue
            if method == STANDARD:
                needed = 2 * reader.count(document.text) * kv_bytes_per_token
                free = _free_bytes(reader)
                if needed > free:
                    reason = f"needs {format_bytes(needed)} for its KV and a copy; there are {format_bytes(free)}"
                    results.skipped[document.key] = reason
                    continue
                results.skipped.pop(document.key, None)
            reading = reader.read(document, method)
            results.add(document, reading)
            results.save()
            readings.append(reading)
        on_document(document, readings)
    results.save()


def _groups(reader: Reader, documents: Iterable[Document], results: Results) -> Iterator[list[Document]]:
    """Yield documents in order, in groups that are read together.

    These are neighbours of equal length that fit the memory. Beyond _MOST_TOKENS_TOGETHER nothing is gained. A document
    that has all its answers is a group of its own.
    """
    group: list[Document] = []
    can_pad = reader.can_read_together()
    for document in documents:
        if group and not (can_pad and _joins(reader, group, document, results)):
            yield group
            group = []
        group.append(document)
    if group:
        yield group


def _joins(reader: Reader, group: Sequence[Document], document: Document, results: Results) -> bool:
    """Return whether a document is read together with a group."""
    length = document.facts.get("length")
    rows = len(group) + 1
    return (
        isinstance(length, int)
        and length == group[0].facts.get("length")
        and rows <= MOST_ROWS
        and rows * length <= _MOST_TOKENS_TOGETHER
        and not results.has(group[0], HEAD_WISE)
        and not results.has(document, HEAD_WISE)
        and reader.fits_together(length, rows)
    )


def _free_bytes(reader: Reader) -> int:
    """Free memory for the standard cache, on the model's device."""
    device = reader.model.device
    if device.type == "cuda":
        from headinfer.engine.machine import free_device_bytes

        return free_device_bytes(device)
    return available_host_bytes()


def _key(document: Document, question: Question) -> str:
    return f"{document.key}/{question.key}"
