"""The result of a GPU run: JSON that other commands read, Markdown and a table that people read."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from headinfer.bench.job import Job, Line
from headinfer.info import accelerator, gather_info, machine
from headinfer.utils.units import format_bytes, format_seconds

__all__ = ["HEADER", "gpu_json", "gpu_markdown", "gpu_rows", "is_result_markdown", "result_paths"]

_HEADING = "# GPU benchmark: "
HEADER = ("", "way", "measured", "x headinfer's", "KV on the device", "to reach", "reached", "note")


def result_paths(output: Path, device: torch.device, gpu_memory_bytes: int | None) -> tuple[Path, Path]:
    """The files for JSON and Markdown, beside each other: FILE.json as it is named, else in a folder by the GPU's name.

    gpu_memory_bytes: of a smaller card that the device stands for, if any.
    """
    if output.suffix == ".json":
        return output, output.with_suffix(".md")
    name = re.sub(r"[^a-z0-9]+", "-", accelerator(device)["name"].lower()).strip("-")
    cap = f"-{gpu_memory_bytes / 1e9:.3g}gb" if gpu_memory_bytes is not None else ""
    return output / f"{name}{cap}.json", output / f"{name}{cap}.md"


def is_result_markdown(path: Path) -> bool:
    """Whether a file begins as gpu_markdown() does."""
    with open(path, "rb") as file:
        return file.read(len(_HEADING)) == _HEADING.encode()


def gpu_json(job: Job, lines: Sequence[Line], arguments: Sequence[str]) -> str:
    """What was measured, with the exact command, versions and device."""
    found = gather_info()
    result: dict[str, Any] = {
        "command": shlex.join(["headinfer", *arguments]),
        "versions": found["versions"],
        "device": accelerator(job.device),
        "host": {**found["cpu"], **found["memory"], "numa_nodes": found["numa_nodes"]},
        "gpu_memory_bytes": job.gpu_memory_bytes,
        "model": job.sizes.model,
        "dtype": str(job.sizes.dtype).removeprefix("torch."),
        "weights_bytes": job.shape.weights * job.sizes.dtype.itemsize,
        "rates": dataclasses.asdict(job.rates),
        "lines": [dataclasses.asdict(line) for line in lines],
    }
    return json.dumps(result, indent=2) + "\n"


def gpu_rows(lines: Sequence[Line]) -> list[tuple[str, ...]]:
    """The lines for a table under HEADER."""
    return [
        (
            f"{line.suite}, {line.point}",
            line.who,
            shown(line.value, line.unit),
            f"{line.ratio:.3f}" if line.ratio is not None else "",
            format_bytes(line.device_kv_bytes) if line.device_kv_bytes is not None else "",
            line.goal,
            {True: "yes", False: "NO", None: ""}[line.reached],
            line.note.replace("|", "/"),
        )
        for line in lines
    ]


def gpu_markdown(job: Job, lines: Sequence[Line], arguments: Sequence[str]) -> str:
    """The same as Markdown, with a verdict, the command, versions and device above it."""
    goals = [line for line in lines if line.reached is not None]
    missed = [f"- {line.suite}, {line.point}, {line.who}: {shown(line.value, line.unit)}"
              f"{f', {line.ratio:.3f} x' if line.ratio is not None else ''}; to reach: {line.goal}"
              for line in goals if not line.reached]  # fmt: skip
    found = accelerator(job.device)
    cap = f", held to {format_bytes(job.gpu_memory_bytes)}" if job.gpu_memory_bytes is not None else ""
    parts = [
        f"{_HEADING}{found['name']}{cap}",
        f"`{shlex.join(['headinfer', *arguments])}`\n\nMachine: {machine()}.\n\nModel: `{job.sizes.model}`.",
        f"{len(goals) - len(missed)} of {len(goals)} goals are reached."
        + ("\n\n" + "\n".join(missed) if missed else ""),
        "Times stand as a multiple of headinfer's in the same turns. A simulation reads one layer's KV for all layers.",
    ]
    for suite in dict.fromkeys(line.suite for line in lines):
        rows = [f"| {' | '.join((row[0].partition(', ')[2], *row[1:]))} |"
                for row in gpu_rows([line for line in lines if line.suite == suite])]  # fmt: skip
        parts.append("\n".join([f"## {suite}\n", f"| {' | '.join(HEADER)} |", "|---" * len(HEADER) + "|", *rows]))
    return "\n\n".join(parts) + "\n"


def shown(value: float | None, unit: str) -> str:
    """A figure for people: 12 ms/token, 25.3 GB/s, 256 MiB, 1.03 x; a dash where there is none."""
    if value is None:
        return "-"
    if unit == "bytes":
        return format_bytes(value)
    if unit.partition("/")[0] == "s":
        return format_seconds(value) + unit[1:]
    return f"{value:,.4g} {unit}"
