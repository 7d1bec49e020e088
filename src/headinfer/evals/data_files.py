"""Benchmarks from local files, with the published templates and metrics: LongBench v2 and SCBench.

LongBench v2 (arXiv 2412.15204): one multiple-choice question a text. SCBench (arXiv 2412.10319): several questions
that share a text, here in its multi-request mode: each is asked of the text alone. Its tasks scored by ROUGE or by the
similarity of code (summary, repoqa, and those mixed with them) are not among them.
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

__all__ = ["DATA_TASKS", "data_documents"]

Item = dict[str, Any]
Make = Callable[[Item], "tuple[str, tuple[Question, ...], dict[str, Any]]"]


def data_documents(task: str, path: Path) -> list[Document]:
    """The documents of a JSON or JSON-lines file. Raises UsageError for an unknown task, and for a file that is not of
    its format, with the line.
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
            raise UsageError(f"{path}, item {number} is no {task} item: {_missing(error)}") from error
        documents.append(Document(f"{task}/{number}", text, questions, {"task": task, "item": number, **facts}))
    if not documents:
        raise UsageError(f"{path} holds no items")
    return documents


def _missing(error: Exception) -> str:
    return f"it has no {error.args[0]!r}" if isinstance(error, KeyError) else "a field has another form"


def _items(path: Path) -> Iterator[tuple[int, Item]]:
    """Items and their numbers, from 1: the lines of a file, or the entries of a JSON array."""
    try:
        text = path.read_text(encoding="utf-8")
        if text.lstrip().startswith("["):
            yield from enumerate(json.loads(text), 1)
            return
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise UsageError(f"cannot read {path}: {reason}") from error
    except json.JSONDecodeError as error:
        raise UsageError(f"{path} is no JSON: {error}") from error
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise UsageError(f"{path}, line {number} is no JSON: {error}") from error


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
    """1 where the letter named is right: "The correct answer is (B)", or without the brackets."""
    plain = answer.replace("*", "")
    found = re.search(r"The correct answer is \(([A-D])\)", plain) or re.search(
        r"The correct answer is ([A-D])", plain
    )  # fmt: skip
    return float(found is not None and found.group(1) == references[0])


# -- SCBench ---------------------------------------------------------------------------------------------------------


def contains_score(answer: str, references: Sequence[str]) -> float:
    """1 where the answer holds the reference, case and all."""
    return float(references[0] in answer)


def first_number_score(answer: str, references: Sequence[str]) -> float:
    """1 where the first number of the answer is the reference; a whole reference is compared with its whole part."""
    found = re.search(r"\d+\.\d+|\d+", answer)
    if found is None:
        return 0.0
    wanted = float(references[0])
    number = float(found.group())
    return float((int(number) if wanted.is_integer() and "." not in references[0] else number) == wanted)


def first_letter_score(answer: str, references: Sequence[str]) -> float:
    """1 where the option chosen is right: the first letter, the option's text, or what follows "answer is"."""
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
    """The best F1 of characters, punctuation and spaces aside (for Chinese)."""

    def characters(text: str) -> Counter[str]:
        return Counter(letter for letter in text.lower() if letter.isalnum())

    return max(_f1(characters(answer), characters(reference)) for reference in references)


def _f1(found: Counter[str], wanted: Counter[str]) -> float:
    common = (found & wanted).total()
    return 2 * common / (found.total() + wanted.total()) if common else 0.0


@dataclass(frozen=True)
class Shared:
    """A task of SCBench: what stands before and after the text, how a turn asks, how many tokens, how it is scored."""

    new_tokens: int
    score: Score
    before: str = ""
    ask: str = "{input}"

    def __call__(self, item: Item) -> tuple[str, tuple[Question, ...], dict[str, Any]]:
        before = self.before.replace("{first}", item["multi_turns"][0]["input"])
        text = before + (item["context"] if "context" in item else item["input"])
        return text, tuple(self._question(index, turn) for index, turn in enumerate(item["multi_turns"])), {}

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
DATA_TASKS: dict[str, Make] = {
    "longbench-v2": _longbench,
    "scbench_kv": Shared(150, contains_score, _KEY_VALUE),
    "scbench_kv_hard": Shared(150, contains_score, _KEY_VALUE),
    "scbench_kv_compressible": Shared(
        150, contains_score, "Extract the value corresponding to the specified key in the following passage.\n\n"
    ),
    "scbench_prefix_suffix": Shared(150, contains_score),
    "scbench_hashhop": Shared(150, contains_score),
    "scbench_vt": Shared(30, match_all),
    "scbench_many_shot": Shared(10, match_part),
    "scbench_mf": Shared(5, first_number_score, "{first}\n\n", "What is {name}?\n\n{input}"),
    "scbench_qa_eng": Shared(
        40,
        match_part,
        "Read the book and answer the question. Be very concise in your answer.\n\n",
        "Question: {input}\nAnswer:",
    ),
    "scbench_qa_chn": Shared(40, characters_f1_score, "阅读以下书籍然后回答问题。\n\n", "问题：{input}\n答案："),
    "scbench_choice_eng": Shared(
        40,
        first_letter_score,
        "Read the book and answer the question.\n\n",
        "Question: {input}\nA. {A}\nB. {B}\nC. {C}\nD. {D}\n\nThe the correct answer is",
    ),
}
