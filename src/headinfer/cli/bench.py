"""`headinfer bench`: measures this machine's CPU or GPU, and prints and writes the results."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from headinfer.cli.console import say, show
from headinfer.cli.options import real, size
from headinfer.errors import HeadinferError, UsageError

if TYPE_CHECKING:
    from headinfer.bench.job import CpuJob, GpuJob
    from headinfer.bench.measurement import Measurement
    from headinfer.bench.results import Block

__all__ = ["bench"]

_DEFAULT_LIMIT_S = 480.0
_WAY_WIDTH = 20  # characters at least of the names of ways, which are wrapped in a narrow terminal


def bench(
    suites: Annotated[
        list[str] | None,
        typer.Argument(
            help="decode, prefill, memory, device-kv, host (all of these if you name none); attention, batch, "
            "kv-dtype, session, disk-tier. "
            "With --device cuda: link, decode, prefill, attention (all of these if you name none); real, a whole "
            "prompt that is really read, which can take many minutes."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    tokens: Annotated[
        str | None,
        typer.Option(metavar="TOKENS,...", help="GPU suite decode: contexts after which a token is decoded: 1K,1M,4M."),
    ] = None,
    offsets: Annotated[
        str | None,
        typer.Option(metavar="TOKENS,...", help="GPU suite prefill: contexts after which a chunk is read: 64K,1M."),
    ] = None,
    whole: Annotated[
        str | None,
        typer.Option(
            metavar="TOKENS,...",
            help="GPU suites prefill and real: lengths of whole prompts, such as 100K. real reads the longest prompt "
            "that host memory holds if you leave it out.",
        ),
    ] = None,
    baselines: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="GPU suites decode and prefill: measure these in turns with headinfer, in this order: paper, "
            "resident, offloaded, dynamic, layer-wise, free, int8, int4 (all if you leave it out), or none.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="GPU suite real: the model, as for headinfer generate.",
            show_default="the shape of Qwen2-7B with random weights",
        ),
    ] = None,
    gpu_memory: Annotated[
        int | None,
        size("--gpu-memory", "GPU suites: limit the process to this much GPU memory, e.g. 24GB, like a smaller card."),
    ] = None,
    limit_s: Annotated[
        float | None,
        real(
            "--limit-s",
            "GPU suites: start nothing that would end after this many seconds (default: 480).",
            low=1e-3,
            high=1e9,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Write the results as JSON to this file. GPU suites: FILE.json or a folder; writes Markdown too."
        ),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="session and disk-tier: a folder on the disk to be measured.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the results as Markdown.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Use small sizes, to see that the suites run. The figures mean nothing.")
    ] = False,
    check_plan: Annotated[
        bool,
        typer.Option("--check-plan", help="Compare the planner's bytes and seconds with measured ones, on the CPU."),
    ] = False,
) -> None:
    """Measure speed and memory on this machine's CPU or GPU, in turns with transformers' caches and other baselines.

    The options for contexts and lengths run only their suites if you name none.
    """
    names = suites or []
    lengths = {"tokens": tokens, "offsets": offsets, "whole": whole, "baselines": baselines, "model": model}
    if device == "cpu":
        for_gpus = {**lengths, "gpu-memory": gpu_memory, "limit-s": limit_s}
        given = [f"--{name}" for name, value in for_gpus.items() if value is not None]
        if given:
            verb = "is" if len(given) == 1 else "are"
            raise UsageError(f"{' and '.join(given)} {verb} for the GPU suites: give --device cuda as well")
        _run(_cpu_job(names, folder, quick=quick), names, output, markdown=markdown, check_plan=check_plan)
        return
    if folder is not None or check_plan:
        raise UsageError("--folder and --check-plan are for the CPU: leave --device out")
    limit = _DEFAULT_LIMIT_S if limit_s is None else limit_s
    names, job = _gpu_job(names, lengths, device, gpu_memory, limit, output, quick=quick)
    _run(job, names, output, markdown=markdown)


def _cpu_job(names: Sequence[str], folder: Path | None, *, quick: bool) -> CpuJob:
    """Check the options of the CPU suites, and return their job."""
    from headinfer.bench.job import CpuJob
    from headinfer.bench.run import check_suites
    from headinfer.bench.sizes import QUICK_CPU, CpuSizes

    check_suites(names, is_gpu=False)
    return CpuJob(QUICK_CPU if quick else CpuSizes(), say, folder=folder)


def _gpu_job(
    suites: Sequence[str],
    lengths: Mapping[str, str | None],
    device: str,
    gpu_memory: int | None,
    limit_s: float,
    output: Path | None,
    *,
    quick: bool,
) -> tuple[list[str], GpuJob]:
    """Check the options of the GPU suites, and return the suites that run and their job."""
    from headinfer.bench.choice import choose
    from headinfer.bench.job import GpuJob
    from headinfer.bench.run import check_device
    from headinfer.bench.sizes import QUICK_GPU, GpuSizes
    from headinfer.utils.files import check_folder

    names, sizes = choose(suites, QUICK_GPU if quick else GpuSizes(), **lengths)
    if output is not None:
        check_folder(output.parent if output.suffix == ".json" else output, "write results")
    return names, GpuJob(check_device(device), sizes, say, limit_s=limit_s, gpu_memory_bytes=gpu_memory)


def _run(
    job: CpuJob | GpuJob, names: Sequence[str], output: Path | None, *, markdown: bool, check_plan: bool = False
) -> None:
    """Measure, write the results as they come, and print them.

    If they cannot be written, all is measured and printed before the error is raised.
    """
    from headinfer.bench.results import ResultFiles, result_markdown

    arguments = sys.argv[1:]
    files = ResultFiles(job, output, arguments) if output is not None else None
    measurements: list[Measurement] = []
    refused: HeadinferError | None = None
    if files is not None:
        say(f"results are written to {' and '.join(str(path) for path in files.paths)} as they come")
    for found in _measured(job, names, check_plan=check_plan):
        measurements += found
        if files is None or refused is not None:
            continue
        try:
            files.write(measurements)
        except HeadinferError as error:
            refused = error
    if markdown:
        print(result_markdown(job, measurements, arguments), end="")
    else:
        _print_tables(measurements)
    if files is not None and refused is not None:
        files.write(measurements)  # all of them: into a temporary file if writing fails again
    if check_plan and any(measurement.reached is False for measurement in measurements):
        raise typer.Exit(1)


def _measured(job: CpuJob | GpuJob, names: Sequence[str], *, check_plan: bool) -> Iterator[list[Measurement]]:
    """Yield the measurements of each point or suite, or of --check-plan."""
    from headinfer.bench.job import CpuJob
    from headinfer.bench.run import run_check, run_suites

    if check_plan and isinstance(job, CpuJob):
        yield run_check(job)
    else:
        yield from run_suites(names, job)


def _print_tables(measurements: Sequence[Measurement]) -> None:
    """Print a block for each point, with its notes below it. All blocks of a suite have the same columns."""
    from headinfer.bench.results import blocks_of

    blocks = blocks_of(measurements, Console().width)
    for suite in dict.fromkeys(block.suite for block in blocks):
        show(f"headinfer bench: {suite}")
        of_suite = [block for block in blocks if block.suite == suite]
        widths = _widths(of_suite)
        for block in of_suite:
            show("")
            show(Text(f"{block.point}: {block.note}" if block.note else block.point, style="bold"))
            if block.rows:
                show(_block_table(block, widths))
            for remark in block.remarks:
                show(Padding(Text(remark), (0, 0, 0, 2)))
        show("")


def _widths(blocks: Sequence[Block]) -> dict[str, int]:
    """Return the width of each column over several blocks, by its header."""
    widths: dict[str, int] = {}
    for block in blocks:
        for row in block.rows:
            for name, text in row.items():
                widths[name] = max(widths.get(name, len(name)), len(text))
    return widths


def _block_table(block: Block, widths: Mapping[str, int]) -> Table:
    """Return the table of a block. The names of ways and the notes are wrapped if it is wider than the terminal."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("", width=1)
    for name in block.rows[0]:
        is_text = name in ("way", "note")
        width = None if is_text else widths[name]
        table.add_column(name, justify="left" if is_text else "right", width=width, no_wrap=not is_text)
    table.columns[1].min_width = min(widths["way"], _WAY_WIDTH)
    for row in block.rows:
        table.add_row("", *(Text(text) for text in row.values()))
    return table
