"""Writes the result of a run: JSON for other programs, Markdown for people.

CPU and GPU runs have one format of JSON and one of Markdown. A CPU run writes the JSON file that the user names. A GPU
run writes JSON and Markdown, in a folder under the GPU's name if the user names a folder.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from headinfer.bench.job import GpuJob, Job
from headinfer.bench.measurement import Measurement, shown
from headinfer.info import accelerator, gather_info, machine
from headinfer.utils.files import Output, read_json_object
from headinfer.utils.units import format_bytes

__all__ = [
    "Block",
    "ResultFiles",
    "blocks_of",
    "is_result_json",
    "is_result_markdown",
    "result_json",
    "result_markdown",
    "result_paths",
]

_GPU_HEADING = "# GPU benchmark: "
_CPU_HEADING = "# CPU benchmark: "
_MARKDOWN_COLUMNS = 100
_WITH_OTHER_MODELS = {"rates", "host", "real"}  # suites without a model, or with one of their own


class ResultFiles:
    """The files of a result. They replace earlier results only.

    Args:
        job: the run.
        output: the file or folder that the user named.
        arguments: the arguments of the command line.

    Raises:
        UsageError: a file cannot be written, or another program's file would be lost.
    """

    def __init__(self, job: Job, output: Path, arguments: Sequence[str]) -> None:
        self.paths = result_paths(job, output)
        self._job = job
        self._arguments = arguments
        formats = ((result_json, is_result_json), (result_markdown, is_result_markdown))
        self._files = [
            (Output(path, is_ours=is_ours), text) for path, (text, is_ours) in zip(self.paths, formats, strict=False)
        ]

    def write(self, measurements: Sequence[Measurement]) -> None:
        """Replace the files by a result of these measurements.

        Raises:
            UsageError: another program's file is at a path now.
            CapacityError: the system refuses to write, for example because the disk is full.
        """
        for written, text in self._files:
            written.write(text(self._job, measurements, self._arguments))


def result_paths(job: Job, output: Path) -> tuple[Path, ...]:
    """Return the paths of a result's files: JSON, and for a GPU run also Markdown beside it.

    Args:
        job: the run.
        output: for a CPU run, the JSON file. For a GPU run, a file that ends with .json, or a folder in which the files
            get the name of the GPU and of the memory that the run is held to.
    """
    if not isinstance(job, GpuJob):
        return (output,)
    if output.suffix == ".json":
        return output, output.with_suffix(".md")
    name = re.sub(r"[^a-z0-9]+", "-", accelerator(job.device)["name"].lower()).strip("-")
    cap = f"-{job.gpu_memory_bytes / 1e9:.3g}gb" if job.gpu_memory_bytes is not None else ""
    return output / f"{name}{cap}.json", output / f"{name}{cap}.md"


def is_result_json(path: Path) -> bool:
    """Return whether a file is the JSON of an earlier `headinfer bench`, with its command and its measurements.

    The first CPU results have their measurements under "measures".
    """
    found = read_json_object(path)
    return str(found.get("command", "")).startswith("headinfer") and ("lines" in found or "measures" in found)


def is_result_markdown(path: Path) -> bool:
    """Return whether a file begins with the heading that result_markdown() writes for a GPU."""
    with open(path, "rb") as file:
        return file.read(len(_GPU_HEADING)) == _GPU_HEADING.encode()


def result_json(job: Job, measurements: Sequence[Measurement], arguments: Sequence[str]) -> str:
    """Return the measurements as JSON, with the exact command, the versions and the machine."""
    found = gather_info()
    result = {
        "command": shlex.join(["headinfer", *arguments]),
        "machine": machine(),
        "versions": found["versions"],
        "device": accelerator(job.device),
        "host": {**found["cpu"], **found["memory"], "numa_nodes": found["numa_nodes"]},
        **job.facts(),
        "lines": [dataclasses.asdict(measurement) for measurement in measurements],
    }
    return json.dumps(result, indent=2) + "\n"


def result_markdown(job: Job, measurements: Sequence[Measurement], arguments: Sequence[str]) -> str:
    """Return the measurements as Markdown of at most 100 columns, apart from the command: a table for each point."""
    name = accelerator(job.device)["name"]
    heading = _CPU_HEADING + name.removeprefix("CPU, ")
    if isinstance(job, GpuJob):
        cap = f", held to {format_bytes(job.gpu_memory_bytes)}" if job.gpu_memory_bytes is not None else ""
        heading = _GPU_HEADING + name + cap
    parts = [
        heading,
        f"`{shlex.join(['headinfer', *arguments])}`",
        _wrapped(f"Machine: {machine()}."),
    ]
    if not {measurement.suite for measurement in measurements} <= _WITH_OTHER_MODELS:
        parts.append(_wrapped(f"Model: `{job.facts()['model']}`."))
    if any(measurement.reached is not None for measurement in measurements):
        parts.append(_verdict(measurements))
    if any(measurement.ratio is not None for measurement in measurements):
        parts.append(
            _wrapped(
                "A ratio is the median over the rounds of a way's time over headinfer's in the same turns. In a "
                "simulation all layers read the KV of one layer."
            )
        )
    suite = ""
    for block in blocks_of(measurements, _MARKDOWN_COLUMNS):
        if block.suite != suite:
            suite = block.suite
            parts.append(f"## {suite}")
        parts.append(f"### {block.point}")
        if block.note:
            parts.append(_wrapped(f"{block.note}."))
        if block.rows:
            parts.append(_table(block))
        if block.remarks:
            parts.append("\n".join(_wrapped(f"- {remark}") for remark in block.remarks))
    return "\n\n".join(parts) + "\n"


@dataclass(frozen=True)
class Block:
    """The measurements of one point of a suite, as people read them.

    Attributes:
        suite: the name of the suite.
        point: the point.
        note: what all figures have in common; empty if nothing.
        rows: the cells of each way with a figure, by column. All rows have the same columns, none of which is empty.
        remarks: notes of single ways, and why others have no figure.
    """

    suite: str
    point: str
    note: str
    rows: list[dict[str, str]]
    remarks: list[str]


def blocks_of(measurements: Sequence[Measurement], columns: int) -> list[Block]:
    """Return a block for each point of each suite.

    Args:
        measurements: the measurements.
        columns: the width of a page. If notes of single ways do not fit it beside the figures, they are remarks.
    """
    grouped: dict[tuple[str, str], list[Measurement]] = {}
    for measurement in measurements:
        grouped.setdefault((measurement.suite, measurement.point), []).append(measurement)
    return [_block(suite, point, found, columns) for (suite, point), found in grouped.items()]


def _block(suite: str, point: str, measurements: Sequence[Measurement], columns: int) -> Block:
    """Return the block of one point."""
    measured = [measurement for measurement in measurements if measurement.value is not None]
    notes = {measurement.note for measurement in measured}
    common = notes.pop() if len(notes) == 1 and len(measured) > 1 else ""
    rows = [_cells(measurement, "" if common else measurement.note) for measurement in measured]
    has_own_notes = not common and bool(rows) and _table_width(rows) > columns
    if has_own_notes:
        rows = [_cells(measurement, "") for measurement in measured]
    ways: dict[str, list[str]] = {}  # by their notes
    for measurement in measurements:
        if measurement.value is None:
            goal = f" (goal: {measurement.goal})" if measurement.goal else ""
            ways.setdefault(measurement.note, []).append(measurement.who + goal)
        elif measurement.note and has_own_notes:
            ways.setdefault(measurement.note, []).append(measurement.who)
    remarks = [f"{', '.join(names)}: {note}" for note, names in ways.items()]
    used = [name for name in (rows[0] if rows else ()) if any(row[name] for row in rows)]
    return Block(suite, point, common, [{name: row[name] for name in used} for row in rows], remarks)


def _cells(measurement: Measurement, note: str) -> dict[str, str]:
    """Return the cells of a row by the headers of their columns."""
    device_kv = measurement.device_kv_bytes
    verdict = {True: ": yes", False: ": NO", None: ""}[measurement.reached]
    return {
        "way": measurement.who,
        "measured": shown(measurement.value, measurement.unit),
        "ratio": f"{measurement.ratio:.3f}" if measurement.ratio is not None else "",
        "device KV": format_bytes(device_kv) if device_kv is not None else "",
        "rounds": str(measurement.rounds) if measurement.rounds is not None else "",
        "goal": f"{measurement.goal}{verdict}",
        "note": note,
    }


def _table_width(rows: Sequence[dict[str, str]]) -> int:
    """Return the characters of the widest line of a Markdown table without padding."""
    return max(sum(len(cell) + 3 for cell in row.values()) + 1 for row in rows)


def _table(block: Block) -> str:
    """Return the Markdown table of a block."""
    columns = list(block.rows[0])
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [f"| {' | '.join(row.values())} |".replace("|  |", "| |") for row in block.rows]
    return "\n".join(lines)


def _wrapped(text: str) -> str:
    """Return a paragraph or an item of a list in lines of at most 100 characters."""
    indent = "  " if text.startswith("- ") else ""
    return textwrap.fill(
        text, _MARKDOWN_COLUMNS, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _verdict(measurements: Sequence[Measurement]) -> str:
    """Return how many goals are reached, and a line for each one that is missed."""
    goals = [measurement for measurement in measurements if measurement.reached is not None]
    missed = [measurement for measurement in goals if not measurement.reached]
    lines = [f"{len(goals) - len(missed)} of {len(goals)} goals are reached."]
    if missed:
        lines.append("")
    for measurement in missed:
        figure = shown(measurement.value, measurement.unit)
        ratio = f", {measurement.ratio:.3f} x" if measurement.ratio is not None else ""
        subject = f"{measurement.suite}, {measurement.point}, {measurement.who}"
        lines.append(_wrapped(f"- {subject}: {figure}{ratio}; to reach: {measurement.goal}"))
    return "\n".join(lines)
