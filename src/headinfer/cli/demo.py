"""`headinfer demo`: what the demo shows."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from headinfer.utils.units import format_bytes, parse_tokens

if TYPE_CHECKING:
    from headinfer.evals.demo import Demo, DemoResult
    from headinfer.evals.reader import Answer, Method, OnText, Reading
    from headinfer.evals.tasks import Document, Question

__all__ = ["demo"]

_SECONDS = 75.0  # for both readings, so that all of it ends in two minutes
_stderr = Console(stderr=True)


def demo(
    context: Annotated[
        str | None, typer.Option(help="Tokens to read, e.g. 100K; else what this machine reads in about a minute.")
    ] = None,
    questions: Annotated[int, typer.Option(help="Needles to hide and to ask for.")] = 4,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    seed: Annotated[int, typer.Option(help="Another seed hides other needles in another part of the text.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Find facts in a very long text with the head-wise cache and with transformers' own, and compare all tokens."""
    from headinfer.evals.demo import Demo, DemoResult, largest_demo
    from headinfer.evals.reader import HEAD_WISE, STANDARD
    from headinfer.jobs.generate import checked_device

    tokens = parse_tokens(context) if context is not None else None
    shown = _Progress()
    made = Demo(checked_device(device), shown.on_tokens)
    if tokens is None:
        _say("how fast is this machine? ...")
        tokens = largest_demo(made, _SECONDS)
    document = made.document(tokens, questions, seed)
    if not as_json:
        _introduce(document, tokens)
    head_wise = shown.read(made, document, HEAD_WISE, "head-wise cache", None if as_json else _answers())
    standard = shown.read(made, document, STANDARD, "standard cache", None)
    result = DemoResult(document, head_wise, standard)
    if as_json:
        print(json.dumps(_as_dict(result)))
    else:
        _show(result)
    if not (result.identical and result.right):
        raise typer.Exit(1)


class _Progress:
    """A bar for each reading, whose share done and time left count attention's quadratic cost."""

    def __init__(self) -> None:
        self._update: Callable[[int], None] = lambda tokens: None

    def on_tokens(self, tokens: int) -> None:
        """After each chunk and each token."""
        self._update(tokens)

    def read(self, made: Demo, document: Document, method: Method, name: str, on_text: OnText | None) -> Reading:
        """Read with a bar; it ends before the answers come."""
        total, flops = made.reader.count(document.text), made.shape.prefill_flops
        columns = (BarColumn(), TextColumn("{task.fields[shown]}"), TimeElapsedColumn(), TextColumn("left"))
        progress = Progress(TextColumn("{task.description}"), *columns, TimeRemainingColumn(), console=_stderr)
        bar = progress.add_task(f"reading, {name}", total=flops(total), shown="")

        def update(tokens: int) -> None:
            if not progress.finished:
                done = min(tokens, total)
                progress.update(bar, completed=flops(done), shown=f"{done:,}/{total:,}")
                if done == total:
                    progress.stop()

        self._update = update
        with progress:
            return made.read(document, method, on_text)


def _introduce(document: Document, tokens: int) -> None:
    words = ", ".join(question.text.split()[-1].rstrip("?") for question in document.questions)
    _say(
        f"{len(document.questions)} numbers, for {words}, are hidden in {tokens:,} tokens of Moby-Dick. A model of "
        "2.6M parameters, trained on other words and another part of the text, reads them twice and is asked."
    )


def _answers() -> OnText:
    """Print each question, then its answer as it comes."""
    asked: list[str] = []

    def show(question: Question, text: str) -> None:
        if asked[-1:] != [question.key]:
            asked.append(question.key)
            print(question.text.strip(), end="", flush=True)
        print(text, end="", flush=True)

    return show


def _show(result: DemoResult) -> None:
    from headinfer.cli.report import columns_table

    runs = (result.standard, result.head_wise)
    rows = [
        (f"answer {number}", *(_marked(question, reading.answers[number - 1]) for reading in runs))
        for number, question in enumerate(result.document.questions, 1)
    ]
    tokens = runs[0].tokens
    rows += [
        ("KV on the device", *(format_bytes(one.device_kv_bytes) for one in runs)),
        ("KV on the host", *(format_bytes(one.host_kv_bytes) for one in runs)),
        (f"reading {tokens:,} tokens", *(f"{one.read_s:.1f} s" for one in runs)),
        ("an answer", *(f"{sum(answer.seconds for answer in one.answers) / len(one.answers):.2f} s" for one in runs)),
    ]
    console = Console()
    console.print(columns_table("", ("", "standard (DynamicCache)", "head-wise (headinfer)"), rows))
    count = sum(len(answer.token_ids) for answer in result.standard.answers)
    same = f"all {count} tokens are identical" if result.identical else "THE TOKENS DIFFER"
    right = "all answers are right" if result.right else "AN ANSWER IS WRONG"
    console.print(f"{same}; {right}", highlight=False)


def _marked(question: Question, answer: Answer) -> str:
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


def _say(line: str) -> None:
    _stderr.print(line, highlight=False, markup=False)
