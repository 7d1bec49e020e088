"""The command `headinfer generate`."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from headinfer.cli.console import discard, say, stderr, warning, write
from headinfer.cli.documents import Files, Globs, given_document
from headinfer.cli.options import (
    MEMORY_PANEL,
    ChunkTokens,
    CpuShare,
    Device,
    DeviceKVBudget,
    DiskTier,
    Dtype,
    HostKVBudget,
    Json,
    KVDtypeOption,
    MaxNewTokens,
    Model,
    Raw,
    SparseHeads,
    SparseShare,
    kv_options,
    number,
    text_option,
    tokens,
)
from headinfer.cli.sampling import System, takes_sampling
from headinfer.errors import UsageError
from headinfer.hf.ranks import Ranks
from headinfer.jobs.sampling import Sampling

if TYPE_CHECKING:
    from headinfer.jobs.generate import Prepared, Summary

__all__ = ["generate"]


@takes_sampling
def generate(
    model: Model,
    file: Files = None,
    glob: Globs = None,
    prompt: Annotated[
        list[str] | None,
        text_option(
            "--prompt",
            "The question about the document, or a prompt of its own. Several are answered together.",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: MaxNewTokens = 256,
    chunk_tokens: ChunkTokens = None,
    device_kv_budget: DeviceKVBudget = None,
    host_kv_budget: HostKVBudget = None,
    disk_tier: DiskTier = None,
    cpu_share: CpuShare = None,
    kv_dtype: KVDtypeOption = None,
    sparse_heads: SparseHeads = None,
    sparse_share: SparseShare = None,
    heads_per_group: Annotated[
        int | None,
        number(
            "--heads-per-group",
            "KV heads that are streamed together.",
            show_default="chosen before each pass",
            rich_help_panel=MEMORY_PANEL,
        ),
    ] = None,
    tile_tokens: Annotated[
        int | None,
        tokens(
            "--tile-tokens",
            "Tokens that are streamed together.",
            show_default="chosen before each pass",
            rich_help_panel=MEMORY_PANEL,
        ),
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(
            help="Attention backends to try first, separated by commas. `headinfer info` lists all.",
            rich_help_panel=MEMORY_PANEL,
        ),
    ] = None,
    transport: Annotated[
        str,
        typer.Option(
            help="How KV reaches the device: auto, in_place, eager or lazy. eager and lazy use the ring of a GPU on a "
            "CPU, for tests.",
            rich_help_panel=MEMORY_PANEL,
        ),
    ] = "auto",
    staging: Annotated[str | None, typer.Option(hidden=True, help="Deprecated: use --transport.")] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    system: System = "",
    raw: Raw = False,
    as_json: Json = False,
    *,
    sampling: Sampling,
) -> None:
    """Generate text after a document and a prompt. The text is streamed to stdout.

    The answers to several prompts are printed in their order, as soon as they are complete.
    """
    from headinfer.engine.options import Options
    from headinfer.hf import parallel
    from headinfer.jobs import generate as generation

    ranks = Ranks.from_environment()
    if staging is not None and ranks.is_first:
        warning("--staging is deprecated: use --transport")

    def check() -> Prepared:
        if not any(prompt or []) and not file:
            raise UsageError("the prompt is empty: give a question with --prompt, a document with --file, or both")
        options = Options(
            **kv_options(device_kv_budget, host_kv_budget, disk_tier, cpu_share, kv_dtype, sparse_heads, sparse_share),
            heads_per_group=heads_per_group,
            tile_tokens=tile_tokens,
            backend=backend,
            transport=transport,  # type: ignore[arg-type]
            staging=staging,
        )
        job = generation.Job(
            model=model,
            document=given_document(file or [], glob).texts,
            prompt=prompt[0] if prompt else "",
            more_prompts=prompt[1:] if prompt else (),
            max_new_tokens=max_new_tokens,
            chunk_tokens=chunk_tokens,
            dtype=dtype,
            device=device,
            seed=sampling.seed,
            raw=raw,
            system=system,
            sampling=sampling,
            options=options,
        )
        return generation.prepare(job, ranks)

    with parallel.process_group(ranks):
        prepared = parallel.run_on_all_ranks(ranks, check)
        if prepared.job.more_prompts:
            _run_together(prepared, as_json=as_json)
            return
        summary = _run(prepared, as_json=as_json) if ranks.is_first else generation.run(prepared, on_text=discard)
    if summary.interrupted:
        raise typer.Exit(130)


def _run(prepared: Prepared, *, as_json: bool) -> Summary:
    """Generate with warnings and progress on stderr, and the text or a JSON object on stdout."""
    from headinfer.cli import report
    from headinfer.jobs import generate as generation

    for message in prepared.warnings:
        warning(message)
    is_text_on_terminal = sys.stdout.isatty() and not as_json
    progress = report.GenerationProgress(
        prepared.shape,
        prepared.input_ids.shape[1],
        prepared.job.max_new_tokens,
        show_decode=not is_text_on_terminal,
    )
    with progress:
        summary = generation.run(prepared, on_text=discard if as_json else write, on_forward=progress.on_forward)
    if as_json:
        print(json.dumps(summary.as_dict()))
    else:
        print(flush=True)
        stderr.print(report.summary_table(summary))
    return summary


def _run_together(prepared: Prepared, *, as_json: bool) -> None:
    """Answer several prompts, with warnings and progress on stderr, and the texts or JSON Lines on stdout.

    Raises:
        typer.Exit: Ctrl-C has ended it.
    """
    from headinfer.cli import report
    from headinfer.jobs.together import generate_together

    for message in prepared.warnings:
        warning(message)
    with report.AnswersProgress(len(prepared.prompts), min(map(len, prepared.prompts))) as progress:
        summaries = generate_together(
            prepared,
            on_text=discard if as_json else progress.write,
            on_forward=progress.on_forward,
            on_done=progress.on_done,
            on_note=say,
        )
    prompts = (prepared.job.prompt, *prepared.job.more_prompts)
    if as_json:
        for prompt, summary in zip(prompts, summaries, strict=True):
            print(json.dumps({"prompt": prompt, **summary.as_dict()}))
    else:
        rows = [report.summary_row(number, summary) for number, summary in enumerate(summaries, 1)]
        stderr.print(report.columns_table("", ("prompt", *report.ANSWER_COLUMNS), rows))
        if summaries[-1].guesses_off_reason:
            say(f"guesses are off: {summaries[-1].guesses_off_reason}")
    if any(summary.interrupted for summary in summaries):
        raise typer.Exit(130)
