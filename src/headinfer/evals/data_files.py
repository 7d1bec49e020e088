"""Reads LongBench v2 and SCBench from local files, with the published templates and metrics.

LongBench v2 (arXiv 2412.15204) has one multiple-choice question for each text. SCBench (arXiv 2412.10319) has several
questions for each text. They are asked in its multi-request mode, in which no question follows another one. SCBench's
tasks that are scored by ROUGE or by the similarity of code (summary, repoqa and their mixtures) are not supported.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headinfer.errors import UsageError
from headinfer.evals.tasks import Document, Question, Score, match_all, match_part
from headinfer.utils.files import read_text

__all__ = ["DATA_TASKS", "data_documents"]

Item = dict[str, Any]
"""An entry of a benchmark's file."""

MakeDocument = Callable[[Item], "tuple[str, tuple[Question, ...], dict[str, Any]]"]
"""Converts an item into a text, questions and the facts of a document."""


def data_documents(task: str, path: Path) -> list[Document]:
    """Read the documents of a JSON or JSON-lines file.

    Args:
        task: the name of the task, one of DATA_TASKS.
        path: the file.

    Returns:
        The documents, in the order of the file.

    Raises:
        UsageError: the task is unknown, or the file cannot be read or does not have the format of the task. The message
            names the line or the item.
    """
    if task not in DATA_TASKS:
        raise UsageError(f"there is no task {task!r} for local files: choose among {', '.join(DATA_TASKS)}")
    documents = []
    for number, item in _items(path):
        try:
            text, questions, facts = DATA_TASKS[task](item)
            if not questions:
                raise KeyError("multi_turns")
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise UsageError(f"{path}, item {number} is not a {task} item: {_reason(error)}") from error
        documents.append(Document(f"{task}/{number}", text, questions, {"task": task, "item": number, **facts}))
    if not documents:
        raise UsageError(f"{path} holds no items")
    return documents


def _reason(error: Exception) -> str:
    return f"it has no {error.args[0]!r}" if isinstance(error, KeyError) else "a field has the wrong type"


def _items(path: Path) -> Iterator[tuple[int, Item]]:
    """Yield the lines of a file, or the entries of a JSON array, with their numbers from 1."""
    text = read_text(path)
    try:
        if text.lstrip().startswith("["):
            yield from enumerate(json.loads(text), 1)
            return
    except (json.JSONDecodeError, RecursionError) as error:
        raise UsageError(f"{path} is not valid JSON: {error}") from error
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise UsageError(f"{path}, line {number} is not valid JSON: {error}") from error


# -- LongBench v2 ----------------------------------------------------------------------------------------------------


def _longbench(item: Item) -> tuple[str, tuple[Question, ...], dict[str, Any]]:
    choices = "".join(f"\n({letter}) {item[f'choice_{letter}'].strip()}" for letter in "ABCD")
    text = (
        "Please read the following text and answer the question below.\n\n"
        f"<text>\n{item['context'].strip()}\n</text>"
    )  # fmt: skip
    question = Question(
        key="0",
        text=f"\n\nWhat is the correct answer to this question: {item['question'].strip()}\nChoices:{choices}\n\n"
        'Format your response as follows: "The correct answer is (insert answer here)".',
        references=(item["answer"],),
        new_tokens=128,
        score=longbench_score,
    )
    return text, (question,), {name: item[name] for name in ("domain", "difficulty", "length") if name in item}


def longbench_score(answer: str, references: Sequence[str]) -> float:
    """Return 1 if the answer says "The correct answer is (B)" with the right letter, else 0. Brackets are optional."""
    plain = answer.replace("*", "")
    bracketed = re.search(r"The correct answer is \(([A-D])\)", plain)
    found = bracketed or re.search(r"The correct answer is ([A-D])", plain)
    return float(found is not None and found.group(1) == references[0])


# -- SCBench ---------------------------------------------------------------------------------------------------------


def contains_score(answer: str, references: Sequence[str]) -> float:
    """Return 1 if the answer contains the reference in the same case, else 0."""
    return float(references[0] in answer)


def first_number_score(answer: str, references: Sequence[str]) -> float:
    """Return 1 if the first number of the answer equals the reference, else 0.

    If the reference is an integer, only the integer part of the answer's number is compared.
    """
    found = re.search(r"\d+\.\d+|\d+", answer)
    if found is None:
        return 0.0
    expected = float(references[0])
    number = float(found.group())
    is_integer = expected.is_integer() and "." not in references[0]
    return float((int(number) if is_integer else number) == expected)


def first_letter_score(answer: str, references: Sequence[str]) -> float:
    """Return 1 if the answer chooses the right option, else 0.

    The choice is the first letter of the answer, the text of an option, or the text after a phrase like "answer is".
    """
    answer = answer.strip()
    if not answer:
        return 0.0
    if answer[0] in "ABCD":
        return float(answer[0] in references)
    if answer in references:
        return 1.0
    plain = " ".join(re.sub(r"[\n\"'.,?!{}]", " ", answer).split())
    for lead in ("answer is:", "answer:", "answer is", "option is"):
        if lead in plain:
            rest = plain[plain.index(lead) + len(lead) + 1 :]
            return float(any(rest.startswith(reference) for reference in references))
    named = next((word for word in plain.split() if word in "ABCD"), None)
    return float(named in references)


def characters_f1_score(answer: str, references: Sequence[str]) -> float:
    """Compute the best F1 score of characters, without punctuation and spaces (for Chinese)."""

    def characters(text: str) -> Counter[str]:
        return Counter(letter for letter in text.lower() if letter.isalnum())

    return max(_f1(characters(answer), characters(reference)) for reference in references)


def _f1(found: Counter[str], expected: Counter[str]) -> float:
    common = (found & expected).total()
    return 2 * common / (found.total() + expected.total()) if common else 0.0


@dataclass(frozen=True)
class ScbenchTask:
    """A task of SCBench.

    Attributes:
        new_tokens: the maximum number of tokens of an answer.
        score: the metric.
        before: the text before the document. "{first}" is replaced by the input of the first question.
        ask: the template of a question. Its fields are {input}, {A} to {D} (the options) and {name}.
    """

    new_tokens: int
    score: Score
    before: str = ""
    ask: str = "{input}"

    def __call__(self, item: Item) -> tuple[str, tuple[Question, ...], dict[str, Any]]:
        before = self.before.replace("{first}", item["multi_turns"][0]["input"])
        text = before + (item["context"] if "context" in item else item["input"])
        questions = tuple(self._question(index, turn) for index, turn in enumerate(item["multi_turns"]))
        return text, questions, {}

    def _question(self, index: int, turn: Item) -> Question:
        words = {"input": turn["input"]}
        if "{A}" in self.ask:
            words |= dict(zip("ABCD", turn["options"], strict=True))
        if "{name}" in self.ask:  # "The smallest number is" -> "the smallest number"
            found = re.search(r"The .+ is", turn["input"])
            words["name"] = found.group().lower()[:-3] if found else turn["input"]
        answer = turn["answer"]
        references = tuple(str(one) for one in (answer if isinstance(answer, list) else [answer]))
        return Question(str(index), "\n\n" + self.ask.format(**words), references, self.new_tokens, score=self.score)


_KEY_VALUE = "Extract the value corresponding to the specified key in the JSON object below.\n\n"

DATA_TASKS: dict[str, MakeDocument] = {
    "longbench-v2": _longbench,
    "scbench_kv": ScbenchTask(150, contains_score, _KEY_VALUE),
    "scbench_kv_hard": ScbenchTask(150, contains_score, _KEY_VALUE),
    "scbench_kv_compressible": ScbenchTask(
        150, contains_score, "Extract the value corresponding to the specified key in the following passage.\n\n"
    ),
    "scbench_prefix_suffix": ScbenchTask(150, contains_score),
    "scbench_hashhop": ScbenchTask(150, contains_score),
    "scbench_vt": ScbenchTask(30, match_all),
    "scbench_many_shot": ScbenchTask(10, match_part),
    "scbench_mf": ScbenchTask(5, first_number_score, "{first}\n\n", "What is {name}?\n\n{input}"),
    "scbench_qa_eng": ScbenchTask(
        40,
        match_part,
        "Read the book and answer the question. Be very concise in your answer.\n\n",
        "Question: {input}\nAnswer:",
    ),
    "scbench_qa_chn": ScbenchTask(40, characters_f1_score, "阅读以下书籍然后回答问题。\n\n", "问题：{input}\n答案："),
    "scbench_choice_eng": ScbenchTask(
        40,
        first_letter_score,
        "Read the book and answer the question.\n\n",
        "Question: {input}\nA. {A}\nB. {B}\nC. {C}\nD. {D}\n\nThe the correct answer is",
    ),
}
"""The tasks by name. The templates are the published ones, with their mistakes."""
