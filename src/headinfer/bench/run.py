"""Runs suites and writes their results."""

from __future__ import annotations

import dataclasses
import json
import shlex
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from headinfer.bench.cpu_model import BENCH_MODEL
from headinfer.bench.cpu_suites import SUITES
from headinfer.bench.disk_suites import DISK_SUITES
from headinfer.bench.measurement import Measure, Sizes
from headinfer.bench.plan_check import Comparison, check_plan, rows_of
from headinfer.bench.probe import probe
from headinfer.errors import UsageError
from headinfer.info import machine

__all__ = ["check_suites", "check_table", "markdown_table", "result_json", "run_check", "run_suites"]

_QUICK = Sizes(
    short_tokens=256,
    long_tokens=4096,
    chunk_tokens=64,
    chunk_offset=1024,
    staged_tokens=(1024, 4096),
    long_steps=2,
    short_steps=2,
    chunks=1,
    checkpoint_tokens=1024,
    disk_rounds=1,
)


def check_suites(names: Sequence[str]) -> None:
    """Raise UsageError for a name that is no suite's."""
    if unknown := [name for name in names if name not in (*SUITES, *DISK_SUITES)]:
        raise UsageError(f"there is no suite {unknown[0]!r}: choose among {', '.join((*SUITES, *DISK_SUITES))}")


def run_suites(
    names: Sequence[str], *, quick: bool, on_stage: Callable[[str], None], folder: Path | None = None
) -> list[Measure]:
    """The measures of the named suites; where none is named, of all that write nothing to a disk.

    folder: of the disk to measure, else the system's for temporary files. Raises UsageError for an unknown name.
    """
    check_suites(names)
    disk_folder = folder or Path(tempfile.gettempdir())
    if not disk_folder.is_dir():
        raise UsageError(f"there is no folder {disk_folder}: name one on the disk that is to be measured")
    sizes = _QUICK if quick else Sizes()
    measures: list[Measure] = []
    for name in names or SUITES:
        on_stage(f"measuring {name} ...")
        measures += SUITES[name](sizes) if name in SUITES else DISK_SUITES[name](sizes, disk_folder)
    return measures


def run_check(*, quick: bool, on_stage: Callable[[str], None]) -> list[Comparison]:
    """The planner's predictions against measurements, on the CPU.

    They are made from a probe in the same run: on a shared machine a stored one would tell of its load at that time.
    """
    return check_plan(probe(torch.device("cpu"), on_stage), quick=quick, on_stage=on_stage)


def result_json(found: Sequence[Measure] | Sequence[Comparison], arguments: Sequence[str]) -> str:
    """What was measured, with the command, the machine and the model of the suites."""
    result = {
        "command": shlex.join(["headinfer", *arguments]),
        "machine": machine(),
        "model": BENCH_MODEL,
        "measures": [dataclasses.asdict(one) for one in found],
    }
    return json.dumps(result, indent=2) + "\n"


def markdown_table(measures: Sequence[Measure]) -> str:
    """The same as a Markdown table, with the machine below it."""
    lines = ["| | measured | to reach |", "|---|---|---|"]
    lines += [f"| {measure.what} | {measure.shown} | {measure.goal} |" for measure in measures]
    return "\n".join([*lines, "", f"Machine: {machine()}."])


def check_table(found: Sequence[Comparison]) -> str:
    """Predictions and measurements as a Markdown table, with the machine below it."""
    lines = ["| | predicted | measured | |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(row if row[1] else (f'**{row[0]}**', '', '', ''))} |" for row in rows_of(found)]
    return "\n".join([*lines, "", f"Machine: {machine()}."])
