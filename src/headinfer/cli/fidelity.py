"""The command `headinfer eval fidelity`."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headinfer.cli.console import say, show, warning
from headinfer.cli.documents import Files, Globs, given_document
from headinfer.cli.options import (
    ChunkTokens,
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
from headinfer.utils.units import parse_tokens

if TYPE_CHECKING:
    from headinfer.evals.fidelity_job import FidelityJob
    from headinfer.evals.fidelity_results import FidelityResults

__all__ = ["fidelity"]

_PLOT = "fidelity.png"


def fidelity(
    model: Model,
    file: Files = None,
    glob: Globs = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Tokens of a context, separated by commas.",
            show_default="powers of two from 1K up to what text, model and memory allow",
        ),
    ] = None,
    window: Annotated[int, tokens("--window", "Compare the predictions of the last tokens of each length.")] = 512,
    needles: Annotated[
        int, number("--needles", "Facts that are hidden in the text and asked for; 0 for none.", low=0, high=1000)
    ] = 8,
    out: Annotated[
        Path, typer.Option(help="Folder for the results. An interrupted evaluation resumes from it.")
    ] = Path("results"),
    seed: Annotated[int, seed("Seed of the needles.")] = 0,
    raw: Raw = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    chunk_tokens: ChunkTokens = None,
    device_kv_budget: DeviceKVBudget = None,
    cpu_share: CpuShare = None,
    kv_dtype: KVDtypeOption = None,
    sparse_heads: SparseHeads = None,
    sparse_share: SparseShare = None,
    as_json: Json = False,
) -> None:
    """Measure what approximate KV changes in a model's predictions, against exact KV, on a text of yours."""
    from headinfer.evals.fidelity_job import FidelityJob

    if not file:
        raise UsageError("there is no text to compare predictions on: give one with --file")
    job = FidelityJob(
        model=model,
        texts=given_document(file, glob).texts,
        out=out,
        approximate=approximate_options(kv_dtype, sparse_heads, sparse_share),
        lengths=_lengths(lengths) if lengths is not None else None,
        window=window,
        needles=needles,
        seed=seed,
        is_raw=raw,
        dtype=dtype,
        device=device,
        chunk_tokens=chunk_tokens,
        device_kv_budget_bytes=device_kv_budget,
        cpu_share=cpu_share,
        command=shlex.join(["headinfer", *sys.argv[1:]]),
    )
    can_draw = _checked_plot(out / _PLOT)
    results = _run(job)
    try:
        if can_draw:
            _draw(results, out / _PLOT)
        else:
            say("no plot is drawn: it needs matplotlib (pip install 'headinfer[eval]')")
    finally:  # the figures are shown even if the plot cannot be written
        _show(results, as_json=as_json)


def _run(job: FidelityJob) -> FidelityResults:
    """Check a job, then run it with a progress bar."""
    from headinfer.cli.report import EvaluationProgress
    from headinfer.evals.fidelity_job import prepare, run

    prepared = prepare(job)
    for line in prepared.warnings:
        warning(line)
    if not prepared.reading_tokens:
        return run(prepared)
    with EvaluationProgress(prepared.shape, prepared.reading_tokens) as progress:
        return run(prepared, on_tokens=progress.on_tokens, on_read=lambda: progress.on_document(None))


def _lengths(text: str) -> tuple[int, ...]:
    return tuple(sorted({parse_tokens(part) for part in text.split(",")}))


def _checked_plot(path: Path) -> bool:
    """Return whether a plot can be drawn.

    Raises:
        UsageError: it would replace another file.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    from headinfer.evals.fidelity_plot import plot_file

    plot_file(path)
    return True


def _draw(results: FidelityResults, path: Path) -> None:
    from headinfer.evals.fidelity_plot import draw_fidelity

    draw_fidelity({results.about["model"]: {results.approximation: results.records}}, path)
    say(f"drawn into {path}")


def _show(results: FidelityResults, *, as_json: bool) -> None:
    """Print the figures of all lengths."""
    from headinfer.cli.report import columns_table
    from headinfer.evals.fidelity_results import table

    if as_json:
        print(json.dumps({"about": results.about, "lengths": results.records, "results": str(results.path)}))
    else:
        show(f"{results.about['model']}, {results.approximation}: {results.explanation}")
        show(columns_table("", *table(results.records)))
    say(f"written to {results.path}")
