"""Runs suites and writes their results."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Callable, Sequence

from headinfer.bench.model import BENCH_MODEL, machine
from headinfer.bench.suites import SUITES, Measure, Sizes
from headinfer.errors import UsageError

__all__ = ["markdown_table", "result_json", "run_suites"]

_QUICK = Sizes(
    short_tokens=256,
    long_tokens=4096,
    chunk_tokens=64,
    chunk_offset=1024,
    staged_tokens=(1024, 4096),
    long_steps=2,
    short_steps=2,
    chunks=1,
)


def run_suites(names: Sequence[str], *, quick: bool, on_stage: Callable[[str], None]) -> list[Measure]:
    """The measures of the named suites, all where none is named. Raises UsageError for an unknown name."""
    if unknown := [name for name in names if name not in SUITES]:
        raise UsageError(f"there is no suite {unknown[0]!r}: choose among {', '.join(SUITES)}")
    measures: list[Measure] = []
    for name in names or SUITES:
        on_stage(f"measuring {name} ...")
        measures += SUITES[name](_QUICK if quick else Sizes())
    return measures


def result_json(measures: Sequence[Measure], arguments: Sequence[str]) -> str:
    """The measures with the command, the machine and the model."""
    result = {
        "command": shlex.join(["headinfer", *arguments]),
        "machine": machine(),
        "model": BENCH_MODEL,
        "measures": [dataclasses.asdict(measure) for measure in measures],
    }
    return json.dumps(result, indent=2) + "\n"


def markdown_table(measures: Sequence[Measure]) -> str:
    """The same as a Markdown table, with the machine below it."""
    lines = ["| | measured | to reach |", "|---|---|---|"]
    lines += [f"| {measure.what} | {measure.shown} | {measure.goal} |" for measure in measures]
    return "\n".join([*lines, "", f"Machine: {machine()}."])
