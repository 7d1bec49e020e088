"""`headinfer eval`: what a model finds in long texts, through the head-wise cache and, to compare, the standard one."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from headinfer.errors import UsageError
from headinfer.utils.units import format_tokens, parse_bytes, parse_tokens

if TYPE_CHECKING:
    from headinfer.evals.run import Results
    from headinfer.evals.tasks import Document
    from headinfer.hf.models import ModelSource
    from headinfer.plan.model_shape import ModelShape

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="What a model finds in long texts, and that no cache changes it.")
_stderr = Console(stderr=True)

Model = Annotated[str, typer.Argument(help="A local folder, a hub name, or embedded.", show_default=False)]
Lengths = Annotated[str, typer.Option(help="Tokens of a prompt with its answer: 4K,16K,64K.")]
Out = Annotated[Path, typer.Option(help="A folder for results; an evaluation cut short goes on from what is there.")]
Compare = Annotated[
    bool, typer.Option("--compare", help="Ask transformers' own cache too, where it fits; exit code 1 if they differ.")
]
Seed = Annotated[int, typer.Option(help="The same seed asks the same questions.")]
Text = Annotated[Path | None, typer.Option(help="A UTF-8 text to hide needles in; else the one that headinfer ships.")]
Raw = Annotated[bool, typer.Option("--raw", help="Do not use the model's chat template.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Budget = Annotated[str | None, typer.Option(help="KV bytes on the device; planned where not given.")]
Json = Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object.")]


@app.command()
def niah(
    model: Model,
    lengths: Lengths = "4K,16K",
    depths: Annotated[
        str, typer.Option(help="Depths in percent: 0,50,100; or 0..100 for 11 of them; or 0..100/5 for 5.")
    ] = "0..100",
    samples: Annotated[int, typer.Option(help="Documents of each length.", min=1)] = 1,
    lead: Annotated[
        bool, typer.Option("--lead/--no-lead", help="Whether the answer's beginning, up to the number, is given.")
    ] = True,
    out: Out = Path("results"),
    compare: Compare = False,
    seed: Seed = 0,
    text: Text = None,
    raw: Raw = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    device_kv_budget: Budget = None,
    as_json: Json = False,
) -> None:
    """Needles at every depth of texts of every length; draws a heatmap."""
    from headinfer.evals.niah import niah_document, niah_documents

    wanted, chosen = _lengths(lengths), _depths(depths)
    job = _Job(model, raw, dtype, device, device_kv_budget, seed, as_json)
    about = {"evaluation": "niah", "depths": chosen, "text": str(text or "shipped")}
    _check_heatmap(out / "niah.png")
    job.prepare(max(wanted), about if lead else about | {"lead": False}, out)
    hay = _text(text)
    # Refuses a length that is too short, before all else.
    niah_document(min(wanted), chosen, 0, hay, job.count, seed, gives_lead=lead)
    documents = niah_documents(wanted, chosen, samples, hay, job.count, seed, gives_lead=lead)
    results = job.run(documents, [length for length in wanted for _ in range(samples)], compare=compare)
    scores = results.scores("length")
    rows = [(format_tokens(length), f"{scores[(length,)]:.1%}") for length in sorted(wanted)]
    try:
        _draw(results, out / "niah.png")
    finally:  # the scores are shown also if the heatmap cannot be written
        job.end(results, ("tokens", "found"), rows)


@app.command()
def ruler(
    model: Model,
    lengths: Lengths = "4K,16K",
    tasks: Annotated[str, typer.Option(help="Names of tasks, with commas; all of them where not given.")] = "all",
    samples: Annotated[int, typer.Option(help="Documents of each task and length.", min=1)] = 10,
    out: Out = Path("results"),
    compare: Compare = False,
    seed: Seed = 0,
    text: Text = None,
    raw: Raw = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    device_kv_budget: Budget = None,
    as_json: Json = False,
) -> None:
    """RULER's tasks that need no external data: needles, variable tracking, common and frequent words."""
    from headinfer.evals.ruler import RULER_TASKS, ruler_documents

    wanted = _lengths(lengths)
    names = list(RULER_TASKS) if tasks == "all" else [name.strip() for name in tasks.split(",")]
    if unknown := [name for name in names if name not in RULER_TASKS]:
        raise UsageError(f"RULER has no task {unknown[0]!r} here: choose among {', '.join(RULER_TASKS)}")
    job = _Job(model, raw, dtype, device, device_kv_budget, seed, as_json)
    job.prepare(max(wanted), {"evaluation": "ruler", "text": str(text or "shipped")}, out)
    hay = _text(text)
    for name in names:
        next(ruler_documents(name, wanted[:1], 1, hay, job.count, seed))  # refuses what is too short, before all else

    def documents() -> Iterator[Document]:
        for length in wanted:
            for name in names:
                yield from ruler_documents(name, [length], samples, hay, job.count, seed)

    sizes = [length for length in wanted for _ in range(samples * len(names))]
    results = job.run(documents(), sizes, compare=compare)
    scores, means = results.scores("task", "length"), results.scores("length")
    rows = [(name, *(f"{scores[name, length]:.1%}" for length in wanted)) for name in names]
    rows.append(("mean", *(f"{means[(length,)]:.1%}" for length in wanted)))
    job.end(results, ("task", *map(format_tokens, wanted)), rows)


@app.command()
def data(
    model: Model,
    task: Annotated[str, typer.Option(help="longbench-v2, or one of SCBench's: scbench_kv, scbench_qa_eng, ...")],
    data: Annotated[Path, typer.Option(help="The benchmark's file, JSON or JSON lines.")],
    most_tokens: Annotated[
        str | None, typer.Option(help="Leave out texts that are longer than this, and say how many.")
    ] = None,
    out: Out = Path("results"),
    compare: Compare = False,
    raw: Raw = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    device_kv_budget: Budget = None,
    as_json: Json = False,
) -> None:
    """A local file of LongBench v2 or SCBench, with the published templates and metric."""
    from headinfer.evals.data_files import data_documents

    documents = data_documents(task, data)
    job = _Job(model, raw, dtype, device, device_kv_budget, 0, as_json)
    job.prepare(1, {"evaluation": task, "data": str(data)}, out)
    sizes = [job.count(document.text) + _tail_tokens(document) for document in documents]
    most = parse_tokens(most_tokens) if most_tokens is not None else max(sizes)
    kept = [(document, size) for document, size in zip(documents, sizes, strict=True) if size <= most]
    if not kept:
        raise UsageError(f"no text of {data} has at most {most:,} tokens: the shortest has {min(sizes):,}")
    if len(kept) < len(documents):
        _say(f"{len(documents) - len(kept)} of {len(documents)} texts are longer than {most:,} tokens and left out")
    job.check_memory(max(size for _, size in kept))
    results = job.run([document for document, _ in kept], [size for _, size in kept], compare=compare)
    rows = [("all", f"{results.scores()[()]:.1%}")]
    for name in ("difficulty", "length", "domain"):
        rows += [(f"{name}: {key[0]}", f"{score:.1%}") for key, score in results.scores(name).items() if key[0]]
    job.end(results, ("", "score"), rows)


class _Job:
    """What the evaluations share: check, load, run with progress, show."""

    def __init__(
        self, model: str, raw: bool, dtype: str, device: str, budget: str | None, seed: int, as_json: bool
    ) -> None:
        self.model, self.raw, self.dtype_name, self.device_name = model, raw, dtype, device
        self.budget = parse_bytes(budget) if budget is not None else None
        self.seed, self.as_json = seed, as_json

    def prepare(self, longest: int, about: dict[str, Any], out: Path) -> None:
        """Check all that can be checked before weights are loaded."""
        from headinfer.evals.run import Results
        from headinfer.hf.models import resolve
        from headinfer.jobs.generate import checked_device, chosen_dtype
        from headinfer.plan.model_shape import ModelShape

        self.device = checked_device(self.device_name)
        self.source: ModelSource = resolve(self.model)
        self.dtype = chosen_dtype(self.dtype_name, self.source, self.device)
        self.tokenizer = self.source.tokenizer()
        self.shape: ModelShape = ModelShape.from_config(self.source.config)
        about = {"model": self.model, "dtype": str(self.dtype).removeprefix("torch."), "seed": self.seed, **about}
        self.results = Results.open(out, about | {"raw": self.raw})
        self.results.command = shlex.join(["headinfer", *sys.argv[1:]])
        self.check_memory(longest)

    def check_memory(self, tokens: int) -> None:
        """Refuse what cannot fit; CapacityError with what would."""
        import torch

        from headinfer.engine.run_plan import plan_run

        fixed = {"device_kv_budget_bytes": self.budget}
        plan_run(self.shape, torch.device(self.device), self.dtype, tokens, fixed=fixed)

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.tokenizer(text, add_special_tokens=False).input_ids)

    def run(self, documents: Iterable[Document], sizes: Sequence[int], *, compare: bool) -> Results:
        """Answer what is not answered yet. sizes: tokens of each document, for the time left."""
        from headinfer.evals.reader import Reader
        from headinfer.evals.run import evaluate

        model = self.source.load(dtype=self.dtype, device=self.device, seed=self.seed)
        costs = iter([self.shape.prefill_flops(size) for size in sizes])
        total = sum(self.shape.prefill_flops(size) for size in sizes)
        columns = (BarColumn(), TextColumn("{task.fields[shown]}"), TimeElapsedColumn(), TextColumn("left"))
        with Progress(TextColumn("{task.description}"), *columns, TimeRemainingColumn(), console=_stderr) as progress:
            bar = progress.add_task("evaluating", total=total, shown=f"0 of {len(sizes)} texts")
            done, before, part = 0, 0.0, next(costs)

            def on_tokens(tokens: int) -> None:
                progress.update(bar, completed=before + min(self.shape.prefill_flops(tokens), part))

            def on_document(*_: object) -> None:
                nonlocal done, before, part
                done, before = done + 1, before + part
                part = next(costs, 0.0)
                score = self.results.summary()["score"]
                shown = f"{done} of {len(sizes)} texts" + (f", score {score:.1%}" if score is not None else "")
                progress.update(bar, completed=before, shown=shown)

            options = {"device_kv_budget_bytes": self.budget}
            reader = Reader(model, self.tokenizer, is_raw=self.raw, options=options, on_tokens=on_tokens)
            kv_bytes = self.shape.kv_bytes_per_token(self.dtype.itemsize)
            evaluate(
                reader, documents, self.results, compare=compare, kv_bytes_per_token=kv_bytes, on_document=on_document
            )
        return self.results

    def end(self, results: Results, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Show scores and the comparison; exit code 1 where the caches differ."""
        from headinfer.cli.report import columns_table

        summary = results.summary()
        compared = summary.get("compared")
        if self.as_json:
            print(json.dumps({"about": results.about, **summary, "results": str(results.path)}))
        else:
            console = Console()
            console.print(f"{self.model}, {summary['questions']} questions", highlight=False, markup=False)
            console.print(columns_table("", header, rows))
            if compared:
                console.print(
                    f"standard against head-wise cache: {compared['identical']} of {compared['questions']} answers "
                    f"identical, difference in score {compared['score_difference']:g}",
                    highlight=False,
                )
            for key, reason in results.skipped.items():
                _say(f"{key} was not compared: the standard cache {reason}")
        _say(f"written to {results.path}")
        if compared and compared["identical"] < compared["questions"]:
            raise typer.Exit(1)


def _lengths(text: str) -> list[int]:
    return sorted({parse_tokens(part) for part in text.split(",")})


def _depths(text: str) -> list[float]:
    """Shares from percents: a list, or a range with a count."""
    found = re.fullmatch(r"\s*([\d.]+)\s*\.\.\s*([\d.]+)\s*(?:/\s*(\d+))?\s*", text)
    try:
        if found:
            low, high, count = float(found[1]), float(found[2]), int(found[3] or 11)
            percents = [low + (high - low) * step / max(count - 1, 1) for step in range(count)]
        else:
            percents = [float(part) for part in text.split(",")]
    except ValueError:
        percents = []
    if not percents or not all(0 <= percent <= 100 for percent in percents):
        raise UsageError(f"{text!r} are no depths: write percents such as 0,50,100, or 0..100, or 0..100/5")
    return sorted({round(percent / 100, 4) for percent in percents})


def _text(path: Path | None) -> str:
    from headinfer.embedded import embedded_text
    from headinfer.jobs.generate import read_text

    text = read_text(path) if path is not None else embedded_text()
    if not text.strip():
        raise UsageError(f"{path} has no text to hide needles in")
    return text


def _tail_tokens(document: Document) -> int:
    return max(len(question.text) // 2 + question.new_tokens for question in document.questions)


def _check_heatmap(path: Path) -> None:
    """Raise UsageError if the heatmap would replace a file that is none, before anything expensive starts."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:  # then none is drawn
        return
    from headinfer.evals.heatmap import is_heatmap
    from headinfer.utils.files import Output

    Output(path, is_ours=is_heatmap)


def _draw(results: Results, path: Path) -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        _say("no heatmap is drawn: it needs matplotlib (pip install 'headinfer[eval]')")
        return
    from headinfer.evals.heatmap import save_heatmap

    save_heatmap(results, path)
    _say(f"drawn into {path}")


def _say(line: str) -> None:
    _stderr.print(line, highlight=False, markup=False, soft_wrap=True)
