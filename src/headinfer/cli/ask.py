"""The command `headinfer ask`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from headinfer.cli.console import discard, say, stderr, warning, write
from headinfer.cli.documents import AGAIN_HELP, DOCUMENT_HELP, Globs, given_document
from headinfer.cli.options import (
    CPU_SHARE_HELP,
    DEVICE_KV_BUDGET_HELP,
    MEMORY_PANEL,
    Device,
    DiskTier,
    HostKVBudget,
    Json,
    MaxNewTokens,
    QuestionsFile,
    SessionOption,
    SessionsFolder,
    cpu_share,
    kv_options,
    session_options,
    size,
    text_argument,
)
from headinfer.cli.sampling import System, takes_sampling
from headinfer.jobs.sampling import Sampling
from headinfer.sessions.folder import default_root
from headinfer.utils.units import format_bytes

__all__ = ["ask"]


@takes_sampling
def ask(
    session: SessionOption,
    questions: Annotated[
        list[str] | None,
        text_argument("questions", "One or more questions. Several are answered together.", show_default=False),
    ] = None,
    questions_file: QuestionsFile = None,
    sessions: SessionsFolder = None,
    file: Annotated[
        list[Path] | None,
        typer.Option(
            help=f"Read this before the question, beside the session. {DOCUMENT_HELP} {AGAIN_HELP}",
            metavar="PATH",
            show_default=False,
        ),
    ] = None,
    glob: Globs = None,
    keep: Annotated[
        bool,
        typer.Option("--keep", help="Add the questions and answers to the session, as context for later questions."),
    ] = False,
    where: Annotated[
        bool,
        typer.Option(
            "--where",
            help="Also print the passages of the document that each answer came from, by its exact attention.",
        ),
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="Where the model is stored, if it was moved.", show_default="the session's")
    ] = None,
    max_new_tokens: MaxNewTokens = 256,
    device_kv_budget: Annotated[
        int | None,
        size("--device-kv-budget", DEVICE_KV_BUDGET_HELP, show_default="the session's", rich_help_panel=MEMORY_PANEL),
    ] = None,
    host_kv_budget: HostKVBudget = None,
    disk_tier: DiskTier = None,
    cpu_share: Annotated[
        float | None,
        cpu_share(CPU_SHARE_HELP, show_default="auto: the session's", rich_help_panel=MEMORY_PANEL),
    ] = None,
    device: Device = "auto",
    system: System = "",
    as_json: Json = False,
    *,
    sampling: Sampling,
) -> None:
    """Ask questions about a document that `headinfer read` has read.

    Each question is answered as if it were the only one, and the session does not change, unless --keep is given.
    Several questions are answered together, since each token reads the document's KV once for all of them. --where
    names the passages that each answer came from.
    """
    from headinfer.cli.report import ANSWER_COLUMNS, AgainProgress, AnswersProgress, columns_table, summary_row
    from headinfer.cli.where import passage_lines
    from headinfer.engine.options import Options
    from headinfer.jobs import ask as asking
    from headinfer.jobs.together import GivenQuestion, read_questions
    from headinfer.plan.model_shape import ModelShape

    given = kv_options(device_kv_budget, host_kv_budget, disk_tier, cpu_share)
    Options(**given)  # raises UsageError before anything is loaded
    asked = [GivenQuestion(question) for question in questions or ()]
    if questions_file is not None:
        asked += read_questions(questions_file)
    job = asking.AskJob(
        name=session,
        root=sessions or default_root(),
        questions=[question.text for question in asked],
        document="".join(given_document(file or [], glob).texts),
        model=model,
        max_new_tokens=max_new_tokens,
        device=device,
        keep=keep,
        system=system,
        sampling=sampling,
        options=session_options(given),
        where=where,
    )
    started = time.perf_counter()
    prepared = asking.prepare_ask(job)
    checked = time.perf_counter()
    say(f"{prepared.manifest.tokens:,} tokens are read, {format_bytes(prepared.manifest.nbytes)} on disk")
    for message in prepared.warnings:
        warning(message)
    for message in prepared.slow:
        say(message)
    load_seconds: list[float] = []
    tokens = prepared.manifest.tokens
    answers = AnswersProgress(len(asked))
    again = AgainProgress(ModelShape.from_config(prepared.source.config), tokens)
    with answers if job.is_together else again as progress:
        shows = answers.write if job.is_together else write
        summaries = asking.ask(
            prepared,
            on_text=discard if as_json else shows,
            on_loaded=lambda _: load_seconds.append(time.perf_counter() - checked),
            on_forward=progress.on_forward,
            on_done=answers.on_done,
            on_note=say,
        )
    if as_json:
        result = {
            "slow": prepared.slow,
            "checks_s": checked - started,
            "model_load_s": load_seconds[0],
            "answers": [
                {"question": question.text, **question.facts, **one.as_dict()}
                for question, one in zip(asked, summaries, strict=False)  # Ctrl-C leaves some out
            ],
        }
        print(json.dumps(result))
    else:
        if not job.is_together:
            print(flush=True)
        for number, one in enumerate(summaries, 1):
            for line in passage_lines(one, str(number) if len(summaries) > 1 else ""):
                print(line, flush=True)
        header = ("question", *ANSWER_COLUMNS)
        stderr.print(columns_table("", header, [summary_row(number, one) for number, one in enumerate(summaries, 1)]))
        if summaries[-1].guesses_off_reason:
            say(f"guesses are off: {summaries[-1].guesses_off_reason}")
        if summaries[-1].cpu_text:
            say(f"attended by the CPU: {summaries[-1].cpu_text}")
        if summaries[-1].kernel_failure:
            say(f"slower attention on the CPU: {summaries[-1].kernel_failure}")
    if any(one.interrupted for one in summaries):
        if keep:
            say("interrupted: this question is not kept, and the session is as it was before it")
        raise typer.Exit(130)
