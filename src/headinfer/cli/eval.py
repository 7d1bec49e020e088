"""The commands `headinfer eval niah`, `ruler` and `data`; fidelity.py has `headinfer eval fidelity`."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headinfer.cli.console import say, show, warning
from headinfer.cli.documents import DOCUMENT_HELP, given_document
from headinfer.cli.fidelity import fidelity
from headinfer.cli.options import (
    Command,
    CpuShare,
    Device,
    DeviceKVBudget,
    Dtype,
    Json,
    KVDtypeOption,
    Model,
    Raw,
    SparseHeads,
    SparseShare,
    approximate_options,
    number,
    seed,
    tokens,
)
from headinfer.errors import UsageError
from headinfer.utils.units import format_tokens, parse_tokens

if TYPE_CHECKING:
    from headinfer.evals.run import Results
    from headinfer.evals.tasks import Document

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True, help="Measure what a model finds in long texts, and check that the cache does not change it."
)
app.command(cls=Command)(fidelity)

_MOST_DEPTHS = 1000

Lengths = Annotated[str, typer.Option(help="Tokens of a prompt and its answer, separated by commas.")]
Samples = Annotated[int, number("--samples", "Documents per length, and per task if there are several.", high=100_000)]
Out = Annotated[Path, typer.Option(help="Folder for the results. An interrupted evaluation resumes from it.")]
Compare = Annotated[
    bool,
    typer.Option(
        "--compare",
        help="Answer with transformers' own cache too, if it fits. The exit code is 1 if an answer differs.",
    ),
]
Seed = Annotated[int, seed("Seed of the documents and questions.")]
Text = Annotated[
    Path | None,
    typer.Option(help=f"Text to hide the needles in. {DOCUMENT_HELP}", show_default="the text that headinfer ships"),
]


@app.command(cls=Command)
def niah(
    model: Model,
    lengths: Lengths = "4K,16K",
    depths: Annotated[
        str,
        typer.Option(
            help="Depths in percent: a list such as 0,50,100, or a range: 0..100 has 11 depths, 0..100/5 has 5."
        ),
    ] = "0..100",
    samples: Samples = 1,
    lead: Annotated[
        bool,
        typer.Option("--lead/--no-lead", help="Whether the prompt ends with the beginning of the answer."),
    ] = True,
    out: Out = Path("results"),
    compare: Compare = False,
    seed: Seed = 0,
    text: Text = None,
    raw: Raw = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    device_kv_budget: DeviceKVBudget = None,
    cpu_share: CpuShare = None,
    kv_dtype: KVDtypeOption = None,
    sparse_heads: SparseHeads = None,
    sparse_share: SparseShare = None,
    as_json: Json = False,
) -> None:
    """Hide facts (needles) at several depths of texts of several lengths, ask for them, and draw a heatmap."""
    from headinfer.evals.niah import niah_document, niah_documents

    wanted = _lengths(lengths)
    chosen = _depths(depths)
    _check_heatmap(out / "niah.png")
    about: dict[str, Any] = {"evaluation": "niah", "depths": chosen, "text": str(text or "shipped")}
    if not lead:
        about["lead"] = False
    form = approximate_options(kv_dtype, sparse_heads, sparse_share)
    evaluation = _Evaluation(model, out, about, seed, raw, dtype, device, device_kv_budget, cpu_share, form)
    evaluation.check_memory(max(wanted))
    hay = _text(text)
    niah_document(min(wanted), chosen, 0, hay, evaluation.count, seed, gives_lead=lead)  # raises if it is too short
    documents = niah_documents(wanted, chosen, samples, hay, evaluation.count, seed, gives_lead=lead)
    results = evaluation.run(documents, [length for length in wanted for _ in range(samples)], compare=compare)
    scores = results.scores("length")
    rows = [(format_tokens(length), f"{scores[(length,)]:.1%}") for length in wanted]
    try:
        _draw(results, out / "niah.png")
    finally:  # the scores are shown even if the heatmap cannot be written
        _show(results, ("tokens", "found"), rows, as_json=as_json)


@app.command(cls=Command)
def ruler(
    model: Model,
    lengths: Lengths = "4K,16K",
    tasks: Annotated[str, typer.Option(help="Names of tasks, separated by commas.")] = "all",
    samples: Samples = 10,
    out: Out = Path("results"),
    compare: Compare = False,
    seed: Seed = 0,
    text: Text = None,
    raw: Raw = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    device_kv_budget: DeviceKVBudget = None,
    cpu_share: CpuShare = None,
    kv_dtype: KVDtypeOption = None,
    sparse_heads: SparseHeads = None,
    sparse_share: SparseShare = None,
    as_json: Json = False,
) -> None:
    """Run RULER's tasks that need no external data: needles, variable tracking, common and frequent words."""
    from headinfer.evals.ruler import RULER_TASKS, ruler_documents

    wanted = _lengths(lengths)
    names = list(RULER_TASKS) if tasks == "all" else [name.strip() for name in tasks.split(",")]
    unknown = [name for name in names if name not in RULER_TASKS]
    if unknown:
        raise UsageError(f"RULER has no task {unknown[0]!r} here: choose among {', '.join(RULER_TASKS)}")
    about = {"evaluation": "ruler", "text": str(text or "shipped")}
    form = approximate_options(kv_dtype, sparse_heads, sparse_share)
    evaluation = _Evaluation(model, out, about, seed, raw, dtype, device, device_kv_budget, cpu_share, form)
    evaluation.check_memory(max(wanted))
    hay = _text(text)
    for name in names:
        next(ruler_documents(name, wanted[:1], 1, hay, evaluation.count, seed))  # raises if a length is too short

    def documents() -> Iterator[Document]:
        for length in wanted:
            for name in names:
                yield from ruler_documents(name, [length], samples, hay, evaluation.count, seed)

    document_tokens = [length for length in wanted for _ in range(samples * len(names))]
    results = evaluation.run(documents(), document_tokens, compare=compare)
    scores = results.scores("task", "length")
    means = results.scores("length")
    rows = [(name, *(f"{scores[name, length]:.1%}" for length in wanted)) for name in names]
    rows.append(("mean", *(f"{means[(length,)]:.1%}" for length in wanted)))
    _show(results, ("task", *map(format_tokens, wanted)), rows, as_json=as_json)


@app.command(cls=Command)
def data(
    model: Model,
    task: Annotated[str, typer.Option(help="longbench-v2, or a task of SCBench: scbench_kv, scbench_qa_eng, ...")],
    data: Annotated[Path, typer.Option(help="File of the benchmark, JSON or JSON lines.")],
    most_tokens: Annotated[
        int | None,
        tokens("--most-tokens", "Leave out texts that are longer than this, e.g. 128K.", show_default="no limit"),
    ] = None,
    out: Out = Path("results"),
    compare: Compare = False,
    raw: Raw = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    device_kv_budget: DeviceKVBudget = None,
    cpu_share: CpuShare = None,
    kv_dtype: KVDtypeOption = None,
    sparse_heads: SparseHeads = None,
    sparse_share: SparseShare = None,
    as_json: Json = False,
) -> None:
    """Evaluate with a local file of LongBench v2 or SCBench, with the published templates and metric."""
    from headinfer.evals.data_files import data_documents

    documents = data_documents(task, data)
    evaluation = _Evaluation(
        model,
        out,
        {"evaluation": task, "data": str(data)},
        0,
        raw,
        dtype,
        device,
        device_kv_budget,
        cpu_share,
        approximate_options(kv_dtype, sparse_heads, sparse_share),
    )
    evaluation.check_memory(1)  # raises before the texts are tokenized
    sizes = [evaluation.count(document.text) + _answer_tokens(document) for document in documents]
    most = most_tokens if most_tokens is not None else max(sizes)
    kept = [(document, size) for document, size in zip(documents, sizes, strict=True) if size <= most]
    if not kept:
        raise UsageError(f"no text of {data} has at most {most:,} tokens: the shortest has {min(sizes):,}")
    if len(kept) < len(documents):
        say(f"{len(documents) - len(kept)} of {len(documents)} texts are longer than {most:,} tokens and left out")
    evaluation.check_memory(max(size for _, size in kept))
    results = evaluation.run([document for document, _ in kept], [size for _, size in kept], compare=compare)
    rows = [("all", f"{results.scores()[()]:.1%}")]
    for name in ("difficulty", "length", "domain"):
        rows += [(f"{name}: {key[0]}", f"{score:.1%}") for key, score in results.scores(name).items() if key[0]]
    _show(results, ("", "score"), rows, as_json=as_json)


class _Evaluation:
    """A model and the folder of its results, checked; weights are loaded by run().

    Args:
        model: as for `headinfer generate`.
        out: the folder of results.
        about: the facts that the results of an earlier run must agree with, apart from the arguments below.
        seed: the seed of documents, questions and random weights.
        is_raw: whether the model's chat template is left out.
        dtype: a value of --dtype.
        device: a value of --device.
        device_kv_budget: bytes; planned if None.
        cpu_share: the share of the host's CPU in decode; planned if None.
        form: approximate_options() of the command.

    Raises:
        UsageError: the folder holds other results, or an argument is wrong.
    """

    def __init__(
        self,
        model: str,
        out: Path,
        about: dict[str, Any],
        seed: int,
        is_raw: bool,
        dtype: str,
        device: str,
        device_kv_budget: int | None,
        cpu_share: float | None,
        form: dict[str, Any],
    ) -> None:
        from headinfer.engine.machine import chosen_device
        from headinfer.engine.options import Options
        from headinfer.evals.run import Results
        from headinfer.hf.cache import HeadCache
        from headinfer.hf.models import resolve
        from headinfer.jobs.generate import chosen_dtype
        from headinfer.jobs.prompts import chat_texts
        from headinfer.plan.cpu_share import unused_share_warnings
        from headinfer.plan.model_shape import ModelShape

        self._options: dict[str, Any] = {"device_kv_budget_bytes": device_kv_budget, "cpu_share": cpu_share}
        chosen = Options(**form)
        if chosen.is_approximate:
            self._options |= form
            pattern = chosen.sparse_heads
            about = {**about, "kv_dtype": chosen.kv_dtype, "approximate": True}
            if pattern is not None:
                about["sparse_heads"] = pattern.reduced().as_dict()
            warning(chosen.approximation)
        self._seed = seed
        self._is_raw = is_raw
        self._device = str(chosen_device(device))
        self._source = resolve(model)
        self._dtype = chosen_dtype(dtype, self._source, self._device)
        self._tokenizer = self._source.tokenizer()
        chat_texts(self._tokenizer, is_raw=is_raw)  # raises if the chat template cannot be used
        self._shape = ModelShape.from_config(self._source.config)
        HeadCache(self._source.config, **self._options)  # raises if the model or an option is not served
        dtype_name = str(self._dtype).removeprefix("torch.")
        self._results = Results.open(out, {"model": model, "dtype": dtype_name, "seed": seed, **about, "raw": is_raw})
        self._results.command = shlex.join(["headinfer", *sys.argv[1:]])
        for line in unused_share_warnings(cpu_share, is_in_place=self._device == "cpu"):
            warning(line)

    def check_memory(self, tokens: int) -> None:
        """Raise CapacityError if a context of `tokens` tokens does not fit this machine."""
        import torch

        from headinfer.engine.options import Options
        from headinfer.engine.run_plan import RunRequest, plan_run

        options = Options(**self._options)
        plan_run(RunRequest(self._shape, torch.device(self._device), self._dtype, tokens, options))

    def count(self, text: str) -> int:
        """Return the number of tokens of a text.

        Raises:
            UsageError: the model has no embedding for a token.
        """
        ids = self._tokenizer(text, add_special_tokens=False).input_ids
        self._source.check_ids(ids)
        return len(ids)

    def run(self, documents: Iterable[Document], document_tokens: Sequence[int], *, compare: bool) -> Results:
        """Answer the questions that have no answer in the folder yet, with a progress bar.

        Args:
            documents: the documents with their questions.
            document_tokens: tokens of each document, for the progress bar.
            compare: whether transformers' own cache answers too.
        """
        from headinfer.cli.report import EvaluationProgress
        from headinfer.evals.reader import Reader
        from headinfer.evals.run import evaluate

        model = self._source.load(dtype=self._dtype, device=self._device, seed=self._seed)
        with EvaluationProgress(self._shape, document_tokens) as progress:
            reader = Reader(
                model,
                self._tokenizer,
                is_raw=self._is_raw,
                options=self._options,
                on_tokens=progress.on_tokens,
            )
            evaluate(
                reader,
                documents,
                self._results,
                compare=compare,
                kv_bytes_per_token=self._shape.kv_bytes_per_token(self._dtype.itemsize),
                on_document=lambda *_: progress.on_document(self._results.summary()["score"]),
            )
        return self._results


def _show(results: Results, header: Sequence[str], rows: Sequence[Sequence[str]], *, as_json: bool) -> None:
    """Print scores and the comparison of the caches. Exit with code 1 if their answers differ."""
    from headinfer.cli.report import columns_table

    summary = results.summary()
    compared = summary.get("compared")
    if as_json:
        print(json.dumps({"about": results.about, **summary, "results": str(results.path)}))
    else:
        show(f"{results.about['model']}, {summary['questions']} questions")
        show(columns_table("", header, rows))
        if compared:
            show(
                f"standard and head-wise cache: {compared['identical']} of {compared['questions']} answers identical, "
                f"difference in score {compared['score_difference']:g}"
            )
        for key, reason in results.skipped.items():
            say(f"{key} was not compared: the standard cache {reason}")
    say(f"written to {results.path}")
    if compared and compared["identical"] < compared["questions"]:
        raise typer.Exit(1)


def _lengths(text: str) -> list[int]:
    return sorted({parse_tokens(part) for part in text.split(",")})


def _depths(text: str) -> list[float]:
    """Parse --depths: percents such as 0,50,100, or a range such as 0..100/5. Returns shares of 1."""
    found = re.fullmatch(r"\s*([\d.]+)\s*\.\.\s*([\d.]+)\s*(?:/\s*(\d+))?\s*", text)
    try:
        if found:
            low = float(found[1])
            high = float(found[2])
            count = min(int((found[3] or "11")[:5]), _MOST_DEPTHS + 1)
            percents = [low + (high - low) * step / max(count - 1, 1) for step in range(count)]
        else:
            percents = [float(part) for part in text.split(",")]
    except ValueError:
        percents = []
    if not percents or not all(0 <= percent <= 100 for percent in percents):
        raise UsageError(f"{text!r} is not a list of depths: write percents such as 0,50,100, or 0..100, or 0..100/5")
    if found and float(found[1]) > float(found[2]):
        raise UsageError(f"{text!r} is a reversed range of depths: write the smaller percent first")
    if len(percents) > _MOST_DEPTHS:
        raise UsageError(f"{text[:40]!r} has more than {_MOST_DEPTHS} depths, and a document holds one needle for each")
    return sorted({round(percent / 100, 4) for percent in percents})


def _text(path: Path | None) -> str:
    from headinfer.embedded import embedded_text

    text = "".join(given_document([path], []).texts) if path is not None else embedded_text()
    if not text.strip():
        raise UsageError(f"{path} has no text to hide needles in")
    return text


def _answer_tokens(document: Document) -> int:
    return max(len(question.text) // 2 + question.new_tokens for question in document.questions)


def _check_heatmap(path: Path) -> None:
    """Raise UsageError if the heatmap would replace another file, before anything expensive starts."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:  # no heatmap is drawn
        return
    from headinfer.evals.heatmap import is_heatmap
    from headinfer.utils.files import Output

    Output(path, is_ours=is_heatmap)


def _draw(results: Results, path: Path) -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        say("no heatmap is drawn: it needs matplotlib (pip install 'headinfer[eval]')")
        return
    from headinfer.evals.heatmap import save_heatmap

    save_heatmap(results, path)
    say(f"drawn into {path}")
