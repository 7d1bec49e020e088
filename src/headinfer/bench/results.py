"""Writes the result of a run: JSON for other programs, Markdown for people.

CPU and GPU runs have one format of JSON and one of Markdown. A CPU run writes the JSON file that the user names. A GPU
run writes JSON and Markdown, in a folder under the GPU's name if the user names a folder.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from headinfer.bench.job import GpuJob, Job
from headinfer.bench.measurement import Measurement, shown
from headinfer.info import accelerator, gather_info, machine
from headinfer.utils.files import Output, read_json_object
from headinfer.utils.units import format_bytes

__all__ = ["ResultFiles", "is_result_json", "is_result_markdown", "result_json", "result_markdown", "result_paths"]

_GPU_HEADING = "# GPU benchmark: "
_CPU_HEADING = "# CPU benchmark: "


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
    """Return the measurements as Markdown: command, machine, goals that are missed, and a table for each suite."""
    name = accelerator(job.device)["name"]
    heading = _CPU_HEADING + name.removeprefix("CPU, ")
    if isinstance(job, GpuJob):
        cap = f", held to {format_bytes(job.gpu_memory_bytes)}" if job.gpu_memory_bytes is not None else ""
        heading = _GPU_HEADING + name + cap
    parts = [
        heading,
        f"`{shlex.join(['headinfer', *arguments])}`\n\nMachine: {machine()}.\n\nModel: `{job.facts()['model']}`.",
        _verdict(measurements),
    ]
    if any(measurement.ratio is not None for measurement in measurements):
        parts.append(
            "Times are also given as multiples of headinfer's in the same turns. In a simulation all layers read the "
            "KV of one layer."
        )
    for suite in dict.fromkeys(measurement.suite for measurement in measurements):
        rows = [_cells(measurement) for measurement in measurements if measurement.suite == suite]
        parts.append(f"## {suite}\n\n{_table(rows)}")
    return "\n\n".join(parts) + "\n"


def _table(rows: Sequence[dict[str, str]]) -> str:
    """Return a Markdown table of cells by column. A column without any text is left out."""
    columns = [name for name in rows[0] if any(cells[name] for cells in rows)]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [f"| {' | '.join(cells[name] for name in columns)} |" for cells in rows]
    return "\n".join(lines)


def _cells(measurement: Measurement) -> dict[str, str]:
    """Return the cells of a row in the Markdown by the headers of their columns."""
    device_kv = measurement.device_kv_bytes
    return {
        "point": measurement.point,
        "way": measurement.who,
        "measured": shown(measurement.value, measurement.unit),
        "x headinfer's": f"{measurement.ratio:.3f}" if measurement.ratio is not None else "",
        "KV on the device": format_bytes(device_kv) if device_kv is not None else "",
        "to reach": measurement.goal,
        "reached": {True: "yes", False: "NO", None: ""}[measurement.reached],
        "note": measurement.note.replace("|", "/"),
    }


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
        lines.append(f"- {subject}: {figure}{ratio}; to reach: {measurement.goal}")
    return "\n".join(lines)
