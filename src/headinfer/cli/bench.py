"""`headinfer bench`: measures this machine's CPU or GPU, and prints and writes the results."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from headinfer.cli.console import say, show
from headinfer.cli.options import real, size
from headinfer.errors import HeadinferError, UsageError
from headinfer.utils.units import format_bytes

if TYPE_CHECKING:
    from headinfer.bench.job import CpuJob, GpuJob
    from headinfer.bench.measurement import Measurement

__all__ = ["bench"]

_DEFAULT_LIMIT_S = 480.0
_WAY_WIDTH = 30  # characters; longer names of ways are wrapped in the terminal


def bench(
    suites: Annotated[
        list[str] | None,
        typer.Argument(
            help="decode, prefill, memory, device-kv (all of these if you name none); session, disk-tier. "
            "With --device cuda: link, decode, prefill, attention (all if you name none)."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
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
    """Measure speed and memory on this machine's CPU or GPU, in turns with transformers' caches and other baselines."""
    names = suites or []
    if device == "cpu":
        if gpu_memory is not None or limit_s is not None:
            raise UsageError("--gpu-memory and --limit-s are for the GPU suites: give --device cuda as well")
        _run(_cpu_job(names, folder, quick=quick), names, output, markdown=markdown, check_plan=check_plan)
        return
    if folder is not None or check_plan:
        raise UsageError("--folder and --check-plan are for the CPU: leave --device out")
    limit = _DEFAULT_LIMIT_S if limit_s is None else limit_s
    _run(_gpu_job(names, device, gpu_memory, limit, output, quick=quick), names, output, markdown=markdown)


def _cpu_job(names: Sequence[str], folder: Path | None, *, quick: bool) -> CpuJob:
    """Check the options of the CPU suites, and return their job."""
    from headinfer.bench.job import CpuJob
    from headinfer.bench.run import check_suites
    from headinfer.bench.sizes import QUICK_CPU, CpuSizes

    check_suites(names, is_gpu=False)
    return CpuJob(QUICK_CPU if quick else CpuSizes(), say, folder=folder)


def _gpu_job(
    names: Sequence[str], device: str, gpu_memory: int | None, limit_s: float, output: Path | None, *, quick: bool
) -> GpuJob:
    """Check the options of the GPU suites, and return their job."""
    from headinfer.bench.job import GpuJob
    from headinfer.bench.run import check_device, check_suites
    from headinfer.bench.sizes import QUICK_GPU, GpuSizes
    from headinfer.utils.files import check_folder

    check_suites(names, is_gpu=True)
    if output is not None:
        check_folder(output.parent if output.suffix == ".json" else output, "write results")
    sizes = QUICK_GPU if quick else GpuSizes()
    return GpuJob(check_device(device), sizes, say, limit_s=limit_s, gpu_memory_bytes=gpu_memory)


def _run(
    job: CpuJob | GpuJob, names: Sequence[str], output: Path | None, *, markdown: bool, check_plan: bool = False
) -> None:
    """Measure, write the results after each suite, and print them.

    If they cannot be written, all is measured and printed before the error is raised.
    """
    from headinfer.bench.results import ResultFiles, result_markdown

    arguments = sys.argv[1:]
    files = ResultFiles(job, output, arguments) if output is not None else None
    measurements: list[Measurement] = []
    refused: HeadinferError | None = None
    for found in _measured(job, names, check_plan=check_plan):
        measurements += found
        if files is None or refused is not None:
            continue
        try:
            files.write(measurements)
        except HeadinferError as error:
            refused = error
        else:
            say(f"written to {' and '.join(str(path) for path in files.paths)}")
    if markdown:
        print(result_markdown(job, measurements, arguments), end="")
    else:
        _print_tables(measurements)
    if files is not None and refused is not None:
        files.write(measurements)  # all of them: into a temporary file if writing fails again
    if check_plan and any(measurement.reached is False for measurement in measurements):
        raise typer.Exit(1)


def _measured(job: CpuJob | GpuJob, names: Sequence[str], *, check_plan: bool) -> Iterator[list[Measurement]]:
    """Yield the measurements of each suite, or of --check-plan."""
    from headinfer.bench.job import CpuJob
    from headinfer.bench.run import run_check, run_suites

    if check_plan and isinstance(job, CpuJob):
        yield run_check(job)
    else:
        yield from run_suites(names, job)


def _print_tables(measurements: Sequence[Measurement]) -> None:
    """Print a table for each suite, with its rows grouped by point. Notes that do not fit are printed below it."""
    width = Console().width
    for suite in dict.fromkeys(measurement.suite for measurement in measurements):
        rows = [measurement for measurement in measurements if measurement.suite == suite]
        footnotes = _footnotes(rows, width)
        show(_suite_table(suite, rows, footnotes))
        for number, note in enumerate(footnotes, start=1):
            show(f"  [{number}] {note}")


def _footnotes(rows: Sequence[Measurement], width: int) -> list[str]:
    """Return the notes that do not fit into a table of this width, beside its other columns."""
    cells = [_cells(measurement, []) for measurement in rows]
    taken = 1
    for name in cells[0]:
        longest = max(len(row[name]) for row in cells)
        if name == "":
            taken += min(longest, _WAY_WIDTH) + 1
        elif name != "note" and longest:
            taken += max(longest, len(name)) + 1
    notes = dict.fromkeys(measurement.note for measurement in rows if measurement.note)
    return [note for note in notes if len(note) > width - taken]


def _suite_table(suite: str, rows: Sequence[Measurement], footnotes: Sequence[str]) -> Table:
    """Return a table of one suite. A column without any text is left out.

    Args:
        suite: the name of the suite.
        rows: its measurements.
        footnotes: notes that are printed below the table, and are numbers in it.
    """
    cells = [_cells(measurement, footnotes) for measurement in rows]
    columns = [name for name in cells[0] if any(row[name] for row in cells)]
    table = Table(title=f"headinfer bench: {suite}", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in columns:
        table.add_column(name, justify="left" if name in ("", "note") else "right", no_wrap=name != "")
    point = None
    for measurement, row in zip(rows, cells, strict=True):
        if measurement.point != point:
            point = measurement.point
            table.add_row(Text(point, style="bold"))
        table.add_row(*(Text(row[name]) for name in columns))
    return table


def _cells(measurement: Measurement, footnotes: Sequence[str]) -> dict[str, str]:
    """Return the cells of a row in the terminal by the headers of their columns."""
    from headinfer.bench.measurement import shown

    device_kv = measurement.device_kv_bytes
    is_footnote = measurement.note in footnotes
    mark = f" [{footnotes.index(measurement.note) + 1}]" if is_footnote else ""
    verdict = {True: ": yes", False: ": NO", None: ""}[measurement.reached]
    return {
        "": f"  {measurement.who}{mark}",
        "measured": shown(measurement.value, measurement.unit),
        "ratio": f"{measurement.ratio:.3f}" if measurement.ratio is not None else "",
        "device KV": format_bytes(device_kv) if device_kv is not None else "",
        "goal": f"{measurement.goal}{verdict}",
        "note": "" if is_footnote else measurement.note,
    }
