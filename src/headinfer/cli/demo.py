"""The command `headinfer demo`."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headinfer.cli.console import say, show
from headinfer.cli.options import Device, Json, number, seed, tokens

if TYPE_CHECKING:
    from headinfer.evals.demo import DemoResult
    from headinfer.evals.reader import Answer, Method, OnText, Reading
    from headinfer.evals.tasks import Document, Question

__all__ = ["demo"]

_READING_SECONDS = 75.0
"""The time for both readings if no context is given; the whole demo then takes about two minutes."""


def demo(
    context: Annotated[
        int | None,
        tokens("--context", "Tokens to read, e.g. 100K.", show_default="what this machine reads in about a minute"),
    ] = None,
    questions: Annotated[int, number("--questions", "Number of facts to hide and to ask for.", high=1000)] = 4,
    device: Device = "auto",
    seed: Annotated[int, seed("Seed of the facts and of the part of the text.")] = 0,
    as_json: Json = False,
) -> None:
    """Find facts in a very long text with the head-wise cache and with transformers' own, and compare all tokens.

    The exit code is 1 if a token differs or an answer is wrong.
    """
    from headinfer.cli.report import ReadingProgress
    from headinfer.engine.machine import chosen_device
    from headinfer.evals.demo import Demo, DemoResult, largest_demo
    from headinfer.evals.reader import HEAD_WISE, STANDARD

    length = context
    progress = ReadingProgress()
    made = Demo(str(chosen_device(device)), progress.on_tokens)
    if length is None:
        say("measuring the speed of this machine ...")
        length = largest_demo(made, _READING_SECONDS)
    say(f"making a text of {length:,} tokens ...")
    document = made.document(length, questions, seed)
    if not as_json:
        _introduce(document, length)

    def read(method: Method, name: str, on_text: OnText | None) -> Reading:
        with progress.reading(f"reading, {name}", made.shape, made.reader.count(document.text)):
            return made.read(document, method, on_text)

    head_wise = read(HEAD_WISE, "head-wise cache", None if as_json else _print_answers())
    standard = read(STANDARD, "standard cache", None)
    result = DemoResult(document, head_wise, standard)
    if as_json:
        print(json.dumps(_as_dict(result)))
    else:
        _show(result)
    if not (result.identical and result.right):
        raise typer.Exit(1)


def _introduce(document: Document, tokens: int) -> None:
    words = ", ".join(question.text.split()[-1].rstrip("?") for question in document.questions)
    say(
        f"{len(document.questions)} numbers, for {words}, are hidden in {tokens:,} tokens of Moby-Dick. A model of "
        "2.6M parameters, trained on other words and another part of the text, reads them with each cache and answers."
    )


def _print_answers() -> OnText:
    """Return a function that prints each question, then its answer as it is generated."""
    asked: set[str] = set()

    def show_piece(question: Question, text: str) -> None:
        if question.key not in asked:
            asked.add(question.key)
            print(question.text.strip(), end="", flush=True)
        print(text, end="", flush=True)

    return show_piece


def _show(result: DemoResult) -> None:
    from headinfer.cli.report import columns_table
    from headinfer.utils.units import format_bytes

    readings = (result.standard, result.head_wise)
    rows: list[tuple[str, ...]] = [
        (f"answer {number}", *(_marked(question, reading.answers[number - 1]) for reading in readings))
        for number, question in enumerate(result.document.questions, 1)
    ]
    rows += [
        ("KV on the device", *(format_bytes(one.device_kv_bytes) for one in readings)),
        ("KV on the host", *(format_bytes(one.host_kv_bytes) for one in readings)),
        (f"reading {result.standard.tokens:,} tokens", *(f"{one.read_s:.1f} s" for one in readings)),
        ("an answer", *(f"{_answer_seconds(one):.2f} s" for one in readings)),
    ]
    show(columns_table("", ("", "standard (DynamicCache)", "head-wise (headinfer)"), rows))
    count = sum(len(answer.token_ids) for answer in result.standard.answers)
    same = f"all {count} tokens are identical" if result.identical else "THE TOKENS DIFFER"
    right = "all answers are right" if result.right else "AN ANSWER IS WRONG"
    show(f"{same}; {right}")


def _answer_seconds(reading: Reading) -> float:
    return sum(answer.seconds for answer in reading.answers) / len(reading.answers)


def _marked(question: Question, answer: Answer) -> str:
    """Return the number in an answer, marked if it is wrong."""
    found = re.search(r"\d+", answer.text)
    number = found.group() if found else answer.text.strip()[:20]
    return number if question.score(answer.text, question.references) == 1.0 else f"{number} (wrong)"


def _as_dict(result: DemoResult) -> dict[str, Any]:
    return {
        "tokens_in": result.standard.tokens,
        "identical": result.identical,
        "right": result.right,
        "runs": [
            {
                "name": one.method,
                "answers": [answer.text for answer in one.answers],
                "token_ids": [answer.token_ids for answer in one.answers],
                "read_s": one.read_s,
                "answer_s": [answer.seconds for answer in one.answers],
                "device_kv_bytes": one.device_kv_bytes,
                "host_kv_bytes": one.host_kv_bytes,
            }
            for one in (result.standard, result.head_wise)
        ],
    }
