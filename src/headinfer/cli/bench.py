"""`headinfer bench`: this machine's CPU, or with --device cuda its GPU, against other ways of holding a context."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from headinfer.errors import HeadinferError, UsageError
from headinfer.utils.units import parse_bytes

if TYPE_CHECKING:
    from headinfer.bench.job import Job, Line

__all__ = ["bench"]

_stderr = Console(stderr=True)


def bench(
    suites: Annotated[
        list[str] | None,
        typer.Argument(
            help="decode, prefill, memory, device-kv (where none is named); session, disk-tier. "
            "With --device cuda: link, decode, prefill, attention (all, where none is named)."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    gpu_memory: Annotated[
        str | None, typer.Option(help="Hold the process to so much GPU memory, e.g. 24GB, for a smaller card.")
    ] = None,
    limit_s: Annotated[
        float | None, typer.Option(help="GPU suites: begin nothing that would end after this; 480 if not given.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Write the measures to this file, as JSON; GPU suites: FILE.json or a folder, Markdown too."),
    ] = None,
    folder: Annotated[Path | None, typer.Option(help="On the disk for session and disk-tier.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes: whether it runs, not how fast.")] = False,
    check_plan: Annotated[
        bool, typer.Option("--check-plan", help="The planner's bytes and seconds against measured ones, on the CPU.")
    ] = False,
) -> None:
    """Measure speed and memory of this machine's CPU or GPU against transformers' caches and other ways."""
    if device == "cpu":
        if gpu_memory is not None or limit_s is not None:
            raise UsageError("--gpu-memory and --limit-s are for the GPU suites: give --device cuda as well")
        _cpu(suites or [], output, folder, markdown=markdown, quick=quick, check_plan=check_plan)
        return
    if folder is not None or check_plan:
        raise UsageError("--folder and --check-plan are for the CPU: leave --device out")
    _gpu(suites or [], device, gpu_memory, 480.0 if limit_s is None else limit_s, output, markdown, quick)


def _cpu(
    suites: list[str], output: Path | None, folder: Path | None, *, markdown: bool, quick: bool, check_plan: bool
) -> None:
    from headinfer.bench.measurement import is_result_json
    from headinfer.bench.plan_check import rows_of
    from headinfer.bench.run import check_suites, check_table, markdown_table, result_json, run_check, run_suites
    from headinfer.cli.report import columns_table
    from headinfer.utils.files import Output

    check_suites(suites)
    written = Output(output, is_ours=is_result_json) if output is not None else None
    if check_plan:
        found = run_check(quick=quick, on_stage=_say)
        try:
            if written is not None:
                written.write(result_json(found, sys.argv[1:]))
        finally:  # what took minutes is shown also if it cannot be written
            if markdown:
                print(check_table(found))
            else:
                header = ("", "predicted", "measured", "")
                Console().print(columns_table("headinfer bench --check-plan", header, rows_of(found)))
        if not all(one.is_right for one in found if one.unit == "bytes"):
            raise typer.Exit(1)
        return
    measures = run_suites(suites, quick=quick, on_stage=_say, folder=folder)
    try:
        if written is not None:
            written.write(result_json(measures, sys.argv[1:]))
    finally:
        if markdown:
            print(markdown_table(measures))
        else:
            rows = [(measure.what, measure.shown, measure.goal) for measure in measures]
            Console().print(columns_table("headinfer bench", ("", "measured", "to reach"), rows))


def _gpu(
    suites: list[str],
    device: str,
    gpu_memory: str | None,
    limit_s: float,
    output: Path | None,
    markdown: bool,
    quick: bool,
) -> None:
    from headinfer.bench.gpu import check_device, check_gpu_suites, run_gpu
    from headinfer.bench.job import QUICK, GpuSizes
    from headinfer.bench.measurement import is_result_json
    from headinfer.bench.results import (
        HEADER,
        gpu_json,
        gpu_markdown,
        gpu_rows,
        is_result_markdown,
        result_paths,
    )
    from headinfer.cli.report import columns_table
    from headinfer.utils.files import Output, check_folder

    check_gpu_suites(suites)
    cap = parse_bytes(gpu_memory) if gpu_memory is not None else None
    if not limit_s > 0:
        raise UsageError(f"--limit-s is {limit_s:g}: it must be a positive number of seconds")
    if output is not None:
        check_folder(output.parent if output.suffix == ".json" else output, "write results")
    found = check_device(device)
    sizes = QUICK if quick else GpuSizes()

    written: tuple[Output, Output] | None = None
    if output is not None:
        json_path, markdown_path = result_paths(output, found, cap)
        written = Output(json_path, is_ours=is_result_json), Output(markdown_path, is_ours=is_result_markdown)
    refused: list[HeadinferError] = []

    def keep(job: Job, lines: Sequence[Line]) -> None:
        if written is None or refused:
            return
        try:
            for one, text in zip(written, (gpu_json, gpu_markdown), strict=True):
                one.write(text(job, lines, sys.argv[1:]))
        except HeadinferError as error:  # raised below, when all has been measured and shown
            refused.append(error)
            return
        _say(f"written to {written[0].path} and {written[1].path}")

    job, lines = run_gpu(suites, found, sizes, _say, limit_s=limit_s, gpu_memory_bytes=cap, keep=keep)
    if markdown:
        print(gpu_markdown(job, lines, sys.argv[1:]), end="")
    else:
        Console().print(columns_table("headinfer bench", HEADER, gpu_rows(lines), "left"))
    if refused:
        raise refused[0]


def _say(line: str) -> None:
    _stderr.print(line, highlight=False, markup=False)
